"""Encoder features that are computed once and kept on disk, so that training a head does not run the encoder.

The arrays are memory-mapped and in half precision. Their size is limited by the disk only, and several processes can
train heads on them at the same time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import Dataset

from simomerge.core import distributed
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError
from simomerge.core.kept import kept_array
from simomerge.core.machine import autocast
from simomerge.core.progress import progress
from simomerge.core.text import size_text
from simomerge.datasets.batches import images_within, ordered_batches
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder, Features

_META = {"taps": int, "cls": int, "image_size": [int], "padded_size": [int]}


class CachedFeatures(Dataset[dict[str, Any]]):
    """Features of a dataset's images, from a folder that `cache_features` wrote, with the dataset's targets.

    Args:
        folder: The cache.
        dataset: The dataset that the features were computed from.
        tasks: The tasks whose targets to read.

    Raises:
        InputError: The cache has another number of images than the dataset, or a damaged file.
    """

    def __init__(self, folder: str | Path, dataset: Any, tasks: Iterable[str]) -> None:
        self.folder = Path(folder)
        self.dataset = dataset
        self.tasks = list(tasks)
        remedy = f"remove the folder {folder}, and repeat the command."
        meta = read_json(self.folder / "features.json", remedy, _META)
        self.image_size = tuple(meta["image_size"])
        self.padded_size = tuple(meta["padded_size"])
        self.maps, self.cls = (
            [kept_array(self.folder / f"{name}{i}.npy", remedy, np.float16) for i in range(count)]
            for name, count in (("map", meta["taps"]), ("cls", meta["taps"] * meta["cls"]))
        )
        if len(self) != len(dataset):
            raise InputError(f"{folder}: features of {len(self)} images, but the dataset has {len(dataset)}.")

    def __len__(self) -> int:
        return len(self.maps[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: targets by task, and ``maps`` and ``cls``: lists of float16 tensors, one per tap."""
        sample = self.dataset.targets(index, self.tasks)
        sample["maps"] = [torch.from_numpy(array[index].copy()) for array in self.maps]
        sample["cls"] = [torch.from_numpy(array[index].copy()) for array in self.cls]
        return sample

    def features(self, batch: Mapping[str, Any]) -> Features:
        """The Features of a batch of samples, in float32."""
        # Channels last is the memory layout of an encoder's tokens. Convolutions take half the time with it on a CPU.
        return Features(
            maps=tuple(m.float().contiguous(memory_format=torch.channels_last) for m in batch["maps"]),
            cls=tuple(c.float() for c in batch["cls"]),
            image_size=self.image_size,
            padded_size=self.padded_size,
        )

    def head_losses(
        self, task: Task, criterion: str, head: torch.nn.Module, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """``task.loss`` or ``task.distance`` of one head on a batch of samples."""
        height, width = self.image_size
        logits = head(self.features(batch))[..., :height, :width]
        return {task.name: getattr(task, criterion)(logits, batch[task.name])}


@torch.no_grad()
def bytes_per_image(encoder: Encoder, image: Tensor) -> int:
    """What `cache_features` writes for each image of the size of this one, float (3, H, W), in bytes."""
    encoder.eval()
    return _bytes_of_one(_encoded(encoder, image[None]))


@torch.no_grad()
def cache_features(
    encoder: Encoder,
    dataset: Any,
    folder: str | Path,
    batch_size: int = 64,
    label: str = "features",
    budget: int | None = None,
) -> Path:
    """Encode every image of a dataset once, and write the Features as memory-mappable float16 arrays.

    Batches of large images are smaller than ``batch_size``, see `simomerge.datasets.batches.images_within`. Under
    torchrun each process encodes its share of the batches and writes to the same files.

    Args:
        encoder: The encoder; it is put into evaluation mode.
        dataset: Samples with ``image`` (3, H, W) in [0, 1], all of one size.
        folder: The folder to write. It appears when it is complete.
        budget: Maximum size of the features in bytes. The default is the free space of the disk.

    Raises:
        InputError: The features would be larger; the message gives their size. This is known after the first image.
    """
    encoder.eval()
    images, count = _ImagesOnly(dataset), len(dataset)
    with distributed.folder_together(folder) as target:
        image = images[0]["image"]
        batch_size = images_within(batch_size, image)
        first = _encoded(encoder, image[None])
        if distributed.is_first():
            needed = count * _bytes_of_one(first)
            _check_space(target, needed, count, budget)
            progress(label, 0, count, f"{size_text(needed)} on disk")
            for name, tensor in _by_file(first).items():
                open_memmap(target / name, mode="w+", dtype=np.float16, shape=(count, *tensor.shape[1:])).flush()
            sizes = {"image_size": first.image_size, "padded_size": first.padded_size}
            meta = {"taps": len(first.maps), "cls": int(bool(first.cls)), **sizes}
            (target / "features.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")
        distributed.wait()
        starts = distributed.share(list(range(0, count, batch_size)))
        with ExitStack() as stack:
            files = {name: stack.enter_context((target / name).open("r+b")) for name in _by_file(first)}
            for start, batch in zip(starts, ordered_batches(images, batch_size, shared=True), strict=True):
                for name, tensor in _by_file(_encoded(encoder, batch["image"])).items():
                    write_rows(files[name], start, count, tensor.half().cpu().numpy())
                progress(label, min(start + distributed.processes() * batch_size, count), count)
    return Path(folder)


def write_rows(file: BinaryIO, start: int, total: int, rows: np.ndarray) -> None:
    """Write rows of an NPY file, from row ``start`` of ``total``.

    A memory map would write whole pages. Machines that share a disk would overwrite each other's rows with old ones.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(end - (total - start) * rows[0].nbytes)
    file.write(rows.tobytes())


def _encoded(encoder: Encoder, images: Tensor) -> Features:
    device = next(encoder.parameters()).device
    with autocast(device):
        return encoder(images.to(device))


def _bytes_of_one(features: Features) -> int:
    """The size of the features of one image in half precision."""
    return sum(2 * tensor[0].numel() for tensor in _by_file(features).values())


def _by_file(features: Features) -> dict[str, Tensor]:
    """Map and CLS token of every tap, by file name."""
    maps = {f"map{i}.npy": each for i, each in enumerate(features.maps)}
    return maps | {f"cls{i}.npy": each for i, each in enumerate(features.cls)}


class _ImagesOnly(Dataset[dict[str, Tensor]]):
    """A dataset without its targets, so that none is decoded."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.dataset.image(index)}


def _check_space(folder: Path, needed: int, count: int, budget: int | None) -> None:
    limits = {"are free; use fewer images or another disk": shutil.disk_usage(folder).free}
    if budget is not None:
        limits["may be used; use fewer images or raise that limit"] = budget
    for rest, limit in limits.items():
        if needed > limit:
            sizes = f"need {size_text(needed)}, {size_text(limit)} {rest}"
            raise InputError(f"{folder.parent}: the features of {count} images {sizes}.")
