"""Draw the results of benchmarks/sharing.py: Delta_MTL against cost, one panel per file.

    python benchmarks/sharing_curves.py runs/sharing.json runs/sharing-linear5.json \\
        --titles "three tasks, linear heads" "five tasks, linear heads" -o docs/pictures/sharing.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sharing import best_within
from simomerge.recipes.results import spread

KINDS = {
    "chosen": ("tree chosen without labels", "#1f77b4", "o"),
    "branch": ("best single split", "#2ca02c", "s"),
    "groups": ("best whole encoders for groups", "#ff7f0e", "^"),
    "every": ("best of all trees", "black", "x"),
}
"""What is drawn, in this order: label, colour and marker."""


def curve(seeds: list[list[dict[str, Any]]], kind: str) -> tuple[list[float], list[float], list[float]]:
    """Costs, and mean and standard deviation of Delta_MTL over the seeds, for the costs that all seeds have.

    Whole encoders cost whole numbers, a chosen tree what it was chosen for.
    """
    asked = [{row["asked"] for row in rows if row["kind"] == "chosen"} for rows in seeds]
    top = max(max(each) for each in asked) + 0.25
    costs = sorted({1.0, top, *set.intersection(*asked)})
    if kind == "groups":
        costs = [cost for cost in costs if cost == int(cost)]
    points = [spread([best_within(rows, kind, cost) for rows in seeds]) for cost in costs]
    return costs, [point["mean"] for point in points], [point["std"] or 0.0 for point in points]


def distilled(seeds: list[list[dict[str, Any]]]) -> tuple[list[float], list[float], list[float]]:
    """The chosen trees after distillation."""
    rows = [{row["asked"]: row["delta"] for row in each if row["kind"] == "chosen, distilled"} for each in seeds]
    costs = sorted(set.intersection(*map(set, rows)))
    points = [spread([each[cost] for each in rows]) for cost in costs]
    return costs, [point["mean"] for point in points], [point["std"] or 0.0 for point in points]


def draw(files: list[Path], titles: list[str], path: Path) -> None:
    figure = Figure(figsize=(5 * len(files), 4.2), layout="constrained")
    panels = figure.subplots(1, len(files), squeeze=False)[0]
    for panel, file, title in zip(panels, files, titles, strict=True):
        seeds = [found["rows"] for found in json.loads(file.read_text(encoding="utf-8"))["seeds"].values()]
        curves = {kind: curve(seeds, kind) for kind in KINDS if any(row["kind"] == kind for row in seeds[0])}
        for kind, (costs, means, deviations) in curves.items():
            label, colour, marker = KINDS[kind]
            panel.errorbar(costs, means, deviations, label=label, color=colour, marker=marker, capsize=2, linewidth=1.2)
        costs, means, deviations = distilled(seeds)
        if costs:
            label = "chosen tree, distilled"
            panel.errorbar(costs, means, deviations, label=label, color="#9467bd", marker="D", capsize=2, linewidth=1.2)
        panel.axhline(0, color="gray", linewidth=0.8)
        top = math.ceil(max(curves["chosen"][0]))
        panel.set(title=f"{title}, {len(seeds)} seeds" if len(seeds) > 1 else title, xticks=range(1, top + 1))
        panel.set(xlabel="cost, in encoders", ylabel="Delta_MTL (%), 0 = the experts")
        panel.grid(alpha=0.3)
    panels[0].legend(loc="lower right", fontsize=8)
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
