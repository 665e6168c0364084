"""Three figures of a run, as SVG or PNG: the overview, the tasks, the scale.

Each function takes the results and returns the bytes of a finished picture. Every bar and every curve is
labelled where it is; colours tell the family of a row (or the merge method of a curve) and are from the
palette of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from simomerge.core.errors import InputError
from simomerge.report.results import FAMILIES, MISSING, Results, Value, family, finite, rows, signed, task_names, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ThemeName = Literal["light", "dark"]
Format = Literal["svg", "png"]

METHOD_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
SYSTEM_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: paper, text, secondary text, hairlines, one per family, one per merge method."""

    paper: str
    ink: str
    muted: str
    line: str
    families: Mapping[str, str]
    methods: Sequence[str]


THEMES: dict[str, Theme] = {
    "light": Theme(
        paper="#ffffff",
        ink="#1c2128",
        muted="#656d76",
        line="#d8dce1",
        families={"reference": "#8b949e", "merge": "#d55e00", "re-aligned": "#0072b2", "control": "#b8679b"},
        methods=("#d55e00", "#009e73", "#56b4e9", "#cc79a7"),
    ),
    "dark": Theme(
        paper="#161b22",
        ink="#e6edf3",
        muted="#9aa4af",
        line="#333b45",
        families={"reference": "#8b949e", "merge": "#f0883e", "re-aligned": "#56b4e9", "control": "#d99ac2"},
        methods=("#f0883e", "#2bc49a", "#56b4e9", "#d99ac2"),
    ),
}


def overview_figure(results: Results, theme: ThemeName = "light", format: Format = "svg") -> bytes:
    """Delta_MTL of every row as horizontal bars; 0 = the experts.

    A row far below all others is cut off at the left edge, and its label says its value.

    Args:
        results: the content of a run's ``results.json``.
        theme: ``"light"`` or ``"dark"``.
        format: ``"svg"`` or ``"png"``.

    Raises:
        InputError: no row has a Delta_MTL.

    Example:
        >>> overview_figure({"rows": [{"method": "ties", "delta_mtl": {"mean": -12.3}}]}, format="png")[1:4]
        b'PNG'
    """
    methods, values = _measured(results, "delta_mtl")
    with _drawing(theme) as style:
        figure = _figure(7.6, 0.8 + 0.32 * len(methods))
        axes = figure.subplots()
        _bars(axes, style, methods, values, zero=0.0)
        axes.set_xlim(_visible([cell.mean for cell in values if cell.mean is not None]))
        _numbers_at_ends(axes, style, values)
        _name_rows(axes, style, methods)
        axes.set_xlabel("Delta_MTL in %, 0 = the experts, higher is better")
        _family_legend(figure, style, methods)
        return _rendered(figure, format)


def task_figure(results: Results, theme: ThemeName = "light", format: Format = "svg") -> bytes:
    """Normalised performance of every row, one group of bars per task; the dashed line at 1 = the experts.

    Args and Raises as :func:`overview_figure`.

    Example:
        >>> row = {"method": "ties", "normalised": {"depth": {"mean": 0.8}}}
        >>> task_figure({"tasks": [{"name": "depth"}], "rows": [row]}, format="png")[1:4]
        b'PNG'
    """
    tasks = task_names(results)
    table = [row for row in rows(results) if any(value(row, "normalised", task).mean is not None for task in tasks)]
    if not table:
        raise InputError("the results hold no normalised performance: nothing to draw.")
    methods = [row["method"] for row in table]
    with _drawing(theme) as style:
        figure = _figure(max(7.6, 2.0 + 1.75 * len(tasks)), 0.9 + 0.3 * len(methods))
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            values = [value(row, "normalised", task) for row in table]
            _bars(axes, style, methods, values, zero=1.0)
            _numbers_at_edge(axes, values)
            widest = max([1.0, *(cell.mean + (cell.std or 0) for cell in values if cell.mean is not None)])
            axes.set_xlim(0, 1.36 * widest)
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.set_title(task, loc="left", color=style.ink)
        _name_rows(panels[0], style, methods)
        figure.supxlabel("normalised performance, 1 = the expert, higher is better", color=style.muted)
        _family_legend(figure, style, methods)
        return _rendered(figure, format)


def scale_figure(results: Results, theme: ThemeName = "light", format: Format = "svg") -> bytes:
    """Delta_MTL against the scale of every merge method, and each task's normalised performance below.

    The band is one standard deviation between seeds, a dot the scale chosen with a seed.

    Args and Raises as :func:`overview_figure`.

    Example:
        >>> curve = {"scales": [0, 0.5, 1], "delta_mtl": {"mean": [-60, -20, -40]}, "chosen": [0.5]}
        >>> scale_figure({"tasks": [], "scale_curves": {"ties": curve}}, format="png")[1:4]
        b'PNG'
    """
    curves = results.get("scale_curves") or {}
    if not curves:
        raise InputError("the results hold no scale curves: nothing to draw.")
    tasks = [task for task in task_names(results) if any(task in _normalised(curve) for curve in curves.values())]
    with _drawing(theme) as style:
        figure = _figure(7.6, 5.2 if tasks else 3.4)
        grid = figure.add_gridspec(2 if tasks else 1, max(len(tasks), 1), height_ratios=[1.9, 1][: 2 if tasks else 1])
        _delta_panel(figure.add_subplot(grid[0, :]), style, curves)
        for place, task in enumerate(tasks):
            _task_panel(figure.add_subplot(grid[1, place]), style, curves, task, first=place == 0)
        figure.supxlabel("scale of the task vectors (measured on the validation split)", color=style.muted)
        return _rendered(figure, format)


@contextmanager
def _drawing(theme: ThemeName) -> Iterator[Theme]:
    """Matplotlib's settings while one figure is drawn; the user's own are back afterwards."""
    import matplotlib

    style = THEMES[theme]
    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.labelcolor": style.muted,
        "axes.edgecolor": style.line,
        "axes.facecolor": style.paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": style.ink,
        "figure.constrained_layout.w_pad": 0.08,
        "text.parse_math": False,
        "figure.labelsize": 9,
        "xtick.color": style.muted,
        "ytick.color": style.muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "figure.facecolor": style.paper,
        "savefig.facecolor": style.paper,
        # Text stays text: small files, and the reader's own fonts. Fixed salt: the same picture, the same bytes.
        "svg.fonttype": "none",
        "svg.hashsalt": "simomerge",
    }
    with matplotlib.rc_context(settings):
        yield style


def _figure(width: float, height: float) -> Figure:
    # Without pyplot: no global list of figures, no display, whatever backend the user has chosen.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _rendered(figure: Figure, format: Format) -> bytes:
    target = io.BytesIO()
    if format == "png":
        figure.savefig(target, format="png", dpi=160)
        return target.getvalue()
    figure.savefig(target, format="svg", metadata={"Date": None})
    # The layout is measured with DejaVu, which is wider than these: what fits there fits here.
    return target.getvalue().decode().replace("'DejaVu Sans'", SYSTEM_FONTS).encode()


def _measured(results: Results, key: str) -> tuple[list[str], list[Value]]:
    found = [(row["method"], value(row, key)) for row in rows(results)]
    found = [(method, cell) for method, cell in found if cell.mean is not None]
    if not found:
        raise InputError(f"no row of the results has a {key}: nothing to draw.")
    return [method for method, _ in found], [cell for _, cell in found]


def _bars(axes: Axes, style: Theme, methods: Sequence[str], values: Sequence[Value], zero: float) -> None:
    """One horizontal bar per row, the first row on top, and the line where the experts are."""
    for place, (method, cell) in enumerate(zip(methods, values, strict=True)):
        if cell.mean is None:
            continue
        axes.barh(place, cell.mean, height=0.66, color=style.families[family(method)], zorder=2)
        if cell.std:
            axes.plot(
                [cell.mean - cell.std, cell.mean + cell.std],
                [place, place],
                color=style.ink,
                lw=1.1,
                zorder=3,
            )
    axes.axvline(zero, color=style.muted, lw=1, ls="--" if zero else "-", zorder=4)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=style.line, lw=0.6)
    axes.set_axisbelow(True)


def _numbers_at_ends(axes: Axes, style: Theme, values: Sequence[Value]) -> None:
    """Each bar's number beyond its end, or inside it where the end is out of view."""
    low, _ = axes.get_xlim()
    for place, cell in enumerate(values):
        if cell.mean is None:
            continue
        text, side = f"{signed(cell.mean)} %", -1 if cell.mean < 0 else 1
        at, colour = cell.mean + side * (cell.std or 0), style.ink
        if cell.mean < low:
            text, side, at, colour = f"◂ {text}", 1, low, style.paper
        axes.annotate(text, (at, place), xytext=(4 * side, 0), textcoords="offset points", color=colour, fontsize=8,
                      ha="left" if side > 0 else "right", va="center", zorder=5)  # fmt: skip


def _numbers_at_edge(axes: Axes, values: Sequence[Value]) -> None:
    """The numbers in a column of their own: most bars end near the dashed line, which would strike them out."""
    for place, cell in enumerate(values):
        text = MISSING if cell.mean is None else f"{cell.mean:.2f}"
        axes.annotate(text, (1, place), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=8)


def _name_rows(axes: Axes, style: Theme, methods: Sequence[str]) -> None:
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(axis="y", labelcolor=style.ink, pad=6)


def _visible(means: Sequence[float]) -> tuple[float, float]:
    """Limits of the Delta_MTL axis with room for labels; below -100 % a row may leave the view."""
    lowest = min(means)
    if lowest < -100:
        lowest = max(lowest, 1.3 * min((mean for mean in means if mean >= -100), default=lowest))
    span = max(*means, 0.0) - min(lowest, 0.0) or 1.0
    return min(lowest, 0.0) - 0.22 * span, max(*means, 0.0) + 0.14 * span


def _family_legend(figure: Figure, style: Theme, methods: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    present = [name for name in FAMILIES if name in {family(method) for method in methods}]
    handles = [Patch(color=style.families[name], label=name) for name in present]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, handlelength=0.9,
                  handleheight=0.9, columnspacing=1.4, borderaxespad=0.2)  # fmt: skip


def _normalised(curve: Mapping[str, Any]) -> Mapping[str, Any]:
    return curve.get("normalised") or {}


def _numbers(values: Sequence[Any] | None, length: int) -> np.ndarray:
    """Float array (length,); what is missing is NaN, which leaves a gap."""
    known = [finite(number) for number in values or []]
    known = [*known, *[None] * length][:length]
    return np.array([np.nan if number is None else number for number in known])


def _delta_panel(axes: Axes, style: Theme, curves: Mapping[str, Any]) -> None:
    ends: list[tuple[str, str, float, float]] = []
    lowest = []
    for place, (method, curve) in enumerate(curves.items()):
        colour = style.methods[place % len(style.methods)]
        scales = _numbers(curve["scales"], len(curve["scales"]))
        mean = _numbers(curve["delta_mtl"]["mean"], len(scales))
        std = np.nan_to_num(_numbers(curve["delta_mtl"].get("std"), len(scales)))
        if std.any():
            axes.fill_between(scales, mean - std, mean + std, color=colour, alpha=0.18, lw=0)
        axes.plot(scales, mean, color=colour, ls=METHOD_LINES[place % len(METHOD_LINES)], lw=1.8)
        _mark_chosen(axes, style, colour, curve, scales, mean, size=7)
        if np.isfinite(mean).any():
            last = np.flatnonzero(np.isfinite(mean))[-1]
            ends.append((method, colour, scales[last], mean[last]))
            lowest.append((np.nanmin(mean), np.nanmax(mean)))
    axes.axhline(0, color=style.muted, lw=1, ls="--")
    axes.annotate("experts", (1, 0), xycoords=("axes fraction", "data"), xytext=(-2, 3), textcoords="offset points",
                  ha="right", fontsize=8, color=style.muted)  # fmt: skip
    _limit_delta(axes, lowest)
    _label_ends(axes, ends)
    axes.set_title("Delta_MTL in %, dots: the chosen scales", loc="left", color=style.ink)
    axes.grid(axis="y", color=style.line, lw=0.6)


def _limit_delta(axes: Axes, extremes: Sequence[tuple[float, float]]) -> None:
    """Far below the experts one curve is as useless as another: keep the part that is of interest in view."""
    if not extremes:
        return
    best, worst = max(high for _, high in extremes), min(low for low, _ in extremes)
    lowest = max(worst, min(-100.0, 3 * min(high for _, high in extremes)))
    span = max(best, 0.0) - lowest or 1.0
    axes.set_ylim(lowest - 0.05 * span, max(best, 0.0) + 0.1 * span)


def _label_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """The method's name right of its curve's end, inside the view, and clear of the other names."""
    low, high = axes.get_ylim()
    gap = 0.08 * (high - low)
    floor = low + gap / 2
    for method, colour, x, y in sorted(ends, key=lambda end: end[3]):
        floor = max(y, floor)
        axes.annotate(method, (x, floor), xytext=(6, 0), textcoords="offset points", va="center", color=colour,
                      weight="bold", annotation_clip=False)  # fmt: skip
        floor += gap


def _task_panel(axes: Axes, style: Theme, curves: Mapping[str, Any], task: str, first: bool) -> None:
    for place, curve in enumerate(curves.values()):
        colour = style.methods[place % len(style.methods)]
        scales = _numbers(curve["scales"], len(curve["scales"]))
        mean = _numbers(_normalised(curve).get(task), len(scales))
        axes.plot(scales, mean, color=colour, ls=METHOD_LINES[place % len(METHOD_LINES)], lw=1.2)
        _mark_chosen(axes, style, colour, curve, scales, mean, size=4.5)
    axes.axhline(1, color=style.muted, lw=1, ls="--")
    axes.set_title(task, loc="left", color=style.ink, fontsize=8.5)
    axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
    axes.set_yticks([0, 0.5, 1])
    axes.locator_params(axis="x", nbins=3)
    axes.grid(axis="y", color=style.line, lw=0.6)
    if first:
        axes.set_ylabel("normalised")
    else:
        axes.set_yticklabels([])


def _mark_chosen(
    axes: Axes,
    style: Theme,
    colour: str,
    curve: Mapping[str, Any],
    scales: np.ndarray,
    mean: np.ndarray,
    size: float,
) -> None:
    known = np.isfinite(mean)
    chosen = [scale for scale in map(finite, curve.get("chosen") or []) if scale is not None]
    if chosen and known.any():
        heights = np.interp(chosen, scales[known], mean[known])
        axes.plot(chosen, heights, "o", ms=size, color=colour, mec=style.paper, mew=1.2, zorder=4)
