"""Warnings of what may be wrong."""

from __future__ import annotations

import sys
import warnings

from simomerge.core.text import one_line, shortened, without_secrets


class Caution(UserWarning):
    """A warning of simomerge. The command line prints these, and no warnings of other packages."""


def warn(message: str) -> None:
    """Warn at the line of code outside of simomerge that called it.

    The message becomes one line without control characters, of at most 2,000 characters: it may quote names from files.
    URLs in it are without queries and passwords.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn("8 images are few.")
        >>> str(caught[0].message), caught[0].category.__name__
        ('8 images are few.', 'Caution')
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "simomerge":
        frame, level = frame.f_back, level + 1
    warnings.warn(shortened(without_secrets(one_line(message))), Caution, stacklevel=level)
