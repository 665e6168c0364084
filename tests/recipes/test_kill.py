"""A run that is killed without warning, again and again, ends where one that was left alone ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
base: {base}
tasks: [depth, normals]
train_images: 32
val_images: 8
test_images: 8
scale_images: 8
probe: {{steps: 60, batch_size: 8}}
tune: {{steps: 120, batch_size: 8, validate_every: 20}}
joint: {{steps: 120, batch_size: 8, validate_every: 20}}
realign:
  heads: {{steps: 60, batch_size: 8}}
  adapters: {{steps: 60, batch_size: 8}}
  distill: {{steps: 60, batch_size: 8}}
  distill-encoder: {{steps: 60, batch_size: 8}}
merges: [average, task-arithmetic]
realigned:
  [task-arithmetic+heads, task-arithmetic+adapters, task-arithmetic+fold, average+distill, average+distill-encoder]
"""

# Trainings this short are never saved at the usual pace, twenty seconds; here every fifth of one.
COMMAND = """
import sys
from simomerge.training.state import TrainingState
TrainingState.save_once_in_a_while.__defaults__ = (0.2,)
from simomerge.cli import main
main()
"""


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", COMMAND, "run", str(recipe), "-o", str(folder), "--workers", "1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def written(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file that was renamed meanwhile
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def finish(recipe: Path, folder: Path) -> dict[str, Any]:
    process = start(recipe, folder)
    error = process.communicate(timeout=900)[1]
    assert process.returncode == 0, error.decode()
    return json.loads((folder / "results.json").read_text())


def metrics(results: dict[str, Any]) -> dict[str, Any]:
    return {row["method"]: row["all_metrics"] for row in results["rows"]}


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_metric(tiny_base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "micro.yaml"
    recipe.write_text(RECIPE.format(base=tiny_base))
    alone = finish(recipe, tmp_path / "alone")
    draw, folder = random.Random(0), tmp_path / "killed"
    for kills in range(10):
        before = written(folder)
        process = start(recipe, folder)
        while written(folder) == before and process.poll() is None:  # until it has begun to work
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
        assert process.poll() is None, f"done after {kills} kills: give the recipe more steps"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert metrics(finish(recipe, folder)) == metrics(alone)
    left = [path.name for path in (folder / "stages").iterdir()]
    assert sorted(left) == sorted(path.name for path in (tmp_path / "alone" / "stages").iterdir())
