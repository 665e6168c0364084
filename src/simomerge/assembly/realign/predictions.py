"""Unlabelled images as training data: alone, or with the experts' predictions as stored targets."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from simomerge.assembly.realign.teacher import observe
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.images import resized
from simomerge.core.machine import autocast
from simomerge.core.progress import progress
from simomerge.datasets.base import DenseDataset
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import evaluating


class UnlabelledImages(DenseDataset):
    """Images alone, at the size at which the experts see them.

    Args:
        images: As `simomerge.datasets.pictures.as_images` returns them, all of one size.
        experts: By task.
    """

    def __init__(self, images: Any, experts: Mapping[str, SimoModel]) -> None:
        super().__init__({task: expert.tasks[task] for task, expert in experts.items()}, len(images))
        self.images = images
        height, width = next(iter(experts.values())).fit(images.image(0)[None]).shape[-2:]
        self.size = (int(height), int(width))

    def image(self, index: int) -> Tensor:
        image: Tensor = self.images.image(index)
        return resized(image[None], self.size)[0]  # the experts saw very large images downscaled

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {}

    def group(self, index: int) -> str:
        name: str = self.images.group(index)
        return name

    @property
    def bytes_of_predictions(self) -> int:
        """Size of the experts' logits on all images in half precision."""
        channels = sum(task.channels for task in self.tasks.values())
        return 2 * channels * len(self) * self.size[0] * self.size[1]


class TeacherPredictions(UnlabelledImages):
    """Images with the experts' logits as targets, memory-mapped in half precision.

    Args:
        images: As `simomerge.datasets.pictures.as_images` returns them, all of one size.
        experts: By task.
        folder: Folder of the logits. They are computed if the folder does not have them.

    Raises:
        InputError: The images have different sizes, one cannot be read, or the disk is too small.
    """

    def __init__(self, images: Any, experts: Mapping[str, SimoModel], folder: Path) -> None:
        super().__init__(images, experts)
        self.folder = folder
        self._logits: dict[str, np.ndarray] = {}
        with distributed.first_before_others():
            if not (folder / "done").exists():
                _check_space(self.bytes_of_predictions, len(images), folder)
                _write_predictions(images, self.size, experts, folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_logits": {}}  # pickling a memory map would copy its content to each worker

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        found = {}
        for task in tasks:
            if task not in self._logits:
                self._logits[task] = np.load(self.folder / f"{task}.npy", mmap_mode="r")
            found[task] = torch.from_numpy(self._logits[task][index].astype(np.float32))
        return found


def _check_space(needed: int, count: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"{folder}: the experts' predictions on {count} images need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB"
            " are free; use fewer images, another disk or, where more than the heads is trained, predictions='live'."
        )


@torch.no_grad()
def _write_predictions(images: Any, size: tuple[int, ...], experts: Mapping[str, SimoModel], folder: Path) -> None:
    arrays = {
        task: open_memmap(
            folder / f"{task}.npy", mode="w+", dtype=np.float16, shape=(len(images), expert.tasks[task].channels, *size)
        )
        for task, expert in experts.items()
    }
    progress("experts' predictions", 0, len(images), f"{sum(a.nbytes for a in arrays.values()) / 1e9:.2g} GB on disk")
    for batch in observe(experts, images, label="experts' predictions"):
        if batch.images.shape[-2:] != size:
            raise InputError(
                f"distillation needs images of one size; the first is {size[1]} x {size[0]} pixels, image"
                f" {batch.indices[0]} {batch.images.shape[-1]} x {batch.images.shape[-2]}: resize them"
                " (--size HEIGHTxWIDTH)."
            )
        for task, expert in experts.items():
            with evaluating(expert), autocast(batch.images.device):
                logits = expert.decode(batch.features[task])[task]
            arrays[task][batch.indices] = logits.float().clamp(-6e4, 6e4).half().cpu().numpy()
    for array in arrays.values():
        array.flush()
    (folder / "done").touch()
