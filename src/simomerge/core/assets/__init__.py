"""The files inside the package, the embedded base encoder, and paths as users write them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

EMBEDDED_BASE = "rooms-base"
"""Name of the embedded base wherever a hub id or a folder can be given."""


def resolve_source(source: str | Path) -> str:
    """The folder of the embedded base if its name is given. Others stay, with ``~`` expanded where it names a user.

    Example:
        >>> Path(resolve_source("rooms-base")).name
        'rooms-base'
        >>> resolve_source("facebook/dinov2-base")
        'facebook/dinov2-base'
    """
    if str(source) == EMBEDDED_BASE:
        return str(Path(__file__).parent / EMBEDDED_BASE)
    if "://" not in str(source):
        return str(expanded(source))
    return str(source)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` expanded. A path whose ``~`` names no known user stays as it is.

    Example:
        >>> expanded("~no-such-user/x").name, expanded("photos").name
        ('x', 'photos')
    """
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)
