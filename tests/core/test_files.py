"""Files and folders appear complete or not at all."""

import errno
import os
from pathlib import Path

import pytest

from simomerge.core import exclusive
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder, atomic_write_bytes, atomic_write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_text_and_bytes(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "new" / "a.txt", "ø")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "ø".encode()
    atomic_write_bytes(tmp_path / "new" / "a.txt", b"2")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"2" and names(tmp_path / "new") == ["a.txt"]


def test_write_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write .*a\.txt"):
        atomic_write_text(tmp_path / "file" / "a.txt", "x")


def test_folder_appears_on_success_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "scene"
    with atomic_folder(target) as folder:
        assert folder.parent == target.parent and not target.exists()
        (folder / "heads").mkdir()
        (folder / "heads" / "depth").write_text("1")
        (folder / "heads" / "depth").chmod(0o444)
    assert (target / "heads" / "depth").read_text() == "1" and names(target.parent) == ["scene"]
    (tmp_path / "ordinary").mkdir()
    assert target.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.EIO, "io")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_vanishes_on_any_exception(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    target = tmp_path / "scene"
    if overwrite:
        target.mkdir()
        (target / "old").write_text("kept")
    with pytest.raises(type(error)), atomic_folder(target, overwrite) as folder:
        (folder / "half").write_text("x")
        raise error
    assert names(tmp_path) == (["scene"] if overwrite else [])
    assert not overwrite or names(target) == ["old"]


def test_existing_target(tmp_path: Path) -> None:
    target = tmp_path / "scene"
    for content in ("1", "2"):
        with atomic_folder(target, overwrite=content == "2") as folder:
            (folder / content).write_text(content)
    assert names(target) == ["2"] and names(tmp_path) == ["scene"]
    with pytest.raises(InputError, match=r"already exists: .*overwrite"), atomic_folder(target):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "file", overwrite=True):
        pass
    assert names(tmp_path) == ["file", "scene"]


def test_a_target_made_meanwhile_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "scene"
    with pytest.raises(InputError, match="already exists"), atomic_folder(target):
        target.mkdir()
        (target / "theirs").write_text("x")
    assert names(target) == ["theirs"]


def test_a_failed_second_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "scene"
    target.mkdir()
    (target / "old").write_text("kept")
    rename = Path.rename

    def second_fails(self: Path, to: Path) -> Path:
        if to == target and not (self / "old").exists():
            raise OSError(errno.EIO, "io")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", second_fails)
    monkeypatch.setattr(exclusive, "_exchanged", lambda first, second: False)
    with pytest.raises(OSError, match="io"), atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert names(target) == ["old"] and names(tmp_path) == ["scene"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_names_the_folder(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(InputError, match=r"Cannot write the folder .*scene: no space left"):  # noqa: SIM117
        with atomic_folder(tmp_path / "scene") as folder:
            (folder / "half").write_text("x")
            raise error
    assert names(tmp_path) == []


def test_a_failure_of_a_library_to_write_names_the_folder(tmp_path: Path) -> None:
    error = RuntimeError("SafetensorError: Error while serializing: I/O error: File too large (os error 27)")
    with pytest.raises(InputError, match=r"Cannot write .*scene: File too large\.") as refused:  # noqa: SIM117
        with atomic_folder(tmp_path / "scene"):
            raise error
    assert refused.value.__cause__ is error and names(tmp_path) == []
    with pytest.raises(RuntimeError, match="os error 5"), atomic_folder(tmp_path / "scene"):
        raise RuntimeError("a file that is read: Input/output error (os error 5)")
