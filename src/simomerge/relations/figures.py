"""Figures of how tasks relate: sweeps along task vectors, pairs of merges, norms, cosines, CKA; as SVG or PNG.

Each function takes what `simomerge.relations.Relations.to_dict` gives and returns the bytes of a finished picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.report.figures import Format, Theme, ThemeName, _drawing, _figure, _rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = Mapping[str, Any]

PAGE_WIDTH = 7.6
"""Inches."""

TASK_COLOURS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#444c56"),
    "dark": ("#56b4e9", "#f0883e", "#2bc49a", "#d99ac2", "#f0e442", "#9ecbff", "#c9d1d9"),
}
"""Of Okabe and Ito, darker or lighter where the paper asks for it."""

_DIVERGING = {
    "light": ("#b2182b", "#f7f7f7", "#2166ac"),
    "dark": ("#d6604d", "#21262d", "#4393c3"),
}
"""Against, unrelated, with: around zero the paper's own grey."""


def sweep_figure(found: Found, theme: ThemeName = "light", format: Format = "svg") -> bytes:
    """One panel per task vector: every task's performance against lambda, the vector's own task thick.

    Args:
        found: of `Relations.to_dict`.
        theme: ``"light"`` or ``"dark"``.
        format: ``"svg"`` or ``"png"``.

    Raises:
        InputError: there are no sweeps.

    Example:
        >>> curve = {"depth": {"depth": [0.5, 1.0]}}
        >>> found = {"tasks": ["depth"], "judged_by": "labels", "sweeps": {"lambdas": [0, 1], "performance": curve}}
        >>> sweep_figure(found, format="png")[1:4]
        b'PNG'
    """
    sweeps, tasks = _section(found, "sweeps"), found["tasks"]
    with _drawing(theme) as style:
        figure, panels = _panels(len(tasks), 2.5, 2.3, columns=5, sharey=True)
        for place, (axes, primary) in enumerate(zip(panels, tasks, strict=True)):
            for task, colour in _coloured(tasks, theme):
                curve = _numbers(sweeps["performance"][primary][task])
                own = task == primary
                axes.plot(sweeps["lambdas"], curve, color=colour, lw=2.4 if own else 1.3, zorder=3 if own else 2)
            axes.axhline(1, color=style.muted, lw=0.8, ls="--")
            axes.axvline(1, color=style.muted, lw=0.8, ls="--")
            axes.set_title(f"along {primary}", loc="left", color=style.ink)
            axes.set_xticks([0, 0.5, 1, 1.5] if sweeps["lambdas"][-1] >= 1.5 else [0, 0.5, 1])
            axes.grid(axis="y", color=style.line, lw=0.6)
            if place == 0:
                _limit(axes, sweeps, tasks)
        what = "normalised performance" if found["judged_by"] == "labels" else "agreement with the experts"
        figure.supylabel(what, color=style.muted)
        figure.supxlabel("lambda: 0 = the base, 1 = the expert", color=style.muted)
        _task_legend(figure, tasks, theme)
        return _rendered(figure, format)


def pair_figure(found: Found, theme: ThemeName = "light", format: Format = "svg") -> bytes:
    """What each task (row) gains over its expert, in percent, when it is merged with one other (column).

    Args and Raises as `sweep_figure`.

    Example:
        >>> merges = [{"tasks": ["a", "b"], "gains": {"a": -1.0, "b": -2.0}}]
        >>> pair_figure({"tasks": ["a", "b"], "groups": {"merges": merges}}, format="png")[1:4]
        b'PNG'
    """
    groups, tasks = _section(found, "groups"), found["tasks"]
    table = np.full((len(tasks), len(tasks)), np.nan)
    for merge in groups["merges"]:
        if len(merge["tasks"]) == 2:
            i, j = (tasks.index(task) for task in merge["tasks"])
            table[i, j], table[j, i] = (merge["gains"][task] for task in merge["tasks"])
    with _drawing(theme) as style:
        size = max(3.4, 1.4 + 0.75 * len(tasks))
        # As wide as the other figures, which a page shows at one width: a small table is not to fill it.
        rest = max(PAGE_WIDTH - size, 0.1)
        figure = _figure(size + rest, 0.75 * size + 0.3)
        axes, beside = figure.subplots(1, 2, width_ratios=(size, rest))
        beside.set_visible(False)
        limit = float(np.nanmax(np.abs(table), initial=1e-6))
        _heatmap(axes, style, theme, tasks, table, (-limit, limit), "{:+.1f}")
        axes.set_title("gain of the row's task beside the column's, in %", loc="left", color=style.ink)
        return _rendered(figure, format)


def norm_figure(found: Found, theme: ThemeName = "light", format: Format = "svg") -> bytes:
    """The norm of every task vector, relative to the base's weights, block by block.

    Args and Raises as `sweep_figure`.
    """
    parts, tasks = _blocks(found), found["tasks"]
    with _drawing(theme) as style:
        figure = _figure(PAGE_WIDTH, 3.0)
        axes = figure.subplots()
        for place, (_task, colour) in enumerate(_coloured(tasks, theme)):
            values = _numbers([part["relative"][place] for part in parts]) * 100
            axes.plot(range(len(parts)), values, color=colour, lw=1.8, marker="o", ms=3.5)
        axes.set_xticks(range(len(parts)), [part["name"] for part in parts])
        axes.set_ylim(0)
        axes.grid(axis="y", color=style.line, lw=0.6)
        axes.set_xlabel("block")
        axes.set_title("norm of the task vector, in % of the base's weights there", loc="left", color=style.ink)
        _task_legend(figure, tasks, theme)
        return _rendered(figure, format)


def cosine_figure(found: Found, theme: ThemeName = "light", format: Format = "svg") -> bytes:
    """Cosines of the task vectors, in the whole encoder and in every block.

    Args and Raises as `sweep_figure`.
    """
    parts, tasks = [_section(found, "geometry")[0], *_blocks(found)], found["tasks"]
    tables = [_without_diagonal(part["cosine"]) for part in parts]
    limit = max(float(np.nanmax(np.abs(table), initial=1e-6)) for table in tables)
    titles = ["whole encoder", *(f"block {part['name']}" for part in parts[1:])]
    return _heatmaps(tables, titles, tasks, theme, format, (-limit, limit), "{:.2f}", "cosine of two task vectors")


def cka_figure(found: Found, theme: ThemeName = "light", format: Format = "svg") -> bytes:
    """CKA of base and experts, tap by tap.

    Args and Raises as `sweep_figure`.
    """
    cka = _section(found, "cka")
    tables = [_without_diagonal(table) for table in cka["cka"]]
    titles = [f"block {tap}" for tap in cka["taps"]]
    least = min(float(np.nanmin(table, initial=1.0)) for table in tables)
    # The paper's grey at the least value: all are above zero, and differences are what is looked for.
    limits = (min(2 * least - 1, 0.999), 1.0)
    return _heatmaps(tables, titles, cka["names"], theme, format, limits, "{:.2f}", "linear CKA of the patch features")


def _section(found: Found, name: str) -> Any:
    if not found.get(name):
        raise InputError(f"the section {name!r} was not measured: nothing to draw.")
    return found[name]


def _blocks(found: Found) -> list[Any]:
    return [part for part in _section(found, "geometry") if part["name"].isdecimal()]


def _coloured(tasks: Sequence[str], theme: ThemeName) -> list[tuple[str, str]]:
    colours = TASK_COLOURS[theme]
    return [(task, colours[place % len(colours)]) for place, task in enumerate(tasks)]


def _numbers(values: Sequence[Any]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _without_diagonal(table: Sequence[Sequence[Any]]) -> np.ndarray:
    """The diagonal says nothing, and would set the colours' range."""
    found = np.stack([_numbers(row) for row in table])
    np.fill_diagonal(found, np.nan)
    return found


def _panels(count: int, width: float, height: float, columns: int = 5, **options: Any) -> tuple[Figure, list[Axes]]:
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = _figure(max(across * width, 6.0), down * height + 0.7)
    grid = figure.subplots(down, across, squeeze=False, **options).flatten()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, list(grid[:count])


def _limit(axes: Axes, sweeps: Found, tasks: Sequence[str]) -> None:
    """Far below everything one curve is as useless as another."""
    values = np.concatenate([_numbers(sweeps["performance"][a][b]) for a in tasks for b in tasks])
    if not np.isfinite(values).any():
        return
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    low = max(low, -0.5)
    axes.set_ylim(min(low, 0.9) - 0.03, min(high, 3.0) + 0.05)


def _task_legend(figure: Figure, tasks: Sequence[str], theme: ThemeName) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=2.4, label=task) for task, colour in _coloured(tasks, theme)]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 8), frameon=False,
                  handlelength=1.2, columnspacing=1.4, borderaxespad=0.2)  # fmt: skip


def _heatmaps(
    tables: Sequence[np.ndarray],
    titles: Sequence[str],
    names: Sequence[str],
    theme: ThemeName,
    format: Format,
    limits: tuple[float, float],
    text: str,
    what: str,
) -> bytes:
    with _drawing(theme) as style:
        size = max(1.7, 0.36 * len(names) + 0.6)
        across = max(2, int(13 / (size + 0.25)))
        columns = math.ceil(len(tables) / math.ceil(len(tables) / across))  # rows of one length, nearly
        figure, panels = _panels(len(tables), size + 0.25, size, columns)
        for place, (axes, title, table) in enumerate(zip(panels, titles, tables, strict=True)):
            first, last_row = place % columns == 0, place + columns >= len(tables)
            _heatmap(axes, style, theme, names, table, limits, text, first, last_row)
            axes.set_title(title, loc="left", color=style.ink)
        figure.suptitle(what, x=0.02, ha="left", fontsize=9, color=style.muted)
        return _rendered(figure, format)


def _heatmap(
    axes: Axes,
    style: Theme,
    theme: ThemeName,
    names: Sequence[str],
    table: np.ndarray,
    limits: tuple[float, float],
    text: str,
    name_rows: bool = True,
    name_columns: bool = True,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("against-with", _DIVERGING[theme])
    axes.imshow(table, cmap=colours.with_extremes(bad=style.paper), vmin=limits[0], vmax=limits[1], aspect="auto")
    middle, reach = sum(limits) / 2, (limits[1] - limits[0]) / 2
    for i, j in np.argwhere(np.isfinite(table)):
        dark = theme == "dark" or abs(table[i, j] - middle) > 0.6 * reach
        colour = "#ffffff" if dark else style.ink
        axes.text(j, i, text.format(round(table[i, j], 2) + 0.0), ha="center", va="center", fontsize=7, color=colour)
    short = [name if len(name) <= 13 else f"{name[:12]}…" for name in names]
    axes.set_xticks(range(len(names)), short if name_columns else [""] * len(names), rotation=45, ha="right")
    axes.set_yticks(range(len(names)), short if name_rows else [""] * len(names))
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
