"""The lock of an output: between users, in the place of something else, and on disks that cannot lock."""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from simomerge.core import exclusive
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and users of POSIX")


def names() -> set[str]:
    return {path.name for path in Path().iterdir()}


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_a_writer_of_another_user_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock belongs to root and may only be read by others; the folder is writable for all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exclusive, "_PATIENCE", 0.0)
    tmp_path.chmod(0o777)
    codes = []
    for held in (True, False):
        with exclusive.alone(Path("scene")) if held else nullcontext():
            child = os.fork()
            if child == 0:
                os.setgid(65534)
                os.setuid(65534)
                try:
                    with exclusive.alone(Path("scene")):
                        os._exit(1)
                except InputError as error:
                    os._exit(2 if "another process is writing it" in str(error) else 3)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert codes == [2, 1]


def test_a_lock_that_may_only_be_read_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exclusive, "_PATIENCE", 0.0)
    opened = os.open

    def of_another_user(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR and Path(path).exists():
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", of_another_user)
    Path(".scene.lock").touch()  # of a killed writer
    with exclusive.alone(Path("scene")):
        assert names() == {".scene.lock"}
        with pytest.raises(InputError, match="another process is writing it"), exclusive.alone(Path("scene")):
            pytest.fail("two writers")  # pragma: no cover
    assert names() == set()


def test_what_is_no_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exclusive, "_PATIENCE", 0.0)
    Path(".a.txt.lock").mkdir()
    Path(".b.txt.lock").symlink_to("elsewhere")
    os.mkfifo(".c.txt.lock")
    for name in ("a.txt", "b.txt", "c.txt"):
        with pytest.raises(
            InputError, match=rf"{name}: its lock .*\.{name}\.lock cannot be used .* Remove the lock if"
        ):
            atomic_write_text(name, "x")
    assert names() == {".a.txt.lock", ".b.txt.lock", ".c.txt.lock"}


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), None])
def test_a_lock_that_changes_hands_is_tried_again(
    error: OSError | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, or gone before it is locked, and not there any more when it is looked at."""
    monkeypatch.chdir(tmp_path)
    tries, opened = [], os.open

    def changing(path: Any, flags: int, *mode: int) -> int:
        if Path(path).name != ".scene.lock" or len(tries) >= 5:
            return opened(path, flags, *mode)
        if flags & os.O_CREAT:
            tries.append(flags)
            if error:
                raise error
        descriptor = opened(path, flags, *mode)
        Path(path).unlink()
        return descriptor

    monkeypatch.setattr(os, "open", changing)
    with exclusive.alone(Path("scene")):
        assert len(tries) == 5 and names() == {".scene.lock"}
    assert names() == set()
    tries.clear()
    monkeypatch.setattr(exclusive, "_PATIENCE", 0.0)
    message = "lock .* cannot be used .Permission denied" if error else "another process is writing it"
    with pytest.raises(InputError, match=message), exclusive.alone(Path("scene")):
        pytest.fail("no lock")  # pragma: no cover


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_a_lock_that_may_not_be_read_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder's umask is 077. Where the folder is not writable either, there is no lock, and no wait."""
    monkeypatch.chdir(tmp_path)
    for place, mode in ((".", 0o755), ("open", 0o777), ("shut", 0o755)):
        Path(place).mkdir(exist_ok=True)
        Path(place).chmod(mode)
    results = []
    for place, seconds in (("open", 0.3), ("open", None), ("shut", None)):
        lock = Path(place) / ".scene.lock"
        lock.touch(mode=0o600)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            try:
                with exclusive.alone(Path(place) / "scene"):
                    os._exit(1)
            except InputError as error:
                os._exit(2 if "cannot be used (Permission denied). Remove the lock" in str(error) else 3)
        if seconds:
            time.sleep(seconds)
            lock.unlink()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        results.append((code, time.monotonic() - started > exclusive._PATIENCE))
        lock.unlink(missing_ok=True)
    assert results == [(1, False), (2, True), (1, False)]


@pytest.mark.parametrize(("number", "locks"), [(errno.ENOLCK, False), (errno.ENOTSUP, False), (errno.EBADF, True)])
def test_only_disks_without_locks_need_none(
    number: int, locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int, flags: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exclusive, "_PATIENCE", 0.0)
    monkeypatch.setattr("fcntl.flock", failing)
    with pytest.raises(InputError, match=r"lock .* cannot be used") if locks else nullcontext():
        atomic_write_text("a.txt", "x")
    assert names() == ({".a.txt.lock"} if locks else {"a.txt"})
