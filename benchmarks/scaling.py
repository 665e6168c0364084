"""Images per second of training, fold, evaluation and features in one process and in several, on this machine.

    python benchmarks/scaling.py --processes 1 2

Each process has one thread, so that two processes have twice the cores of one. A machine that does other work at the
same time gives other ratios of wall time; the processor seconds per image show what the sharing itself costs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

BATCH, IMAGES = 32, 256


def work(steps: int) -> None:
    """Time every kind of work; what one of the processes does."""
    os.environ["SIMOMERGE_PRECISION"] = "fp32"
    import torch

    from simomerge.assembly.realign import realign
    from simomerge.core import distributed
    from simomerge.datasets import load_data
    from simomerge.models.model import SimoModel, load
    from simomerge.training.evaluate import evaluate
    from simomerge.training.lpft import finetune, fresh_head
    from simomerge.training.settings import TrainSettings
    from simomerge.training.sharding import sharded

    torch.set_num_threads(1)
    distributed.join_processes()
    tasks = ("segmentation", "depth", "normals")
    with distributed.first_before_others():
        data = load_data("rooms", "val", IMAGES, tasks)

    def fresh() -> SimoModel:
        encoder = load("rooms-base").encoder
        heads = {name: fresh_head(encoder, task, data, "linear") for name, task in data.tasks.items()}
        return SimoModel(encoder, data.tasks, heads).requires_grad_(True)

    def train(shard: bool) -> int:
        with sharded(shard):
            finetune(model, data, TrainSettings(steps=steps, batch_size=BATCH, lr=1e-4))
        return steps * BATCH

    def fold() -> int:
        realign(model, {name: model.select(name) for name in tasks}, data, method="fold-cross", count=IMAGES)
        return IMAGES

    def judge() -> int:
        evaluate(model, data)
        return IMAGES

    model = fresh()
    jobs: dict[str, Callable[[], int]] = {"train": lambda: train(False)}
    if distributed.processes() > 1:
        jobs["train --shard"] = lambda: train(True)
    for name, job in {**jobs, "fold": fold, "evaluate": judge}.items():
        distributed.wait()
        began, cpu = time.monotonic(), time.process_time()
        images = job()
        distributed.wait()
        spent = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
        distributed.add_up(spent)
        if distributed.is_first():
            wall = time.monotonic() - began
            found = {"job": name, "images_per_second": images / wall, "cpu_ms_per_image": 1e3 * float(spent) / images}
            print(json.dumps(found), flush=True)


def measured(processes: int, steps: int) -> dict[str, dict[str, Any]]:
    """Job -> what several processes reported."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker", "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {each["job"]: each for each in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.steps)
        return
    results = {processes: measured(processes, given.steps) for processes in given.processes}
    first = results[given.processes[0]]
    print("| job | processes | images / s | times the first | processor ms per image |")
    print("| --- | --- | --- | --- | --- |")
    for processes, found in results.items():
        for name, each in found.items():
            base = first.get(name) or first["train"]
            ratio = each["images_per_second"] / base["images_per_second"]
            shown = f"{each['images_per_second']:.1f} | {ratio:.2f} | {each['cpu_ms_per_image']:.1f}"
            print(f"| {name} | {processes} | {shown} |")


if __name__ == "__main__":
    main()
