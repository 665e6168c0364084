"""A disk that cannot lock files is named, as network disks without lock service are."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from simomerge.core.errors import InputError
from simomerge.recipes.graph import locked

fcntl = pytest.importorskip("fcntl")


def test_a_lock_is_free_after_the_block(tmp_path: Path) -> None:
    waited: list[int] = []
    for _ in range(2):
        with locked(tmp_path / "run" / "stage.lock", lambda: waited.append(1)):
            pass
    assert not waited


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> Any:
        if how & fcntl.LOCK_UN:
            return real(descriptor, how)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(InputError, match=r"run-7: its disk cannot lock files \(.+\).*Choose a folder on another disk"),
        locked(tmp_path / "run-7" / "stage.lock", lambda: None),
    ):
        pytest.fail("the block ran without a lock")
