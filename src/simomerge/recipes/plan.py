"""Which stages a recipe needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from simomerge.merging import available
from simomerge.recipes import stages
from simomerge.recipes.graph import Stage
from simomerge.recipes.problems import ADAPTS, FOLDS, WITHOUT_LABELS
from simomerge.recipes.recipe import Recipe

COSTS = {"features": 20, "probe": 20, "score": 5, "merged": 40, "auto": 120, "fold": 20, "heads": 50, "distill": 50}
"""Guesses, in training steps; they only order what could start at the same time."""

RELATE_COST = 150
RELATE_IMAGES = 256
"""Of the validation split: half of them are merged on, half judge by their labels."""


class Plan:
    """The stages of a recipe: experts, joint model, merges, re-alignments and the scores of all.

    Args:
        recipe: what to do.
        base: folder or hub id of the foundation encoder.
        splits: the dataset's splits, as plain data.

    Attributes:
        probes, experts: seed -> task -> stage.
        models: (seed, row) -> stage, also of merges that are no row themselves.
        relations: seed -> stage, where the recipe asks for it.
        scores, expert_scores: (seed, row) -> stage and seed -> task -> stage, on the test split.
    """

    def __init__(self, recipe: Recipe, base: str | Path, splits: Mapping[str, stages.Data]) -> None:
        self.recipe = recipe
        self.base = str(base)
        self.splits = splits
        features = Stage(
            "features of the base", stages.features, {"model": self.base, "data": splits["train"]}, COSTS["features"]
        )
        self.probes = {s: {t: self._probe(s, t, features) for t in recipe.tasks} for s in recipe.seeds}
        self.experts = {s: {t: self._expert(s, t) for t in recipe.tasks} for s in recipe.seeds}
        self.models: dict[tuple[int, str], Stage] = {}
        for seed in recipe.seeds:
            for weighting in recipe.joint_weightings:
                self.models[seed, joint_row(weighting)] = self._joint(seed, weighting)
            self._merge(seed)
            self._realign(seed)
        self.relations = {s: self._related(s) for s in recipe.seeds if recipe.relate}
        test = splits["test"]
        self.expert_scores = {s: self._scores_of_experts(s, test) for s in recipe.seeds}
        self.scores = {
            (s, row): self._score(row, s, self.models[s, row], test) for s in recipe.seeds for row in self.rows
        }

    @property
    def rows(self) -> list[str]:
        """The rows that have one model per seed, in the order of the table."""
        return [*map(joint_row, self.recipe.joint_weightings), *self.recipe.merges, *self.recipe.realigned]

    def wanted(self) -> list[Stage]:
        """What has to be done; all else is needed for it."""
        experts = [stage for scores in self.expert_scores.values() for stage in scores.values()]
        return [*self.scores.values(), *experts, *self.relations.values()]

    def chain(self, seed: int, row: str) -> list[Stage]:
        """The stages after the experts that made a row."""
        *before, _last = names = row.split("+")
        if not before:
            return [self.models[seed, row]]
        return [*self.chain(seed, self._before(seed, names)), self.models[seed, row]]

    # Experts and joint model: LP-FT, the base's features, a head per task, then encoder and heads.

    def _probe(self, seed: int, task: str, features: Stage) -> Stage:
        recipe = self.recipe
        arguments = {
            "base": self.base,
            "cached": features,
            "data": self.splits["train"],
            "task": task,
            "head": recipe.head,
            "head_settings": recipe.head_settings,
            "settings": asdict(replace(recipe.probe, seed=seed)),
        }
        return Stage(f"probe {task} seed {seed}", stages.probe, arguments, COSTS["probe"])

    def _expert(self, seed: int, task: str) -> Stage:
        probes = {task: self.probes[seed][task]}
        settings = replace(self.recipe.tune, seed=seed)
        return Stage(f"expert {task} seed {seed}", stages.tune, self._tuning(probes, settings), settings.steps)

    def _joint(self, seed: int, weighting: str) -> Stage:
        settings = replace(self.recipe.joint, seed=seed)
        cost = settings.steps * (1 + 0.1 * len(self.recipe.tasks))
        arguments = self._tuning(self.probes[seed], settings)
        arguments |= {"weighting": weighting} if weighting != "equal" else {}
        return Stage(f"{joint_row(weighting)} seed {seed}", stages.tune, arguments, cost)

    def _tuning(self, probes: Mapping[str, Stage], settings: Any) -> dict[str, Any]:
        return {
            "base": self.base,
            "base_name": Path(self.base).name,
            "train": self.splits["train"],
            "validation": self.splits["val"],
            "probes": probes,
            "settings": asdict(settings),
            # What is as it always was stays out of the arguments, and so of the stage's key.
            **({"augmentation": self.recipe.augmentation} if self.recipe.augmentation != "flip" else {}),
        }

    # Merges: every method with its best scale on the validation split, and those that see no label.

    def _merge(self, seed: int) -> None:
        recipe = self.recipe
        choosing = {**self.splits["val"], "count": min(recipe.scale_images, recipe.val_images)}
        baseline = self._scores_of_experts(seed, choosing)
        for method in recipe.merges:
            arguments = {
                "base": self.base,
                "experts": self.experts[seed],
                "method": method,
                "validation": choosing,
                "baseline": baseline,
                **self._parameters(method),
            }
            self.models[seed, method] = Stage(f"{method} seed {seed}", stages.merged, arguments, COSTS["merged"])
        for method, name in self._merges_without_labels().items():
            images = recipe.fold_cross_images if method == "auto" else recipe.fold_images
            arguments = {
                "base": self.base,
                "experts": self.experts[seed],
                "method": method,
                "images": self._unlabelled(images),
                **self._parameters(method),
            }
            cost = COSTS["auto" if method == "auto" else "fold"]
            self.models[seed, name] = Stage(
                f"{method} without labels seed {seed}", stages.merged_without_labels, arguments, cost
            )

    def _merges_without_labels(self) -> dict[str, str]:
        """The methods whose merges the rows without labels start from, with the name that each merge goes by."""
        rows = [row.split("+") for row in self.recipe.realigned]
        methods = {row[0] for row in rows if row[0] == "auto" or row[1] in WITHOUT_LABELS}
        chosen = [m for m in sorted(methods) if m == "auto" or self._searches_scale(m)]
        return {method: method if method == "auto" else f"{method} without labels" for method in chosen}

    def _searches_scale(self, method: str) -> bool:
        given = self.recipe.merge_settings.get(method, {})
        return "scale" in available()[method].__dataclass_fields__ and "scale" not in given

    def _parameters(self, method: str) -> dict[str, Any]:
        given = self.recipe.merge_settings.get(method)
        return {"parameters": given} if given else {}

    def _unlabelled(self, count: int) -> dict[str, Any]:
        return {**self.splits["val"], "count": min(count, self.recipe.val_images), "tasks": []}

    # Re-alignments: the steps that follow a merge in the rows; rows with the same beginning share it.

    def _realign(self, seed: int) -> None:
        for row in self.recipe.realigned:
            names = row.split("+")
            for length in range(2, len(names) + 1):
                prefix = names[:length]
                if (seed, "+".join(prefix)) not in self.models:
                    self.models[seed, "+".join(prefix)] = self._step(seed, prefix)

    def _before(self, seed: int, prefix: Sequence[str]) -> str:
        """The name of what a step starts from."""
        merge, *steps = prefix[:-1]
        bare = f"{merge} without labels"
        without = not steps and prefix[-1] in WITHOUT_LABELS and (seed, bare) in self.models
        return bare if without else "+".join(prefix[:-1])

    def _step(self, seed: int, prefix: Sequence[str]) -> Stage:
        """The stage that does the last step of a row's beginning."""
        recipe, how = self.recipe, prefix[-1]
        name = f"{'+'.join(prefix)} seed {seed}"
        arguments: dict[str, Any] = {"model": self.models[seed, self._before(seed, prefix)], "how": how}
        if how in FOLDS:
            count = recipe.fold_images if how == "fold" else recipe.fold_cross_images
            shown = {"experts": self.experts[seed], "images": self._unlabelled(count), "settings": {}, "options": {}}
            return Stage(name, stages.taught, {**arguments, **shown}, COSTS["fold"])
        settings = replace(recipe.settings(prefix), seed=seed)
        adapts = how in ADAPTS
        arguments["settings"] = asdict(settings)
        arguments["options"] = {"rank": recipe.rank, "activation": recipe.activation} if adapts else {}
        if how in WITHOUT_LABELS:
            shown = {"experts": self.experts[seed], "images": self._unlabelled(recipe.distill_images)}
            cost = COSTS["distill"] + adapts * settings.steps
            return Stage(name, stages.taught, {**arguments, **shown}, cost)
        arguments["data"] = {**self.splits["val"], "tasks": list(recipe.tasks)}
        return Stage(name, stages.realigned, arguments, settings.steps if adapts else COSTS["heads"])

    def _related(self, seed: int) -> Stage:
        """How the experts relate; pairs of them are merged, so it takes as long as many merges."""
        data = {**self.splits["val"], "count": min(RELATE_IMAGES, self.recipe.val_images)}
        arguments = {"base": self.base, "experts": self.experts[seed], "data": data}
        return Stage(f"relations seed {seed}", stages.related, arguments, RELATE_COST)

    # Scores.

    def _score(self, row: str, seed: int, model: Stage, data: stages.Data) -> Stage:
        return Stage(f"score {row} seed {seed}", stages.score, {"model": model, "data": data}, COSTS["score"])

    def _scores_of_experts(self, seed: int, data: stages.Data) -> dict[str, Stage]:
        return {
            task: self._score(f"expert {task} {data['split']}", seed, expert, data)
            for task, expert in self.experts[seed].items()
        }


def joint_row(weighting: str) -> str:
    """The row of joint MTL with a weighting of its losses.

    Example:
        >>> joint_row("equal"), joint_row("dwa")
        ('joint-mtl', 'joint-mtl-dwa')
    """
    return "joint-mtl" if weighting == "equal" else f"joint-mtl-{weighting}"
