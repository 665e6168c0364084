"""Curves of the distilled encoder from a finished run: Delta_MTL against steps, and against images.

recipes/rooms-distill.yaml makes the run of one picture in docs/benchmarks.md, and recipes/rooms-curves.yaml that of the
other, with more points and the same training with labels.

    python benchmarks/distillation.py runs/rooms-distill --picture docs/pictures/distillation.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from simomerge.recipes.row import Row

CURVES = {
    "from the merge": ("task-arithmetic", ["distill-encoder"], "#1f77b4"),
    "control: from the base": ("zero-shot", ["distill-encoder"], "#ff7f0e"),
    "with labels, from the merge": ("task-arithmetic", ["fold-cross", "finetune"], "#2ca02c"),
    "with labels, from the base": ("zero-shot", ["fold-cross", "finetune"], "#d62728"),
}
"""What each curve shows: the merge, the re-alignments after it, and the colour."""

Point = tuple[int, float, float]
"""Steps or images, mean and standard deviation of Delta_MTL."""


def points(results: Mapping[str, Any], curve: str, by: str) -> list[Point]:
    """The rows of one curve that differ in steps, or in images, only."""
    merge, names, _ = CURVES[curve]
    # Runs that were made before a re-alignment existed have no settings of it, and no rows.
    settings = {"steps": None, "count": None, **results["recipe"]["realign"].get(names[-1], {})}
    given = [(Row.parse(row["method"]), row["delta_mtl"]) for row in results["rows"] if "+" in row["method"]]
    found = []
    for row, delta in given:
        if row.merge != merge or [step.name for step in row.steps] != names:
            continue
        chosen = dict(row.steps[-1].parameters)
        steps, count = chosen.get("steps", settings["steps"]), chosen.get("count", settings["count"])
        if (by == "steps") == (count == settings["count"]) or (by == "count" and steps == IMAGES_AT_STEPS):
            found.append((steps if by == "steps" else count, delta["mean"], delta["std"] or 0.0))
    return sorted(found)


IMAGES_AT_STEPS = 300
"""The curve over images is at this number of steps."""


def plot(results: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    steps_panel, images_panel = figure.subplots(1, 2, sharey=True)
    joint = [row for row in results["rows"] if row["method"].startswith("joint-mtl")]
    left_out = results["recipe"]["joint"]["steps"] == 1  # a recipe has no other way to save its time
    best = None if left_out else max(joint, key=lambda row: row["delta_mtl"]["mean"])
    for label, (_, _, colour) in CURVES.items():
        _curve(steps_panel, points(results, label, "steps"), label, colour)
        _curve(images_panel, points(results, label, "count"), label, colour)
    for panel, by in ((steps_panel, "steps"), (images_panel, "count")):
        ticks = sorted({point[0] for label in CURVES for point in points(results, label, by)})
        panel.axhline(0, color="black", linewidth=0.8)
        if best:
            level, label = best["delta_mtl"]["mean"], f"best joint training, {best['method']}"
            panel.axhline(level, color="gray", linestyle="--", label=label)
        panel.set_xscale("log")
        panel.set_xticks(ticks, labels=[f"{value:,}" for value in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    steps_panel.set(xlabel="steps of 32 images", ylabel="Delta_MTL (%), 0 = the experts", title="Steps")
    images_panel.set(xlabel="images", title=f"Images, {IMAGES_AT_STEPS} steps")
    steps_panel.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def _curve(panel: Any, found: Sequence[Point], label: str, colour: str) -> None:
    if not found:
        return
    x, mean, std = (list(values) for values in zip(*found, strict=True))
    panel.plot(x, mean, marker="o", color=colour, label=label)
    panel.fill_between(
        x,
        [m - s for m, s in zip(mean, std, strict=True)],
        [m + s for m, s in zip(mean, std, strict=True)],
        color=colour,
        alpha=0.2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--picture", type=Path, help="where to write the curves as PNG")
    given = parser.parse_args()
    results = json.loads((given.run / "results.json").read_text(encoding="utf-8"))
    for label in CURVES:
        for by in ("steps", "count"):
            shown = ", ".join(f"{x:,}: {mean:.1f} ± {std:.1f}" for x, mean, std in points(results, label, by))
            print(f"{label}, by {by}: {shown}")
    if given.picture:
        plot(results, given.picture)


if __name__ == "__main__":
    main()
