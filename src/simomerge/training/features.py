"""Features computed once and kept on disk: training a head then costs nothing of the encoder.

Memory-mapped and in half precision, so that their size is bounded by the disk and several heads can train on
them at the same time, each in a process of its own.
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
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.progress import progress
from simomerge.datasets.batches import ordered_batches
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder, Features


class CachedFeatures(Dataset[dict[str, Any]]):
    """Features of a dataset's images from a folder that `cache_features` wrote, with the dataset's targets.

    Args:
        folder: the cache.
        dataset: the dataset it was made from; its targets are read along.
        tasks: whose targets to read.

    Raises:
        InputError: the cache belongs to a dataset of another length.
    """

    def __init__(self, folder: str | Path, dataset: Any, tasks: Iterable[str]) -> None:
        self.folder = Path(folder)
        self.dataset = dataset
        self.tasks = list(tasks)
        meta = json.loads((self.folder / "features.json").read_text(encoding="utf-8"))
        self.image_size = tuple(meta["image_size"])
        self.padded_size = tuple(meta["padded_size"])
        self.maps = [np.load(self.folder / f"map{i}.npy", mmap_mode="r") for i in range(meta["taps"])]
        self.cls = [np.load(self.folder / f"cls{i}.npy", mmap_mode="r") for i in range(meta["taps"] * meta["cls"])]
        if len(self.maps[0]) != len(dataset):
            raise InputError(f"{folder}: features of {len(self.maps[0])} images, but the dataset has {len(dataset)}.")

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
        # Channels last, as an encoder's tokens lie: convolutions on them take half the time on a CPU.
        return Features(
            maps=tuple(m.float().contiguous(memory_format=torch.channels_last) for m in batch["maps"]),
            cls=tuple(c.float() for c in batch["cls"]),
            image_size=self.image_size,
            padded_size=self.padded_size,
        )

    def head_losses(
        self, task: Task, head: torch.nn.Module, criterion: str, batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """``task.loss`` or ``task.distance`` of one head on a batch of samples."""
        height, width = self.image_size
        logits = head(self.features(batch))[..., :height, :width]
        return {task.name: getattr(task, criterion)(logits, batch[task.name])}


@torch.no_grad()
def cache_features(
    encoder: Encoder,
    dataset: Any,
    folder: str | Path,
    batch_size: int = 64,
    label: str = "features",
    budget: int | None = None,
) -> Path:
    """Encode every image of a dataset once and write the Features, float16, as memory-mappable arrays.

    Under torchrun each process encodes its share of the batches, into the same files.

    Args:
        encoder: frozen; run in evaluation mode.
        dataset: of samples with ``image`` (3, H, W) in [0, 1], all of one size.
        folder: where to; written to a temporary sibling and renamed.
        budget: bytes that the features may take at most; by default what is free on the disk.

    Raises:
        InputError: they would take more (the message says how much); that is known after the first image.
    """
    encoder.eval()
    source = _ImagesOnly(dataset)
    with distributed.folder_together(folder) as target:
        first = _encoded(encoder, source[0]["image"][None])
        if distributed.is_first():
            needed = sum(2 * len(dataset) * tensor[0].numel() for tensor in _named(first).values())
            _check_room(target, needed, len(dataset), budget)
            progress(label, 0, len(dataset), f"{needed / 1e9:.2g} GB on disk")
            for name, tensor in _named(first).items():
                shape = (len(dataset), *tensor.shape[1:])
                open_memmap(target / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape).flush()
            _write_meta(target, first)
        distributed.wait()
        every, places = distributed.processes(), range(0, len(dataset), batch_size)
        mine = zip(distributed.share(list(places)), ordered_batches(source, batch_size, shared=True), strict=True)
        with ExitStack() as stack:
            files = {name: stack.enter_context((target / f"{name}.npy").open("r+b")) for name in _named(first)}
            for start, batch in mine:
                for name, tensor in _named(_encoded(encoder, batch["image"])).items():
                    _write_rows(files[name], start, len(dataset), tensor.half().cpu().numpy())
                progress(label, min(start + every * batch_size, len(dataset)), len(dataset), "")
    return Path(folder)


def _write_rows(file: BinaryIO, start: int, total: int, rows: np.ndarray) -> None:
    """Rows of an NPY file, from the row ``start`` of ``total``. By bytes: of a memory map machines that share a disk
    would write whole pages, and each other's rows back."""
    end = file.seek(0, os.SEEK_END)
    file.seek(end - (total - start) * rows[0].nbytes)
    file.write(rows.tobytes())


def _encoded(encoder: Encoder, images: Tensor) -> Features:
    device = next(encoder.parameters()).device
    with autocast(device):
        return encoder(images.to(device))


def _named(features: Features) -> dict[str, Tensor]:
    """Map and CLS token of every tap, by the names of their files."""
    maps = {f"map{i}": each for i, each in enumerate(features.maps)}
    return maps | {f"cls{i}": each for i, each in enumerate(features.cls)}


class _ImagesOnly(Dataset[dict[str, Tensor]]):
    """A dataset without its targets: nobody decodes what nobody reads."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.dataset.image(index)}


def _check_room(folder: Path, needed: int, count: int, budget: int | None) -> None:
    limits = {"are free; use fewer images or another disk": shutil.disk_usage(folder).free}
    if budget is not None:
        limits["may be used; use fewer images or raise that limit"] = budget
    for what, limit in limits.items():
        if needed > limit:
            said = f"need {needed / 1e9:.2g} GB, {limit / 1e9:.2g} GB {what}"
            raise InputError(f"{folder.parent}: the features of {count} images {said}.")


def _write_meta(folder: Path, features: Features) -> None:
    meta = {
        "taps": len(features.maps),
        "cls": int(bool(features.cls)),
        "image_size": features.image_size,
        "padded_size": features.padded_size,
    }
    (folder / "features.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")
