"""Files at URLs such as ``s3://bucket/photos``: everything that fsspec has a file system for.

Reading code works on local files, so it takes a copy: `local_copy` keeps one in the cache folder. Tar files are too
large for that and are read where they are (`RemoteFile`). Credentials are those that fsspec's packages find by
themselves, in the environment or in their configuration files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from simomerge.core.errors import InputError
from simomerge.core.exclusive import is_temporary
from simomerge.core.files import cache_folder, check_room, temporary_folder
from simomerge.core.progress import progress
from simomerge.core.text import first_sentence, without_secrets

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created")
"""Entries of a file's description that change with its content; the first that a file system has counts."""
_URL = re.compile(r"[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*://")
_AT_ONCE = 128
"""Files that are copied together: file systems of object stores do that at the same time."""


def is_url(place: Any) -> bool:
    """Whether a text names a place that is not a local path.

    Example:
        >>> is_url("s3://bucket/photos"), is_url("photos"), is_url("nyuv2:s3://bucket/nyuv2")
        (True, False, False)
    """
    return isinstance(place, str) and _URL.match(place) is not None


def last_name(url: str) -> str:
    """The name of a file or folder without where it is.

    Example:
        >>> last_name("s3://bucket/photos/")
        'photos'
        >>> last_name("https://example.org/a.pth?token=secret")
        'a.pth'
    """
    return PurePosixPath(shown_url(url).partition("://")[2]).name


def shown_url(url: str) -> str:
    """A URL for messages and files: without its query, user and password, which may be keys to what is there.

    Example:
        >>> shown_url("https://me:word@example.org/my files/a.pth?token=secret")
        'https://example.org/my files/a.pth'
    """
    return without_secrets(url.partition("?")[0])


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, which is read where it is.

    Args:
        url: The URL of the file.
        size: Bytes; None if the server does not say it.
        version: Changes with the content, as far as the file system says it.
    """

    url: str
    size: int | None
    version: str

    def __str__(self) -> str:
        return shown_url(self.url)

    @property
    def stamp(self) -> int:
        """A number that stands for size and version: the date of local copies, in seconds, the same on all machines."""
        return int(hashlib.sha256(f"{self.size} {self.version}".encode()).hexdigest()[:8], 16) >> 1

    @contextmanager
    def open(self, passing: tuple[type[Exception], ...] = ()) -> Iterator[BinaryIO]:
        """The file as a stream, which reads ahead.

        Raises:
            InputError: The file cannot be read. Exceptions of the block become one too, except those to be passed on.
        """
        with _file_system(self.url, passing) as (system, path), system.open(path, "rb") as handle:
            try:
                handle.seek(1), handle.seek(0)
            except (OSError, ValueError) as error:  # streams of HTTP say that they can seek
                raise self._whole_only() from error
            if self.size is None:
                raise self._whole_only()
            self.read(0, 1)
            yield handle

    def read(self, start: int, size: int) -> bytes:
        """Part of the file. Raises InputError."""
        with _file_system(self.url) as (system, path):
            content: bytes = system.cat_file(path, start=start, end=start + size)
            if len(content) > size:
                raise self._whole_only()
            return content

    def _whole_only(self) -> RemoteError:
        return RemoteError(f"{self}: its server does not give parts of a file; copy the file to a disk.")


def remote_files(url: str) -> dict[str, RemoteFile]:
    """The files of a folder and its subfolders by their relative names, or one file under the name "".

    Raises:
        InputError: There is no such file or folder, access is denied, or the package for the protocol is missing.
    """
    with _file_system(url) as (system, path):
        system.invalidate_cache()  # or files that another machine has written stay unknown
        whole = system.info(path)
        found = system.find(path, detail=True) if whole["type"] == "directory" else {path: whole}
        if not found:
            raise FileNotFoundError(path)
    files, root = {}, url.rstrip("/")
    for name, about in found.items():
        if name.endswith("/"):  # the mark of an empty folder
            continue
        relative = name[len(path) :].strip("/")
        if relative and {"", ".", ".."} & set(relative.split("/")):
            raise InputError(
                f"{shown_url(url)}: a local folder cannot have a file of the name {relative!r}; rename it."
            )
        version = next((about[key] for key in _VERSIONS if about.get(key)), "")
        version = str(version.timestamp() if hasattr(version, "timestamp") else version)
        files[relative] = RemoteFile(f"{root}/{relative}".rstrip("/"), about["size"], version)
    return files


def names_there(url: str) -> list[str]:
    """The names that `remote_files` would give; none if there is no such file or folder. Raises InputError."""
    with _file_system(url) as (system, path):
        system.invalidate_cache()
        return [name[len(path) :].strip("/") for name in system.find(path)]


@cache
def local_copy(url: str) -> Path:
    """A copy of a file or folder in the cache folder: files that are new or have changed are copied, others removed.

    Each process looks once.

    Raises:
        InputError: See `remote_files`; or the disk of the cache folder has no room.
    """
    copy_here(url, local_place("urls", url))
    return local_place("urls", url)


def local_place(kind: str, url: str) -> Path:
    """The path in the cache folder that belongs to a URL: a digest stands for its query, user and password."""
    public = shown_url(url)
    protocol, _, path = public.partition("://")
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    if public != url:
        parts.insert(0, f"{protocol}-{hashlib.sha256(url.encode()).hexdigest()[:16]}")
    return cache_folder() / kind / protocol / Path(*parts)


def copy_here(url: str, place: Path) -> None:
    """Make a local file or folder equal to that at a URL. One process of a machine at a time copies to a place.

    Raises:
        InputError: See `local_copy`.
    """
    files = remote_files(url)
    with one_at_a_time(place):
        changed = {name: file for name, file in files.items() if not _is_copy(place / name, file)}
        place.parent.mkdir(parents=True, exist_ok=True)
        check_room(place.parent, sum(file.size or 0 for file in changed.values()))
        _copy(url, changed, place)
        for path in place.glob("**/*") if place.is_dir() else ():
            name = path.relative_to(place).as_posix()
            if name not in files and not is_temporary(name) and path.is_file():
                path.unlink(missing_ok=True)


def _copy(url: str, files: Mapping[str, RemoteFile], place: Path) -> None:
    done, total = 0, sum(file.size or 0 for file in files.values())
    waiting = iter(files.items())
    while some := list(islice(waiting, _AT_ONCE)):
        with temporary_folder(place) as temporary:
            here = [temporary / str(number) for number in range(len(some))]
            with _file_system(url) as (system, path), _this_disk(place):
                system.get([f"{path}/{name}".rstrip("/") for name, _ in some], list(map(str, here)))
            for (name, file), copied in zip(some, here, strict=True):
                if file.size not in (None, copied.stat().st_size):
                    raise InputError(f"{file}: changed while it was copied; repeat this when nobody writes it.")
                os.utime(copied, (file.stamp, file.stamp))
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                copied.replace(place / name)
                done += file.size or 0
        progress("copy", done // 10**6, max(1, total // 10**6), f"MB of {shown_url(url)}")


@contextmanager
def _this_disk(place: Path) -> Iterator[None]:
    """Name the local disk where it fails, and not the file system of the URL."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise InputError(
            f"{place}: cannot be written ({error.strerror}); set SIMOMERGE_CACHE to a folder on another disk."
        ) from error


def _is_copy(path: Path, file: RemoteFile) -> bool:
    if not path.is_file() or (file.size is None and not file.version):
        return False
    found = path.stat()
    return file.size in (None, found.st_size) and int(found.st_mtime) == file.stamp


def copy_there(place: Path, url: str, last: str | None = None, exact: bool = False) -> None:
    """Copy a local file or folder to a URL.

    Args:
        last: The name of a file in the folder that shows a complete folder: it is removed first, and written last.
        exact: Remove the files at the URL that the local folder does not have.

    Raises:
        InputError: There is no such bucket, writing is not allowed, or the package for the protocol is missing.
    """
    folder = place.is_dir()
    names = (
        sorted(each.relative_to(place).as_posix() for each in place.rglob("*") if each.is_file()) if folder else [""]
    )
    with _file_system(url) as (system, path):
        system.invalidate_cache()
        if folder and last in names and system.exists(f"{path}/{last}"):
            system.rm_file(f"{path}/{last}")
        for some in ([name for name in names if name != last], [name for name in names if name == last]):
            targets = [f"{path}/{name}".rstrip("/") for name in some]
            for parent in {target.rpartition("/")[0] for target in targets} if not system.async_impl else ():
                system.makedirs(parent, exist_ok=True)  # object stores have no folders, and would make a bucket
            if some:
                system.put([str(place / name) for name in some], targets)
        kept = {f"{path}/{name}" for name in names}
        for name in system.find(path) if exact and folder else ():
            if name not in kept:
                system.rm_file(name)  # rm would take * and ? in names for patterns


def remove_there(url: str) -> None:
    """Remove a file. Raises InputError."""
    with _file_system(url) as (system, path):
        system.rm_file(path)


@contextmanager
def one_at_a_time(place: Path) -> Iterator[None]:
    """Let one process of this machine at a time run the block for a path; others wait.

    Raises:
        InputError: The cache folder cannot be written.
    """
    from filelock import FileLock

    key = hashlib.sha256(str(place.absolute()).encode()).hexdigest()[:16]
    locks = cache_folder() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / key)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise InputError(
            f"Cannot write to the cache folder {locks.parent} ({error}): set SIMOMERGE_CACHE to another."
        ) from error
    try:
        yield
    finally:
        lock.release()


class RemoteError(InputError):
    """A file at a URL could not be read or written."""


class Unreachable(RemoteError, OSError):
    """A failure that another attempt may not have, such as one of the network."""


@contextmanager
def _file_system(url: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[tuple[Any, str]]:
    """fsspec's file system for a URL and the path in it; exceptions of the block become an InputError, or pass."""
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        yield system, path.rstrip("/")
    except Exception as error:  # every package has exceptions of its own
        if isinstance(error, (InputError, *passing)):
            raise
        if isinstance(error, FileNotFoundError):
            error = _of_server(error.__cause__) or error
        lasting = isinstance(error, (ImportError, FileNotFoundError, PermissionError, ValueError))
        lasting |= _status(error) in (401, 403)
        raise (RemoteError if lasting else Unreachable)(f"{shown_url(url)}: {_problem(url, error)}") from error


def _of_server(cause: BaseException | None) -> Exception | None:
    """The failure of an HTTP server or of the way to it, each of which fsspec takes for a file that is not there."""
    by_http = isinstance(cause, OSError) or type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if by_http and isinstance(cause, Exception) and _status(cause) not in (404, 410) else None


def _status(error: BaseException | None) -> int | None:
    """The status code of an HTTP server's answer."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


def _problem(url: str, error: Exception) -> str:
    """What a failure means, and what to do: one or two sentences."""
    protocol = url.partition("://")[0]
    if isinstance(error, ImportError):
        package = _PACKAGES.get(protocol)
        return f"{protocol}:// needs a package: {f'pip install {package}' if package else first_sentence(error)}."
    if isinstance(error, FileNotFoundError):
        return "there is no such file, folder or bucket."
    if isinstance(error, ValueError) and "rotocol" in str(error):
        return f"fsspec knows no protocol {protocol!r}; give a URL such as s3://BUCKET/FOLDER."
    if isinstance(error, PermissionError) or _status(error) in (401, 403) or "credentials" in str(error).lower():
        return f"access is denied ({first_sentence(error)}); check the credentials (docs/clusters.md)."
    return f"the file system of {protocol}:// fails ({first_sentence(error)[:200]})."
