"""A run as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text
from simomerge.core.text import one_line
from simomerge.report.drawing import FAMILY_COLOURS, PALETTE, inline_figures
from simomerge.report.facts import FAMILIES, MISSING, Results, family, rows, seeds, sentences
from simomerge.report.figures import overview_figure, scale_figure, task_figure
from simomerge.report.recommendation import recommendation
from simomerge.report.table import columns

Gallery = Sequence[Mapping[str, Any]]
"""Per image: ``{"image": uint8 (H, W, 3), "predictions": {task: {column: uint8 (H, W, 3)}}}``, and perhaps
``legends``: by task ``{"entries": [(name, RGB)], "bar": uint8 (N, 3) or None, "low": text, "high": text}``."""

FIGURES = {"Overview": overview_figure, "By task": task_figure, "By scale": scale_figure}
"""The figures of a run by heading; their captions are in the template."""


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("simomerge.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: one_line(value) if type(value) is str else value,  # Markup is a class of its own
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["image"] = _image
    environment.filters["bar"] = lambda colours, label: _image(np.asarray(colours)[None], label)
    environment.filters["rgb"] = lambda colour: "rgb({}, {}, {})".format(*map(int, colour))
    return environment


def render_html(template: str, **values: Any) -> Markup:
    """HTML from one of this package's templates. Values are escaped unless they are `markupsafe.Markup`.

    Example:
        >>> page = render_html("base.html", title="Rooms & more", sentences=["Nothing was measured."], about="")
        >>> page[:15], "<h1>Rooms &amp; more</h1>" in page
        (Markup('<!DOCTYPE html>'), True)
    """
    return Markup(_environment().get_template(template).render(palette=PALETTE, **values))


def write_report(
    path: str | os.PathLike[str],
    results: Results,
    gallery: Gallery = (),
    more: Sequence[tuple[str, str]] = (),
    folder: str | None = None,
) -> Path:
    """Write the page of a run: headline, table, figures, pictures, recipe. The file is replaced as a whole.

    Args:
        path: the file to write or to replace.
        results: the content of a run's ``results.json``.
        gallery: images with predictions that are coloured already, uint8 (H, W, 3): per image ``image`` and
            ``predictions[task][column]``; the columns keep the order in which they first appear.
        more: further sections, which follow the figures: pairs of a heading and its content. HTML content must be
            `markupsafe.Markup`, other strings are escaped; sections without content are left out.
        folder: The run folder as its reader may type it; that of the file by default.

    Returns:
        The path.

    Raises:
        InputError: a picture is not uint8 (H, W, 3), or the file cannot be written.

    Example:
        >>> write_report("report.html", {"title": "Rooms", "tasks": [], "rows": []}).name
        'report.html'
    """
    folder = Path(path).parent.as_posix() if folder is None else folder
    atomic_write_text(path, report_page(results, gallery, more, folder))
    return Path(path)


def report_page(results: Results, gallery: Gallery = (), more: Sequence[tuple[str, str]] = (), folder: str = "") -> str:
    """The HTML that `write_report` writes into a run folder.

    Example:
        >>> report_page({"title": "Rooms", "tasks": [], "rows": []})[:15]
        Markup('<!DOCTYPE html>')
    """
    table, advice = columns(results), recommendation(results, folder)
    return render_html(
        "run.html",
        title=results.get("title") or "A run of simomerge",
        sentences=advice.sentences if advice else sentences(results),
        advice=advice,
        story=sentences(results) if advice else [],
        created=str(results.get("created") or "").replace("T", " "),
        seeds=seeds(results),
        families={name: (FAMILY_COLOURS[name], meaning) for name, meaning in FAMILIES.items()},
        realignments=results.get("realignments") or [],
        tables={
            heading: ([column.head for column in chosen], list(zip(*(column.cells for column in chosen), strict=True)))
            for heading, chosen in (
                ("Results", [column for column in table if not column.cost]),
                ("Cost", [table[0], *(column for column in table if column.cost)]),
            )
        },
        row_colours=[FAMILY_COLOURS[family(row)] for row in rows(results)],
        figures=inline_figures(FIGURES, results),
        more=[(heading, content) for heading, content in more if content],
        gallery=gallery,
        settings={name: dict(_flat(results[name])) for name in ("recipe", "machine") if results.get(name)},
        notes=results.get("notes") or [],
    )


def _image(pixels: Any, label: str) -> Markup:
    """An ``<img>`` element that contains its pixels, uint8 (H, W, 3)."""
    from PIL import Image

    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise InputError(f"{label}: expected uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}; colour it first.")
    height, width = pixels.shape[:2]
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="PNG", optimize=True)
    content = base64.b64encode(target.getvalue()).decode("ascii")
    image = '<img src="data:image/png;base64,{}" alt="{}" width="{}" height="{}">'
    return Markup(image).format(content, label, width, height)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names: ``training.steps``."""
    for key, setting in settings.items():
        if isinstance(setting, Mapping) and setting:
            yield from _flat(setting, f"{prefix}{key}.")
        elif isinstance(setting, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(map(str, setting)) or MISSING
        else:
            yield f"{prefix}{key}", MISSING if setting is None else str(setting)
