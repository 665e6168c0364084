"""Files and folders that appear complete or not at all.

Content goes to a temporary sibling on the same file system, which is then renamed; a rename is atomic. After an
exception, a full disk or a kill, the old content is still there. Small files and replacements are flushed to the disk
before the rename. A large new file that can be made again need not wait for that (``durable=False``): a power failure
within seconds may lose it, and nothing else.
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
    """Yield a binary file that replaces ``path`` when the block ends without an exception.

    Args:
        path: the file to write or replace; missing parent folders are created.
        needed_bytes: size of the complete file, if known: compared with the free space before writing.
        durable: flush the file to the disk before the rename. Without it, a power failure may lose a large new file:
            use that only for content that can be made again from files that still exist.

    Raises:
        InputError: no space left, no permission, or any other OSError while writing; the message names the path.

    Example:
        >>> with atomic_file("notes.bin") as handle:
        ...     _ = handle.write(b"all or nothing")
    """
    target = Path(path)
    temporary = _temporary_sibling(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed_bytes is not None:
            check_room(target, needed_bytes)
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            if durable or _must_flush(handle.tell() if needed_bytes is None else needed_bytes, target):
                os.fsync(handle.fileno())
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        size = "" if needed_bytes is None else f" ({needed_bytes:,} bytes)"
        raise InputError(f"Cannot write {target}{size}: {error.strerror or error}{_remedy(error)}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_room(path: Path, needed: int) -> None:
    """Raise InputError if the disk has less free space than the ``needed`` bytes for a file or an existing folder."""
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if needed > free:
        full = OSError(errno.ENOSPC, f"No space left on device, {free:,} bytes are free")
        raise InputError(f"Cannot write {path} ({needed:,} bytes): {full.strerror}{_remedy(full)}.")


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
        path: the folder to create; missing parent folders are created.
        overwrite: replace an existing folder **and everything in it**. The old folder is moved aside, the new one is
            moved in, then the old one is deleted: at every moment one of the two is complete.
        durable: see :func:`atomic_file`.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is false, ``path`` is a file, or there is no space left. Any
            other exception of the block passes through. The temporary folder is removed in every case.

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
            if durable or _must_flush(written.stat().st_size, target):
                _sync(written)
        _check_target(target, overwrite)
        _swap(temporary, target)
        _sync(target.parent)
    except (PermissionError, NotADirectoryError) as error:  # not a directory: a parent is a file
        raise InputError(f"Cannot write {error.filename or target}: {error.strerror}.") from error
    except Exception as error:
        if not isinstance(error, InputError) and _is_full(error):
            raise InputError(f"Cannot write the folder {target}: no space left{_remedy(error)}.") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_absent(target: Path, overwrite: bool) -> None:
    """Raise InputError if ``target`` exists and must not be replaced."""
    if target.exists() and not overwrite:
        raise InputError(f"{target} already exists: choose another path, or pass overwrite to replace it.")


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of killed writers of ``path``. Call it only where no other process can be writing it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _check_target(target: Path, overwrite: bool) -> None:
    check_absent(target, overwrite)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: choose the path of a folder.")


def _swap(temporary: Path, target: Path) -> None:
    """Two renames; if the second fails, the first is undone."""
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
    # tempfile would make folders that only their owner can read, and the result would inherit that.
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")


def _must_flush(size: int, target: Path) -> bool:
    """Whether to flush even without ``durable``: for small files, which is quick, and where old content is at risk."""
    return size < _LARGE or target.exists()


def _is_full(error: Exception) -> bool:
    # safetensors and torch report a full disk in exceptions of their own, recognisable only by their text.
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or os.strerror(errno.ENOSPC) in str(error)


def _remedy(error: Exception) -> str:
    return "; free some space or choose another disk" if _is_full(error) else ""


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. Only a full disk is an error."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some systems cannot flush a folder or a read-only file; that is no reason to fail.
        if _is_full(error):
            raise
