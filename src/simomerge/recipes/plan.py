"""Which stages a recipe needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from simomerge.checkpoints.experts import source_name
from simomerge.recipes.graph import Data, Stage
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.row import CONTROL, LABEL_FREE, Row, joint_row
from simomerge.recipes.stages import (
    Features,
    Merge,
    MergeWithoutLabels,
    Probe,
    Realign,
    Relate,
    Score,
    Tune,
    searches_scale,
)
from simomerge.training.settings import TrainSettings

RELATE_IMAGES = 256
"""Images of the validation split that relate uses: it merges on half of them, and evaluates on the rest."""


class Plan:
    """The stages of a recipe: experts, joint models, merges, re-alignments and the scores of all.

    Args:
        recipe: What to do.
        base: Folder or hub id of the foundation encoder.
        splits: The dataset's splits, as plain data.

    Attributes:
        probes, experts: seed -> task -> stage.
        models: (seed, row as text) -> stage, also for merges that are not a row of the table.
        relations: seed -> stage, if the recipe asks for it.
        scores: (seed, row as text) -> stage, on the test split.
        expert_scores: seed -> task -> stage, on the test split.
        candidates: Rows of which the run recommends one, in the order of the table.
        choosing: (seed, row) -> stage, the scores of several candidates on validation images.
        choosing_experts: seed -> task -> stage, on the same images.
        choosing_images: Number of these images that are asked for.
    """

    def __init__(self, recipe: Recipe, base: str | Path, splits: Mapping[str, Data]) -> None:
        self.recipe = recipe
        self.base = str(base)
        self.splits = splits
        features = Features(name="features of the base", model=self.base, data=splits["train"])
        self.probes = {s: {t: self._probe(s, t, features) for t in recipe.tasks} for s in recipe.seeds}
        self.experts = {
            s: {t: self._tune(s, f"expert {t}", [t], recipe.tune) for t in recipe.tasks} for s in recipe.seeds
        }
        self.models: dict[tuple[int, str], Stage] = {}
        self.choosing_images = min(recipe.scale_images, recipe.val_images)
        choosing = {**splits["val"], "count": self.choosing_images}
        self.choosing_experts = {s: self._scores_of_experts(s, choosing) for s in recipe.seeds}
        for seed in recipe.seeds:
            for weighting in recipe.joint_weightings:
                row = joint_row(weighting)
                self.models[seed, row] = self._tune(seed, row, recipe.tasks, recipe.joint, weighting)
            self._merge(seed, choosing)
            for prefix in (prefix for row in recipe.rows for prefix in row.prefixes()):
                if (seed, str(prefix)) not in self.models:
                    self.models[seed, str(prefix)] = self._realigned(seed, prefix)
        related = {**splits["val"], "count": min(RELATE_IMAGES, recipe.val_images)}
        self.relations = {
            s: Relate(name=f"relations seed {s}", base=self.base, experts=self.experts[s], data=related)
            for s in (recipe.seeds if recipe.relate else ())
        }
        test = splits["test"]
        self.expert_scores = {s: self._scores_of_experts(s, test) for s in recipe.seeds}
        self.scores = self._scores(self.rows, "score", test)
        self.candidates = self._candidates()
        self.choosing = self._scores(self.candidates, "validate", choosing) if len(self.candidates) > 1 else {}

    @property
    def rows(self) -> list[str]:
        """The rows that have one model per seed, in the order of the table."""
        return [*map(joint_row, self.recipe.joint_weightings), *self.recipe.merges, *self.recipe.realigned]

    @property
    def references(self) -> list[str]:
        """The rows that a merge is compared with: the experts and joint MTL."""
        return ["experts", *map(joint_row, self.recipe.joint_weightings)]

    def wanted(self) -> list[Stage]:
        """The final stages; they need all others."""
        experts = [stage for scores in self.expert_scores.values() for stage in scores.values()]
        if self.choosing:
            experts += [stage for scores in self.choosing_experts.values() for stage in scores.values()]
        return [*self.scores.values(), *experts, *self.choosing.values(), *self.relations.values()]

    def chain(self, seed: int, row: Row) -> list[Stage]:
        """The stages after the experts that made a row."""
        if not row.steps:
            return [self.models[seed, str(row)]]
        start = self._start(seed, row)
        before = [self.models[seed, start]] if len(row.steps) == 1 else self.chain(seed, row.before)
        return [*before, self.models[seed, str(row)]]

    # Experts and joint model: LP-FT, the base's features, a head per task, then encoder and heads.

    def _probe(self, seed: int, task: str, features: Stage) -> Stage:
        recipe = self.recipe
        return Probe(
            name=f"probe {task} seed {seed}",
            base=self.base,
            features=features,
            data=self.splits["train"],
            task=task,
            head=recipe.head,
            head_settings=recipe.head_settings,
            settings=replace(recipe.probe, seed=seed),
        )

    def _tune(
        self, seed: int, name: str, tasks: Iterable[str], settings: TrainSettings, weighting: str = "equal"
    ) -> Stage:
        return Tune(
            name=f"{name} seed {seed}",
            base=self.base,
            base_name=source_name(self.recipe.base),
            probes={task: self.probes[seed][task] for task in tasks},
            train=self.splits["train"],
            validation=self.splits["val"],
            settings=replace(settings, seed=seed),
            weighting=weighting,
            augmentation=self.recipe.augmentation,
        )

    # Merges: every method with its best scale on the validation split, and those that use no label.

    def _merge(self, seed: int, choosing: Data) -> None:
        recipe, baseline = self.recipe, self.choosing_experts[seed]
        common: dict[str, Any] = {"base": self.base, "experts": self.experts[seed]}
        for method in recipe.merges:
            self.models[seed, method] = Merge(
                **common,
                name=f"{method} seed {seed}",
                method=method,
                parameters=recipe.merge_settings.get(method, {}),
                validation=choosing,
                baseline=baseline,
            )
        for method, count in self._merges_without_labels().items():
            name = f"{method} without labels"
            self.models[seed, method if method in LABEL_FREE else name] = MergeWithoutLabels(
                **common,
                name=f"{name} seed {seed}",
                method=method,
                parameters=recipe.merge_settings.get(method, {}),
                images=self.unlabelled(count),
            )

    def _merges_without_labels(self) -> dict[str, int]:
        """The methods whose merge the rows without labels start from, with the number of images that choose."""
        recipe = self.recipe
        found = {}
        for row in recipe.rows:
            parameters = recipe.merge_settings.get(row.merge, {})
            if row.merge in LABEL_FREE:
                found[row.merge] = recipe.auto_images
            elif recipe.method(row.prefixes()[0]).teacher == "experts" and searches_scale(row.merge, parameters):
                found[row.merge] = recipe.choose_images
        return dict(sorted(found.items()))

    def unlabelled(self, count: int | None) -> dict[str, Any]:
        """See `unlabelled_data`."""
        return unlabelled_data(self.recipe, self.splits, count)

    # Re-alignments: the steps that follow a merge; rows with the same beginning share it.

    def _start(self, seed: int, row: Row) -> str:
        """The row, as text, whose model a row's last step starts from."""
        bare = f"{row.merge} without labels"
        if len(row.steps) == 1 and self.recipe.method(row).teacher == "experts" and (seed, bare) in self.models:
            return bare
        return str(row.before)

    def _realigned(self, seed: int, row: Row) -> Stage:
        """The stage that does the last step of a row."""
        method = self.recipe.method(row, seed)
        without_labels = method.teacher == "experts"
        data = {**self.splits["val"], "tasks": list(self.recipe.tasks)}
        if method.count is not None:
            data["count"] = min(method.count, self.recipe.val_images)
        return Realign(
            name=f"{row} seed {seed}",
            model=self.models[seed, self._start(seed, row)],
            method=replace(method, count=None),  # the data hold as many images as the method asks for
            data=self.unlabelled(method.count) if without_labels else data,
            experts=self.experts[seed] if without_labels else {},
            base=self.base if method.needs_base else "",
        )

    # Scores, and the choice of a model on validation images.

    def _candidates(self) -> list[str]:
        """The rows of which the run recommends one: merges that were re-aligned without labels, if there are some.

        Re-alignments with labels learn from the validation split, so its figures flatter them: they are compared with
        each other only, and only if no row works without labels. Merges alone come last.
        """
        merged = [row for row in self.recipe.rows if row.merge != CONTROL]
        free = [str(row) for row in merged if not any(map(self._needs_labels, row.prefixes()))]
        plain = [method for method in self.recipe.merges if method != CONTROL]
        return free or [str(row) for row in merged] or plain

    def _needs_labels(self, row: Row) -> bool:
        return bool(row.steps) and self.recipe.method(row).teacher == "labels"

    def _scores(self, rows: Iterable[str], name: str, data: Data) -> dict[tuple[int, str], Stage]:
        return {
            (seed, row): Score(name=f"{name} {row} seed {seed}", model=self.models[seed, row], data=data)
            for seed in self.recipe.seeds
            for row in rows
        }

    def _scores_of_experts(self, seed: int, data: Data) -> dict[str, Stage]:
        return {
            task: Score(name=f"score expert {task} {data['split']} seed {seed}", model=expert, data=data)
            for task, expert in self.experts[seed].items()
        }


def splits_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The three splits of a recipe's dataset, as plain data."""
    counts = {"train": recipe.train_images, "val": recipe.val_images, "test": recipe.test_images}
    return {
        split: {"spec": recipe.data, "split": split, "count": count, **recipe.data_options}
        for split, count in counts.items()
    }


def unlabelled_data(recipe: Recipe, splits: Mapping[str, Data], count: int | None) -> dict[str, Any]:
    """``count`` of the images that rows without labels use, as plain data; all of them by default."""
    if recipe.align_images is not None:
        return {"spec": recipe.align_images, "count": count, "unlabelled": True}
    limits = {name: splits[name]["count"] if name in splits else None for name in recipe.align_splits}
    common = {**splits["train"], "tasks": []}
    if len(limits) > 1:
        return {**common, "split": limits, "count": count}
    ((split, limit),) = limits.items()
    return {**common, "split": split, "count": limit if count is None else min(count, limit or count)}
