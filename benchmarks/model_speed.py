"""One model with T heads against T separate models: seconds per image and memory, on this machine's CPU.

    python benchmarks/model_speed.py [--sizes S B] [--heads linear dpt] [--tasks 5] [--repeats 3] [--bf16] [-o FILE]

The encoders have the sizes of DINOv2 and random weights. The heads are the paper's (linear, or DPT with 128 fusion
channels). Images are 280 x 378, as in the paper's NYUv2, and are processed one at a time. The one model and the T
models run in separate processes, which take turns. Each process adds one task at a time and measures after every
addition: two images to warm up, then `--images`. The time is that of the median image. Memory is the peak of anonymous
pages, minus what torch and transformers take when imported. Prints medians and ranges over the processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from simomerge.recipes.results import machine

SIZES = {"S": (384, 6), "B": (768, 12), "L": (1024, 16)}
"""Hidden width and attention heads; 12 blocks, L 24."""

IMAGE = (280, 378)


def model(size: str, head: str) -> Any:
    """An expert: an encoder and a one-channel head."""
    from transformers import Dinov2Config, Dinov2Model

    from simomerge.datasets.tasks import Task
    from simomerge.models.encoders import Encoder
    from simomerge.models.heads import head_for
    from simomerge.models.model import SimoModel

    width, attention_heads = SIZES[size]
    config = Dinov2Config(
        hidden_size=width,
        num_attention_heads=attention_heads,
        num_hidden_layers=24 if size == "L" else 12,
        patch_size=14,
        image_size=518,
    )
    encoder = Encoder(Dinov2Model(config))
    return SimoModel(encoder, {"task1": Task("task1", "depth")}, {"task1": head_for(encoder, head, 1)}).eval()


def anonymous() -> int:
    """Bytes of anonymous pages of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("Linux only")


def measure(size: str, head: str, shared: bool, most: int, images: int, bf16: bool) -> list[dict[str, float]]:
    """Measure 1 to ``most`` tasks in this process: median seconds per image, peak bytes of models and activations."""
    import torch
    import transformers  # noqa: F401

    from simomerge.datasets.tasks import Task
    from simomerge.models.heads import head_for
    from simomerge.models.model import SimoModel

    start, image, found = anonymous(), torch.rand(1, 3, *IMAGE), []
    models: list[SimoModel] = []
    with Watch() as watch, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for tasks in range(1, most + 1):
            if shared and models:
                name = f"task{tasks}"
                encoder = models[0].encoder
                models[0].tasks[name] = Task(name, "depth")
                models[0].heads[name] = head_for(encoder, head, 1).eval()
            else:
                models.append(model(size, head))
            seconds = []
            for _ in range(2 + images):
                begin = time.perf_counter()
                for each in models:
                    each(image)
                seconds.append(time.perf_counter() - begin)
            found.append({"seconds": statistics.median(seconds[2:]), "bytes": watch.peak - start})
    return found


class Watch:
    """The peak of this process's anonymous pages so far, read every two milliseconds."""

    def __enter__(self) -> Watch:
        self.peak, self.running = anonymous(), True
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()

    def _look(self) -> None:
        while self.running:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)


def run(*arguments: Any) -> list[dict[str, float]]:
    """Run `measure` in a new process."""
    call = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    result: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def spread(values: list[float], scale: float = 1.0) -> str:
    return f"{statistics.median(values) * scale:.3g} ({min(values) * scale:.3g}-{max(values) * scale:.3g})"


def row(tasks: int, found: dict[bool, list[list[dict[str, float]]]]) -> dict[str, Any]:
    """All figures for one number of tasks. In each pair, the one model comes first."""
    seconds, taken = (
        [[run[tasks - 1][what] for run in found[shared]] for shared in (True, False)] for what in ("seconds", "bytes")
    )
    faster = statistics.median(seconds[1]) / statistics.median(seconds[0])
    less = statistics.median(taken[0]) / statistics.median(taken[1])
    return {"tasks": tasks, "seconds": seconds, "bytes": taken, "faster": faster, "memory": less}


def line(row: dict[str, Any]) -> str:
    times, sizes = row["seconds"], row["bytes"]
    return (
        f"| {row['size']} | {row['head']} | {row['tasks']} | {spread(times[0])} | {spread(times[1])} |"
        f" {row['faster']:.2f} | {spread(sizes[0], 1e-9)} | {spread(sizes[1], 1e-9)} | {row['memory']:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S", "B"], choices=list(SIZES))
    parser.add_argument("--heads", nargs="+", default=["linear", "dpt"], choices=["linear", "dpt"])
    parser.add_argument("--tasks", type=int, default=5, help="largest number of tasks")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, as in evaluation on such devices")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    print(f"machine: {machine()}; {'bfloat16 where autocast uses it' if arguments.bf16 else 'float32'}")
    print(
        "| encoder | heads | T | one model, s | T models, s | times as fast | one model, GB | T models, GB | memory |"
    )
    print("| --- | --- | --: | --: | --: | --: | --: | --: | --: |")
    rows = []
    for size in arguments.sizes:
        for head in arguments.heads:
            found: dict[bool, list[list[dict[str, float]]]] = {True: [], False: []}
            for _ in range(arguments.repeats):
                for shared in found:
                    found[shared].append(run(size, head, shared, arguments.tasks, arguments.images, arguments.bf16))
            for tasks in range(1, arguments.tasks + 1):
                rows.append({"size": size, "head": head, **row(tasks, found)})
                print(line(rows[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
