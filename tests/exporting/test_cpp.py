"""The example in C++ compiles, and computes what the runtime in Python computes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simomerge.runtime import Scene

from .conftest import SIZE, Exported, frames_of

onnxruntime = pytest.importorskip("onnxruntime")

SOURCE = Path(__file__).parents[2] / "examples/cpp/scene.cpp"
HEADERS = Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"))
LIBRARY = next(iter(sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))), None)

pytestmark = pytest.mark.skipif(
    not (HEADERS / "onnxruntime_cxx_api.h").exists() or shutil.which("g++") is None or LIBRARY is None,
    reason="needs g++ and the headers of onnxruntime (ONNXRUNTIME_INCLUDE)",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled example."""
    made = tmp_path_factory.mktemp("cpp") / "scene"
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # as a release of onnxruntime has them
        (made.parent / name).symlink_to(LIBRARY)
    linked = ["-L", made.parent, "-lonnxruntime", f"-Wl,-rpath,{made.parent}"]
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", SOURCE, "-isystem", HEADERS, *linked, "-o", made]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return made


def run(program: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)


def test_it_predicts_what_the_runtime_predicts(program: Path, exported: Exported, tmp_path: Path) -> None:
    frame = frames_of(SIZE, 1)[0]
    Image.fromarray(frame).save(tmp_path / "frame.ppm")
    done = run(program, exported.file, tmp_path / "frame.ppm", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    wanted = Scene(exported.file).predict(frame)
    assert {file.stem for file in (tmp_path / "out").iterdir()} == set(wanted)
    for name, values in wanted.items():
        found = np.load(tmp_path / "out" / f"{name}.npy")[0]
        assert found.dtype == (np.int64 if name == "parts" else np.float32)
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"P6\n8 8\n255\n" + bytes(192), "8 x 8 pixels, and the model takes 30 x 42"),
        (b"P6\n42 30\n255\n" + bytes(100), "the file ends before its pixels do"),
        (b"\x89PNG", "not a binary PPM file"),
    ],
)
def test_a_wrong_picture_is_named(
    program: Path, exported: Exported, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "frame.ppm").write_bytes(content)
    done = run(program, exported.file, tmp_path / "frame.ppm", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()


def test_a_file_that_is_no_model_is_named(program: Path, tmp_path: Path) -> None:
    (tmp_path / "scene.onnx").write_bytes(b"nothing")
    done = run(program, tmp_path / "scene.onnx", tmp_path / "frame.ppm", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("Error: ")
