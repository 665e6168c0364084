"""How much faster is a re-alignment epoch on cached features than one through the encoder?

    python benchmarks/cached_features.py [--images 256] [--large-images 16] [--repeats 5]

One epoch trains the heads of three tasks on rooms, in this process with one thread (the paper's re-alignment of heads).
It runs once through the frozen encoder and once on features that were computed before. The encoders are the embedded
base, and encoders of ViT-B and ViT-L size with random weights. The large ones also process images of 280 x 378 with
patches of 14 and the paper's linear head (one logit per patch), as the paper's models do on NYUv2. Prints the median
and the range of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from simomerge.core.assets import resolve_source
from simomerge.core.machine import limit_threads
from simomerge.datasets import DenseDataset, load_data
from simomerge.models.encoders import Encoder, load_encoder
from simomerge.models.model import SimoModel
from simomerge.recipes.demo import ROOMS_HEADS
from simomerge.recipes.results import machine
from simomerge.training.features import CachedFeatures, cache_features
from simomerge.training.loop import fit
from simomerge.training.lpft import fresh_head, image_losses, train_head
from simomerge.training.settings import TrainSettings

BATCH = 32


def vit(size: str, patch: int = 8, image: int = 80) -> Encoder:
    """An encoder of ViT-B or ViT-L size, with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    width, depth, heads = {"B": (768, 12, 12), "L": (1024, 24, 16)}[size]
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, patch_size=patch, image_size=image
    )
    return Encoder(Dinov2Model(config))


def timed(work: Callable[[], object], repeats: int) -> tuple[float, str]:
    """Median seconds, and a text of median and range."""
    work()  # the first run pays for lazy set-up
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    median = statistics.median(times)
    return median, f"{median:.2f} s ({min(times):.2f} to {max(times):.2f})"


def compare(
    name: str,
    encoder: Encoder,
    kind: str,
    data: DenseDataset,
    repeats: int,
    head_settings: Mapping[str, Any],
    batch: int = BATCH,
) -> None:
    heads = {task.name: fresh_head(encoder, task, data, kind, **head_settings) for task in data.tasks.values()}
    model = SimoModel(encoder, data.tasks, heads)
    model.requires_grad_(False)
    model.heads.requires_grad_(True)
    settings = TrainSettings(steps=max(1, len(data) // batch), batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        cache_features(encoder, data, Path(folder) / "features")
        caching = time.perf_counter() - began

        def cached() -> None:
            for task in data.tasks.values():
                train_head(
                    heads[task.name], task, CachedFeatures(Path(folder) / "features", data, [task.name]), settings
                )

        slow, through = timed(lambda: fit(model, partial(image_losses, model), data, settings), repeats)
        fast, on_cache = timed(cached, repeats)
    size = " x ".join(str(n) for n in data.image(0).shape[1:])
    print(f"| {name} | {size} | {kind} | {through} | {on_cache} | {slow / fast:.1f} | {caching:.1f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--large-images", type=int, default=16, help="images of 280 x 378; 0 skips these rows")
    parser.add_argument("--large", nargs="*", default=["B", "L"], help="encoder sizes for the images of 280 x 378")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tasks = ["segmentation", "depth", "normals"]
    data = load_data("rooms", split="val", count=args.images, tasks=tasks)
    limit_threads(1)
    print(f"{machine()}; {args.images} images (large: {args.large_images}), three heads, median of {args.repeats}")
    print("| encoder | images | heads | epoch through the encoder | epoch on cached features | ratio | caching once |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, make in (
        ("embedded base", lambda: load_encoder(resolve_source("rooms-base"))),
        ("ViT-B size", lambda: vit("B")),
    ):
        for kind in ("linear", "dpt"):
            compare(name, make(), kind, data, args.repeats, ROOMS_HEADS[kind])
    if args.large_images:
        large = load_data("rooms", split="val", count=args.large_images, tasks=tasks, size=(280, 378))
        for size in args.large:
            compare(f"ViT-{size} size, patch 14", vit(size, 14, 518), "linear", large, args.repeats, {}, batch=8)


if __name__ == "__main__":
    main()
