"""Text that came from files, as people may see it: in terminals, in Markdown and in error messages."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

LONGEST_MESSAGE = 2000
"""Characters of an error message."""

_LONGEST_VALUE = 300
_CONTROL: dict[int, str | None] = dict.fromkeys(
    (
        *range(32),
        *range(127, 160),
        0x061C,  # marks of the direction of writing, which can show a text in another order
        *range(0x200E, 0x2010),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x2070),
        *range(0xD800, 0xE000),  # halves of characters, which no encoding can write
    )
)
_CONTROL |= {ord(end): " " for end in "\n\t\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"}
_CONTROL_OF_LINES = {code: instead for code, instead in _CONTROL.items() if code != ord("\n")}
_MARKDOWN = {ord(sign): f"\\{sign}" for sign in "\\`*_{}[]<>#|!~"}

_USER = re.compile(r"(?<![\w+.-])(?!(?:abfss?|az|adl|wasbs?)://)([A-Za-z][\w+.-]*://)[^\s/?#]*@")
"""A URL up to its user and password. What lies before the @ in URLs of Azure is a container."""
_QUERY = re.compile(r"""(://[^\s?'"]*)\?[^\s'"]*[^\s'":;,.)\]]""")
"""A URL with its query, but not the punctuation of the sentence after it."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 6
_short.maxlevel = 3


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, or its class if it has none."""
    return first_line(error).partition(". ")[0].rstrip(".")


def printable(text: str) -> str:
    """A text of simomerge, which may have several lines, without control characters, which could change a terminal.

    Example:
        >>> printable("a\\x1b[31mb")
        'a[31mb'
    """
    return text.translate(_CONTROL_OF_LINES)


def one_line(text: object) -> str:
    """A name or value from a file as a part of one line: without control characters, and a space for a new line.

    Whatever builds a line for people puts it through this, so that no file can add lines to what simomerge says.

    Example:
        >>> one_line("depth\\nError: all\\tfine\\u202e")
        'depth Error: all fine'
    """
    return str(text).translate(_CONTROL)


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """A text without control characters, of at most ``most`` characters; what is too much is cut from its middle.

    Example:
        >>> shortened("x" * 100, 9)
        'xx ... xx'
    """
    text = printable(text)
    if len(text) <= most:
        return text
    half = (most - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def without_secrets(text: str) -> str:
    """A URL, or a text with URLs in it, without their queries, users and passwords, which may be keys to what is there.

    Example:
        >>> without_secrets("https://me:word@example.org/a.pth?token=secret: there is no such file.")
        'https://example.org/a.pth: there is no such file.'
    """
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def shown(value: Any) -> str:
    """A value from a file as a message quotes it: `repr`, in bounded time and length.

    Example:
        >>> shown("depth"), shown("x" * 100)[:10], shown(list(range(100)))
        ("'depth'", "'xxxxxxxxx", '[0, 1, 2, 3, 4, 5, ...]')
    """
    try:
        return shortened(_short.repr(value), _LONGEST_VALUE)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a {type(value).__name__}"


def size_text(size: float) -> str:
    """A number of bytes with three digits and its unit.

    Example:
        >>> size_text(98_304), size_text(20e9), size_text(1_234_567_890_123)
        ('98.3 kB', '20 GB', '1.23 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def markdown(text: object) -> str:
    """A text as plain words in Markdown: no markup, no HTML, no new line.

    Example:
        >>> markdown("<b>depth|x")
        '\\\\<b\\\\>depth\\\\|x'
    """
    return one_line(text).translate(_MARKDOWN)


def plain(value: Any) -> str:
    """A value as a recipe or the command line would have it, not as Python writes it.

    Example:
        >>> plain(None), plain(True), plain(0.30000000000000004), plain(["a", 1]), plain({"a": None})
        ('none', 'true', '0.3', '[a, 1]', '{a: none}')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(plain, value))}]"
    return str(value) or '""'


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of finished text, the head first, as an HTML table for notebooks. The first column is that of the names.

    Example:
        >>> html_table([["x"], ["a < b"]])
        '<table><thead><tr><th>x</th></tr></thead><tbody><tr><th>a &lt; b</th></tr></tbody></table>'
    """
    safe = [[escape(one_line(cell)) for cell in row] for row in rows]
    head = "".join(f"<th>{cell}</th>" for cell in safe[0])
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in safe[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
