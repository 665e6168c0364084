"""The lock of an output: between users, in the place of something else, and on disks that cannot lock."""

from __future__ import annotations

import errno
import os
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
    Path(".a.txt.lock").mkdir()
    Path(".b.txt.lock").symlink_to("elsewhere")
    for name in ("a.txt", "b.txt"):
        with pytest.raises(
            InputError, match=rf"{name}: its lock .*\.{name}\.lock cannot be used .* Remove the lock if"
        ):
            atomic_write_text(name, "x")
    assert names() == {".a.txt.lock", ".b.txt.lock"}


@pytest.mark.parametrize(("number", "locks"), [(errno.ENOLCK, False), (errno.ENOTSUP, False), (errno.EBADF, True)])
def test_only_disks_without_locks_need_none(
    number: int, locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int, flags: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fcntl.flock", failing)
    with pytest.raises(InputError, match=r"lock .* cannot be used") if locks else nullcontext():
        atomic_write_text("a.txt", "x")
    assert names() == ({".a.txt.lock"} if locks else {"a.txt"})
