"""The three figures of a run: Delta_MTL, the tasks, and the scale of the task vectors.

Every bar and every curve is labelled at its place. Bars have the colour of their row's family, curves one each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simomerge.report.drawing import FAMILY_COLOURS, LIGHT, SERIES, NothingToDraw, figure_style, new_figure, numbers
from simomerge.report.facts import (
    FAMILIES,
    MISSING,
    Results,
    Row,
    Value,
    family,
    finite,
    rows,
    signed,
    task_names,
    value,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

WIDTH = 7.6
"""Inches. A page shows all figures at one width, so wider figures have smaller text."""

DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


@figure_style()
def overview_figure(results: Results) -> Figure:
    """Delta_MTL of every row as horizontal bars; 0 is equal to the experts.

    A row far below all others is cut off at the left edge, where its label gives its value.

    Args:
        results: the content of a run's ``results.json``.

    Raises:
        NothingToDraw: no row has a Delta_MTL.
    """
    table = [row for row in rows(results) if value(row, "delta_mtl").mean is not None]
    if not table:
        raise NothingToDraw("no row of the results has a delta_mtl: nothing to draw.")
    figure = new_figure(WIDTH, 0.8 + 0.32 * len(table))
    axes = figure.subplots()
    values = [value(row, "delta_mtl") for row in table]
    bars = _draw_bars(axes, table, values, experts=0.0)
    means = [cell.mean for cell in values if cell.mean is not None]
    axes.set_xlim(_delta_limits(means))
    _label_bars(axes, bars, means)
    _name_rows(axes, table)
    axes.set_xlabel("Delta_MTL in %, 0 = the experts, higher is better")
    _family_legend(figure, table)
    return figure


@figure_style()
def task_figure(results: Results) -> Figure:
    """Normalised performance of every row, one panel of bars per task; the dashed line at 1 is the expert.

    Args and Raises as `overview_figure`.
    """
    tasks = task_names(results)
    table = [row for row in rows(results) if any(value(row, "normalised", task).mean is not None for task in tasks)]
    if not table:
        raise NothingToDraw("the results contain no normalised performance: nothing to draw.")
    figure = new_figure(max(WIDTH, 2.0 + 1.75 * len(tasks)), 0.9 + 0.3 * len(table))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        values = [value(row, "normalised", task) for row in table]
        _draw_bars(axes, table, values, experts=1.0)
        # The values have a column of their own: most bars end near the dashed line, which would cross them out.
        for place, cell in enumerate(values):
            text = MISSING if cell.mean is None else f"{cell.mean:.2f}"
            axes.annotate(text, (1, place), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=8)
        widest = max([1.0, *(cell.mean + (cell.std or 0) for cell in values if cell.mean is not None)])
        axes.set_xlim(0, 1.36 * widest)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_title(task)
    _name_rows(panels[0], table)
    figure.supxlabel("normalised performance, 1 = the expert, higher is better", color=LIGHT["muted"])
    _family_legend(figure, table)
    return figure


@figure_style()
def scale_figure(results: Results) -> Figure:
    """Delta_MTL against the scale for every merge method, and each task's normalised performance below.

    The band is one standard deviation between seeds, a dot is the scale that was chosen for a seed.

    Args and Raises as `overview_figure`.
    """
    found = (results.get("scale_curves") or {}).items()
    curves = [_Curve.read(place, method, entry) for place, (method, entry) in enumerate(found)]
    if not curves:
        raise NothingToDraw("the results contain no scale curves: nothing to draw.")
    tasks = [task for task in task_names(results) if any(task in curve.normalised for curve in curves)]
    figure = new_figure(WIDTH, 5.2 if tasks else 3.4)
    heights = [1.9, 1] if tasks else [1]
    grid = figure.add_gridspec(len(heights), max(len(tasks), 1), height_ratios=heights)
    _delta_panel(figure.add_subplot(grid[0, :]), curves)
    for place, task in enumerate(tasks):
        _task_panel(figure.add_subplot(grid[1, place]), curves, task, first=place == 0)
    figure.supxlabel("scale of the task vectors (measured on the validation split)", color=LIGHT["muted"])
    return figure


# Bars ---------------------------------------------------------------------------------------------------


def _draw_bars(axes: Axes, table: Sequence[Row], values: Sequence[Value], experts: float) -> BarContainer:
    """One horizontal bar per row, the first row on top, and a line at the experts' value."""
    means, spread = (numbers([getattr(cell, name) for cell in values]) for name in ("mean", "std"))
    bars = axes.barh(
        range(len(table)),
        means,
        height=0.66,
        color=[LIGHT[FAMILY_COLOURS[family(row)]] for row in table],
        xerr=np.nan_to_num(spread),
        error_kw={"ecolor": LIGHT["ink"], "elinewidth": 1.1},
        zorder=2,
    )
    axes.axvline(experts, color=LIGHT["muted"], lw=1, ls="--" if experts else "-", zorder=4)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return bars


def _label_bars(axes: Axes, bars: BarContainer, means: Sequence[float]) -> None:
    """Each bar's value next to its end, or inside the bar if the end is out of view."""
    low, _ = axes.get_xlim()
    labels = [f"{signed(mean)} %" for mean in means]
    cut = [mean < low for mean in means]
    axes.bar_label(bars, ["" if c else label for c, label in zip(cut, labels, strict=True)], padding=4, fontsize=8)
    for place in np.flatnonzero(cut):
        axes.annotate(
            f"◂ {labels[place]}",
            (low, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=LIGHT["card"],
            fontsize=8,
        )


def _name_rows(axes: Axes, table: Sequence[Row]) -> None:
    axes.set_yticks(range(len(table)), [row["method"] for row in table])
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], pad=6)


def _delta_limits(means: Sequence[float]) -> tuple[float, float]:
    """Limits of the Delta_MTL axis with room for labels; rows below -100 % may be out of view."""
    lowest = min(means)
    if lowest < -100:
        lowest = max(lowest, 1.3 * min((mean for mean in means if mean >= -100), default=lowest))
    span = max(*means, 0.0) - min(lowest, 0.0) or 1.0
    return min(lowest, 0.0) - 0.22 * span, max(*means, 0.0) + 0.14 * span


def _family_legend(figure: Figure, table: Sequence[Row]) -> None:
    from matplotlib.patches import Patch

    present = {family(row) for row in table}
    handles = [Patch(color=LIGHT[FAMILY_COLOURS[name]], label=name) for name in FAMILIES if name in present]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=0.9, handleheight=0.9)


# Curves -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """One merge method against the scale; unknown numbers are NaN, which leaves a gap.

    Attributes:
        method: name of the merge method.
        style: colour and dashes of the line.
        scales: the scales that were measured, (S,).
        delta, std: Delta_MTL and its standard deviation between seeds, (S,).
        normalised: normalised performance by task, (S,) each.
        chosen: the scale that was chosen for each seed.
    """

    method: str
    style: Mapping[str, Any]
    scales: np.ndarray
    delta: np.ndarray
    std: np.ndarray
    normalised: Mapping[str, np.ndarray]
    chosen: Sequence[float]

    @classmethod
    def read(cls, place: int, method: str, entry: Mapping[str, Any]) -> _Curve:
        """The entry of a method in ``results["scale_curves"]``; its place decides the colour."""
        unknown = [None] * len(entry["scales"])
        return cls(
            method,
            {"color": SERIES[place % len(SERIES)], "ls": DASHES[place % len(DASHES)]},
            numbers(entry["scales"]),
            numbers(entry["delta_mtl"]["mean"]),
            np.nan_to_num(numbers(entry["delta_mtl"].get("std") or unknown)),
            {task: numbers(values) for task, values in (entry.get("normalised") or {}).items()},
            [scale for scale in map(finite, entry.get("chosen") or []) if scale is not None],
        )

    def draw(self, axes: Axes, values: np.ndarray, width: float, dot: float) -> None:
        """A line, and a dot at each chosen scale."""
        axes.plot(self.scales, values, lw=width, **self.style)
        known = np.isfinite(values)
        if self.chosen and known.any():
            heights = np.interp(self.chosen, self.scales[known], values[known])
            axes.plot(
                self.chosen, heights, "o", ms=dot, color=self.style["color"], mec=LIGHT["card"], mew=1.2, zorder=4
            )


def _delta_panel(axes: Axes, curves: Sequence[_Curve]) -> None:
    for curve in curves:
        if curve.std.any():
            low, high = curve.delta - curve.std, curve.delta + curve.std
            axes.fill_between(curve.scales, low, high, color=curve.style["color"], alpha=0.18, lw=0)
        curve.draw(axes, curve.delta, width=1.8, dot=7)
    axes.axhline(0, color=LIGHT["muted"], lw=1, ls="--")
    axes.annotate(
        "experts",
        (1, 0),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=LIGHT["muted"],
    )
    known = [curve for curve in curves if np.isfinite(curve.delta).any()]
    if known:
        # Far below the experts all curves are equally useless: show the range that matters.
        highs = [np.nanmax(curve.delta) for curve in known]
        lowest = max(min(np.nanmin(curve.delta) for curve in known), min(-100.0, 3 * min(highs)))
        highest = max(*highs, 0.0)
        span = highest - lowest or 1.0
        axes.set_ylim(lowest - 0.05 * span, highest + 0.1 * span)
    _name_curves(axes, known)
    axes.set_title("Delta_MTL in %, dots: the chosen scales")
    axes.grid(axis="y")


def _name_curves(axes: Axes, curves: Sequence[_Curve]) -> None:
    """The methods' names to the right of the ends of their curves, inside the view and without overlap."""
    ends = [(curve, np.flatnonzero(np.isfinite(curve.delta))[-1]) for curve in curves]
    low, high = axes.get_ylim()
    gap = 0.08 * (high - low)
    floor = low + gap / 2
    for curve, end in sorted(ends, key=lambda item: item[0].delta[item[1]]):
        floor = max(curve.delta[end], floor)
        axes.annotate(
            curve.method,
            (curve.scales[end], floor),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=curve.style["color"],
            weight="bold",
            annotation_clip=False,
        )
        floor += gap


def _task_panel(axes: Axes, curves: Sequence[_Curve], task: str, first: bool) -> None:
    for curve in curves:
        if task in curve.normalised:
            curve.draw(axes, curve.normalised[task], width=1.2, dot=4.5)
    axes.axhline(1, color=LIGHT["muted"], lw=1, ls="--")
    axes.set_title(task, fontsize=8.5)
    axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
    axes.set_yticks([0, 0.5, 1])
    axes.locator_params(axis="x", nbins=3)
    axes.grid(axis="y")
    if first:
        axes.set_ylabel("normalised")
    else:
        axes.set_yticklabels([])
