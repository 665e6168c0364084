"""Files and folders that appear complete or not at all.

Content goes to a temporary sibling on the same file system, which is then renamed, or exchanged with the old folder;
both are atomic. After an exception, a full disk or a kill, the old content is still there. Only one process at a time
writes a path, and it removes what killed writers of that path left behind (see `simomerge.core.exclusive`). Small files
and replacements are flushed to the disk before the rename. A large new file that can be made again need not wait for
that (``durable=False``): a power failure within seconds may lose it, and nothing else.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from simomerge.core.assets import expanded, resolve_source
from simomerge.core.errors import InputError
from simomerge.core.exclusive import alone, in_use, is_temporary, put_in_place, remove, sibling
from simomerge.core.model_files import file_and_key
from simomerge.core.text import shown

_LARGE = 64_000_000
_on_bus_error: Any = None  # ctypes needs it to stay alive
_OF_THE_PLACE = frozenset(
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "EFBIG", "ENOTEMPTY", "EEXIST")
)
"""Errors that say something about the place to write. Others come from what is read, or from the machine."""
_LOST_PAGES = (
    b"Error: a file that is mapped into memory became shorter, or a disk or /dev/shm is full: repeat this when nobody"
    b" writes the inputs and there is space.\n"
)
_NO_FILES = "the system keeps no files there; choose another path"


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
    target = _destination(path)
    try:
        _make_folder(target.parent)
        with alone(target), _temporary(target) as temporary:
            if needed_bytes is not None:
                check_room(target, needed_bytes)
            with temporary.open("xb") as handle:
                yield handle
                handle.flush()
                if durable or _must_flush(handle.tell() if needed_bytes is None else needed_bytes, target):
                    os.fsync(handle.fileno())
            _keep_mode(temporary, target)
            temporary.replace(target)
            _sync(target.parent)
    except OSError as error:
        size = "" if needed_bytes is None else f" ({needed_bytes:,} bytes)"
        reason = _NO_FILES if _takes_no_files(target, error) else error.strerror or error
        raise InputError(f"Cannot write {target}{size}: {reason}{_remedy(error)}.") from error


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
        overwrite: replace an existing folder **and everything in it**. The two folders are exchanged in one step, then
            the old one is deleted. Where the system cannot do that, the old one is moved aside first; if the process is
            killed then, the next writer of the path brings it back.
        durable: see :func:`atomic_file`.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is false, ``path`` is a file, or there is no space left. Any
            other exception of the block passes through. The temporary folder is removed in every case.

    Example:
        >>> with atomic_folder("scene") as folder:
        ...     _ = (folder / "simo.json").write_text("{}", encoding="utf-8")
    """
    target = _destination(path)
    _check_target(target, overwrite)
    try:
        _make_folder(target.parent)
        with alone(target), _temporary(target) as temporary:
            _check_target(target, overwrite)
            temporary.mkdir()
            yield temporary
            for written in temporary.rglob("*"):
                if durable or _must_flush(written.stat().st_size, target):
                    _sync(written)
            _check_target(target, overwrite)
            _keep_mode(temporary, target)
            put_in_place(temporary, target)
            _sync(target.parent)
    except OSError as error:
        if _is_full(error):
            raise InputError(f"Cannot write the folder {target}: no space left{_remedy(error)}.") from error
        if _takes_no_files(target, error):
            raise InputError(f"Cannot write {target}: {_NO_FILES}.") from error
        if error.errno not in _OF_THE_PLACE:
            raise
        place = f" ({error.filename})" if error.filename and str(target) not in str(error.filename) else ""
        raise InputError(f"Cannot write {target}: {error.strerror}{place}{_remedy(error)}.") from error
    except Exception as error:  # safetensors and torch have exceptions of their own
        if isinstance(error, InputError):
            raise
        if _is_full(error):
            raise InputError(f"Cannot write the folder {target}: no space left{_remedy(error)}.") from error
        if (number := _errno(error)) in _OF_THE_PLACE:
            raise InputError(f"Cannot write {target}: {os.strerror(number)}.") from error
        raise


@contextmanager
def temporary_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder next to ``path``, for the files of an output that has several; it is removed at the end.

    Like the writers above it is alone, and it removes what killed writers of the path left.

    Raises:
        InputError: Another process is writing the path, or there can be no folder.
    """
    target = Path(path).absolute()
    with alone(target), _temporary(target) as temporary:
        try:
            temporary.mkdir()
        except OSError as error:
            raise InputError(f"Cannot write {target}: {error.strerror}{_remedy(error)}.") from error
        yield temporary


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder for files that can be made again: the argument, SIMOMERGE_CACHE, or the user's cache folder."""
    chosen = cache_dir or os.environ.get("SIMOMERGE_CACHE")
    if chosen:
        folder = expanded(chosen)
        if folder.parts[:1] and folder.parts[0].startswith("~"):
            raise InputError(f"the cache folder {chosen} begins with the home of an unknown user; give another path.")
        return folder
    import platformdirs

    return Path(platformdirs.user_cache_dir("simomerge"))


def check_not_current(path: Path) -> None:
    """Raise InputError if a path is the current folder or one that holds it, which cannot be replaced."""
    target, here = path.resolve(), Path.cwd()
    if target == here or target in here.parents:
        raise InputError(f"{str(path)!r} is the current folder or holds it: name a new folder.")


def check_absent(target: Path, overwrite: bool) -> None:
    """Raise InputError if ``target`` exists and must not be replaced."""
    if target.exists() and not overwrite:
        raise InputError(f"{target} already exists: choose another path, or pass overwrite to replace it.")


def check_apart(output: Path, inputs: Iterable[str | os.PathLike[str]], inside: bool = True) -> None:
    """Raise InputError if an output is one of the inputs, under any name, holds one, or lies in one.

    Args:
        output: What is to be written.
        inputs: Paths, with ``::KEY`` or not; hub ids and names that are no path are left out.
        inside: Whether an output that lies in an input is refused.
    """
    target = output.resolve()
    for given in inputs:
        try:
            source = Path(resolve_source(file_and_key(os.fspath(given))[0])).resolve()
            if not source.exists():
                continue
        except (OSError, RuntimeError):  # a name that no file can have, or a loop of links: its reader says so
            continue
        if target.exists() and (target.samefile(source) or target in source.parents):
            how = "holds" if target in source.parents else "is"
            raise InputError(f"{output} {how} the input {given} and would be replaced: choose another path.")
        if inside and source.is_dir() and source in target.parents:
            raise InputError(f"{output} lies inside the input {given}: choose a path outside it.")


def explain_lost_pages() -> None:
    """End with a message, and without leftovers, where memory that stands for a file is lost.

    A file that is mapped into memory becomes shorter, or the disk or /dev/shm has no room for what is written into it.
    The system then sends SIGBUS in the middle of the arithmetic, which no exception can follow. For programs, not for
    libraries: it changes how the process ends.
    """
    import ctypes
    import signal

    if not hasattr(signal, "SIGBUS"):
        return
    owner = os.getpid()

    def end(number: int) -> None:
        os.write(2, _LOST_PAGES)
        for left in in_use if os.getpid() == owner else ():  # a forked process writes nothing of its own
            remove(left)
        os._exit(2)

    global _on_bus_error
    _on_bus_error = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    ctypes.CDLL(None).signal(int(signal.SIGBUS), _on_bus_error)


def _destination(path: str | os.PathLike[str]) -> Path:
    """The absolute path to write, behind links, which stay. Raises InputError for a link that leads nowhere."""
    given = Path(path)
    try:
        target = given.resolve()
        if given.is_symlink() and not target.exists():
            raise InputError(f"{given} is a link to {target}, which does not exist: remove the link.")
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a name that no system takes
        if isinstance(error, InputError):
            raise
        raise InputError(f"Cannot write {shown(str(given))}: {error}.") from error
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error


def _check_target(target: Path, overwrite: bool) -> None:
    check_not_current(target)
    check_absent(target, overwrite)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file: choose the path of a folder.")


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """The path of a temporary sibling, which is removed at the end, if it is there."""
    # tempfile would make folders that only their owner can read, and the result would inherit that.
    temporary = sibling(target, "tmp")
    in_use.add(temporary)
    try:
        yield temporary
    finally:
        remove(temporary)
        in_use.discard(temporary)


def _keep_mode(temporary: Path, target: Path) -> None:
    """Give what replaces a file or folder its permissions."""
    with suppress(OSError):
        temporary.chmod(target.stat().st_mode & 0o7777)


def _must_flush(size: int, target: Path) -> bool:
    """Whether to flush even without ``durable``: for small files, which is quick, and where old content is at risk."""
    return size < _LARGE or target.exists()


def _errno(error: Exception) -> int:
    """The number of an error of the system; safetensors has it in the text of an exception of its own."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else 0)


def _takes_no_files(target: Path, error: OSError) -> bool:
    """Whether a new file or folder could not be made where there are no files of users, as in /proc."""
    failed = Path(os.fsdecode(error.filename or ""))
    temporary = failed.parent == target.parent and is_temporary(failed.name)
    return error.errno == errno.ENOENT and (failed in target.parents or temporary)


def _is_full(error: Exception) -> bool:
    # torch says it in words only.
    return _errno(error) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


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
