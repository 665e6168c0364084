"""What every HTML page of simomerge has: one file, no script, figures for light and for dark."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from simomerge.core.errors import InputError

# The browser itself refuses whatever the page would fetch.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def shell(title: str, said: Sequence[str], about: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page: what is said on top, then the sections that have content, which is HTML already.

    Example:
        >>> shell("Rooms", ["Nothing yet."], "", [])[:15]
        '<!DOCTYPE html>'
    """
    first, *more = (escape(sentence).replace(" %", "&nbsp;%") for sentence in said)
    body = "\n".join(f"<section>\n<h2>{head}</h2>\n{content}\n</section>" for head, content in sections if content)
    css = files("simomerge.report").joinpath("page.css").read_text("utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<p class="headline">{first}</p>
{"".join(f'<p class="second">{sentence}</p>' for sentence in more)}
<p class="about">{escape(about)}</p>
</header>
{body}
</main>
</body>
</html>
"""


def embedded(draw: Callable[..., bytes], results: Any, caption: str) -> str:
    """A figure twice, for light and for dark pages: an embedded SVG does not see the page's colours.

    Empty where nothing of its kind was measured: the page says less.
    """
    try:
        light, dark = (data_uri(draw(results, theme), "image/svg+xml") for theme in ("light", "dark"))
    except InputError:
        return ""
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(caption)}"></picture>'
    )
    return f'<figure><div class="scroll">{picture}</div><figcaption>{escape(caption)}</figcaption></figure>'


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as the address of an image in the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
