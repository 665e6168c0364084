"""Nothing is lost: outputs that overlap inputs, other writers, kills, changes of what is read, and overflow."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import simomerge as sm
from simomerge.checkpoints import open_checkpoint, write_safetensors, write_sharded
from simomerge.cli import cli
from simomerge.core import exclusive
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_file, atomic_folder, atomic_write_text
from simomerge.merging.disk.compress import compress
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.merging.disk.output import Output

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and signals of POSIX")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    values = {"base": 1.0, "depth": 2.0, "normals": 3.0}
    return {name: write_safetensors(f"{name}.safetensors", {"w": np.full(64, v, "f4")}) for name, v in values.items()}


def merge(files: dict[str, Path], output: str, overwrite: bool = True, **options: Any) -> None:
    experts = {name: path for name, path in files.items() if name != "base"}
    merge_on_disk(files["base"], experts, Output(Path(output), overwrite=overwrite), **options)


def names() -> set[str]:
    return {path.name for path in Path().iterdir()}


# What must not be replaced --------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", ["thesis.txt", "model/thesis.txt", "encoder/thesis.txt", "photos/1.jpg"])
def test_overwrite_replaces_only_models(files: dict[str, Path], foreign: str) -> None:
    place = Path("home") / foreign
    place.parent.mkdir(parents=True)
    place.write_text("precious")
    with pytest.raises(InputError, match="holds no model that could be replaced"):
        merge(files, "home")
    write_safetensors("home/model.safetensors", {"w": np.ones(1, "f4")})
    with pytest.raises(InputError, match="which simomerge did not write and would delete"):
        merge(files, "home")
    with pytest.raises(InputError, match="did not write"):
        compress(files["base"], {"depth": files["depth"]}, "home", overwrite=True)
    assert place.read_text() == "precious"


@pytest.mark.parametrize("name", ["README.md", ".poetry.lock", ".notes.tmp", ".simo.json.0123456789ax.tmp", "a.lock"])
def test_files_with_names_like_its_own_stay(make_model: Any, tmp_path: Path, name: str) -> None:
    model = make_model([sm.Task("depth")])
    model.save_pretrained(tmp_path / "scene")
    (tmp_path / "scene" / name).write_text("# My notes about this model")
    with pytest.raises(InputError, match=rf"'{re.escape(name)}', which simomerge did not write and would delete"):
        model.save_pretrained(tmp_path / "scene", overwrite=True)
    (tmp_path / "scene" / name).unlink()
    for left in (".simo.json.lock", ".README.md.0123456789ab.tmp"):  # of a killed writer
        (tmp_path / "scene" / left).touch()
    model.save_pretrained(tmp_path / "scene", overwrite=True)
    assert {path.name for path in (tmp_path / "scene").iterdir()} == {"README.md", "encoder", "heads", "simo.json"}


@pytest.mark.parametrize(("name", "message"), [("", "empty"), (" ", "empty"), ("-", "standard output")])
@pytest.mark.parametrize("command", ["merge base a=a", "train --task depth", "predict scene photo.png", "demo"])
def test_names_that_are_no_output(command: str, name: str, message: str) -> None:
    result = CliRunner().invoke(cli, [*command.split(), "-o", name])
    assert isinstance(result.exception, InputError), result.output
    assert re.search(rf"^-o .*: .*{message}; name what to write", str(result.exception))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder without files of users")
@pytest.mark.parametrize("path", ["/proc/x", "/proc/x/y"])
def test_folders_that_keep_no_files(path: str) -> None:
    message = rf"^Cannot write {path}: the system keeps no files there; choose another path\.$"
    with pytest.raises(InputError, match=message), atomic_file(path):
        pytest.fail("it was opened")  # pragma: no cover
    with pytest.raises(InputError, match=message), atomic_folder(path):
        pytest.fail("it was made")  # pragma: no cover


@pytest.mark.parametrize("missing", ["elsewhere/x", "missing.safetensors", ".hidden"])
def test_a_missing_file_that_is_read_is_no_error_of_the_output(missing: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out"):
        (tmp_path / missing).read_text()


def test_its_own_outputs_are_replaced(files: dict[str, Path], make_model: Any) -> None:
    make_model([sm.Task("depth")]).save_pretrained("scene")
    make_model([sm.Task("depth")]).save_pretrained("scene", overwrite=True)
    compress(files["base"], {"depth": files["depth"]}, "scene", overwrite=True)
    compress(files["base"], {"depth": files["depth"]}, "scene", overwrite=True)
    merge(files, "scene")
    merge(files, "scene")
    assert {path.name for path in Path("scene").iterdir()} == {"model.safetensors"}


def test_models_of_all_kinds_are_replaced(files: dict[str, Path], make_model: Any) -> None:
    """The tensors of a tree of encoders and of adapters have files of their own."""
    make_model([sm.Task("depth")]).save_pretrained("scene")
    for name in ("branches/depth", "stitches", "adapters"):
        write_safetensors(f"scene/{name}.safetensors", {"w": np.ones(1, "f4")})
    make_model([sm.Task("depth")]).save_pretrained("scene", overwrite=True)
    assert not Path("scene/branches").exists()


@pytest.mark.parametrize("output", [".", "", "..", "inside/../."])
def test_the_current_folder_is_no_output(files: dict[str, Path], output: str) -> None:
    with pytest.raises(InputError, match="is the current folder or holds it"):
        merge(files, output)
    with pytest.raises(InputError, match="is the current folder or holds it"), atomic_folder(output, overwrite=True):
        pass
    assert len(names()) == 3


def test_no_output_lies_inside_an_input(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "depth"):
        make_model([sm.Task("depth")] if name == "depth" else []).save_pretrained(name)
    for output in ("depth/encoder", "depth/new", "base/new"):
        with pytest.raises(InputError, match=r"lies inside the (model folder|input)"):
            merge_on_disk("base", {"depth": "depth"}, Output(Path(output), overwrite=True))
    with pytest.raises(InputError, match="lies inside the model folder"):
        make_model([]).save_pretrained("depth/encoder", overwrite=True)
    assert list(sm.load("depth").tasks) == ["depth"]


@pytest.mark.parametrize("name", ["depth", "base", "symbolic", "hard"])
def test_no_output_is_an_input(files: dict[str, Path], name: str) -> None:
    Path("symbolic.safetensors").symlink_to("depth.safetensors")
    Path("hard.safetensors").hardlink_to("depth.safetensors")
    with pytest.raises(
        InputError, match=rf"{name}\.safetensors is the input .* would be replaced: choose another path"
    ):
        merge(files, f"{name}.safetensors")
    assert open_checkpoint("depth.safetensors")["w"][0] == 2


def test_links_stay_and_dangling_ones_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    Path("real.safetensors").touch(mode=0o640)
    Path("link.safetensors").symlink_to("real.safetensors")
    merge(files, "link.safetensors")
    assert Path("link.safetensors").is_symlink() and Path("real.safetensors").stat().st_mode & 0o777 == 0o640
    Path("gone.safetensors").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"is a link to .*nowhere, which does not exist"):
        merge(files, "gone.safetensors")
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop"):
        atomic_write_text("loop", "x")


# Other writers and kills ----------------------------------------------------------------------------------


def test_a_second_writer_says_so(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "_PATIENCE", 0.0)
    with atomic_folder("scene"):
        for write in (lambda: merge(files, "scene"), lambda: atomic_write_text("scene", "x")):
            with pytest.raises(InputError, match=r"scene: another process is writing it\. Wait until it has ended"):
                write()
    assert {path.name for path in Path().iterdir()} == {"scene", *(path.name for path in files.values())}


def test_writers_of_one_folder_never_fail_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = """
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder
for _ in range(150):
    try:
        with atomic_folder("out", overwrite=True, durable=False) as folder: (folder / "x").write_text("x")
    except InputError: pass
"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0, 0, 0, 0]
    assert names() == {"out"} and (tmp_path / "out/x").read_text() == "x"


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("moment", ["in the block", "after a rename"])
def test_a_kill_loses_nothing_and_the_next_writer_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, moment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_folder("scene") as folder:
        (folder / "x").write_text("old")
    code = f"""
import os, signal
from pathlib import Path
from simomerge.core import exclusive, files
if not {exchange}: exclusive._exchanged = lambda first, second: False
rename = Path.rename
def killed(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
exchanged = exclusive._exchanged
def then_killed(first, second):
    return exchanged(first, second) and os.kill(os.getpid(), signal.SIGKILL)
exclusive._exchanged = then_killed
with files.atomic_folder("scene", overwrite=True) as folder:
    (folder / "x").write_text("new")
    if {moment == "in the block"}: os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert len(names()) > 1  # a temporary folder and the lock
    if exchange or moment == "in the block":
        expected = "old" if moment == "in the block" else "new"
        assert (tmp_path / "scene/x").read_text() == expected
    with pytest.raises(InputError, match="already exists"), atomic_folder("scene"):
        pytest.fail("it was written")  # pragma: no cover
    atomic_write_text("scene/y", "another")
    with atomic_folder("scene", overwrite=True) as folder:
        (folder / "x").write_text("newest")
    assert names() == {"scene"} and (tmp_path / "scene/x").read_text() == "newest"


LOST = "Error: a file that is mapped into memory became shorter, or a disk or /dev/shm is full: repeat this when"
BIG = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a parent in the background ignores some of them
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
from simomerge.core import progress
from simomerge.merging.engine.merge import Merged
read = Merged.__getitem__
def slow(self, name):
    print("reading", flush=True)
    time.sleep(0.4)
    return read(self, name)
Merged.__getitem__ = slow
given = ["merge", "base.safetensors", "depth=depth.safetensors", "normals=normals.safetensors", "-o", sys.argv[1]]
sys.argv = ["simomerge", *given]
from simomerge.cli import main
main()
"""


@pytest.fixture
def running(files: dict[str, Path]) -> Iterator[subprocess.Popen[str]]:
    """A merge that is in the middle of its tensors; they are larger than what is read ahead."""
    for name in files:
        write_safetensors(f"{name}.safetensors", {f"w{i}": np.full(2**20, i + len(name), "f4") for i in range(4)})
    command = [sys.executable, "-c", BIG, "out.safetensors"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("reading")
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing(running: subprocess.Popen[str], number: int) -> None:
    running.send_signal(number)
    error = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and "No file is half-written" in error and "Traceback" not in error
    assert names() == {"base.safetensors", "depth.safetensors", "normals.safetensors"}


@pytest.mark.parametrize("change", ["shorter", "other values"])
def test_an_input_that_changes_is_found(running: subprocess.Popen[str], change: str) -> None:
    if change == "shorter":
        os.truncate("depth.safetensors", 2000)
    else:
        with Path("depth.safetensors").open("r+b") as handle:
            handle.seek(2**20)
            handle.write(b"x" * 100)
    error = running.communicate(timeout=60)[1]
    message = LOST if change == "shorter" else "while it was read"
    assert running.returncode == 2 and message in error and "Traceback" not in error
    assert names() == {"base.safetensors", "depth.safetensors", "normals.safetensors"}


@pytest.mark.parametrize("command", ["diff", "inspect"])
def test_every_command_says_that_an_input_became_shorter(files: dict[str, Path], command: str) -> None:
    write_safetensors("depth.safetensors", {"w": np.ones(2**20, "f4")})
    code = """
import os, sys
from simomerge.checkpoints import reading
opened = reading._open_safetensors
def then_shorter(file):
    found = opened(file)
    os.truncate("depth.safetensors", 2000)
    found["w"].stored[-1] + 1
    return found
reading._open_safetensors = then_shorter
from simomerge.cli import main
main()
"""
    given = ["depth.safetensors"] * (2 if command == "diff" else 1)
    done = subprocess.run([sys.executable, "-c", code, command, *given], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(LOST)


def test_files_beyond_the_first_are_read_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {f"t{i}": np.arange(i, 200_000 + i, dtype="f4") for i in range(40)}
    write_sharded("many", tensors, max_shard_size=400_000)
    opened = open_checkpoint("many")
    for name, values in tensors.items():
        assert np.array_equal(opened[name], values) and opened[name].dtype == np.float32
        for part in (slice(3, 70_000), slice(0, None, 49), slice(5, None, 40_000), slice(7, 7)):
            assert np.array_equal(opened.flat(name, part), values[part])
    os.truncate(sorted(Path("many").glob("*.safetensors"))[-1], 2000)
    with pytest.raises(InputError, match="became shorter while it was read"):
        [opened[name] for name in tensors]
    with pytest.raises(InputError, match="changed while it was read"):
        opened.check_unchanged()


@pytest.mark.parametrize("method", ["task-arithmetic", "average", "ties", "breadcrumbs", "iso-c"])
def test_a_result_that_overflows_is_an_error(files: dict[str, Path], method: str) -> None:
    tensor = np.ones((4, 4), "f4")
    for name in files:
        write_safetensors(f"{name}.safetensors", {"w": tensor if name == "base" else 3e38 * tensor})
    options = {"density": 0.5} if method == "breadcrumbs" else {}
    try:
        merge(files, "out.safetensors", method=method, **options)
    except InputError as error:
        assert "too large for float32" in str(error) or "infinite" in str(error)
        assert "out.safetensors" not in names()
    else:
        assert np.isfinite(open_checkpoint("out.safetensors")["w"]).all()


def test_a_lock_of_a_dead_process_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".a.txt.lock").touch()
    Path(".a.txt.0123456789ab.tmp").touch()
    started = time.monotonic()
    with atomic_file("a.txt") as handle:
        handle.write(b"x")
    assert names() == {"a.txt"} and time.monotonic() - started < 1
