"""Which tasks to merge: compare the answer of `simomerge relate` with the true Delta_MTL of every group.

    python benchmarks/grouping.py --run runs/rooms-dpt [--seeds 0 1 2] -o runs/grouping-dpt.json

Uses the experts of a finished run of recipes/rooms-full.yaml.

- The truth: every group of 2 to T tasks is merged (task arithmetic, the scale by alignment on 64 images without
  labels), folded cross tap on 256 images, and evaluated on the run's test split. The true value of a partition is the
  mean over the tasks of their gains over the experts. A task that keeps its expert gains 0.
- The answer: the same scale, and the fold on the same 64 images. It is judged on 64 other images of the validation
  split, once without labels (by the experts' predictions) and once with labels. It uses no image of the test split.

Results are written after every group, and a second call resumes. `--show` prints the results and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from simomerge.assembly.alignment import Aligner
from simomerge.assembly.experts import check_experts, with_merged_encoder
from simomerge.assembly.realign.layout import FoldLayout
from simomerge.assembly.realign.sums import HeadTargets, fold_heads
from simomerge.assembly.realign.teacher import observe
from simomerge.core.assets import resolve_source
from simomerge.core.files import atomic_write_text
from simomerge.datasets import load_data
from simomerge.merging import TaskArithmetic
from simomerge.models.model import SimoModel, load
from simomerge.recipes.results import machine, spread
from simomerge.relations import Judge, MergedGroup, geometry
from simomerge.relations.grouping import choose_groups
from simomerge.relations.partitions import Group, best_partitions
from simomerge.relations.relations import halves

KINDS = {"unlabelled": "without labels", "labelled": "with 64 labelled images"}


class Bench:
    """The experts of one seed, the images, and the judges."""

    def __init__(self, run: Path, seed: int) -> None:
        recipe = json.loads((run / "results.json").read_text(encoding="utf-8"))["recipe"]
        self.tasks = list(recipe["tasks"])
        self.base = load(resolve_source("rooms-base"))
        self.experts = check_experts(self.base, {task: load(_expert(run, task, seed)) for task in self.tasks})
        # The folds of the truth use the first 256 images of the validation split, the answer only the first 128.
        self.pool = load_data("rooms", split="val", count=256, tasks=self.tasks)
        few = self.pool.take(128)
        self.few, judging = halves(few)
        self.judges = {kind: Judge(self.experts, judging, kind == "labelled") for kind in KINDS}
        self.observed = {id(images): list(observe(self.experts, images)) for images in (self.few, self.pool)}
        test = load_data("rooms", split="test", count=recipe["test_images"], tasks=self.tasks)
        self.test = Judge(self.experts, test, True)

    def measure(self, group: Group) -> dict[str, Any]:
        """The gains of a group: the true ones, and those by each judge of the answer."""
        some = {task: self.experts[task] for task in group}
        method: Any = Aligner(self.base, some, self.few, None).best_scale(TaskArithmetic()).method
        merged = with_merged_encoder(self.base, some, method)
        small, large = (self._folded(merged, images) for images in (self.few, self.pool))
        found = {kind: judge.gains(judge.scores(small)) for kind, judge in self.judges.items()}
        return {"group": group, "scale": method.scale, "test": self.test.gains(self.test.scores(large)), **found}

    def _folded(self, merged: SimoModel, images: Any) -> SimoModel:
        """The cross-tap fold, from expert features that were computed once for all groups."""
        layout = FoldLayout(merged, "cross-tap")
        with torch.no_grad():
            observed = self.observed[id(images)]
            targets = [HeadTargets(o.indices, o.images, layout.targets(o.features)) for o in observed]
        return fold_heads(merged, targets, "cross-tap").model


def _expert(run: Path, task: str, seed: int) -> Path:
    """The newest finished expert of a run."""
    found = [p for p in (run / "stages").glob(f"expert-{task}-seed-{seed}-*/model") if ".work" not in str(p)]
    return max(found, key=lambda path: path.stat().st_mtime)


def measure(run: Path, seed: int, results: dict[str, Any], output: Path) -> None:
    """Measure the groups of one seed that are not in the results yet, and write them to the file."""
    rows = results["seeds"].setdefault(str(seed), [])
    tasks = json.loads((run / "results.json").read_text(encoding="utf-8"))["recipe"]["tasks"]
    done = {tuple(row["group"]) for row in rows}
    if str(seed) not in results.setdefault("cosines", {}):
        experts = {task: load(_expert(run, task, seed)) for task in tasks}
        results["cosines"][str(seed)] = geometry(load(resolve_source("rooms-base")), experts).all.cosine
        atomic_write_text(output, json.dumps(results, indent=1) + "\n")
    missing = [g for size in range(2, len(tasks) + 1) for g in combinations(tasks, size) if g not in done]
    bench = Bench(run, seed) if missing else None
    for group in missing:
        assert bench is not None
        rows.append(bench.measure(group))
        atomic_write_text(output, json.dumps(results, indent=1) + "\n")
        print(f"  seed {seed} {'+'.join(group)}: {_mean(rows[-1]['test']):+.2f}", flush=True)


def judged(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], kind: str) -> Iterator[dict[str, Any]]:
    """For each budget, the truly best partition and that of the answer, with their values on the test split."""
    table = {tuple(row["group"]): row for row in rows}

    def true(group: Group) -> float:
        return sum(table[group]["test"].values()) if len(group) > 1 else 0.0

    merges, choices = choose_groups(
        tasks, lambda group: MergedGroup(group, table[group][kind], None), kind == "labelled"
    )
    for budget, best in best_partitions(tasks, true).items():
        groups = choices[budget - 1].groups
        values = [sum(map(true, partition)) / len(tasks) for partition in (best, groups)]
        every = [sum(map(true, p)) / len(tasks) for p in partitions(list(tasks)) if len(p) == len(best)]
        yield {
            "budget": budget,
            "best": best,
            "answer": groups,
            "true_best": values[0],
            "true_answer": values[1],
            "true_worst": min(every),
            "true_mean": statistics.mean(every),
            "merges": len(merges),
        }


def other_ways(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], cosines: Sequence[Sequence[float]]
) -> dict[str, list[float]]:
    """Points that other rules lose against the truly best partition, for budgets of 2 to T - 1 encoders."""
    table = {tuple(row["group"]): row for row in rows}

    def measured(kind: str) -> Callable[[Group], float]:
        return lambda group: sum(table[group][kind].values()) if len(group) > 1 else 0.0

    def by_cosine(group: Group) -> float:
        places = [tasks.index(task) for task in group]
        apart = [1 - cosines[i][j] for i in places for j in places if i != j]
        return -sum(apart) / max(len(group) - 1, 1)

    merged = {group: MergedGroup(group, row["unlabelled"], None) for group, row in table.items()}
    pairs_only = choose_groups(tasks, merged.__getitem__, False, limit=0)[1]
    rules = {
        "plain agreement, every group merged": best_partitions(tasks, measured("unlabelled")),
        "the answer without labels, pairs only": {choice.budget: choice.groups for choice in pairs_only},
        "cosine of the task vectors": best_partitions(tasks, by_cosine),
    }
    true = measured("test")
    best = best_partitions(tasks, true)
    budgets = range(2, len(tasks))
    gaps = {
        name: [(sum(map(true, best[k])) - sum(map(true, found[k]))) / len(tasks) for k in budgets]
        for name, found in rules.items()
    }
    mean = {k: statistics.mean(sum(map(true, p)) for p in partitions(list(tasks)) if len(p) == k) for k in budgets}
    gaps["the mean of all partitions"] = [(sum(map(true, best[k])) - mean[k]) / len(tasks) for k in budgets]
    return gaps


def partitions(tasks: list[str]) -> Iterator[tuple[Group, ...]]:
    """Every partition of the tasks. The tasks of a group keep their order."""
    if not tasks:
        yield ()
        return
    first, *others = tasks
    for size in range(len(others) + 1):
        for chosen in combinations(others, size):
            for rest in partitions([task for task in others if task not in chosen]):
                yield ((first, *chosen), *rest)


def show(results: Mapping[str, Any]) -> None:
    """Print the true gains of every pair and the table of budgets, over the seeds."""
    tasks = results["tasks"]
    groups = 2 ** len(tasks) - len(tasks) - 1
    seeds = {seed: rows for seed, rows in results["seeds"].items() if len(rows) == groups}  # only finished seeds
    print(f"{results['run']}, {len(seeds)} seeds, {groups} groups each\n")
    print("| merged with | " + " | ".join(tasks) + " |\n| :-- |" + " --: |" * len(tasks))
    for task in tasks:
        cells = []
        for other in tasks:
            gains = [r["test"][task] for rows in seeds.values() for r in rows if set(r["group"]) == {task, other}]
            cells.append(_cell(gains) if gains else "")
        print(f"| {task} | " + " | ".join(cells) + " |")
    for kind, words in KINDS.items():
        print(f"\nJudged {words}:\n")
        print("| encoders | best by truth | the answer | gap | mean of all | worst | same | merges |")
        print("| --: | --: | --: | --: | --: | --: | --: | --: |")
        columns = zip(*(list(judged(rows, tasks, kind)) for rows in seeds.values()), strict=True)
        for found in columns:
            gaps = [row["true_best"] - row["true_answer"] for row in found]
            same = sum(set(row["best"]) == set(row["answer"]) for row in found)
            cells = [_cell([row[key] for row in found]) for key in ("true_best", "true_answer")]
            others = [f"{statistics.mean(row[key] for row in found):+.2f}" for key in ("true_mean", "true_worst")]
            merges = f"{statistics.mean(row['merges'] for row in found):.0f}"
            print(
                f"| {found[0]['budget']} | {' | '.join(cells)} | {_cell(gaps)}, at most {max(gaps):.2f} |"
                f" {' | '.join(others)} | {same} of {len(found)} | {merges} |"
            )
        for seed, rows in seeds.items():
            for row in judged(rows, tasks, kind):
                print(f"seed {seed}, {row['budget']}: {_named(row['best'])} / {_named(row['answer'])}")

    ways = [other_ways(rows, tasks, results["cosines"][seed]) for seed, rows in seeds.items()]
    print("\nGap to the best, chosen by:\n\n| | " + " | ".join(f"{k} encoders" for k in range(2, len(tasks))) + " |")
    print("| :-- |" + " --: |" * (len(tasks) - 2))
    for name in ways[0] if ways else ():
        print(f"| {name} | " + " | ".join(map(_cell, zip(*(way[name] for way in ways), strict=True))) + " |")


def _named(partition: Sequence[Group]) -> str:
    return ", ".join("+".join(group) for group in partition)


def _cell(values: Sequence[float]) -> str:
    found = spread(list(values))
    return f"{found['mean']:+.2f} ± {found['std'] or 0:.2f}"


def _mean(gains: Mapping[str, float]) -> float:
    return statistics.mean(gains.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--show", action="store_true", help="Print the content of OUTPUT; measure nothing.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"machine": machine(), "run": options.run.name, "seeds": {}}
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))
    recipe = json.loads((options.run / "results.json").read_text(encoding="utf-8"))["recipe"]
    results["tasks"] = recipe["tasks"]
    for seed in () if options.show else options.seeds:
        measure(options.run, seed, results, options.output)
    show(results)


if __name__ == "__main__":
    main()
