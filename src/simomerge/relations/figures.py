"""Figures of how tasks relate: sweeps along task vectors, gains of pairs, norms, cosines, CKA.

Each function takes the result of `simomerge.relations.Relations.to_dict` and returns a figure, or raises
`simomerge.report.drawing.NothingToDraw` if its section was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simomerge.relations.curve import measure, recommended_tree
from simomerge.relations.verdict import pair_gains
from simomerge.report.drawing import LIGHT, SERIES, NothingToDraw, figure_style, new_figure, numbers
from simomerge.report.figures import WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = Mapping[str, Any]


@figure_style()
def sweep_figure(found: Found) -> Figure:
    """One panel per task vector: every task's performance against lambda, the vector's own task as a thick curve."""
    sweeps, tasks = _section(found, "sweeps"), found["tasks"]
    figure, panels, _ = _panels(len(tasks), 2.5, 2.3, columns=5, sharey=True)
    values = []
    for axes, primary in zip(panels, tasks, strict=True):
        for task, colour in _coloured(tasks):
            curve, own = numbers(sweeps["performance"][primary][task]), task == primary
            axes.plot(sweeps["lambdas"], curve, color=colour, lw=2.4 if own else 1.3, zorder=3 if own else 2)
            values += curve[np.isfinite(curve)].tolist()
        for line in (axes.axhline, axes.axvline):
            line(1, color=LIGHT["muted"], lw=0.8, ls="--")
        axes.set_title(f"along {_short(primary)}")
        axes.set_xticks([0, 0.5, 1, 1.5] if sweeps["lambdas"][-1] >= 1.5 else [0, 0.5, 1])
        axes.grid(axis="y")
    if values:  # far below 0 all curves are equally useless, and would hide the others
        panels[0].set_ylim(min(max(min(values), -0.5), 0.9) - 0.03, min(max(values), 3.0) + 0.05)
    measure = "normalised performance" if found["judged_by"] == "labels" else "agreement with the experts"
    figure.supylabel(measure, color=LIGHT["muted"])
    figure.supxlabel("lambda: 0 = the base, 1 = the expert", color=LIGHT["muted"])
    _task_legend(figure, tasks)
    return figure


@figure_style()
def pair_figure(found: Found) -> Figure:
    """The gain of each task (row) over its expert, in percent, when it is merged with one other task (column)."""
    _section(found, "groups")
    tasks, gains = found["tasks"], pair_gains(found)
    table = np.array([[gains[task].get(other, np.nan) for other in tasks] for task in tasks])
    size = max(3.4, 1.4 + 0.75 * len(tasks))
    # As wide as the other figures, which a page shows at one width: a small table must not fill it.
    rest = max(WIDTH - size, 0.1)
    figure = new_figure(size + rest, 0.75 * size + 0.3)
    axes, empty = figure.subplots(1, 2, width_ratios=(size, rest))
    empty.set_visible(False)
    limit = float(np.nanmax(np.abs(table), initial=1e-6))
    _heatmap(axes, table, (-limit, limit), "{:+.1f}")
    _name_axes(axes, tasks, tasks)
    axes.set_title("gain of the row's task merged with the column's, in %")
    return figure


@figure_style()
def sharing_figure(found: Found) -> Figure:
    """The mean gain, and that of every task, against the cost of trees of shared blocks and of whole encoders."""
    curve = _section(found, "sharing")
    figure = new_figure(WIDTH, 3.0)
    axes = figure.subplots()
    costs = [each["cost"] for each in curve]
    for task, colour in _coloured(found["tasks"]):
        axes.plot(costs, numbers([each["gains"][task] for each in curve]), color=colour, lw=1.3)
    axes.plot(costs, numbers([each["gain"] for each in curve]), color=LIGHT["ink"], lw=2.4, marker="o", ms=3.5)
    if groups := found.get("groups"):
        encoders = [len(choice["groups"]) for choice in groups["choices"]]
        axes.scatter(
            encoders, numbers([choice["gain"] for choice in groups["choices"]]), color=LIGHT["muted"], marker="s"
        )
    if best := recommended_tree(found, found.get("budget")):
        axes.plot(best["cost"], best["gain"], color=LIGHT["ink"], marker="o", ms=11, mfc="none")
    axes.axhline(0, color=LIGHT["muted"], lw=0.8, ls="--")
    axes.grid(axis="y")
    axes.set_xlim(0.95, len(found["tasks"]) + 0.05)
    axes.set_xlabel("cost, in encoders")
    axes.set_ylabel("gain over the experts, in %")
    axes.set_title(f"{measure(found)}: mean (thick) and by task")
    _task_legend(figure, found["tasks"])
    return figure


@figure_style()
def norm_figure(found: Found) -> Figure:
    """The norm of every task vector, relative to the base's weights, block by block."""
    blocks, tasks = _blocks(found), found["tasks"]
    figure = new_figure(WIDTH, 3.0)
    axes = figure.subplots()
    for place, (_task, colour) in enumerate(_coloured(tasks)):
        values = numbers([block["relative"][place] for block in blocks]) * 100
        axes.plot(range(len(blocks)), values, color=colour, lw=1.8, marker="o", ms=3.5)
    axes.set_xticks(range(len(blocks)), [block["name"] for block in blocks])
    axes.set_ylim(0)
    axes.grid(axis="y")
    axes.set_xlabel("block")
    axes.set_title("norm of the task vector, in % of the base's weights in the block")
    _task_legend(figure, tasks)
    return figure


@figure_style()
def cosine_figure(found: Found) -> Figure:
    """Cosines of the task vectors, in the whole encoder and in every block."""
    parts = [_section(found, "geometry")[0], *_blocks(found)]
    tables = [_without_diagonal(part["cosine"]) for part in parts]
    limit = max(float(np.nanmax(np.abs(table), initial=1e-6)) for table in tables)
    titles = ["whole encoder", *(f"block {part['name']}" for part in parts[1:])]
    named = dict(zip(titles, tables, strict=True))
    return _heatmaps("cosine of two task vectors", named, found["tasks"], (-limit, limit))


@figure_style()
def cka_figure(found: Found) -> Figure:
    """CKA of the base and the experts, tap by tap."""
    cka = _section(found, "cka")
    tables = [_without_diagonal(table) for table in cka["cka"]]
    titles = [f"block {tap}" for tap in cka["taps"]]
    least = min(float(np.nanmin(table, initial=1.0)) for table in tables)
    # Colours start at the smallest value: all values are above zero, and their differences matter.
    limits = (min(2 * least - 1, 0.999), 1.0)
    return _heatmaps("linear CKA of the patch features", dict(zip(titles, tables, strict=True)), cka["names"], limits)


def _section(found: Found, name: str) -> Any:
    if not found.get(name):
        raise NothingToDraw(f"the section {name!r} was not measured: nothing to draw.")
    return found[name]


def _blocks(found: Found) -> list[Any]:
    return [part for part in _section(found, "geometry") if part["name"].isdecimal()]


def _coloured(tasks: Sequence[str]) -> list[tuple[str, str]]:
    return [(task, SERIES[place % len(SERIES)]) for place, task in enumerate(tasks)]


def _without_diagonal(table: Sequence[Sequence[Any]]) -> np.ndarray:
    """The table without its diagonal, which has no information and would decide the range of colours."""
    found = np.stack([numbers(row) for row in table])
    np.fill_diagonal(found, np.nan)
    return found


def _panels(count: int, width: float, height: float, columns: int, **options: Any) -> tuple[Figure, list[Axes], int]:
    """A figure with a grid of panels, row by row, and the number of panels in a row."""
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = new_figure(max(across * width, 6.0), down * height + 0.7)
    grid = figure.subplots(down, across, squeeze=False, **options).flatten()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, list(grid[:count]), across


def _task_legend(figure: Figure, tasks: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=2.4, label=task) for task, colour in _coloured(tasks)]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 8), handlelength=1.2)


def _heatmaps(
    measure: str, tables: Mapping[str, np.ndarray], names: Sequence[str], limits: tuple[float, float]
) -> Figure:
    """One heat map per title, in rows of nearly equal length; only the outer ones have names."""
    size = max(1.7, 0.36 * len(names) + 0.6)
    rows = math.ceil(len(tables) / max(2, int(13 / (size + 0.25))))
    figure, panels, columns = _panels(len(tables), size + 0.25, size, math.ceil(len(tables) / rows))
    blank = [""] * len(names)
    for place, (axes, (title, table)) in enumerate(zip(panels, tables.items(), strict=True)):
        _heatmap(axes, table, limits, "{:.2f}")
        first, lowest = place % columns == 0, place + columns >= len(tables)
        _name_axes(axes, names if first else blank, names if lowest else blank)
        axes.set_title(title)
    figure.suptitle(measure, x=0.02, ha="left", fontsize=9, color=LIGHT["muted"])
    return figure


def _heatmap(axes: Axes, table: np.ndarray, limits: tuple[float, float], text: str) -> None:
    """Cells whose colour is the more opaque the further the value is from the middle, so any background works."""
    from matplotlib.colors import to_rgba

    middle, reach = sum(limits) / 2, (limits[1] - limits[0]) / 2
    strength = np.clip((np.nan_to_num(table, nan=middle) - middle) / reach, -1, 1)
    colours = np.array([[to_rgba(LIGHT["positive" if s > 0 else "negative"], abs(s)) for s in row] for row in strength])
    edges = np.arange(len(table) + 1) - 0.5
    axes.pcolormesh(edges, edges, colours, edgecolors="none")
    axes.set_ylim(edges[-1], edges[0])
    for i, j in np.argwhere(np.isfinite(table)):
        colour = LIGHT["on-strong" if abs(strength[i, j]) > 0.6 else "ink"]
        axes.text(j, i, text.format(round(table[i, j], 2) + 0.0), ha="center", va="center", fontsize=7, color=colour)


def _name_axes(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), [*map(_short, columns)], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [*map(_short, rows)])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= 13 else f"{name[:12]}…"
