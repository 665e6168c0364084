"""Draw the results of benchmarks/sharing.py: Delta_MTL against cost, one panel per file.

    python benchmarks/sharing_curves.py runs/sharing.json runs/sharing-linear5.json \\
        --titles "three tasks, linear heads" "five tasks, linear heads" -o docs/pictures/sharing.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from sharing import best_within
from simomerge.recipes.results import spread

KINDS = {
    "chosen": ("tree chosen without labels", "#1f77b4", "o"),
    "branch": ("best single split", "#2ca02c", "s"),
    "groups": ("best whole encoders for groups", "#ff7f0e", "^"),
    "every": ("best of all trees", "black", "x"),
}
"""What is drawn, in this order: label, colour and marker."""


Points = tuple[list[float], list[float], list[float]]
"""Costs, and for each the mean and the standard deviation of Delta_MTL over the seeds."""


def curve(seeds: list[list[dict[str, Any]]], kind: str) -> Points:
    """What a kind of trees reaches within each cost that all seeds have.

    Whole encoders for groups cost whole numbers, a single split what it costs, and other trees a multiple of a quarter.
    """
    rows = [[row for row in each if row["kind"] == kind] for each in seeds]
    if not all(rows):
        return [], [], []
    top = round(max(row["cost"] for row in seeds[0] if row["kind"] == "branch"))
    costs: list[float] = [step / 4 for step in range(4, 4 * top + 1)]
    if kind == "branch":
        costs = sorted(set.intersection(*({row["cost"] for row in each} for each in rows)))
    elif kind == "groups":
        costs = list(map(float, range(1, top + 1)))
    elif kind == "chosen":
        asked = set.intersection(*({row["asked"] for row in each} for each in rows))
        costs = [1.0, *sorted(asked), float(top)] if top - 0.25 in asked else [1.0, *sorted(asked)]
    return _points(costs, [[best_within(each, kind, cost) for each in seeds] for cost in costs])


def distilled(seeds: list[list[dict[str, Any]]]) -> Points:
    """The chosen trees after distillation, for the costs that all seeds have."""
    rows = [{row["asked"]: row["delta"] for row in each if row["kind"] == "chosen, distilled"} for each in seeds]
    costs = sorted(set.intersection(*map(set, rows)))
    return _points(costs, [[each[cost] for each in rows] for cost in costs])


def _points(costs: list[float], values: list[list[float]]) -> Points:
    found = [spread(each) for each in values]
    return costs, [each["mean"] for each in found], [each["std"] or 0.0 for each in found]


def draw(files: list[Path], titles: list[str], path: Path) -> None:
    """Draw one panel per file, with a curve for each kind of trees that was measured for all seeds."""
    figure = Figure(figsize=(5 * len(files), 4.2), layout="constrained")
    panels = figure.subplots(1, len(files), squeeze=False)[0]
    for panel, file, title in zip(panels, files, titles, strict=True):
        seeds = [found["rows"] for found in json.loads(file.read_text(encoding="utf-8"))["seeds"].values()]
        curves = [(*KINDS[kind], curve(seeds, kind)) for kind in KINDS]
        curves.append(("chosen tree, distilled", "#9467bd", "D", distilled(seeds)))
        for label, colour, marker, (costs, means, deviations) in curves:
            if costs:
                style = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2}
                panel.errorbar(costs, means, deviations, label=label, **style)
        panel.axhline(0, color="gray", linewidth=0.8)
        panel.set(title=f"{title}, {len(seeds)} seeds" if len(seeds) > 1 else title)
        panel.set(xlabel="cost, in encoders", ylabel="Delta_MTL (%), 0 = the experts")
        panel.xaxis.set_major_locator(MultipleLocator(1))
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results of benchmarks/sharing.py")
    parser.add_argument("--titles", nargs="+", required=True, help="one per file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where to write the picture as PNG")
    given = parser.parse_args()
    if len(given.titles) != len(given.files):
        parser.error(f"{len(given.files)} files need as many titles, not {len(given.titles)}.")
    draw(given.files, given.titles, given.output)


if __name__ == "__main__":
    main()
