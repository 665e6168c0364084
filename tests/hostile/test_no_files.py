"""Named pipes, devices and folders where a file is expected: one clear error, and no wait for a writer."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import simomerge as sm
from simomerge.checkpoints import open_checkpoint
from simomerge.checkpoints.reading import check_safetensors
from simomerge.cli import cli
from simomerge.core.documents import read_json, read_yaml
from simomerge.core.errors import InputError
from simomerge.core.images import read_image
from simomerge.core.orientation import orientation
from simomerge.datasets.published.hdf5 import open_hdf5
from simomerge.datasets.published.matlab import read_matlab
from simomerge.datasets.stored import may_be_truncated, read_array
from simomerge.datasets.tables import read_table
from simomerge.datasets.tars import TarPictures
from simomerge.runtime import read_picture

pytestmark = pytest.mark.skipif(os.name != "posix", reason="named pipes of POSIX")

READERS: list[tuple[Callable[[Path], object], tuple[str, ...]]] = [
    (open_checkpoint, (".safetensors", ".pt", ".pth", ".pth.tar", ".bin", ".ckpt")),
    (check_safetensors, (".safetensors",)),
    (read_array, (".npy", ".png", ".jpg", ".tif", ".pfm", ".exr", ".flo")),
    (read_image, (".png", ".tif", ".pfm")),
    (read_picture, (".png",)),
    (may_be_truncated, (".npy", ".png", ".tif")),
    (open_hdf5, (".mat", ".h5")),
    (read_matlab, (".mat",)),
    (lambda path: TarPictures([path], (".png",)), (".tar",)),
    (lambda path: read_json(path, "give a file."), (".json",)),
    (lambda path: read_yaml(path, "give a file."), (".yaml",)),
    (lambda path: read_table(path, "image"), (".csv",)),
]


@pytest.fixture(autouse=True)
def at_most_a_minute() -> Iterator[None]:
    """An error in the middle of a test that hangs: waiting for the writer of a named pipe ends by a signal."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("what", "kind"), [("pipe", "named pipe"), ("device", "device"), ("folder", "folder")])
@pytest.mark.parametrize(("read", "suffix"), [(read, suffix) for read, suffixes in READERS for suffix in suffixes])
def test_only_files_are_read(read: Callable[[Path], object], suffix: str, what: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"f{suffix}"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    message = f"is no file but a {kind}; give"
    if read is read_picture:
        message = "is no file; give a picture"
    elif read is open_checkpoint and what == "folder":  # a folder may hold weights
        message = "holds no weights"
    with pytest.raises(InputError, match=f"f\\{suffix} {message}"):
        read(path)


def test_a_pipe_has_no_orientation(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.png")
    assert orientation(tmp_path / "f.png") is None


@pytest.mark.parametrize("command", ["inspect", "diff", "merge"])
def test_commands_refuse_a_pipe(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("f.safetensors")
    given = {"inspect": [], "diff": ["f.safetensors"], "merge": ["a=f.safetensors", "-o", "out"]}[command]
    result = CliRunner().invoke(cli, [command, "f.safetensors", *given])
    assert isinstance(result.exception, InputError) and "no file but a named pipe" in str(result.exception)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("simo.json", r"scene: not a model folder \(no simo\.json in it\)"),
        ("encoder/config.json", r"scene/encoder: cannot load an encoder \(config\.json is missing"),
        ("encoder/model.safetensors", r"scene/encoder/model\.safetensors is no file but a named pipe"),
        ("heads/depth.safetensors", r"scene/heads/depth\.safetensors: missing"),
    ],
)
def test_models_refuse_a_pipe(name: str, message: str, make_model: Any, tmp_path: Path) -> None:
    make_model([sm.Task("depth")]).save_pretrained(tmp_path / "scene")
    (tmp_path / "scene" / name).unlink()
    os.mkfifo(tmp_path / "scene" / name)
    with pytest.raises(InputError, match=message):
        sm.load(tmp_path / "scene")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"base: cannot load an encoder \(config\.json is missing"),
        ("preprocessor_config.json", ""),
        ("model.safetensors", r"base holds no weights \(looked for model\.safetensors"),
    ],
)
def test_encoders_refuse_a_pipe(name: str, message: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name == "preprocessor_config.json":  # as if it were not there
        sm.load(folder)
        return
    with pytest.raises(InputError, match=message):
        sm.load(folder)
