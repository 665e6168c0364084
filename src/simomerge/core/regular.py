"""Readers open regular files only: opening a named pipe waits for a writer, and a device may have no end."""

from __future__ import annotations

import stat
from pathlib import Path

from simomerge.core.errors import InputError

_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}


def check_regular(path: Path, remedy: str) -> None:
    """Raise InputError if a path is a folder, pipe, socket or device. A missing file passes; opening it reports that.

    Args:
        path: What is to be opened.
        remedy: What to give instead, appended to the error message.

    Example:
        >>> check_regular(Path("/dev/null"), "give an image.")
        Traceback (most recent call last):
        simomerge.core.errors.InputError: /dev/null is no file but a device; give an image.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "device")
        raise InputError(f"{path} is no file but a {kind}; {remedy}")
