"""Peak memory of each process that trains a ViT-L, with DistributedDataParallel and divided by --shard.

    python benchmarks/sharding.py                       # both, two processes each: needs 16 GB of memory
    python benchmarks/sharding.py --whole-processes 1   # a whole model in one process: needs 8 GB
    python benchmarks/sharding.py --save                # and write the trained model to a temporary folder

The model has random weights, the data are a few rendered rooms. Each process reports the largest memory that it ever
used (ru_maxrss), so loading, training and saving all count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = {
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}


def train(size: str, steps: int, shard: bool, save: bool) -> None:
    """Train a model for a few steps; what one of the processes does."""
    os.environ["SIMOMERGE_PRECISION"] = "fp32"
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from simomerge.core import distributed
    from simomerge.datasets import load_data
    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel
    from simomerge.training.lpft import finetune, fresh_head
    from simomerge.training.settings import TrainSettings
    from simomerge.training.sharding import sharded

    torch.set_num_threads(1)
    distributed.join_processes()
    start = peak()
    torch.manual_seed(0)
    encoder = Encoder(Dinov2Model(Dinov2Config(**SIZES[size], patch_size=16, image_size=64)))
    data = load_data("rooms", "train", 8, ("depth",))
    head = fresh_head(encoder, data.tasks["depth"], data, "linear")
    model = SimoModel(encoder, data.tasks, {"depth": head}).requires_grad_(True)
    with sharded(shard):
        log = finetune(model, data, TrainSettings(steps=steps, batch_size=2, lr=1e-4))
    trained = peak()
    if save and distributed.is_first():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(Path(folder) / "model")
    parameters = sum(each.numel() for each in model.parameters())
    found = {"rank": distributed.rank(), "parameters": parameters, "start": start, "peak": trained, "saved": peak()}
    print(json.dumps({**found, "seconds_per_step": log.seconds / steps}), flush=True)


def peak() -> float:
    """The largest memory that this process ever used, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measured(processes: int, *options: str) -> list[dict[str, Any]]:
    """What each of several processes reports."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != processes:
        sys.exit(done.stderr[-2000:])
    return sorted(map(json.loads, lines), key=lambda each: each["rank"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="large")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="processes among which the model is divided")
    parser.add_argument("--whole-processes", type=int, default=2, help="processes of DistributedDataParallel")
    parser.add_argument("--save", action="store_true", help="also write the model, and count its memory")
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        train(given.size, given.steps, given.shard, given.save)
        return
    common = ["--size", given.size, "--steps", str(given.steps), *(["--save"] if given.save else [])]
    runs = {"divided": measured(given.processes, *common, "--shard"), "whole": measured(given.whole_processes, *common)}
    for name, found in runs.items():
        for each in found:
            print(
                f"{name:8} process {each['rank']} of {len(found)}: {each['peak']:.2f} GB while training,"
                f" {each['saved']:.2f} GB in all, {each['start']:.2f} GB before the model;"
                f" {each['seconds_per_step']:.1f} s per step, {each['parameters'] / 1e6:.0f} M parameters"
            )
    shares = [max(each["saved"] for each in found) for found in runs.values()]
    print(f"divided / whole: {100 * shares[0] / shares[1]:.0f} %")


if __name__ == "__main__":
    main()
