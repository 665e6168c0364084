"""Files at URLs: local copies that follow the files there, parts that are read there, and clear errors."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

from simomerge.checkpoints import open_checkpoint
from simomerge.cli import cli
from simomerge.core import remote
from simomerge.core.errors import InputError
from simomerge.core.files import temporary_folder
from simomerge.core.hub import local_source
from simomerge.core.model_files import file_and_key
from simomerge.core.progress import show_progress
from simomerge.core.remote import (
    RemoteError,
    RemoteFile,
    Unreachable,
    copy_here,
    copy_there,
    local_copy,
    local_place,
    names_there,
    remote_files,
    remove_there,
)
from simomerge.datasets.load import data_name

CONTENT = {"data.csv": b"image\n", "images/0.png": b"first", "images/deep/1.png": b"second picture"}


class Locked(MemoryFileSystem):
    """A file system that lets nobody in."""

    protocol = "locked"

    def info(self, path: str, **_: Any) -> Any:
        raise PermissionError("Access Denied")

    def put_file(self, *_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """A folder of three files at memory://bucket/robot, and an empty cache folder."""
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "cache"))
    local_copy.cache_clear()
    memory = fsspec.filesystem("memory")
    for name, content in CONTENT.items():
        memory.pipe_file(f"/bucket/robot/{name}", content)
    yield memory
    memory.rm("/bucket", recursive=True)
    local_copy.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_key_of_a_training_file_stays(files: MemoryFileSystem) -> None:
    files.pipe_file("/bucket/robot/last.ckpt", b"weights")
    file, key = file_and_key(local_source("memory://bucket/robot/last.ckpt::state_dict_ema"))
    assert Path(file).read_bytes() == b"weights" and key == "state_dict_ema"


@pytest.mark.parametrize("query", ["token=SECRET", "X-Amz-Signature=SECRET" + "a" * 300 + "/b+c=="])
def test_the_query_of_a_url_is_kept_nowhere(files: MemoryFileSystem, tmp_path: Path, query: str) -> None:
    """The file of another query is another file, and their local copies have the name that the URL has without it."""
    for number, name in enumerate(("a.pth", f"a.pth?{query}", "a.pth?other")):
        content = io.BytesIO()
        torch.save({"weight": torch.full((3,), float(number))}, content)
        files.pipe_file(f"/bucket/robot/{name}", content.getvalue())
    shown: list[str] = []
    with show_progress(lambda label, done, total, note: shown.append(note)):
        for number, name in enumerate(("a.pth", f"a.pth?{query}", "a.pth?other")):
            for _ in range(2):
                copy = local_source(f"memory://bucket/robot/{name}")
                assert Path(copy).name == "a.pth" and open_checkpoint(copy)["weight"].tolist() == [number] * 3
    assert shown == ["MB of memory://bucket/robot/a.pth"] * 3
    assert "SECRET" not in " ".join(map(str, tmp_path.rglob("*")))
    url = f"memory://me:SECRET@bucket/robot/none.pth?{query}"
    with pytest.raises(InputError, match=r"^memory://bucket/robot/none\.pth: there is no such file") as caught:
        local_source(url)
    assert "SECRET" not in str(caught.value)
    assert str(RemoteFile(url, None, "")) == "memory://bucket/robot/none.pth"
    assert "SECRET" not in str(local_place("urls", url)) and data_name(url) == "robot"


def test_a_merge_of_urls_with_queries_records_and_prints_none(
    files: MemoryFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "token=SECRET" + "a" * 300
    for name, value in (("base", 1.0), ("one", 3.0)):
        content = safetensors.torch.save({"weight": torch.full((2, 2), value)})
        files.pipe_file(f"/bucket/robot/{name}.safetensors?{secret}", content)
    base, one = (f"memory://bucket/robot/{name}.safetensors?{secret}" for name in ("base", "one"))
    given = [base, f"depth={one}", "--method", "task-arithmetic", "--scale", "0.5"]
    cli(["merge", *given, "-o", str(tmp_path / "merged.safetensors")], standalone_mode=False)
    merged = safetensors.torch.load_file(tmp_path / "merged.safetensors")
    assert merged["weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    cli(["inspect", one], standalone_mode=False)
    cli(["inspect", one, "--json"], standalone_mode=False)
    cli(["diff", base, one], standalone_mode=False)
    printed = capsys.readouterr()
    assert "one.safetensors" in printed.out and "SECRET" not in printed.out + printed.err
    with pytest.raises(InputError, match=r"^memory://bucket/robot/base\.safetensors is a weight file"):
        cli(["merge", *given[:-1], "auto", "--images", str(tmp_path), "-o", str(tmp_path / "x")], standalone_mode=False)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"SECRET" in path.read_bytes() or "SECRET" in str(path)]


def test_messages_of_a_server_name_no_token(files: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise RuntimeError("503, message='Busy', url='https://me:SECRET@example.org/a.pth?token=SECRET'")

    file = remote_files("memory://bucket/robot/data.csv")[""]
    monkeypatch.setattr(MemoryFileSystem, "cat_file", busy)
    with pytest.raises(InputError, match=r"url='https://example\.org/a\.pth'\)\.$"):
        file.read(0, 1)


def test_a_copy_follows_the_files_at_the_url(
    files: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    get_file = MemoryFileSystem.get_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "get_file",
        lambda self, source, *more, **given: copied.append(source) or get_file(self, source, *more, **given),
    )
    folder = local_copy("memory://bucket/robot")
    assert contents(folder) == CONTENT and len(copied) == 3
    assert folder == tmp_path / "cache" / "urls" / "memory" / "bucket" / "robot"

    local_copy.cache_clear()  # as in another process
    assert local_copy("memory://bucket/robot/") == folder and len(copied) == 3

    files.pipe_file("/bucket/robot/images/0.png", b"other")  # of the same size
    files.rm_file("/bucket/robot/data.csv")
    (folder / "images" / "deep" / "1.png").write_bytes(b"cut")  # damaged here
    local_copy.cache_clear()
    expected = {"images/0.png": b"other", "images/deep/1.png": CONTENT["images/deep/1.png"]}
    assert contents(local_copy("memory://bucket/robot")) == expected and len(copied) == 5
    assert local_copy("memory://bucket/robot/images/0.png").read_bytes() == b"other" and len(copied) == 5


def test_dates_of_copies_are_the_same_on_all_machines(
    files: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = local_copy("memory://bucket/robot/data.csv").stat()
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "other"))
    local_copy.cache_clear()
    second = local_copy("memory://bucket/robot/data.csv").stat()
    assert first.st_ino != second.st_ino and first.st_mtime_ns == second.st_mtime_ns


def test_parts_of_a_file_are_read_at_the_url(files: MemoryFileSystem) -> None:
    file = remote_files("memory://bucket/robot")["images/deep/1.png"]
    assert (file.size, file.read(7, 7)) == (14, b"picture")
    with file.open() as stream:
        assert stream.read() == b"second picture"


def _path(kind: type[MemoryFileSystem], url: str) -> str:
    return MemoryFileSystem._strip_protocol(url.replace(f"{kind.protocol}://", "memory://"))


class Whole(MemoryFileSystem):
    """A server that gives whole files only, as simple HTTP servers do."""

    protocol = "whole"
    _strip_protocol = classmethod(_path)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> Any:
        return super().cat_file(path)


class Streaming(MemoryFileSystem):
    """A server that gives a stream, which says that it can seek and cannot."""

    protocol = "streaming"
    _strip_protocol = classmethod(_path)

    def open(self, path: str, *_: Any, **__: Any) -> Any:
        class Stream(io.BytesIO):
            def seek(self, *_: int) -> int:
                raise ValueError("Cannot seek streaming HTTP file")

        return Stream(super().cat_file(path))


class Sizeless(MemoryFileSystem):
    """A server that does not say how long its files are."""

    protocol = "sizeless"
    _strip_protocol = classmethod(_path)

    def info(self, path: str, **_: Any) -> Any:
        return {**super().info(path), "size": None}


def test_a_server_may_give_whole_files_only(files: MemoryFileSystem) -> None:
    fsspec.register_implementation("whole", Whole, clobber=True)
    fsspec.register_implementation("sizeless", Sizeless, clobber=True)
    fsspec.register_implementation("streaming", Streaming, clobber=True)
    for protocol in ("whole", "sizeless"):
        assert local_copy(f"{protocol}://bucket/robot/data.csv").read_bytes() == b"image\n"
    message = r"images/0\.png: its server does not give parts of a file; copy the file to a disk\."
    with pytest.raises(InputError, match=message):
        remote_files("whole://bucket/robot/images/0.png")[""].read(1, 2)
    for protocol in ("whole", "streaming", "sizeless"):
        with (
            pytest.raises(RemoteError, match=message),
            remote_files(f"{protocol}://bucket/robot/images/0.png")[""].open(),
        ):
            pass


def test_a_failing_server_is_no_damaged_file(files: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remote_files("memory://bucket/robot/data.csv")[""]
    with pytest.raises(Unreachable, match=r"memory://bucket/robot/data\.csv: .* fails \(reset by peer\)"), file.open():
        raise RuntimeError("reset by peer")
    with pytest.raises(EOFError), file.open(passing=(EOFError,)):
        raise EOFError

    def silent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("url") from ConnectionRefusedError("Connection refused")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", silent)
    with pytest.raises(Unreachable, match=r"fails \(Connection refused\)"):
        file.read(0, 1)

    class Answer(Exception):
        status: int | None = 503

    Answer.__module__ = "aiohttp.client_exceptions"

    def busy(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("url") from Answer("Service Unavailable")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", busy)
    with pytest.raises(Unreachable, match=r"fails \(Service Unavailable\)"):
        file.read(0, 1)
    Answer.status = 404
    with pytest.raises(RemoteError, match="there is no such file"):
        file.read(0, 1)
    Answer.status, Answer.__module__ = None, "botocore.exceptions"  # its FileNotFoundError says the same
    with pytest.raises(RemoteError, match="there is no such file"):
        file.read(0, 1)
    Answer.__module__ = "aiohttp.client_exceptions"  # a connection that ended
    with pytest.raises(Unreachable, match=r"fails \(Service Unavailable\)"):
        file.read(0, 1)


def test_a_full_disk_here_is_not_the_servers_fault(
    files: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MemoryFileSystem, "get", full)
    with pytest.raises(InputError, match=r"cache/urls/\S+: cannot be written \(No space left on device\); set "):
        local_copy("memory://bucket/robot")
    monkeypatch.setattr(MemoryFileSystem, "put", full)
    with pytest.raises(RemoteError, match=r"^memory://bucket/x: the file system of memory:// fails \(.*No space left"):
        copy_there(tmp_path, "memory://bucket/x")


def test_a_copy_of_a_part_is_not_disturbed(files: MemoryFileSystem) -> None:
    folder = local_copy("memory://bucket/robot")
    with temporary_folder(folder / "images") as temporary:
        (temporary / "0").write_bytes(b"on its way")
        copy_here("memory://bucket/robot", folder)
        assert (temporary / "0").exists()
    assert contents(folder) == CONTENT


def test_a_folder_at_a_url_becomes_that_on_the_disk(
    files: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stage"
    (folder / "model").mkdir(parents=True)
    (folder / "log.json").write_bytes(b"{}")
    (folder / "model" / "weights").write_bytes(b"w")
    written: list[str] = []
    put_file = MemoryFileSystem.put_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "put_file",
        lambda self, source, target, **given: written.append(target) or put_file(self, source, target, **given),
    )
    there = names_there("memory://bucket/robot")
    copy_there(folder, "memory://bucket/robot", last="log.json")
    assert set(names_there("memory://bucket/robot")) == {"log.json", "model/weights", *there}
    files.pipe_file("/bucket/robot/x[1]*.png", b"a name with the letters of a pattern")
    written.clear()
    copy_there(folder, "memory://bucket/robot", last="log.json", exact=True)
    assert written == ["/bucket/robot/model/weights", "/bucket/robot/log.json"]
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="division by zero"):
        copy_there(folder, "memory://bucket/robot", last="log.json")
    assert names_there("memory://bucket/robot") == ["model/weights"], "no log.json says that the folder is complete"
    monkeypatch.undo()
    copy_there(folder, "memory://bucket/robot", last="log.json")
    assert sorted(names_there("memory://bucket/robot")) == ["log.json", "model/weights"]
    copy_there(folder / "log.json", "memory://bucket/one.json")
    assert files.cat_file("/bucket/one.json") == b"{}"
    remove_there("memory://bucket/one.json")
    assert names_there("memory://bucket/one.json") == [] == names_there("memory://nowhere")


def test_a_model_may_be_at_a_url(files: MemoryFileSystem) -> None:
    assert contents(Path(local_source("memory://bucket/robot"))) == CONTENT


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/nowhere", r"memory://bucket/nowhere: there is no such file, folder or bucket\."),
        ("s4://bucket/robot", r"fsspec knows no protocol 's4'; give a URL such as s3://BUCKET/FOLDER"),
        ("abfs://bucket/robot", r"abfs:// needs a package: pip install adlfs\."),
        ("locked://bucket/robot", r"access is denied \(Access Denied\); check the credentials"),
        ("broken://bucket/robot", r"the file system of broken:// fails \(no route to host\)"),
    ],
)
def test_what_cannot_be_read_is_said(
    files: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    class Broken(MemoryFileSystem):
        def info(self, path: str, **_: Any) -> Any:
            raise RuntimeError("no route to host. Traceback follows")

    monkeypatch.setitem(sys.modules, "adlfs", None)
    fsspec.register_implementation("locked", Locked, clobber=True)
    fsspec.register_implementation("broken", Broken, clobber=True)
    with pytest.raises(InputError, match=message):
        local_copy(url)


def test_a_disk_without_room_is_named_before_anything_is_copied(
    files: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"25 bytes.*10 bytes are free"):
        local_copy("memory://bucket/robot")
    assert not (tmp_path / "cache" / "urls" / "memory" / "bucket" / "robot").exists()


def test_names_stay_inside_the_folder(files: MemoryFileSystem, tmp_path: Path) -> None:
    files.store["/bucket/robot/../../../outside"] = files.store["/bucket/robot/data.csv"]
    try:
        with pytest.raises(InputError, match=r"cannot have a file of the name '\.\./\.\./\.\./outside'"):
            local_copy("memory://bucket/robot")
    finally:
        del files.store["/bucket/robot/../../../outside"]


def test_a_file_that_changes_while_it_is_copied_is_named(
    files: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shorter(self: Any, source: str, target: str, **_: Any) -> None:
        Path(target).write_bytes(b"x")

    monkeypatch.setattr(MemoryFileSystem, "get_file", shorter)
    with pytest.raises(InputError, match=r"memory://bucket/robot/data\.csv: changed while it was copied"):
        local_copy("memory://bucket/robot")


def test_a_cache_folder_that_cannot_be_written_is_named(
    files: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"Cannot write to the cache folder .*set SIMOMERGE_CACHE"):
        local_copy("memory://bucket/robot")


def test_processes_of_a_machine_take_turns(files: MemoryFileSystem, tmp_path: Path) -> None:
    with remote.one_at_a_time(tmp_path / "place"):
        child = os.fork()
        if not child:
            (tmp_path / "waits").touch()
            with remote.one_at_a_time(tmp_path / "place"):
                (tmp_path / "entered").touch()
            os._exit(0)
        while not (tmp_path / "waits").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0) and not (tmp_path / "entered").exists()
    os.waitpid(child, 0)
    assert (tmp_path / "entered").exists()
