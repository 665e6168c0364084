"""One writer for each path: a lock next to it, what killed writers left behind, and the exchange of old and new.

A writer of ``scene`` holds ``.scene.lock`` and makes ``.scene.XXXX.tmp``. Whoever holds the lock may remove every other
temporary sibling, because nobody is writing it any more. The system frees the lock of a process that was killed.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simomerge.core.errors import InputError

_PATIENCE = 2.0
"""Seconds to wait for another writer. Small files are written in less."""
_LONGEST_NAME = 200
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EROFS, errno.EIO)
"""Errors of disks without locks, such as some network disks."""
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
"""Errors where a new file cannot be made, whatever is in its place."""
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


in_use: set[Path] = set()
"""The temporary files, folders and locks of this process."""


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Hold the lock of a path while the block writes it, after removing what killed writers left.

    Where the disk cannot lock, the block runs without a lock, and nothing is removed. Inside a temporary folder of this
    process there is no other writer, and no lock.

    Raises:
        InputError: Another process is writing it, perhaps one of another user, or its lock cannot be used.
    """
    if any(parent.name.startswith(".") and parent.suffix == ".tmp" for parent in target.parents):
        yield
        return
    lock = target.with_name(f".{target.name[:_LONGEST_NAME]}.lock")
    descriptor = _acquired(lock, target)
    try:
        if descriptor is not None:
            in_use.add(lock)
            _recover(target)
            remove_leftovers(target)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock.unlink()  # while it is held, so that no other process can hold it
            in_use.discard(lock)
            os.close(descriptor)


def sibling(target: Path, kind: str) -> Path:
    """A new name next to a path, for a temporary file or folder of this kind."""
    return target.with_name(f".{target.name[:_LONGEST_NAME]}.{uuid.uuid4().hex[:12]}.{kind}")


def is_temporary(name: str) -> bool:
    """Whether a relative path is that of a temporary file, of a file in a temporary folder, or of a lock.

    Example:
        >>> is_temporary("images/.a.png.0123456789ab.tmp/0"), is_temporary("images/a.png")
        (True, False)
    """
    return re.search(r"(^|/)\.[^/]*\.([0-9a-f]{12}\.tmp|lock)(/|$)", name) is not None


def remove_leftovers(target: Path) -> None:
    """Remove temporary files of killed writers of a path. Call it only where no other process can be writing it."""
    for left in _siblings(target, "tmp"):
        remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it is there, as far as the system lets us."""
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a folder to ``target``. A folder that is there is exchanged with it, so the temporary name holds the old.

    Raises:
        OSError: It cannot be renamed; everything is as before.
    """
    if not target.exists():
        temporary.rename(target)
    elif not _exchanged(temporary, target):
        aside = sibling(target, "old")
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        remove(aside)


def _siblings(target: Path, kind: str) -> list[Path]:
    return list(target.parent.glob(f".{glob.escape(target.name[:_LONGEST_NAME])}.{'[0-9a-f]' * 12}.{kind}"))


def _recover(target: Path) -> None:
    """Bring back a folder that a killed writer had moved aside, or remove it if the new one is in place."""
    for aside in _siblings(target, "old"):
        if target.exists():
            remove(aside)
        else:
            aside.rename(target)


def _acquired(lock: Path, target: Path) -> int | None:
    """The descriptor of a locked file; None where there can be no such file, or nothing can be locked.

    Raises:
        InputError: Another process holds the lock, there is something else in its place, or this user may not read it.
    """
    if os.name != "posix":
        return None
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return _locked(lock)
        except OSError as error:
            denied = isinstance(error, PermissionError) and not os.access(lock.parent, os.W_OK | os.X_OK)
            if denied or error.errno in (*_CANNOT_LOCK, *_NO_FILE):
                return None  # where there can be no file, writing next to it fails with the better message
            if time.monotonic() > end:
                raise _unusable(lock, target, error) from error
        time.sleep(0.01)


def _locked(lock: Path) -> int:
    """The descriptor of a lock's file that is locked and in its place. Raises OSError if that cannot be now."""
    import fcntl

    descriptor = _opened(lock)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileExistsError(errno.EEXIST, "it is no file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # a network disk may lock only what is open for writing
            if error.errno in _CANNOT_LOCK:
                with suppress(OSError):
                    lock.unlink()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.lstat()):
                return descriptor
        raise BlockingIOError(errno.EAGAIN, "its last holder has removed it")
    except BaseException:
        os.close(descriptor)
        raise


def _opened(lock: Path) -> int:
    """A descriptor of a lock's file. That of another user may be read only, which is enough for flock."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # a named pipe in its place is not waited for
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        with suppress(OSError):
            return os.open(lock, os.O_RDONLY | flags)
        raise


def _unusable(lock: Path, target: Path, error: OSError) -> InputError:
    if isinstance(error, BlockingIOError):
        return InputError(f"{target}: another process is writing it. Wait until it has ended, or choose another path.")
    return InputError(
        f"Cannot write {target}: its lock {lock} cannot be used ({error.strerror}). Remove the lock if nobody"
        f" is writing {target.name}, or choose another path."
    )


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; False where the system or the disk cannot do that."""
    import ctypes

    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if exchange is None:
        return False
    if exchange(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))
