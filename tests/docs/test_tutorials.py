"""The tutorials run as they are printed. What cannot run says why, in the page."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import simomerge

from .blocks import Block, blocks, script

ROOT = Path(__file__).parent.parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


def run(text: str, folder: Path) -> str:
    """Run a shell script with ``simomerge`` and ``python`` of this environment; its output."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, call in (("python", ""), ("simomerge", "-m simomerge ")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {call}"$@"\n')
        program.chmod(0o755)
    paths = [str(Path(simomerge.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ":".join(paths)}
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        'a\n```python title="x.py"\n1\n```\n<!-- not run: because -->\n```bash\nls\n```\n```bash\npwd\n```\n'
    )
    assert blocks(page) == [
        Block("python", "1\n", "x.py"),
        Block("bash", "ls\n", "", "because"),
        Block("bash", "pwd\n"),
    ]
    assert script(page) == "set -eu\ncat > x.py <<'END_OF_BLOCK'\n1\nEND_OF_BLOCK\npwd\n"


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_fence_is_a_block_of_a_known_kind(page: Path) -> None:
    found = blocks(page)
    assert page.read_text().count("```") == 2 * len(found) and {block.kind for block in found} <= {"python", "bash"}


@pytest.mark.slow
def test_own_experts(tmp_path: Path) -> None:
    text = script(ROOT / "docs" / "tutorials" / "own-experts.md")
    assert "range(1, 61)" in text and "count=128" in text
    shorter = text.replace("range(1, 61)", "range(1, 4)").replace("count=128", "count=16")
    out = run(shorter.replace("--images rooms", "--images rooms --count 16"), tmp_path)
    assert out.count("Delta_MTL:") == 2 and "{'depth': (64, 80), 'segmentation': (64, 80)}" in out


@pytest.mark.slow
def test_robot(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    text = script(ROOT / "docs" / "tutorials" / "robot.md")
    out = run(text.replace("steps 30", "steps 2").replace("--count 64", "--count 8"), tmp_path)
    assert "{'depth': (64, 80), 'normals': (3, 64, 80)}" in out


@pytest.mark.slow
def test_hub_models(tmp_path: Path) -> None:
    """With tiny random models of the same architectures in place of the downloads, and rooms in place of photos."""
    names = {
        "LiheYoung/depth-anything-small-hf": "./anything",
        "facebook/dinov2-small": "dinov2",
        "[9, 10, 11, 12]": "[1, 2, 3, 4]",
        "nyuv2:/data/nyuv2": "rooms --count 8 --val-count 8 --probe-steps 2 --batch-size 4",
        "--steps 2000": "--steps 2",
        "--images photos/": "--images rooms --count 16",
    }
    text = script(ROOT / "docs" / "tutorials" / "hub-models.md")
    for old, new in names.items():
        assert old in text, old
        text = text.replace(old, new)
    shutil.copy(Path(__file__).parent / "stand_ins.py", tmp_path)
    run("python stand_ins.py", tmp_path)
    assert "R2 of the head's input" in run(text, tmp_path)
