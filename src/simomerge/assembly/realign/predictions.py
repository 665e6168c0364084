"""Unlabelled images as training data: alone, or with the experts' predictions as stored targets."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from simomerge.assembly.realign.teacher import observe
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text
from simomerge.core.images import resized
from simomerge.core.kept import kept_array
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.core.text import size_text
from simomerge.datasets.base import DenseDataset
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.training.features import write_rows

PREDICTIONS = "the experts' predictions"
"""What is stored, in messages."""

EVERY = 30.0
"""Seconds between two times that the place of the next image is saved."""


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
        """Size of the experts' logits on all images as they are stored, see `TeacherPredictions`."""
        values = sum(task.channels * _stored_as(task).itemsize for task in self.tasks.values())
        return values * len(self) * self.size[0] * self.size[1]


class TeacherPredictions(UnlabelledImages):
    """Images with the experts' logits as targets, memory-mapped.

    Logits in units of the target without bounds, such as a depth in mm, are stored in float32, all others in float16.
    Under torchrun each process predicts its share of the images. An interrupted start goes on where it was, if it has
    as many processes again.

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
        done = folder / "done"
        if distributed.from_first(done.exists()):
            return
        if distributed.is_first():
            self._make_files()
        distributed.wait()
        _write_predictions(images, self.size, experts, folder)
        distributed.wait()
        if distributed.is_first():
            done.touch()
            for left in folder.glob("next-*"):
                left.unlink()
        distributed.wait()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_logits": {}}  # pickling a memory map would copy its content to each worker

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        found = {}
        for task in tasks:
            if task not in self._logits:
                remedy = f"remove the folder {self.folder}, and repeat the command."
                self._logits[task] = kept_array(self._file(task), remedy, *self._form(task))
            found[task] = torch.from_numpy(self._logits[task][index].astype(np.float32))
        return found

    def _file(self, task: str) -> Path:
        return self.folder / f"{task}.npy"

    def _form(self, task: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """What the file of a task holds, and its shape."""
        return _stored_as(self.tasks[task]), (len(self), self.tasks[task].channels, *self.size)

    def _make_files(self) -> None:
        """Make the files of the logits, unless an interrupted start has made them."""
        with suppress(InputError):
            for task in self.tasks:
                kept_array(self._file(task), "it is made again.", *self._form(task))
            return
        for left in (*map(self._file, self.tasks), *self.folder.glob("next-*")):  # they would count as not free space
            left.unlink(missing_ok=True)
        check_space({PREDICTIONS: self.bytes_of_predictions}, len(self), self.folder)
        progress("experts' predictions", 0, 1, f"{size_text(self.bytes_of_predictions)} on disk")
        for task in self.tasks:
            dtype, shape = self._form(task)
            open_memmap(self._file(task), mode="w+", dtype=dtype, shape=shape).flush()


def are_kept(folder: Path) -> bool:
    """Whether a folder has the files of predictions, complete or begun."""
    return any(folder.glob("*.npy"))


def bytes_kept(folder: Path) -> int:
    """What the files of predictions take on the disk. Files that were only begun take less than their length."""
    found = [file.stat() for file in folder.glob("*.npy")]
    if (folder / "done").exists() or os.name == "nt":
        return sum(each.st_size for each in found)
    return sum(each.st_blocks * 512 for each in found)


def check_space(needed: Mapping[str, int], count: int, folder: Path) -> None:
    """Check that files fit on the disk of a folder, which is made.

    Args:
        needed: The size of the files in bytes, by what they hold.
        count: Number of images that they are made from.

    Raises:
        InputError: They do not fit; the message has the sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sum(needed.values()) > (free := shutil.disk_usage(folder).free):
        sizes = " and ".join(f"{size_text(size)} for {what}" for what, size in needed.items() if size)
        raise InputError(
            f"{folder}: {count} images need {sizes}, and {size_text(free)} are free; use fewer images, another disk or,"
            " where more than the heads is trained, predictions='live'."
        )


def _stored_as(task: Task) -> np.dtype[Any]:
    """How logits of a task are stored. Float16 ends at 65,504, and has steps of 0.25 from 256 on."""
    return np.dtype(np.float32 if task.has_own_scale else np.float16)


def as_stored(logits: Tensor, task: Task) -> Tensor:
    """Logits in float32 or float16, as `TeacherPredictions` says. In float16 large ones are cut, to stay finite."""
    return logits.float() if task.has_own_scale else logits.float().clamp(-6e4, 6e4).half()


@torch.no_grad()
def _write_predictions(images: Any, size: tuple[int, ...], experts: Mapping[str, SimoModel], folder: Path) -> None:
    """Write the logits for this process's share of the images."""
    following = folder / f"next-{distributed.rank()}-of-{distributed.processes()}"
    start, saved_at = int(following.read_text()) if following.exists() else 0, time.monotonic()
    with ExitStack() as stack:
        files = {task: stack.enter_context((folder / f"{task}.npy").open("r+b")) for task in experts}
        for batch in observe(experts, images, label="experts' predictions", shared=True, start=start):
            if batch.images.shape[-2:] != size:
                raise InputError(
                    f"distillation needs images of one size; the first is {size[1]} x {size[0]} pixels, image"
                    f" {batch.indices[0]} {batch.images.shape[-1]} x {batch.images.shape[-2]}: resize them"
                    " (--size HEIGHTxWIDTH)."
                )
            for task, expert in experts.items():
                with evaluating(expert), autocast(batch.images.device):
                    logits = expert.decode(batch.features[task])[task]
                rows = as_stored(logits, expert.tasks[task]).cpu().numpy()
                for place, index in enumerate(batch.indices):
                    write_rows(files[task], index, len(images), rows[place : place + 1])
            if time.monotonic() - saved_at >= EVERY:
                for file in files.values():
                    file.flush()
                atomic_write_text(following, str(batch.indices[-1] + distributed.processes()))
                saved_at = time.monotonic()
