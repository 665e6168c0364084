"""The wheel, made from the sdist, works in new environments without torch, in every Python that is installed here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from simomerge.checkpoints import write_safetensors
from simomerge.core.version import __version__

from .conftest import SIZE, Exported, frames_of

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")

MERGE = """
import sys
from simomerge.cli import cli
files = ["base.safetensors", "a=a.safetensors", "b=b.safetensors"]
cli(["merge", *files, "-o", "merged.safetensors", "--method", "average"])
"""

PREDICT = """
import importlib.util
import numpy as np
from simomerge.runtime import Scene
assert importlib.util.find_spec("torch") is None
for task, values in Scene("scene.onnx").predict(np.load("frame.npy")).items():
    np.save(f"{task}.npy", values)
"""


def python_of(version: str) -> str | None:
    """The interpreter of a version on this machine, also one of pyenv that is not in PATH."""
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(kept[-1]) if kept else shutil.which(f"python{version}")


def run(*arguments: str | Path, folder: Path) -> str:
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, arguments)), cwd=folder, env=outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The wheel that is built from the sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)  # the sdist, and from it the wheel
    (made,) = folder.glob("*.whl")
    assert made.name == f"simomerge-{__version__}-py3-none-any.whl"
    assert [path.name for path in folder.glob("*.tar.gz")] == [f"simomerge-{__version__}.tar.gz"]
    yield made


def test_pages_name_the_wheel_of_this_version() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = re.findall(
        r"simomerge-([^ ]+)-py3-none-any\.whl", "".join(page.read_text(encoding="utf-8") for page in pages)
    )
    assert found and set(found) == {__version__}


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_merging_and_the_runtime_work_without_torch(
    version: str, wheel: Path, exported: Exported, tmp_path: Path
) -> None:
    if (python := python_of(version)) is None:
        pytest.skip(f"Python {version} is not installed")
    run(python, "-m", "venv", "new", folder=tmp_path)
    new = tmp_path / "new/bin/python"
    run(new, "-m", "pip", "install", "--quiet", f"{wheel}[runtime]", folder=tmp_path)
    assert run(tmp_path / "new/bin/simomerge", "--version", folder=tmp_path).split()[-1] == __version__
    installed = {
        each["name"] for each in json.loads(run(new, "-m", "pip", "list", "--format", "json", folder=tmp_path))
    }
    assert {"numpy", "onnxruntime", "simomerge"} <= installed and not {"torch", "transformers"} & installed

    draw = np.random.default_rng(0)
    weights = {name: {"w": draw.normal(size=(4, 4)).astype(np.float32)} for name in ("base", "a", "b")}
    for name, tensors in weights.items():
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
    run(new, "-c", MERGE, folder=tmp_path)
    from safetensors.numpy import load_file

    merged = load_file(tmp_path / "merged.safetensors")["w"]
    np.testing.assert_allclose(merged, (weights["a"]["w"] + weights["b"]["w"]) / 2, rtol=1e-6)

    shutil.copy(exported.file, tmp_path)
    (frame,) = frames_of(SIZE, 1)
    np.save(tmp_path / "frame.npy", frame)
    run(new, "-c", PREDICT, folder=tmp_path)
    wanted = exported.model.predict(frame)
    for task in ("depth", "normals"):
        np.testing.assert_allclose(np.load(tmp_path / f"{task}.npy"), wanted[task], rtol=1e-4, atol=1e-4)
