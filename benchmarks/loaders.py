"""How fast are images and targets read and decoded, compared with the speed of training?

    python benchmarks/loaders.py [--images 12] [--repeats 3]

Everything runs in one thread of one process, as in the training of an expert. For each published dataset, the script
writes a few files in its formats and sizes; their content are enlarged rooms with the noise of a camera. It reads them
at the size of the paper's protocol, with all tasks and with the slowest task alone. It trains DINOv2-base (random
weights, linear head) on images of that size; for rooms, it trains the embedded base. Prints medians and ranges.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from model_speed import model
from simomerge.core.assets import resolve_source
from simomerge.core.machine import limit_threads
from simomerge.datasets import load_data
from simomerge.datasets.batches import training_batches
from simomerge.datasets.published.taskonomy import BUILDINGS
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel, load
from simomerge.recipes.results import machine
from simomerge.training.loop import fit
from simomerge.training.lpft import fresh_head, image_losses
from simomerge.training.settings import TrainSettings

Scene = dict[str, np.ndarray]


def scenes(count: int, height: int, width: int) -> list[Scene]:
    """Rooms resized to another size: image with noise (8 bits), labels, depth, normals."""
    rooms = load_data("rooms", "val", count)
    return [_enlarged(rooms[i], height, width, np.random.default_rng(i)) for i in range(count)]


def _enlarged(sample: dict[str, Any], height: int, width: int, rng: np.random.Generator) -> Scene:
    size = (height, width)
    image = torch.nn.functional.interpolate(sample["image"][None], size, mode="bicubic")[0].permute(1, 2, 0).numpy()
    noisy = 255 * image + 2 * rng.standard_normal(image.shape)
    near = [np.linspace(0, old - 1, new).round().astype(int) for old, new in zip((64, 80), size, strict=True)]
    return {
        "image": noisy.clip(0, 255).astype(np.uint8),
        "labels": sample["segmentation"].numpy()[np.ix_(*near)],
        "depth": torch.nn.functional.interpolate(sample["depth"][None], size, mode="bilinear")[0, 0].numpy(),
        "normals": sample["normals"].permute(1, 2, 0).numpy()[np.ix_(*near)],
    }


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)


def nyuv2_npy(root: Path, count: int) -> str:
    for part in ("train", "val"):
        for i, scene in enumerate(scenes(count, 288, 384)):
            write(root / part / f"image/{i}.npy", scene["image"].astype(np.float32) / 255)
            write(root / part / f"label/{i}.npy", scene["labels"].astype(np.float32))
            write(root / part / f"depth/{i}.npy", scene["depth"][..., None])
            write(root / part / f"normal/{i}.npy", scene["normals"])
    return f"nyuv2:{root}"


def nyuv2_mat(root: Path, count: int) -> str:
    root.mkdir(parents=True)
    found = scenes(count, 480, 640)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        for name, values in {
            "images": [scene["image"].transpose(2, 1, 0) for scene in found],
            "depths": [scene["depth"].T.astype(np.float32) for scene in found],
            "labels": [scene["labels"].T.astype(np.uint16) for scene in found],
        }.items():
            file.create_dataset(name, data=np.stack(values), chunks=(1, *values[0].shape))
    numbers = np.arange(1, count + 1)
    savemat(root / "splits.mat", {"trainNdxs": numbers[:-2, None], "testNdxs": numbers[-2:, None]})
    savemat(root / "classMapping40.mat", {"mapClass": np.arange(894)[None] % 40 + 1})
    return f"nyuv2:{root}"


def cityscapes_tree(root: Path, count: int) -> str:
    for part, city in (("train", "aachen"), ("val", "frankfurt")):
        for i, scene in enumerate(scenes(count if part == "train" else 1, 1024, 2048)):
            stem = f"{part}/{city}/{city}_{i:06d}_000019"
            write(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", scene["image"])
            write(root / "gtFine" / f"{stem}_gtFine_labelIds.png", scene["labels"].astype(np.uint8) + 7)
            uids = np.where(scene["labels"] == 1, 2401002, scene["labels"] + 7).astype(np.int32)
            write(root / "gtFinePanopticParts" / f"{stem}_gtFinePanopticParts.tif", uids)
            write(root / "disparity" / f"{stem}_disparity.png", (256 * 60 / scene["depth"]).astype(np.uint16))
    return f"cityscapes:{root}"


def cityscapes_npy(root: Path, count: int) -> str:
    for part in ("train", "val"):
        for i, scene in enumerate(scenes(count, 128, 256)):
            write(root / part / f"image/{i}.npy", scene["image"].astype(np.float32) / 255)
            write(root / part / f"label_19/{i}.npy", scene["labels"].astype(np.float32))
            write(root / part / f"part_seg/{i}.npy", (scene["labels"] % 10).astype(np.float32))
            write(root / part / f"depth/{i}.npy", 0.5 / scene["depth"][..., None])
    return f"cityscapes:{root}"


def taskonomy_tree(root: Path, count: int) -> str:
    found = scenes(max(2, count // 8), 512, 512)
    for building in (name for names in BUILDINGS.values() for name in names):
        for i, scene in enumerate(found):
            grey = scene["image"].sum(-1, dtype=np.uint16)
            for domain, array in {
                "rgb": scene["image"],
                "depth_zbuffer": (512 * scene["depth"]).astype(np.uint16),
                "normal": (127.5 * (1 + scene["normals"])).astype(np.uint8),
                "edge_texture": grey * 14,
                "keypoints2d": grey * 4,
            }.items():
                write(root / domain / building / f"point_{i}_view_0_domain_{domain}.png", array)
            mask = np.full(grey.shape, 255, np.uint8)
            write(root / "mask_valid" / building / f"point_{i}_view_0_domain_depth_zbuffer.png", mask)
    return f"taskonomy:{root}"


FORMATS: dict[str, tuple[Callable[[Path, int], str], str]] = {
    "rooms": (lambda root, count: "rooms", "memory map, 64 x 80"),
    "NYUv2, NPY": (nyuv2_npy, "float32, 288 x 384"),
    "NYUv2, MATLAB": (nyuv2_mat, "HDF5, 480 x 640"),
    "Cityscapes, NPY": (cityscapes_npy, "float32, 128 x 256"),
    "Cityscapes, official": (cityscapes_tree, "PNG and TIFF, 1024 x 2048"),
    "Taskonomy": (taskonomy_tree, "PNG, 512 x 512"),
}


def read_speed(data: Any, repeats: int) -> list[float]:
    """Images per second of each repeat, which reads all images in batches of four. A first repeat is a warm-up."""
    speeds = []
    for seed in range(repeats + 1):
        steps = max(1, len(data) // 4)
        began = time.perf_counter()
        for _ in training_batches(data, 4, steps, seed):
            pass
        speeds.append(4 * steps / (time.perf_counter() - began))
    return speeds[1:]


class InMemory(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A few samples in memory, so that only training is timed."""

    def __init__(self, data: Any) -> None:
        self.samples = [data[i] for i in range(min(4, len(data)))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]


def train_speed(data: Any, rooms: bool, repeats: int) -> list[float]:
    """Images per second of fine-tuning encoder and head on one task."""
    (task,) = data.tasks.values()
    encoder = load(resolve_source("rooms-base")).encoder if rooms else model("B", "linear").encoder
    head = fresh_head(encoder, task, data, "linear")
    tuned = SimoModel(encoder, {task.name: task}, {task.name: head}).requires_grad_(True)
    samples, size = InMemory(data), 32 if rooms else 4
    if rooms:
        samples.samples *= 8
    speeds = []
    for _ in range(repeats + 1):
        log = fit(tuned, lambda batch: image_losses(tuned, batch), samples, TrainSettings(steps=4, batch_size=size))
        speeds.append(log.samples / log.seconds)
    return speeds[1:]


def shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def row(name: str, folder: Path, images: int, repeats: int) -> str:
    make, stored = FORMATS[name]
    spec = make(folder / name.replace(", ", "-"), images)
    data = load_data(spec, "train", 64 if spec == "rooms" else images)
    alone = {task: read_speed(data.select([task]), repeats) for task in data.tasks}
    slowest = min(alone, key=lambda task: statistics.median(alone[task]))
    trained: Task = data.tasks["segmentation" if "segmentation" in data.tasks else "depth"]
    consumed = train_speed(data.select([trained.name]), spec == "rooms", repeats)
    ratio = statistics.median(alone[slowest]) / statistics.median(consumed)
    height, width = data[0]["image"].shape[-2:]
    cells = (
        *(name, stored, f"{height} x {width}", shown(read_speed(data, repeats))),
        *(f"{slowest}: {shown(alone[slowest])}", shown(consumed), f"{ratio:.1f}"),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    args = parser.parse_args()
    limit_threads(1)
    print(f"{machine()}; images per second of one thread, median (range) of {args.repeats}")
    print("| dataset | stored | read at | all tasks | slowest task alone | training | times training |")
    print("| --- | --- | --- | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.formats:
            print(row(name, Path(folder), args.images, args.repeats), flush=True)


if __name__ == "__main__":
    main()
