"""Trees of shared blocks: do time and memory follow the nominal cost?

    python benchmarks/tree_speed.py [--sizes S B] [--tasks 3] [--images 7] [--repeats 3]

Encoders have the sizes of DINOv2 and random weights, heads are linear, and images have 280 x 378 pixels. All tasks
share the first k of 12 blocks, and then each has its own. The times of all k are measured in one process, image by
image in turn, so that a drift of the machine's speed affects all of them equally: seconds of the process on one thread,
the median over the images. Weights are the bytes of the encoder's parameters. Memory is that of one process for each k:
the peak of anonymous pages while it processes images, minus what torch and transformers take when imported. Prints all
of them relative to one encoder next to the nominal cost, as medians and ranges over the repeats.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from model_speed import IMAGE, Watch, anonymous
from model_speed import model as expert
from simomerge.recipes.results import machine

BLOCKS = 12


def tree_model(size: str, tasks: int, shared: int) -> Any:
    """A model whose tasks share the first blocks; random weights."""
    from simomerge.datasets.tasks import Task
    from simomerge.merging.tree import Tree
    from simomerge.models.encoders.tree import TreeEncoder
    from simomerge.models.heads import head_for
    from simomerge.models.model import SimoModel

    names = [f"task{number}" for number in range(1, tasks + 1)]
    tree, encoder = Tree.of(shared, names, BLOCKS), expert(size, "linear").encoder
    grown = encoder if tree.is_trivial else TreeEncoder(tree, encoder)
    heads = {name: head_for(encoder, "linear", 1) for name in names}
    return SimoModel(grown, {name: Task(name, "depth") for name in names}, heads).eval()


def times(size: str, tasks: int, shared: Sequence[int], images: int) -> list[float]:
    """Median seconds per image of this process, for each number of shared blocks, in turn."""
    import torch

    torch.set_num_threads(1)
    models, image = [tree_model(size, tasks, k) for k in shared], torch.rand(1, 3, *IMAGE)
    found: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(images + 1):
            for model, seconds in zip(models, found, strict=True):
                begin = time.process_time()
                model(image)
                seconds.append(time.process_time() - begin)
    return [statistics.median(seconds[1:]) for seconds in found]


def memory(size: str, tasks: int, shared: int) -> tuple[int, int]:
    """Bytes of the encoder's parameters, and of the model with the activations for one image at their peak."""
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    begin = anonymous()
    model = tree_model(size, tasks, shared)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what making the tree took goes back to the system
    with Watch() as watch, torch.inference_mode():
        for _ in range(3):
            model(torch.rand(1, 3, *IMAGE))
    weights = sum(parameter.nbytes for parameter in model.encoder.parameters())
    return weights, watch.peak - begin


def run(*arguments: Any) -> Any:
    """Run `times` or `memory` in a new process."""
    call = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def shown(values: Sequence[float], cost: float) -> str:
    """The median and the range of a ratio, and how far the median is from the nominal cost."""
    median = statistics.median(values)
    return f"{median:.2f} ({min(values):.2f}-{max(values):.2f}), {median / cost - 1:+.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S", "B"], choices=["S", "B", "L"])
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--shared", type=int, nargs="+", default=[12, 9, 6, 3, 0], help="numbers of shared blocks")
    parser.add_argument("--images", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        what, *arguments = json.loads(given.measure)
        print(json.dumps({"times": times, "memory": memory}[what](*arguments)))
        return
    print(f"machine: {machine()}; {given.tasks} tasks, float32, one thread")
    print("| encoder | shared blocks | nominal cost | time | weights | memory |\n| --- | --: | --: | --: | --: | --: |")
    for size in given.sizes:
        seconds = [run("times", size, given.tasks, [BLOCKS, *given.shared], given.images) for _ in range(given.repeats)]
        one = [run("memory", size, given.tasks, BLOCKS) for _ in range(given.repeats)]
        for place, shared in enumerate(given.shared, 1):
            cost = (shared + given.tasks * (BLOCKS - shared)) / BLOCKS
            taken = [run("memory", size, given.tasks, shared) for _ in range(given.repeats)]
            ratios = [[each[place] / each[0] for each in seconds]]
            ratios += [[some[i] / whole[i] for some, whole in zip(taken, one, strict=True)] for i in (0, 1)]
            print(
                f"| {size} | {shared} | {cost:.2f} | {' | '.join(shown(each, cost) for each in ratios)} |", flush=True
            )


if __name__ == "__main__":
    main()
