"""Arrays that simomerge keeps on disk for itself, in work folders and caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from simomerge.core.errors import InputError
from simomerge.core.regular import check_regular


def kept_array(path: Path, remedy: str, dtype: Any, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """An array in an NPY file, mapped into memory.

    Args:
        path: The file.
        remedy: What to do if it is damaged, appended to the error message.
        dtype: What it must hold.
        shape: What it must have; None for a length that is not known, or for any shape.

    Raises:
        InputError: The file is missing, truncated or damaged, or holds another array.

    Example:
        >>> np.save("map0.npy", np.ones((3, 2), np.float16))
        >>> kept_array(Path("map0.npy"), "remove the folder.", np.float16, (None, 2)).shape
        (3, 2)
    """
    check_regular(path, remedy)
    try:
        found = open_memmap(path, mode="r")
    except Exception as error:  # Python reads the header: damaged ones raise many kinds of errors
        raise InputError(f"{path}: cannot be read ({error}); {remedy}") from error
    fits = shape is None or (
        len(shape) == found.ndim and all(want in (None, size) for want, size in zip(shape, found.shape, strict=True))
    )
    if found.dtype != dtype or not fits:
        raise InputError(f"{path}: holds {found.dtype} of shape {found.shape}, not what was kept here; {remedy}")
    return found
