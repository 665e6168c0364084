"""The exceptions for what a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong: a path, a key, a shape, a value.

    The message names the thing and the mend in one or two sentences. The command line prints it without a
    traceback and exits with status 2; in Python it is an ordinary ``ValueError``.
    """


class DivergedError(InputError):
    """A training whose loss is no number any more: its learning rate is too high."""
