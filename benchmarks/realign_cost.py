"""Seconds and peak memory of every label-free re-alignment on the same merge, experts and images.

The last line is `merge --scale learned`, which learns one coefficient per expert and block.

Each method runs in a process of its own with one thread, on a merge of seed 0 of a finished run.

    python benchmarks/realign_cost.py runs/rooms-distill --count 256
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from simomerge.assembly.realign import realignments
from simomerge.datasets.load import load_data
from simomerge.models.model import load

STEPS = {"surgery": 1000, "symerge": 180, "prodistill": 40, "distill": 40, "distill-encoder": 100}


def stage(run: Path, name: str) -> Path:
    """The model folder of a stage of seed 0."""
    (found,) = run.glob(f"stages/{name}-seed-0-*/model")
    return found


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in GB of a command."""
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}.")
    return time.monotonic() - began, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run with task arithmetic and three tasks")
    parser.add_argument("--count", type=int, default=256, help="unlabelled images")
    given = parser.parse_args()
    scene = stage(given.run, "task-arithmetic-without-labels")
    tasks = list(load(scene).tasks)
    experts = [f"{task}={stage(given.run, f'expert-{task}')}" for task in tasks]
    free = [name for name, method in realignments().items() if method.teacher == "experts"]
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        rooms = load_data("rooms", split="val", count=given.count, tasks=[])
        for index in range(given.count):
            pixels = (rooms.image(index).permute(1, 2, 0).numpy() * 255).round().astype("uint8")
            Image.fromarray(pixels).save(photos / f"{index:05}.png")
        commands = dict[str, list[str]]()
        for name in free:
            options = ["--steps", str(STEPS[name])] if name in STEPS else []
            options += ["--base", "rooms-base"] if realignments()[name].needs_base else []
            commands[name] = ["realign", str(scene), *experts, "--method", name, *options]
        commands["merge, learned"] = ["merge", "rooms-base", *experts, "--scale", "learned"]
        for name, command in commands.items():
            images = ["--images", str(photos), "--count", str(given.count), "-o", str(Path(folder) / name)]
            seconds, memory = measured([sys.executable, "-m", "simomerge", *command, *images])
            print(f"{name:<18} {seconds:6.1f} s  {memory:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
