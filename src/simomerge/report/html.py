"""A run as one HTML page that needs no other file and no network."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text
from simomerge.report.figures import overview_figure, scale_figure, task_figure
from simomerge.report.headline import sentences
from simomerge.report.results import FAMILIES, MISSING, Results, family, rows, seeds
from simomerge.report.shell import data_uri, embedded, shell
from simomerge.report.tables import columns

Gallery = Sequence[Mapping[str, Any]]
"""Per image: ``{"image": uint8 (H, W, 3), "predictions": {task: {column: uint8 (H, W, 3)}}}``."""

WORDS = {
    "Delta_MTL": "The mean over the tasks of the change of each task's metric against that task's expert, in %, "
    "with the sign turned so that higher is better. 0 is equal to the experts; -10 is ten percent worse on "
    "average. It has no lower end where an error can grow without one.",
    "normalised performance": "One task alone: its metric divided by its expert's, or the reverse where lower is "
    "better. 1 is equal to the expert, higher is better.",
    "experts": "One model per task, each with its own encoder. Everything else has one encoder for all tasks.",
    "re-align": "After merging, the features no longer match the heads. Without labels, a linear map mends that, "
    "folded into the heads in closed form (+fold per tap, +fold-cross from all taps), or training on the experts' "
    "predictions (+distill). With labels, tuning the heads (+heads), or low-rank adapters and the heads (+adapters). "
    "The merged encoder stays as it is.",
    "zero-shot+heads": "The control: the base encoder, nothing merged, its heads re-aligned on the same images. "
    "A merge is worth its while only as far as it ends above this row once it is re-aligned too.",
    "cost": "Seconds, steps, trained parameters and labelled images are what a row takes beyond the experts; the "
    "row of the experts has those of all experts.",
}

FIGURES: tuple[tuple[str, Callable[..., bytes], str], ...] = (
    (
        "Overview",
        overview_figure,
        "Delta_MTL of every row. A thin line is one standard deviation between seeds.",
    ),
    (
        "By task",
        task_figure,
        "Normalised performance of every row on every task. The dashed line is the expert.",
    ),
    (
        "By scale",
        scale_figure,
        "How far to go along the task vectors: 0 is the base encoder, dots are the scales that were chosen. "
        "Measured on the validation split with the experts' heads, so before any re-alignment.",
    ),
)


def write_report(
    path: str | os.PathLike[str], results: Results, gallery: Gallery = (), more: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write the page of a run: headline, table, figures, pictures, recipe. All or nothing.

    Args:
        path: the file to write or to replace.
        results: the content of a run's ``results.json``.
        gallery: images with predictions already in colours, uint8 (H, W, 3): per image ``image`` and
            ``predictions[task][column]``; the columns keep the order in which they first appear.
        more: further sections, each a heading and its HTML, shown after the figures.

    Returns:
        The path.

    Raises:
        InputError: a picture is not uint8 (H, W, 3), or the file cannot be written.

    Example:
        >>> write_report("report.html", {"title": "Rooms", "tasks": [], "rows": []}).name
        'report.html'
    """
    atomic_write_text(path, page(results, gallery, more))
    return Path(path)


def page(results: Results, gallery: Gallery = (), more: Sequence[tuple[str, str]] = ()) -> str:
    """The page that :func:`write_report` writes.

    Example:
        >>> page({"title": "Rooms", "tasks": [], "rows": []})[:15]
        '<!DOCTYPE html>'
    """
    title = escape(str(results.get("title") or "A run of simomerge"))
    sections = [
        ("How to read it", _definitions(WORDS, "words") + _family_key()),
        ("Results", _table(results)),
        *_figures(results),
        *more,
        ("Predictions", _gallery(gallery)),
        ("Recipe and machine", _settings(results)),
        ("Notes", _notes(results.get("notes") or [])),
    ]
    return shell(title, sentences(results), _about(results), sections)


def _about(results: Results) -> str:
    count = seeds(results)
    spread = {
        0: "",
        1: "One seed: the spread between runs is not known.",
    }.get(count, f"Means over {count} seeds ± one standard deviation.")
    return " · ".join(part for part in (str(results.get("created") or "").replace("T", " "), spread) if part)


def _definitions(entries: Mapping[str, str], kind: str = "") -> str:
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items())
    return f'<dl class="{kind}">\n' + "\n".join(lines) + "\n</dl>"


def _dot(name: str) -> str:
    return f'<span class="dot {name}"></span>'


def _family_key() -> str:
    lines = (f"<dt>{_dot(name)}{name}</dt><dd>{escape(text)}</dd>" for name, text in FAMILIES.items())
    return "<h3>Colours</h3>\n<dl>\n" + "\n".join(lines) + "\n</dl>"


def _table(results: Results) -> str:
    table = columns(results)
    heads = "".join(
        f"<th>{escape(name)}" + "".join(f"<small>{escape(part)}</small>" for part in rest) + "</th>"
        for name, *rest in (column.head for column in table)
    )
    lines = []
    for place, row in enumerate(rows(results)):
        first, *cells = (escape(column.cells[place]) for column in table)
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><td>{_dot(family(row.get('method', '')))}{first}</td>{numbers}</tr>")
    body = "\n".join(lines)
    head = f"<thead><tr>{heads}</tr></thead>"
    return f'<div class="scroll"><table class="numbers">\n{head}\n<tbody>\n{body}\n</tbody></table></div>'


def _figures(results: Results) -> Iterator[tuple[str, str]]:
    for head, draw, caption in FIGURES:
        if shown := embedded(draw, results, caption):
            yield head, shown


def _gallery(gallery: Gallery) -> str:
    if not gallery:
        return ""
    predictions = [maps for entry in gallery for maps in entry["predictions"].values()]
    names = list(dict.fromkeys(name for maps in predictions for name in maps))
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("", "input", *names))
    bodies = "\n".join(_gallery_rows(entry, names, place) for place, entry in enumerate(gallery, start=1))
    return f'<div class="scroll"><table class="gallery">\n<thead><tr>{heads}</tr></thead>\n{bodies}\n</table></div>'


def _gallery_rows(entry: Mapping[str, Any], names: Sequence[str], place: int) -> str:
    """One image: a line per task, the input beside the first."""
    lines: list[str] = []
    for task, maps in entry["predictions"].items():
        shown = "" if lines else _image(entry["image"], f"image {place}")
        cells = [_image(maps[name], f"{task} of image {place}: {name}") if name in maps else "" for name in names]
        cells = [f"<td>{cell}</td>" for cell in (shown, *cells)]
        lines.append(f"<tr><th>{escape(task)}</th>{''.join(cells)}</tr>")
    return "<tbody>\n" + "\n".join(lines) + "\n</tbody>"


def _image(pixels: Any, alt: str) -> str:
    from PIL import Image

    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise InputError(f"{alt}: expected uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}; colour it first.")
    height, width = pixels.shape[:2]
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="PNG", optimize=True)
    source = data_uri(target.getvalue(), "image/png")
    return f'<img src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _settings(results: Results) -> str:
    parts = [
        f"<div><h3>{key.capitalize()}</h3>\n{_definitions(dict(_flat(results[key])))}</div>"
        for key in ("recipe", "machine")
        if results.get(key)
    ]
    return f'<div class="columns">\n{"".join(parts)}\n</div>' if parts else ""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names: ``training.steps``."""
    for key, setting in settings.items():
        if isinstance(setting, Mapping) and setting:
            yield from _flat(setting, f"{prefix}{key}.")
        elif isinstance(setting, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(map(str, setting)) or MISSING
        else:
            yield f"{prefix}{key}", MISSING if setting is None else str(setting)


def _notes(notes: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(str(note))}</li>" for note in notes) + "\n</ul>" if notes else ""
