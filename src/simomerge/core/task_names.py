"""The names that tasks can have. A name is a key of samples, a column of tables, and the name of a file."""

from __future__ import annotations

from simomerge.core.errors import InputError

COLUMNS = ("image", "split")
"""Columns of a table of images that are no tasks. Samples hold their image under the first name."""

_NPZ = ("file", "allow_pickle", "export")
"""Arguments of the function of numpy that writes NPZ files, and what such a file of an export has beside its maps."""


def check_task_name(name: str) -> None:
    """Check that a task can have a name.

    Raises:
        InputError: It is not an identifier, or it has another meaning in tables or in files of predictions.

    Example:
        >>> check_task_name("image")
        Traceback (most recent call last):
        simomerge.core.errors.InputError: no task can be called 'image', which is a column of every table: rename it.
    """
    if not name.isidentifier():
        raise InputError(f"{name!r} cannot be the name of a task: use letters, digits and underscores.")
    if name in COLUMNS:
        raise InputError(f"no task can be called {name!r}, which is a column of every table: rename it.")
    if name in _NPZ:
        raise InputError(f"no task can be called {name!r}, which has another meaning in NPZ files: rename it.")
