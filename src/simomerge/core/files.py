"""Files and folders that are either complete or not there.

Everything is written to a temporary sibling (same file system, so a rename is atomic) and renamed into place. An
exception, a full disk or a kill leaves the old content, never half of the new. What is small, or replaces something, is
flushed to the disk before; for a large new file nobody waits that long: should the power fail in the seconds after, it
has to be made again, and nothing else is lost.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from simomerge.core.errors import InputError

_LARGE = 64_000_000


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], needed_bytes: int | None = None, durable: bool = True
) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of ``path`` when the block ends without an exception.

    Args:
        path: the file to write or to replace; missing parent folders are made.
        needed_bytes: size of the whole file, if known: checked against the free space first.
        durable: wait until the disk has it. Without, a large new file may be lost with the power: only for what can be
            made again from files that are still there.

    Raises:
        InputError: no space left, no permission, or any other OSError of writing; the message names the path.

    Example:
        >>> with atomic_file("notes.bin") as handle:
        ...     _ = handle.write(b"all or nothing")
    """
    target = Path(path)
    temporary = _temporary_sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed_bytes is not None:
            _check_room(target.parent, needed_bytes)
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            if durable or _waits(handle.tell() if needed_bytes is None else needed_bytes, target):
                os.fsync(handle.fileno())
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        size = "" if needed_bytes is None else f" ({needed_bytes:,} bytes)"
        reason = f"{error.strerror or error}{_mend(error)}"
        raise InputError(f"Cannot write {target}{size}: {reason}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _waits(size: int, target: Path) -> bool:
    """Whether a file of this size is flushed to the disk even where that is not asked for: nothing old is at risk."""
    return size < _LARGE or target.exists()


def check_room(folder: Path, needed: int) -> None:
    """Refuse what the disk has no room for. Raises InputError."""
    try:
        _check_room(folder, needed)
    except OSError as error:
        raise InputError(f"Cannot write {folder} ({needed:,} bytes): {error.strerror}{_mend(error)}.") from error


def _check_room(folder: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(errno.ENOSPC, f"No space left on device, {free:,} bytes are free")


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``, all or nothing. Raises InputError like :func:`atomic_file`.

    Example:
        >>> atomic_write_bytes("weights.bin", b"abc")
    """
    with atomic_file(path, needed_bytes=len(content)) as handle:
        handle.write(content)


def atomic_write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write ``content`` to ``path`` as UTF-8, all or nothing. Raises InputError like :func:`atomic_file`.

    Example:
        >>> atomic_write_text("simo.json", "{}")
    """
    atomic_write_bytes(path, content.encode("utf-8"))


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` when the block ends without an exception.

    Args:
        path: the folder to make; missing parent folders are made.
        overwrite: replace an existing folder **and all it holds**. The old one is moved aside, the new one
            moved in, the old one deleted: at every moment one of the two is there in full.
        durable: as of `atomic_file`.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is false, ``path`` is a file, or there is no space left.
            Any other exception of the block passes through; the temporary folder is gone either way.

    Example:
        >>> with atomic_folder("scene") as folder:
        ...     _ = (folder / "simo.json").write_text("{}", encoding="utf-8")
    """
    target = Path(path).resolve()
    _check_target(target, overwrite)
    temporary = _temporary_sibling(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for written in temporary.rglob("*"):
            if durable or _waits(written.stat().st_size, target):
                _sync(written)
        _check_target(target, overwrite)
        _swap(temporary, target)
        _sync(target.parent)
    except (PermissionError, NotADirectoryError) as error:  # the latter: a parent is a file
        raise InputError(f"Cannot write {error.filename or target}: {error.strerror}.") from error
    except Exception as error:
        if not isinstance(error, InputError) and _is_full(error):
            raise InputError(f"Cannot write the folder {target}: no space left{_mend(error)}.") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise InputError(f"{target} already exists: choose another path, or pass overwrite to replace it.")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: choose the path of a folder.")


def _swap(temporary: Path, target: Path) -> None:
    """Two renames; if the second fails, the first is taken back."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = _temporary_sibling(target)
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _temporary_sibling(target: Path) -> Path:
    # Not tempfile: its folders are readable by their owner only, and the result would inherit that.
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")


def remove_leftovers(path: Path) -> None:
    """Remove what writers of ``path`` left that were killed; call it where nobody else can be writing it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    # safetensors and torch report a full disk in exceptions of their own, recognisable by their text only.
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or os.strerror(errno.ENOSPC) in str(error)


def _mend(error: Exception) -> str:
    return "; free some space or choose another disk" if _is_full(error) else ""


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk; best effort but for a disk found to be full."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Not every system lets a folder or a read-only file be flushed; that is no reason to fail.
        if _is_full(error):
            raise
