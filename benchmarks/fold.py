"""How the fold depends on images, ridge and scale, how well the alignment chooses merges, and what the fold costs.

    python benchmarks/fold.py --run runs/rooms-dpt [--sections curves proxy] [--seeds 0 1 2] -o runs/fold-dpt.json
    python benchmarks/fold.py --sections speed

Uses the experts of a finished run of recipes/rooms-full.yaml. Every figure is Delta_MTL on the run's test split,
against the experts. The folds use images of the validation split, without labels. No setting is chosen on the test
split.

- curves: number of images (4 to 1,024) and ridge, each per tap and cross tap, at the scale that `scale="auto"` chooses
  on 64 images without labels.
- proxy: scales of several merge methods; the rank correlation of the held-out alignment with Delta_MTL after the fold,
  and the points that are lost by taking the merge of the best alignment.
- labelled: the paper's two re-alignments on 64 and 256 labelled images. Rate and steps (three settings, two for
  adapters) are chosen on validation rooms of another seed.
- speed: time to accumulate the sums and to solve, from random features, at the width of the embedded base (one thread)
  and of ViT-B (768 channels, 4 taps, CLS, 540 tokens; two threads).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from simomerge.assembly.alignment import Aligner, Trial
from simomerge.assembly.experts import check_experts, with_merged_encoder
from simomerge.assembly.realign import methods, realign
from simomerge.assembly.realign.fold import VARIANTS
from simomerge.assembly.realign.layout import FoldLayout
from simomerge.assembly.realign.sums import RIDGES, HeadSums, HeadTargets, fold_heads, head_targets
from simomerge.core.assets import resolve_source
from simomerge.core.files import atomic_write_text
from simomerge.core.machine import autocast
from simomerge.datasets import load_data
from simomerge.merging import Lines, TaskArithmetic, ZeroShot, get_method
from simomerge.models.model import SimoModel, load
from simomerge.recipes.results import machine, spread
from simomerge.training.evaluate import delta_mtl, evaluate

COUNTS = (4, 16, 64, 256, 1024)
SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
MERGES = {
    "task-arithmetic": SCALES,
    "ties": (0.2, 0.4, 0.6, 0.8, 1.0),
    "task-arithmetic+lines": SCALES,
    "zero-shot": (0.0,),
}

SETTINGS = {"heads": ((60, 1e-3), (150, 1e-3), (150, 3e-3)), "adapters": ((60, 1e-3), (150, 1e-3))}
"""Steps and learning rates of the re-alignments with labels."""

WITH_LABELS = [name for name, method in methods().items() if method.teacher == "labels" and name in SETTINGS]


class Bench:
    """The experts of one seed, their scores on the test split, and the unlabelled images."""

    def __init__(self, run: Path, seed: int, test_images: int) -> None:
        recipe = json.loads((run / "results.json").read_text(encoding="utf-8"))["recipe"]
        self.base = load(resolve_source("rooms-base"))
        self.experts = check_experts(self.base, {task: load(_expert(run, task, seed)) for task in recipe["tasks"]})
        tasks = list(self.experts)
        self.test = load_data("rooms", split="test", count=test_images, tasks=tasks)
        self.pool = load_data("rooms", split="val", count=max(COUNTS))
        self.val_images = recipe["val_images"]
        self.baseline = {task: evaluate(expert, self.test)[task] for task, expert in self.experts.items()}
        self.unmerged = with_merged_encoder(self.base, self.experts, ZeroShot())

    def delta(self, model: SimoModel) -> float:
        return delta_mtl(evaluate(model, self.test), self.baseline, model.tasks)

    def merged(self, name: str, scale: float) -> SimoModel:
        method, _, schedule = name.partition("+")
        parameters = {} if method == "zero-shot" else {"scale": scale}
        return with_merged_encoder(
            self.base, self.experts, get_method(method, **parameters), Lines() if schedule else None
        )

    def scale_without_labels(self) -> float:
        best: Any = Aligner(self.base, self.experts, self.pool.take(64)).best_scale(TaskArithmetic()).method
        return float(best.scale)

    def targets(self, variant: Any, count: int) -> list[HeadTargets]:
        return list(head_targets(self.unmerged, self.experts, self.pool.take(count), variant))


def _expert(run: Path, task: str, seed: int) -> Path:
    """The newest finished expert of a run."""
    found = [p for p in (run / "stages").glob(f"expert-{task}-seed-{seed}-*/model") if ".work" not in str(p)]
    return max(found, key=lambda path: path.stat().st_mtime)


def images_curve(bench: Bench, scale: float) -> dict[str, dict[str, float]]:
    """Delta_MTL by number of images. The sums of a larger set continue those of the smaller one."""
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        model = bench.merged("task-arithmetic", scale)
        fold, done, values = HeadSums(FoldLayout(model, variant)), 0, {}
        batches: Iterator[HeadTargets] = head_targets(bench.unmerged, bench.experts, bench.pool, variant, batch_size=4)
        for batch in batches:
            with torch.no_grad(), autocast("cpu"):
                features = model.encode(batch.images)
            with torch.no_grad():
                fold.add(features, batch.targets, batch.indices)
            done += len(batch.indices)
            if done in COUNTS:
                values[str(done)] = bench.delta(_with_heads(model, fold))
        found[variant] = values
    return found


def _with_heads(model: SimoModel, fold: HeadSums, ridge: Any = "auto") -> SimoModel:
    return SimoModel(model.encoder, model.tasks, fold.solve(ridge)[0]).eval()


def ridge_curve(bench: Bench, scale: float, count: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        model = bench.merged("task-arithmetic", scale)
        fold = fold_heads(model, bench.targets(variant, count), variant).sums
        found[variant] = {str(ridge): bench.delta(_with_heads(model, fold, ridge)) for ridge in ("auto", *RIDGES)}
    return found


def proxy_points(bench: Bench, count: int) -> list[dict[str, Any]]:
    """For every merge and scale, Delta_MTL before the fold and after each variant of it, and the alignments."""
    points = []
    targets = {variant: bench.targets(variant, count) for variant in VARIANTS}
    for name, scales in MERGES.items():
        for scale in scales:
            model = bench.merged(name, scale)
            point: dict[str, Any] = {"merge": name, "scale": scale, "unaligned": bench.delta(model)}
            for variant in VARIANTS:
                folded = fold_heads(model, targets[variant], variant)
                point[variant] = bench.delta(folded.model)
                r2 = {task: fit.r2 for task, fit in folded.fits.items()}
                trial = Trial(get_method("zero-shot"), None, r2)
                point[f"alignment {variant}"] = trial.alignment
            points.append(point)
            print(f"  {name} {scale}: {point}", flush=True)
    return points


def judge(points: Sequence[Mapping[str, Any]], by: str, truth: str) -> dict[str, float]:
    """Spearman's rank correlation of the proxy with the truth, and the points lost by taking the proxy's best merge."""
    ranks = [_ranks([point[key] for point in points]) for key in (by, truth)]
    best = max(points, key=lambda point: point[by])
    return {
        "rank_correlation": statistics.correlation(*ranks),
        "regret": max(point[truth] for point in points) - best[truth],
    }


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [float(order.index(value)) for value in values]


def labelled(bench: Bench, scale: float, how: str, count: int) -> dict[str, Any]:
    """One of the paper's re-alignments on ``count`` labelled images, with steps and rate chosen on other rooms."""
    tasks = list(bench.experts)
    data = load_data("rooms", split="val", count=count, tasks=tasks)
    other = load_data("rooms", split="val", count=256, seed=1, tasks=tasks)
    reference = {task: evaluate(expert, other)[task] for task, expert in bench.experts.items()}
    model = bench.merged("task-arithmetic", scale)
    tried = []
    for steps, lr in SETTINGS[how]:
        aligned = realign(model, data=data, method=how, steps=steps, lr=lr)
        judged = delta_mtl(evaluate(aligned, other), reference, aligned.tasks)
        tried.append((judged, steps, lr, aligned))
        print(f"  {how}, {count} labelled images, {steps} steps at {lr:g}: {judged:+.2f} on validation", flush=True)
    _, steps, lr, best = max(tried, key=lambda trial: trial[0])
    return {"steps": steps, "lr": lr, "delta_mtl": bench.delta(best)}


def speed(width: int, grid: tuple[int, int], fusion: int, threads: int, images: int = 64) -> dict[str, Any]:
    """Seconds to accumulate the sums and to solve, for four taps with CLS, five DPT heads and random features."""
    from transformers import Dinov2Config, Dinov2Model

    from simomerge.datasets.tasks import Task
    from simomerge.models.encoders import Encoder, Features
    from simomerge.models.heads import head_for

    def _dpt(encoder: Any, task: Task, fusion: int) -> Any:
        return head_for(encoder, "dpt", task.channels, fusion_channels=fusion)

    torch.set_num_threads(threads)
    config = Dinov2Config(hidden_size=width, num_hidden_layers=4, num_attention_heads=4, patch_size=14, image_size=378)
    encoder = Encoder(Dinov2Model(config))
    tasks = {name: Task(name) for name in ("depth", "normals", "edges", "texture", "keypoints")}
    model = SimoModel(encoder, tasks, {n: _dpt(encoder, t, fusion) for n, t in tasks.items()})
    size = (grid[0] * 14, grid[1] * 14)
    found: dict[str, Any] = {"width": width, "images": images, "tokens": grid[0] * grid[1], "threads": threads}

    def features(seed: int, batch: int) -> Features:
        generator = torch.Generator().manual_seed(seed)
        maps = tuple(torch.randn(batch, width, *grid, generator=generator) for _ in range(4))
        return Features(maps, tuple(torch.randn(batch, width, generator=generator) for _ in range(4)), size, size)

    for variant in VARIANTS:
        fold, counting = HeadSums(FoldLayout(model, variant)), 0.0
        for first in range(0, images, 16):
            own, expert = features(first, 16), features(first + 1, 16)
            began = time.perf_counter()
            with torch.no_grad():
                fold.add(own, fold.layout.targets(dict.fromkeys(tasks, expert)), range(first, first + 16))
            counting += time.perf_counter() - began
        began = time.perf_counter()
        fold.solve()
        found[variant] = {"accumulate": counting, "solve": time.perf_counter() - began}
        print(f"width {width}, {threads} threads, {variant}: {found[variant]}", flush=True)
    return found


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Plot Delta_MTL against images, ridge and scale: mean over the seeds, and a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = list(results["seeds"].values())
    points = [p for run in runs for p in run.get("proxy", []) if p["merge"] == "task-arithmetic"]
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    for variant, colour in zip(VARIANTS, ("tab:blue", "tab:orange"), strict=True):
        images = [[run["images"][variant][key] for run in runs] for key in map(str, COUNTS)]
        _band(panels[0], COUNTS, images, variant, colour)
        ridges = [ridge for ridge in RIDGES if ridge != float("inf")]
        _band(panels[1], ridges, [[run["ridge"][variant][str(r)] for run in runs] for r in ridges], variant, colour)
        panels[1].axhline(
            statistics.mean(run["ridge"][variant]["auto"] for run in runs), color=colour, linestyle=":", linewidth=1
        )
    for key, label, colour in (
        ("unaligned", "not aligned", "gray"),
        ("per-tap", "per-tap", "tab:blue"),
        ("cross-tap", "cross-tap", "tab:orange"),
    ):
        values = [[point[key] for point in points if point["scale"] == scale] for scale in SCALES]
        _band(panels[2], SCALES, values, label, colour)
    for panel, title, logarithmic in zip(
        panels, ("unlabelled images", "ridge (dotted: chosen)", "scale of task arithmetic"), (2, 10, 0), strict=True
    ):
        panel.set_xlabel(title)
        if logarithmic:
            panel.set_xscale("log", base=logarithmic)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("Delta_MTL (%)")
    panels[0].set_ylim(bottom=-40, top=0)  # what is not aligned falls far below at large scales
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _band(panel: Any, x: Sequence[float], values: Sequence[Sequence[float]], label: str, colour: str) -> None:
    found = [spread(list(value)) for value in values]
    mean = [value["mean"] for value in found]
    std = [value["std"] or 0.0 for value in found]
    panel.plot(x, mean, marker="o", markersize=3, label=label, color=colour)
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    panel.fill_between(x, low, high, color=colour, alpha=0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--sections", nargs="+", default=["curves", "proxy"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test-images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="Results of other seeds to add.")
    parser.add_argument("--picture", type=Path, help="Draw the curves and the proxy's scales into this file.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"machine": machine(), "run": str(options.run), "seeds": {}}
    if "speed" in options.sections:
        results["speed"] = [speed(128, (8, 10), 32, 1), speed(768, (20, 27), 128, 2)]
        torch.set_num_threads(options.threads)
    for seed in options.seeds if options.run else ():
        bench = Bench(options.run, seed, options.test_images)
        scale = bench.scale_without_labels()
        found: dict[str, Any] = {"scale": scale}
        results["seeds"][str(seed)] = found
        if "curves" in options.sections:
            found["images"] = images_curve(bench, scale)
            print(f"seed {seed} images {found['images']}", flush=True)
            found["ridge"] = ridge_curve(bench, scale, 64)
            print(f"seed {seed} ridge {found['ridge']}", flush=True)
        if "proxy" in options.sections:
            found["proxy"] = proxy_points(bench, 64)
            for variant in VARIANTS:
                found[f"judged {variant}"] = judge(found["proxy"], "alignment per-tap", variant)
                print(f"seed {seed} proxy, {variant}: {found[f'judged {variant}']}", flush=True)
        if "labelled" in options.sections:
            found["labelled"] = {
                how: {str(count): labelled(bench, scale, how, count) for count in (64, 256)} for how in WITH_LABELS
            }
            print(f"seed {seed} labelled {found['labelled']}", flush=True)
    for other in options.add:
        results["seeds"] |= json.loads(other.read_text(encoding="utf-8"))["seeds"]
    if options.output:
        atomic_write_text(options.output, json.dumps(results, indent=2) + "\n")
        print(f"Results: {options.output}")
    if options.picture:
        plot(results, options.picture)
    for how in WITH_LABELS:
        rows = [found["labelled"][how] for found in results["seeds"].values() if "labelled" in found]
        for count in rows[0] if rows else ():
            value = spread([row[count]["delta_mtl"] for row in rows])
            print(f"{how}, {count} labelled images: {value['mean']:+.2f} ± {value['std'] or 0:.2f}")
    for section in ("images", "ridge"):
        rows = [found[section] for found in results["seeds"].values() if section in found]
        for variant in VARIANTS if rows else ():
            for key in rows[0][variant]:
                value = spread([row[variant][key] for row in rows])
                print(f"{section} {variant} {key}: {value['mean']:+.2f} ± {value['std'] or 0:.2f}")


if __name__ == "__main__":
    main()
