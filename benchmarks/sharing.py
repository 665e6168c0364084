"""Shared and own blocks: Delta_MTL against cost, for chosen trees, single splits and whole encoders for groups.

    simomerge run recipes/rooms-distill.yaml --set "seeds=[0]" --set "realigned=[]" --set "merges=[average]" \\
        --set "joint.steps=1" --set "joint_weightings=[equal]" -o runs/rooms-sharing
    python benchmarks/sharing.py --run runs/rooms-sharing [--seeds 0] -o runs/sharing.json

Uses the experts of a finished run, but not its joint model. Merges are task arithmetic; the scale of each group of
tasks is chosen without labels on 64 images. Trees are chosen on the same 64 images. Stitches and the cross-tap fold of
each final model use 128 images of the validation split (``--images-split``), without labels. Delta_MTL is that on the
run's test split. ``--data``, ``--base`` and ``--trust-code`` are those of the run; ``--test-images`` takes fewer.

- ``chosen``: the tree for each budget, in steps of a quarter of an encoder.
- ``labelled``: the same, chosen by the labels of 128 other images.
- ``branch``: all tasks share the first k blocks, and then each has its own.
- ``groups``: whole encoders for groups of tasks. The partition has the best Delta_MTL on the test split itself, so
  that no way to choose one without labels could be better.
- ``every tree`` (``--exhaustive``): the best tree within each budget, likewise by the test split itself.
- ``distilled`` (``--distil STEPS``): the chosen tree of each whole and half budget, and the best partition into whole
  encoders, both trained on the predictions of the experts for 512 images without labels (``distill-encoder``).
- ``rank`` (``--ranks 4 16 64``): the split after half of the blocks, with own blocks as differences of this rank to
  shared weights (``merge --branch-rank``), and how many encoders' worth of parameters the encoder has then.

Results are written after every model, and a second call resumes. `--show` prints the results and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from simomerge.assembly.alignment import Aligner
from simomerge.assembly.experts import check_experts
from simomerge.assembly.realign import realign
from simomerge.assembly.sharing.grow import Grower, share_blocks
from simomerge.assembly.sharing.search import TreeSearch, path_of
from simomerge.assembly.sharing.stitches import Known
from simomerge.core.assets import resolve_source
from simomerge.core.classes import trust
from simomerge.core.files import atomic_write_text
from simomerge.datasets import load_data
from simomerge.datasets.pictures import as_images
from simomerge.merging import MergeMethod, TaskArithmetic
from simomerge.merging.tree import Group, Partition, Tree
from simomerge.models.model import SimoModel, load
from simomerge.recipes.results import machine, spread
from simomerge.training.evaluate import evaluate

STITCHED = 128
"""Images for the stitches and the fold of each final model."""

DISTILLED = 512
"""Images for the distillation of the rows ``distilled``, without labels."""

LABELLED = 128
"""Other images, whose labels choose the trees of the rows ``labelled``."""


KINDS = ("branch", "groups", "chosen", "labelled")

COLUMNS = {
    "chosen": "chosen",
    "labelled": "chosen by labels",
    "branch": "best single split",
    "groups": "best whole groups",
    "every": "best of every tree",
}
"""What `show` prints of each kind of tree."""


class Bench:
    """The experts of one seed, the images, and what is measured so far."""

    def __init__(self, given: argparse.Namespace, seed: int, found: dict[str, Any]) -> None:
        recipe = json.loads((given.run / "results.json").read_text(encoding="utf-8"))["recipe"]
        self.tasks, self.found = list(recipe["tasks"]), found
        base = load(resolve_source(given.base))
        experts = check_experts(base, {task: load(_expert(given.run, task, seed)) for task in self.tasks})
        split = given.images_split
        pool = load_data(given.data, split=split, count=recipe[f"{split}_images"], tasks=self.tasks)
        self.few, self.images = as_images(pool, 64), as_images(pool, STITCHED)
        self.many = as_images(pool, DISTILLED)
        self.labelled = pool.skip(STITCHED).take(LABELLED)
        count = given.test_images or recipe["test_images"]
        self.test = load_data(given.data, split="test", count=count, tasks=self.tasks)
        self.grower = Grower(base, experts, self._method)
        self.known: Known = {}
        self.baseline = {task: evaluate(expert, self.test)[task] for task, expert in experts.items()}

    def _method(self, group: Group) -> MergeMethod:
        some = {task: self.grower.experts[task] for task in group}
        return Aligner(self.grower.base, some, self.few, None).best_scale(TaskArithmetic()).method

    def tree(self, given: Any) -> Tree:
        return Tree.of(given, self.tasks, self.grower.blocks)

    def delta(self, tree: Tree) -> float:
        """Delta_MTL of a tree on the test split. What a task gains is kept by its path."""
        gains = self.found.setdefault("gains", {})
        keys = {task: f"{task}: {path_of(tree, task)}" for task in self.tasks}
        missing = [task for task in self.tasks if keys[task] not in gains]
        if missing:
            model = share_blocks(self.grower, tree, self.images, self.known)
            gains |= {keys[task]: gain for task, gain in self.gains(model.select(missing)).items()}
        return statistics.mean(gains[key] for key in keys.values())

    def distilled(self, tree: Tree, steps: int) -> float:
        """Delta_MTL of a tree after distillation, on the test split."""
        model = share_blocks(self.grower, tree, self.images, self.known)
        model = realign(model, self.grower.experts, self.many, method="distill-encoder", steps=steps)
        return statistics.mean(self.gains(model).values())

    def gains(self, model: SimoModel) -> dict[str, float]:
        """What each task of a model gains against its expert on the test split, in percent."""
        found = {}
        for task, metrics in evaluate(model, self.test).items():
            metric, about = model.tasks[task].metric, model.tasks[task]
            change = metrics[metric] / self.baseline[task][metric] - 1
            found[task] = 100 * (change if about.higher_is_better else -change)
        return found

    def low_rank(self, tree: Tree, rank: int | None) -> dict[str, Any]:
        """The row of a tree whose own blocks are differences of this rank; None stores them in full."""
        model = share_blocks(self.grower, tree, self.images, self.known, rank)
        whole, found = (
            sum(each.numel() for each in encoder.parameters()) for encoder in (self.grower.base.encoder, model.encoder)
        )
        row = {"delta": statistics.mean(self.gains(model).values()), "parameters": found / whole}
        return row | {"kept": model.provenance["merge"].get("difference_kept", {})}


def _expert(run: Path, task: str, seed: int) -> Path:
    """The newest finished expert of a run."""
    found = [p for p in (run / "stages").glob(f"expert-{task}-seed-{seed}-*/model") if ".work" not in str(p)]
    return max(found, key=lambda path: path.stat().st_mtime)


def measure_ranks(given: argparse.Namespace, seed: int, results: dict[str, Any]) -> None:
    """Measure the split after half of the blocks with own blocks in full, and with each rank."""
    found = results["seeds"].setdefault(str(seed), {"rows": []})
    bench = Bench(given, seed, found)
    tree = bench.tree(bench.grower.blocks // 2)
    done = {row["asked"] for row in found["rows"] if row["kind"] == "rank"}
    for rank in (None, *given.ranks):
        if rank not in done:
            row = {"kind": "rank", "asked": rank, "tree": str(tree), **bench.low_rank(tree, rank)}
            found["rows"].append({"cost": tree.cost(), **row})
            atomic_write_text(given.output, json.dumps(results, indent=1) + "\n")


def measure_distilled(given: argparse.Namespace, seed: int, results: dict[str, Any]) -> None:
    """Distil the chosen trees and the best whole groups of a seed that has been measured."""
    if str(seed) not in results["seeds"]:
        raise SystemExit(f"seed {seed} has not been measured: run without --distil first.")
    rows = results["seeds"][str(seed)]["rows"]
    bench, began = Bench(given, seed, results["seeds"][str(seed)]), time.monotonic()
    done = {(row["kind"], row["asked"]) for row in rows}
    for budget in (1 + step / 2 for step in range(2 * len(bench.tasks) - 2)):
        for kind in ("chosen", "groups"):
            found = [row for row in rows if row["kind"] == kind and row["cost"] <= budget + 1e-9]
            found = [row for row in found if kind == "groups" or row["asked"] == budget]
            if budget == 1 and kind == "chosen":
                found = [row for row in rows if row["kind"] == "branch" and row["cost"] == 1]
            if not found or (f"{kind}, distilled", budget) in done or (kind == "groups" and budget % 1):
                continue
            best = max(found, key=lambda row: float(row["delta"]))
            tree = bench.tree(best["tree"])
            delta = bench.distilled(tree, given.distil)
            row = {"kind": f"{kind}, distilled", "asked": budget, "cost": tree.cost(), "tree": str(tree)}
            rows.append(row | {"delta": delta, "before": best["delta"]})
            atomic_write_text(given.output, json.dumps(results, indent=1) + "\n")
            print(
                f"  {time.monotonic() - began:5.0f} s  seed {seed} {kind}, distilled {budget:.2f}: {delta:+.2f}",
                flush=True,
            )


def measure(given: argparse.Namespace, seed: int, results: dict[str, Any]) -> None:
    """Measure what the results do not have yet of one seed, and write them after every model."""
    found = results["seeds"].setdefault(str(seed), {"rows": []})
    bench, began = Bench(given, seed, found), time.monotonic()
    done = {(row["kind"], row["asked"]) for row in found["rows"]}

    def add(kind: str, asked: float, tree: Tree, **more: Any) -> None:
        row = {"kind": kind, "asked": asked, "cost": tree.cost(), "tree": str(tree), "delta": bench.delta(tree), **more}
        found["rows"].append(row)
        atomic_write_text(given.output, json.dumps(results, indent=1) + "\n")
        print(
            f"  {time.monotonic() - began:5.0f} s  seed {seed} {kind:8} cost {row['cost']:.3f}"
            f" {row['delta']:+.2f}  {tree}",
            flush=True,
        )

    blocks, count = bench.grower.blocks, len(bench.tasks)
    for shared in range(blocks, -1, -1):
        if ("branch", shared) not in done and "branch" in given.kinds:
            add("branch", shared, bench.tree(shared))
    for encoders in range(2, count) if "groups" in given.kinds else ():
        for tree in (bench.tree({blocks: groups}) for groups in partitions(bench.tasks) if len(groups) == encoders):
            if ("groups", str(tree)) not in done:
                add("groups", str(tree), tree)  # type: ignore[arg-type]
    budgets = [1 + step / 4 for step in range(1, 4 * (count - 1)) if 1 + step / 4 <= (given.most or count)]
    for kind, data in (("chosen", None), ("labelled", bench.labelled)):
        missing = [budget for budget in budgets if (kind, budget) not in done and kind in given.kinds]
        search = TreeSearch(bench.grower, bench.few, data) if missing else None
        for budget in missing if search else ():
            start = time.monotonic()
            best = search.best(budget)
            add(kind, budget, best.tree, losses=best.losses, seconds=round(time.monotonic() - start, 1))
    for number, tree in enumerate(every_tree(bench.tasks, blocks) if given.exhaustive else ()):
        if ("every", number) not in done:
            add("every", number, tree)


def partitions(tasks: Sequence[str]) -> Iterator[Partition]:
    """Every partition of the tasks. Groups keep the order of the tasks."""
    if not tasks:
        yield ()
        return
    first, *others = tasks
    for chosen in range(1 << len(others)):
        group = (first, *(task for place, task in enumerate(others) if chosen >> place & 1))
        for rest in partitions([task for task in others if task not in group]):
            yield (group, *rest)


def every_tree(tasks: Sequence[str], blocks: int) -> Iterator[Tree]:
    """Every tree of these tasks over these blocks."""

    def grown(before: list[Partition]) -> Iterator[list[Partition]]:
        if len(before) == blocks:
            yield before
            return
        for partition in partitions(tasks):
            if not before or all(any(set(g) <= set(wider) for wider in before[-1]) for g in partition):
                yield from grown([*before, partition])

    yield from (Tree(tuple(levels)) for levels in grown([]))


def show(results: dict[str, Any]) -> None:
    """Print Delta_MTL by cost, over the seeds."""
    seeds = [found["rows"] for found in results["seeds"].values()]
    show_ranks(seeds)
    show_distilled(seeds)
    if not any(row["kind"] == "chosen" for row in seeds[0]):
        return
    top = _separate(seeds[0])
    asked = {row["asked"] for row in seeds[0] if row["kind"] == "chosen"}
    costs = sorted({1.0, *asked, *((top,) if top - 0.25 in asked else ())})
    measured = {row["kind"] for row in seeds[0]}
    names = {kind: name for kind, name in COLUMNS.items() if kind in measured}
    print("| cost at most | " + " | ".join(names.values()) + " |\n| --: |" + " --: |" * len(names))
    for cost in costs:
        cells = []
        for kind in names:
            values = [best_within(rows, kind, cost) for rows in seeds]
            found = spread(values)
            cells.append(f"{found['mean']:+.2f}" + (f" ± {found['std']:.2f}" if found["std"] else ""))
        print(f"| {cost:.2f} | {' | '.join(cells)} |")
    for seed, found in results["seeds"].items():
        for row in found["rows"]:
            if row["kind"] in ("chosen", "labelled"):
                print(f"seed {seed}, {row['kind']} {row['asked']:.2f}: {row['tree']}")


def show_ranks(seeds: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Print Delta_MTL and parameters by rank, over the seeds."""
    ranks = [row["asked"] for row in seeds[0] if row["kind"] == "rank"]
    if ranks:
        print("| branch rank | parameters, in encoders | Delta_MTL % |\n| --: | --: | --: |")
    for rank in ranks:
        rows = [row for each in seeds for row in each if row["kind"] == "rank" and row["asked"] == rank]
        delta = spread([row["delta"] for row in rows])
        shown = f"{delta['mean']:+.2f}" + (f" ± {delta['std']:.2f}" if delta["std"] else "")
        print(f"| {'in full' if rank is None else rank} | {rows[0]['parameters']:.2f} | {shown} |")


def show_distilled(seeds: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Print Delta_MTL before and after distillation, over the seeds."""
    asked = [(row["kind"], row["asked"]) for row in seeds[0] if row["kind"].endswith("distilled")]
    if asked:
        print("| cost at most | trees | before | distilled |\n| --: | :-- | --: | --: |")
    for kind, budget in asked:
        rows = [row for each in seeds for row in each if (row["kind"], row["asked"]) == (kind, budget)]
        before, after = (spread([row[key] for row in rows]) for key in ("before", "delta"))
        cells = [f"{found['mean']:+.2f} ± {found['std'] or 0:.2f}" for found in (before, after)]
        print(f"| {budget:.2f} | {kind.split(',')[0]} | {' | '.join(cells)} |")


def best_within(rows: Sequence[dict[str, Any]], kind: str, cost: float) -> float:
    """The Delta_MTL for a cost; for kinds that are not chosen, the best on the test split itself."""
    single = {row["asked"]: row["delta"] for row in rows if row["kind"] == "branch"}
    ends: list[float] = [single[max(single)]]  # one encoder
    if kind in ("chosen", "labelled"):
        asked = {row["asked"]: row["delta"] for row in rows if row["kind"] == kind}
        return float((asked | {1.0: ends[0], _separate(rows): 0.0})[cost])
    if kind == "groups" and cost >= _separate(rows):
        ends.append(0.0)  # one encoder per task: the experts
    return max(ends + [row["delta"] for row in rows if row["kind"] == kind and row["cost"] <= cost + 1e-9])


def _separate(rows: Sequence[dict[str, Any]]) -> float:
    """The cost of one encoder per task, a whole number."""
    return float(round(max(row["cost"] for row in rows if row["kind"] == "branch")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--base", default="rooms-base")
    parser.add_argument("--data", default="rooms")
    parser.add_argument("--images-split", default="val", choices=("train", "val"))
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--trust-code", action="store_true", help="Import the class of an encoder of one's own.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exhaustive", action="store_true", help="Also measure every tree (three tasks at most).")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="Measure some kinds of trees only.")
    parser.add_argument("--most", type=float, help="Choose no tree for a higher cost than this.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[], help="Measure these branch ranks only.")
    parser.add_argument("--distil", type=int, metavar="STEPS", help="Distil trees that have been measured, only.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--show", action="store_true", help="Print the content of OUTPUT; measure nothing.")
    options = parser.parse_args()
    if options.trust_code:
        trust()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"machine": machine(), "run": options.run.name, "seeds": {}}
    if options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))
    for seed in () if options.show else options.seeds:
        if options.ranks:
            measure_ranks(options, seed, results)
        elif options.distil is not None:
            measure_distilled(options, seed, results)
        else:
            measure(options, seed, results)
    show(results)


if __name__ == "__main__":
    main()
