"""A recipe carried out in a run folder: what is there already is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import simomerge
from simomerge.checkpoints import atomic_write_text
from simomerge.datasets import load_data
from simomerge.datasets.rooms import RENDER_VERSION
from simomerge.devices import available_cores, mixed_precision
from simomerge.evaluation import delta_mtl, normalised_performance
from simomerge.merging import available
from simomerge.model import load
from simomerge.progress import Progress, silent
from simomerge.recipes import stages
from simomerge.recipes.recipe import WITHOUT_LABELS, Recipe
from simomerge.tasks import colourise
from simomerge.training import WorkerPool


@dataclass(frozen=True)
class Stage:
    """One piece of work: a function of `simomerge.recipes.stages` and its arguments, plain data."""

    name: str
    function: Callable[..., None]
    arguments: Mapping[str, Any]
    cost: int = 0  # a guess; the longest starts first


class Run:
    """A folder of finished stages, each keyed by everything it depends on.

    Args:
        folder: of the run.
        pool: where stages run.
        base: where the foundation encoder is.
        salt: what else the results depend on (the base's weights, the version).
    """

    def __init__(self, folder: Path, pool: WorkerPool, base: str, salt: str) -> None:
        self.folder = folder
        self.base = base
        self.pool = pool
        self.salt = salt

    def build(self, todo: Sequence[Stage]) -> dict[str, str]:
        """Folder by stage name, after doing what is not there yet, side by side."""
        outputs = {stage.name: self._output(stage) for stage in todo}
        missing = [stage for stage in sorted(todo, key=lambda s: -s.cost) if not outputs[stage.name].exists()]
        self.pool.run(
            [
                (stage.function, {**stage.arguments, "output": outputs[stage.name], "label": stage.name})
                for stage in missing
            ]
        )
        return {name: str(path) for name, path in outputs.items()}

    def _output(self, stage: Stage) -> Path:
        # An argument that is a stage's folder carries that stage's key in its name, so keys chain.
        # Places of this machine do not count; the base counts by its weights, which the salt holds.
        arguments = _without_places(dict(stage.arguments), {str(self.folder): "", self.base: "base"})
        named = json.dumps(arguments, sort_keys=True, default=str)
        key = hashlib.sha256(f"{self.salt} {stage.function.__name__} {named}".encode()).hexdigest()[:12]
        return self.folder / "stages" / f"{stage.name.replace(' ', '-').replace('/', '-')}-{key}"


def run_recipe(
    recipe: Recipe,
    base: str | Path,
    folder: str | Path,
    workers: int | None = None,
    dataset: str = "rooms",
    title: str = "simomerge demo",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Carry out a recipe: experts, joint MTL, merges, re-alignments, evaluation on the test split.

    Args:
        recipe: what to do.
        base: folder of the foundation encoder.
        folder: the run folder; a second run with the same recipe reuses every stage in it.
        workers: processes side by side; one per core by default.

    Returns:
        The results: what ``results.json`` in the folder holds (see docs/formats.md), and under ``gallery`` the
        pictures of the report.
    """
    began = time.monotonic()
    folder = Path(folder).resolve()
    base = Path(base).resolve() if Path(base).exists() else base  # else a hub id
    splits: dict[str, dict[str, Any]] = {
        split: {"spec": dataset, "split": split, "count": count}
        for split, count in (
            ("train", recipe.train_images),
            ("val", recipe.val_images),
            ("test", recipe.test_images),
        )
    }
    fingerprint = load(base).encoder_fingerprint()  # a wrong base is told before any rendering
    salt = f"{simomerge.__version__} {RENDER_VERSION} {mixed_precision()} {fingerprint}"
    for split, data in splits.items():
        load_data(**data, workers=workers, progress=lambda d, t, split=split: progress(f"render {split}", d, t, ""))
    with WorkerPool(workers, progress) as pool:
        run = Run(folder, pool, str(base), salt)
        plan = _Plan(recipe, base, splits, run)
        plan.train()
        plan.merge()
        plan.realign()
        plan.score()
    results = plan.results(title)
    results["seconds_of_this_call"] = round(time.monotonic() - began, 1)
    atomic_write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return {**results, "gallery": plan.gallery()}


def _without_places(value: Any, places: Mapping[str, str]) -> Any:
    """Plain data with the start of every path replaced."""
    if isinstance(value, Mapping):
        return {key: _without_places(item, places) for key, item in value.items()}
    if isinstance(value, str):
        for place, short in places.items():
            value = short + value[len(place) :].replace("\\", "/") if value.startswith(place) else value
    return value


class _Plan:
    """The stages of a recipe, level by level; every level runs the stages of all seeds side by side."""

    def __init__(self, recipe: Recipe, base: str | Path, splits: Mapping[str, stages.Data], run: Run) -> None:
        self.recipe = recipe
        self.base = str(base)
        self.splits = splits
        self.run = run
        self.tasks = load_data(**splits["test"]).select(list(recipe.tasks)).tasks
        self.experts: dict[int, dict[str, str]] = {}
        self.models: dict[tuple[int, str], str] = {}  # (seed, row) -> stage folder; the experts' row has none
        self.probes: dict[int, dict[str, str]] = {}
        self.scores: dict[tuple[int, str], dict[str, Any]] = {}
        self.val_scores: dict[int, dict[str, dict[str, float]]] = {}

    def _per_seed(self, make: Callable[[int], list[Stage]]) -> dict[str, str]:
        return self.run.build([stage for seed in self.recipe.seeds for stage in make(seed)])

    def train(self) -> None:
        """LP-FT: features of the base, a head per task, then experts and the joint model."""
        recipe, train = self.recipe, self.splits["train"]
        arguments = {"model": self.base, "data": train}
        cached = self.run.build([Stage("features of the base", stages.features, arguments)])["features of the base"]
        probed = self._per_seed(
            lambda seed: [
                Stage(
                    f"probe {task} seed {seed}",
                    stages.probe,
                    {
                        "base": self.base,
                        "cached": cached,
                        "data": train,
                        "task": task,
                        "head": recipe.head,
                        "head_settings": recipe.head_settings,
                        "settings": asdict(replace(recipe.probe, seed=seed)),
                    },
                )
                for task in recipe.tasks
            ]
        )
        self.probes = {s: {t: probed[f"probe {t} seed {s}"] for t in recipe.tasks} for s in recipe.seeds}
        tuned = self._per_seed(self._tuning)
        self.experts = {s: {t: tuned[f"expert {t} seed {s}"] for t in recipe.tasks} for s in recipe.seeds}
        self.models = {(s, "joint-mtl"): tuned[f"joint-mtl seed {s}"] for s in recipe.seeds}

    def _tuning(self, seed: int) -> list[Stage]:
        recipe = self.recipe
        shared = {
            "base": self.base,
            "base_name": Path(self.base).name,
            "train": self.splits["train"],
            "validation": self.splits["val"],
        }
        joint = Stage(
            f"joint-mtl seed {seed}",
            stages.tune,
            {**shared, "probes": self.probes[seed], "settings": asdict(replace(recipe.joint, seed=seed))},
            cost=recipe.joint.steps * len(recipe.tasks),
        )
        experts = [
            Stage(
                f"expert {task} seed {seed}",
                stages.tune,
                {**shared, "probes": {task: folder}, "settings": asdict(replace(recipe.tune, seed=seed))},
                cost=recipe.tune.steps,
            )
            for task, folder in self.probes[seed].items()
        ]
        return [joint, *experts]

    def merge(self) -> None:
        """Every merge method with its best scale on the validation split, and the merges that see no label."""
        choosing = {**self.splits["val"], "count": min(self.recipe.scale_images, self.recipe.val_images)}
        self.val_scores = self._expert_scores(choosing)
        without = self._merges_without_labels()
        built = self._per_seed(
            lambda seed: [
                *(self._merge_without_labels(seed, method) for method in without),
                *(
                    Stage(
                        f"{method} seed {seed}",
                        stages.merged,
                        {
                            "base": self.base,
                            "experts": self.experts[seed],
                            "method": method,
                            "validation": choosing,
                            "baseline": self.val_scores[seed],
                        },
                    )
                    for method in self.recipe.merges
                ),
            ]
        )
        for seed in self.recipe.seeds:
            for method in self.recipe.merges:
                self.models[seed, method] = built[f"{method} seed {seed}"]
            for method, row in without.items():
                self.models[seed, row] = built[f"{method} without labels seed {seed}"]

    def _merges_without_labels(self) -> dict[str, str]:
        """The methods whose merges the rows without labels start from, with the name that each merge goes by."""
        rows = [row.split("+") for row in self.recipe.realigned]
        methods = {row[0] for row in rows if row[0] == "auto" or row[1] in WITHOUT_LABELS}
        chosen = [m for m in sorted(methods) if m == "auto" or "scale" in available()[m].__dataclass_fields__]
        return {method: method if method == "auto" else f"{method} without labels" for method in chosen}

    def _merge_without_labels(self, seed: int, method: str) -> Stage:
        count = self.recipe.fold_cross_images if method == "auto" else self.recipe.fold_images
        return Stage(
            f"{method} without labels seed {seed}",
            stages.merged_without_labels,
            {
                "base": self.base,
                "experts": self.experts[seed],
                "method": method,
                "images": self._unlabelled(count),
            },
            cost=method == "auto",
        )

    def realign(self) -> None:
        """The steps that follow a merge in the rows, level by level; rows with the same beginning share it."""
        rows = [row.split("+") for row in self.recipe.realigned]
        for level in range(2, max((len(row) for row in rows), default=0) + 1):
            prefixes = list(dict.fromkeys(tuple(row[:level]) for row in rows if len(row) >= level))
            built = self._per_seed(lambda seed, wanted=prefixes: [self._step(seed, prefix) for prefix in wanted])  # type: ignore[misc]
            for seed in self.recipe.seeds:
                for name in map("+".join, prefixes):
                    self.models[seed, name] = built[f"{name} seed {seed}"]

    def _unlabelled(self, count: int) -> dict[str, Any]:
        return {**self.splits["val"], "count": min(count, self.recipe.val_images), "tasks": []}

    def _before(self, seed: int, prefix: Sequence[str]) -> str:
        """The name of what a step starts from."""
        merge, *steps = prefix[:-1]
        bare = f"{merge} without labels"
        without = not steps and prefix[-1] in WITHOUT_LABELS and (seed, bare) in self.models
        return bare if without else "+".join(prefix[:-1])

    def _step(self, seed: int, prefix: Sequence[str]) -> Stage:
        """The stage that does the last step of a row's beginning."""
        recipe, how = self.recipe, prefix[-1]
        model = self.models[seed, self._before(seed, prefix)]
        adapts = how in ("adapters", "distill-adapters")
        options = {"rank": recipe.rank, "activation": recipe.activation} if adapts else {}
        name = f"{'+'.join(prefix)} seed {seed}"
        if how in WITHOUT_LABELS:
            counts = {"fold": recipe.fold_images, "fold-cross": recipe.fold_cross_images}
            settings = {} if how in counts else asdict(replace(recipe.settings(prefix), seed=seed))
            arguments = {
                "model": model,
                "experts": self.experts[seed],
                "images": self._unlabelled(counts.get(how, recipe.distill_images)),
                "how": how,
                "settings": settings,
                "options": options,
            }
            return Stage(name, stages.taught, arguments, cost=adapts)
        arguments = {
            "model": model,
            "data": {**self.splits["val"], "tasks": list(recipe.tasks)},
            "how": how,
            "settings": asdict(replace(recipe.settings(prefix), seed=seed)),
            "options": options,
        }
        return Stage(name, stages.realigned, arguments, cost=adapts)

    def _rows(self) -> list[str]:
        """The rows that have one model per seed, in the order of the table."""
        return ["joint-mtl", *self.recipe.merges, *self.recipe.realigned]

    def score(self) -> None:
        """Every row on the test split."""
        test = self.splits["test"]
        keys = [(seed, row) for seed in self.recipe.seeds for row in self._rows()]
        built = self.run.build(
            [
                Stage(f"score {row} seed {seed}", stages.score, {"model": self.models[seed, row], "data": test})
                for seed, row in keys
            ]
        )
        self.scores = {key: stages.read_log(Path(built[f"score {key[1]} seed {key[0]}"]))["scores"] for key in keys}
        self.scores |= {(seed, "experts"): scores for seed, scores in self._expert_scores(test).items()}

    def _expert_scores(self, data: stages.Data) -> dict[int, dict[str, dict[str, float]]]:
        built = self._per_seed(
            lambda seed: [
                Stage(
                    f"score expert {task} {data['split']} seed {seed}",
                    stages.score,
                    {"model": folder, "data": data},
                )
                for task, folder in self.experts[seed].items()
            ]
        )

        def scores(task: str, seed: int) -> dict[str, float]:
            return stages.read_log(Path(built[f"score expert {task} {data['split']} seed {seed}"]))["scores"][task]

        return {seed: {task: scores(task, seed) for task in self.recipe.tasks} for seed in self.recipe.seeds}

    def results(self, title: str) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "format": 1,
            "title": title,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "machine": machine(),
            "recipe": recipe.to_dict(),
            "tasks": [
                {"name": t.name, "metric": t.metric, "unit": t.unit, "higher_is_better": t.higher_is_better}
                for t in self.tasks.values()
            ],
            "rows": [self._row(row) for row in ["experts", *self._rows()]],
            "scale_curves": self._curves(),
            "notes": list(NOTES),
        }

    def _row(self, row: str) -> dict[str, Any]:
        seeds = self.recipe.seeds
        scores = [self.scores[seed, row] for seed in seeds]
        baselines = [self.scores[seed, "experts"] for seed in seeds]
        ratios = [normalised_performance(s, b, self.tasks) for s, b in zip(scores, baselines, strict=True)]
        costs = [self._cost(seed, row) for seed in seeds]
        scales = [cost.pop("scale") for cost in costs]
        return {
            "method": row,
            "delta_mtl": spread([delta_mtl(s, b, self.tasks) for s, b in zip(scores, baselines, strict=True)]),
            "metrics": {name: spread([s[name][task.metric] for s in scores]) for name, task in self.tasks.items()},
            "normalised": {name: spread([r[name] for r in ratios]) for name in self.tasks},
            "all_metrics": {name: [s[name] for s in scores] for name in self.tasks},
            **{key: statistics.mean(cost[key] for cost in costs) for key in costs[0]},
            "encoders": len(self.tasks) if row == "experts" else 1,
            "parameters": {"scale": scales} if scales[0] is not None else {},
        }

    def _cost(self, seed: int, row: str) -> dict[str, Any]:
        """What a row costs beyond the experts: seconds, steps, trained parameters, labelled images."""
        logs: list[dict[str, Any]]
        images = self.recipe.train_images
        probes = [stages.read_log(Path(folder)) for folder in self.probes[seed].values()]
        if row == "experts":
            logs = [stages.read_log(Path(folder)) for folder in self.experts[seed].values()] + probes
        elif row == "joint-mtl":
            logs = [stages.read_log(Path(self.models[seed, row])), *probes]
        else:
            logs = [stages.read_log(Path(folder)) for folder in self._chain(seed, row)]
            images = max(log["labelled_images"] for log in logs)
        return {
            "seconds": sum(log["seconds"] for log in logs),
            "steps": sum(log.get("steps", 0) for log in logs),
            "trained_parameters": sum(log.get("trained_parameters", 0) for log in logs),
            "labelled_images": images,
            "unlabelled_images": max(log.get("unlabelled_images", 0) for log in logs),
            "scale": next((log["scale"] for log in logs if "scale" in log), None),
        }

    def _chain(self, seed: int, row: str) -> list[str]:
        """The folders of all stages after the experts that made a row."""
        *before, _last = names = row.split("+")
        if not before:
            return [self.models[seed, row]]
        return [*self._chain(seed, self._before(seed, names)), self.models[seed, row]]

    def _curves(self) -> dict[str, Any]:
        curves = {}
        for method in self.recipe.merges:
            logs = [stages.read_log(Path(self.models[seed, method])) for seed in self.recipe.seeds]
            if "curve" not in logs[0]:
                continue
            found = [log["curve"] for log in logs]
            points = [spread(list(values)) for values in zip(*(c["delta_mtl"] for c in found), strict=True)]
            curves[method] = {
                "scales": found[0]["scales"],
                "delta_mtl": {key: [point[key] for point in points] for key in ("mean", "std")},
                "normalised": {
                    task: [statistics.mean(v) for v in zip(*(c["normalised"][task] for c in found), strict=True)]
                    for task in self.tasks
                },
                "chosen": [log["scale"] for log in logs],
            }
        return curves

    def gallery(self, images: int = 4) -> list[dict[str, Any]]:
        """Some test images with the truth and the predictions of the gallery's rows, coloured."""
        seed = self.recipe.seeds[0]
        data = load_data(**self.splits["test"]).select(list(self.recipe.tasks))
        rows = [row for row in self.recipe.gallery if row == "experts" or (seed, row) in self.models]
        models = {row: load(Path(self.models[seed, row]) / "model") for row in rows if row != "experts"}
        experts = {task: load(Path(folder) / "model") for task, folder in self.experts[seed].items()}
        shown = []
        for index in range(0, len(data), max(1, len(data) // images)):
            sample = data[index]
            truth = {task: sample[task].numpy() for task in self.tasks}
            predicted = {row: model.predict(sample["image"]) for row, model in models.items()}
            predicted["experts"] = {task: expert.predict(sample["image"])[task] for task, expert in experts.items()}
            shown.append(
                {
                    "image": (sample["image"].permute(1, 2, 0).numpy() * 255).astype("uint8"),
                    "predictions": {name: self._coloured(name, truth[name], predicted, rows) for name in self.tasks},
                }
            )
        return shown[:images]

    def _coloured(self, name: str, truth: Any, predicted: Mapping[str, Any], rows: Sequence[str]) -> dict[str, Any]:
        task = self.tasks[name]
        limits = (
            (float(truth.min()), float(truth.max())) if task.kind in ("depth", "texture", "keypoints") else (0.0, 1.0)
        )
        return {
            "truth": colourise(task, truth, limits),
            **{row: colourise(task, predicted[row][name], limits) for row in rows},
        }


NOTES = (
    "Delta_MTL is the mean relative gain over the experts' own metrics on the test split: 0 equals the experts,"
    " higher is better. No value of the test split chose a model, a scale or a setting; the headline names the row that"
    " came out best.",
    "The validation split chose the scales and the checkpoint kept of experts and joint model, and is the labelled"
    " data of every re-alignment with labels: experts and joint model have seen its labels only through that choice.",
    "Rows with 0 labelled images use no label in the merge either: its scale is the one whose features can be folded"
    " best. Their unlabelled images are the first of the validation split.",
    "zero-shot+heads is the control: the unmerged base with re-aligned heads. What a merge adds is the difference"
    " to it.",
    "The embedded base was pretrained on other rooms with masked RGB, gradient magnitude and relative depth as"
    " targets; the last two overlap the tasks texture and depth.",
    "The costs of the experts and of joint MTL are those of their training, all other rows' those beyond the experts."
    " Seconds are of one process, with as many side by side as there are cores.",
)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one seed) and the values."""
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "per_seed": list(values),
    }


def machine() -> dict[str, Any]:
    """The machine in plain words, for whoever reads the figures."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else None
    return {
        "cpu": cpu,
        "cores": available_cores(),
        "memory_gb": round(memory) if memory else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
