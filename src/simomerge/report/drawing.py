"""What all figures share: colours for light and dark pages, matplotlib settings, PNG files and inline SVG.

A figure is drawn once, in the light colours. Inside a page each of these colours becomes a CSS variable of the same
name, so the figure follows the reader's theme. The hues are from the palette of Okabe and Ito, which colour-blind
readers can tell apart, made darker or lighter where the background requires it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from simomerge.core.errors import InputError
from simomerge.report.facts import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE: dict[str, tuple[str, str]] = {
    "page": ("#f6f7f9", "#0d1117"),
    "card": ("#ffffff", "#161b22"),
    "ink": ("#1c2128", "#e6edf3"),
    "muted": ("#656d76", "#9aa4af"),
    "line": ("#d8dce1", "#333b45"),
    "grey": ("#8b949e", "#8b949e"),
    "plum": ("#b8679b", "#d99ac2"),
    "orange": ("#d55e00", "#f0883e"),
    "green": ("#009e73", "#2bc49a"),
    "blue": ("#0072b2", "#56b4e9"),
    "pink": ("#cc79a7", "#f2b8dc"),
    "gold": ("#b58900", "#f0e442"),
    "sky": ("#56b4e9", "#9ecbff"),
    "slate": ("#444c56", "#c9d1d9"),
    "positive": ("#2166ac", "#4393c3"),
    "negative": ("#b2182b", "#d6604d"),
    "on-strong": ("#fefefe", "#ffffff"),
}
"""Name of a CSS variable -> its colour on light and on dark pages. No two light colours are equal."""

LIGHT = {name: light for name, (light, _) in PALETTE.items()}
"""The colours that figures are drawn in."""

FAMILY_COLOURS = {"reference": "grey", "merge": "orange", "re-aligned": "blue", "control": "plum"}
"""Names of the colours of the families of rows, see `simomerge.report.facts.FAMILIES`."""

SERIES = tuple(LIGHT[name] for name in ("orange", "green", "sky", "pink", "gold", "blue", "slate"))
"""Colours of curves, in the order in which the curves appear."""

_VARIABLES = {light: f"var(--{name})" for name, light in LIGHT.items()}


class NothingToDraw(InputError):
    """The results do not contain what a figure shows."""


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib's settings while a figure is drawn or saved; the user's own settings are restored afterwards."""
    import matplotlib

    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": LIGHT["ink"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.edgecolor": LIGHT["line"],
        "axes.facecolor": LIGHT["card"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": LIGHT["line"],
        "grid.linewidth": 0.6,
        "text.color": LIGHT["ink"],
        "text.parse_math": False,
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.columnspacing": 1.4,
        "legend.borderaxespad": 0.2,
        "figure.labelsize": 9,
        "figure.facecolor": LIGHT["card"],
        "figure.constrained_layout.w_pad": 0.08,
        "savefig.facecolor": LIGHT["card"],
        # Text stays text: the files are small and use the reader's fonts. The salt makes equal figures equal bytes.
        "svg.fonttype": "none",
        "svg.hashsalt": "simomerge",
    }
    with matplotlib.rc_context(settings):
        yield


def numbers(values: Sequence[Any]) -> np.ndarray:
    """A float array in which missing numbers are NaN, which leaves a gap in a curve.

    Example:
        >>> numbers([0.5, None, float("inf")])
        array([0.5, nan, nan])
    """
    return np.array([np.nan if (known := finite(number)) is None else known for number in values], dtype=float)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. It does not use pyplot, so neither a display nor the user's backend matters."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@figure_style()
def png(figure: Figure) -> bytes:
    """The figure as a PNG file in light colours."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=160)
    return target.getvalue()


def inline_figures(figures: Mapping[str, Callable[[Any], Figure]], results: Any) -> dict[str, Markup]:
    """The figures that the results have the data for, as inline SVG, by heading.

    Args:
        figures: functions that draw a figure from the results or raise `NothingToDraw`, by heading.
        results: what the functions take.
    """
    found = {}
    for heading, draw in figures.items():
        with suppress(NothingToDraw):
            found[heading] = inline_svg(draw(results), heading)
    return found


@figure_style()
def inline_svg(figure: Figure, label: str) -> Markup:
    """The figure as an ``<svg>`` element that takes its colours and its font from the page's CSS variables.

    Args:
        figure: a figure that was drawn in the colours `LIGHT`.
        label: names the figure for screen readers, and is the prefix of its ids, so that the figures of a page with
            different labels do not clash.
    """
    prefix = re.sub(r"\W+", "-", label.lower())
    target = io.BytesIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(target.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
        for child in list(element):
            if _local(child.tag) in ("metadata", "style"):  # a <style> would apply to the whole page
                element.remove(child)
        element.attrib = {_local(key): _page_value(_local(key), text, prefix) for key, text in element.attrib.items()}
    width = float(root.attrib["viewBox"].split()[2])
    # Labels stay legible on a phone, where the figure scrolls, and do not become huge on a wide screen.
    style = f"stroke-linejoin: round; min-width: {width:.0f}px; max-width: {1.9 * width:.0f}px"
    root.attrib = {"role": "img", "aria-label": label, "viewBox": root.attrib["viewBox"], "style": style}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    """The name of a tag or an attribute without its XML namespace."""
    return name.rpartition("}")[2]


def _page_value(key: str, text: str, prefix: str) -> str:
    """An attribute of a file's SVG as it must be within a page."""
    if key == "id":
        return f"{prefix}-{text}"
    if key == "style":
        # The layout was measured with DejaVu Sans, which is wider than system fonts: text that fits there fits here.
        text = text.replace("'DejaVu Sans'", "var(--font)")
        return re.sub("#[0-9a-f]{6}", lambda colour: _VARIABLES.get(colour[0], colour[0]), text)
    return re.sub("#(?=[a-z])", f"#{prefix}-", text) if key in ("href", "clip-path") else text
