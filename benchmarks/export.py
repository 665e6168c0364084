"""Speed, memory and agreement of exported files against torch, for a ViT of real size or for a model of one's own.

    python benchmarks/export.py --vit small --size 476x630 -o runs/export-vit-small
    python benchmarks/export.py --run runs/rooms --size 64x80 --data rooms -o runs/export-rooms
    python benchmarks/export.py --model runs/scene --size 480x640 --images photos/ -o runs/export-scene

``--run`` merges the experts of a finished run on rooms (seed 0) by task arithmetic, scale 0.4, and folds the heads
cross-tap on 128 images of the validation split; int8 is calibrated on the same images. A ViT has random weights, three
tasks with DPT heads, and DINOv2's shape; its figures of speed are those of a trained model, its differences are not.
All runs use one thread. The table names the processor's time, because the clock also counts what other programs do;
both are in OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import simomerge as sm
from simomerge.cli.benchmark import add_scores
from simomerge.core.files import atomic_write_text
from simomerge.core.pixels import height_width
from simomerge.core.progress import Console, show_progress
from simomerge.datasets.load import load_data
from simomerge.datasets.tasks import Task
from simomerge.exporting.benchmark import benchmark
from simomerge.exporting.export import export
from simomerge.models.encoders import Encoder
from simomerge.models.heads import head_for
from simomerge.models.model import SimoModel

WIDTHS = {"small": (384, 6), "base": (768, 12)}
"""Channels and attention heads of ViT-S and ViT-B."""

FILES = {"fp32.onnx": "fp32", "fp16.onnx": "fp16", "int8.onnx": "int8", "fp32.xml": "fp32", "int8.xml": "int8"}


def vit(name: str) -> SimoModel:
    """A ViT of DINOv2's shape with random weights, and DPT heads for three tasks."""
    from transformers import Dinov2Config, Dinov2Model

    width, heads = WIDTHS[name]
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=width, num_attention_heads=heads, patch_size=14, image_size=518)
    encoder = Encoder(Dinov2Model(config).eval())
    classes = tuple(f"class {number}" for number in range(13))
    tasks = {
        "segmentation": Task("segmentation", classes=classes),
        "depth": Task("depth"),
        "normals": Task("normals"),
    }
    made = {task: head_for(encoder, "dpt", about.channels) for task, about in tasks.items()}
    made["depth"].start_at(torch.tensor([3.0]))
    return SimoModel(encoder, tasks, made).eval()


def merged(run: Path, images: Any) -> SimoModel:
    """The experts of a run as one model, re-aligned without labels."""
    found = {path.name.split("-")[1]: path / "model" for path in run.glob("stages/expert-*-seed-0-*")}
    experts = sm.load_experts(**{task: str(folder) for task, folder in sorted(found.items())})
    model = sm.merge("rooms-base", experts, "task-arithmetic", scale=0.4)
    return sm.realign(model, experts, images, method="fold-cross", count=128)


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Export in every format, then time all of them and the model itself."""
    folder, size = Path(arguments.output), height_width(arguments.size)
    folder.mkdir(parents=True, exist_ok=True)
    model = Path(arguments.model) if arguments.model else folder / "model"
    images: Any = arguments.images
    if arguments.run:
        images = load_data("rooms", split="val", count=128)
    if not model.exists():
        made = merged(Path(arguments.run), images) if arguments.run else vit(arguments.vit)
        made.save_pretrained(model)
    if images is None:
        images = [np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8) for seed in range(8)]
    limits = dict.fromkeys(("segmentation", "depth", "normals"), 1e9)  # the differences are a result here
    for name, precision in FILES.items():
        if not (folder / name).exists() and name in arguments.files.split(","):
            export(model, folder / name, size, precision=precision, images=images, limits=limits)
    files = [folder / name for name in FILES if (folder / name).exists()]
    rows = benchmark([str(model), *map(str, files)], size, images, runs=arguments.runs, threads=1)
    if arguments.data:
        dataset = load_data(arguments.data, split="test", count=arguments.count)
        add_scores(rows, dataset, 1, None)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    tasks = list(rows[0]["difference"])
    scored = "scores" in rows[0]
    head = ["file", "CPU ms", "times as fast", "memory MB", "disk MB", *tasks, *(["Delta_MTL %"] if scored else [])]
    lines = [head, [":--", *["--:"] * (len(head) - 1)]]
    for row in rows:
        cpu = row["milliseconds"]["cpu"]
        cells = [Path(row["target"]).name, f"{cpu:.0f}", f"{rows[0]['milliseconds']['cpu'] / cpu:.2f}"]
        cells += [f"{row['memory'] / 1e6:.0f}", f"{row['disk'] / 1e6:.1f}"]
        cells += [f"{row['difference'][task]['value']:.2g}" for task in tasks]
        lines.append(cells + ([f"{row['delta_mtl']:+.2f}"] if scored else []))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vit", choices=WIDTHS, default="small")
    parser.add_argument("--model", help="a model folder, in place of a ViT")
    parser.add_argument("--run", help="the folder of a finished run on rooms, in place of a ViT")
    parser.add_argument("--size", required=True)
    parser.add_argument("--images", help="images to calibrate on; noise by default")
    parser.add_argument("--data", help="also evaluate on the test split of this dataset")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--files", default=",".join(FILES))
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args()
    with show_progress(Console()):
        rows = measured(arguments)
    atomic_write_text(Path(arguments.output) / "results.json", json.dumps(rows, indent=2))
    print(table(rows))


if __name__ == "__main__":
    main()
