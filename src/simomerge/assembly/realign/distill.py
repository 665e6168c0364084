"""Distillation: heads, or adapters or LoRA and heads, trained to predict on unlabelled images what the experts predict.

It starts from the fold, which has done most of the work in closed form; gradient descent mends what is not linear.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from simomerge.assembly.realign.fold import Variant, realign_fold
from simomerge.assembly.realign.heads import train_heads
from simomerge.assembly.realign.lora import ALL_LINEAR, lora, lora_config, lora_record
from simomerge.assembly.realign.low_rank import check_no_adapters, only_heads_learn, train_with_heads
from simomerge.assembly.realign.record import after
from simomerge.assembly.realign.teacher import evaluating, matching_experts, observe
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.images import resized
from simomerge.core.machine import autocast
from simomerge.datasets import DenseDataset
from simomerge.datasets.pictures import as_images
from simomerge.models.heads.projections import is_foldable
from simomerge.models.model import SimoModel
from simomerge.training.settings import TrainSettings

DISTILL_SETTINGS = TrainSettings(steps=200, batch_size=32, lr=5e-4)


class TeacherPredictions(DenseDataset):
    """Images with the experts' logits as targets, kept memory-mapped in half precision.

    Args:
        images: as `simomerge.datasets.pictures.as_images` gives, all of one size.
        experts: by task.
        folder: where the logits are kept.

    Raises:
        InputError: images of different sizes, or one that cannot be read.
    """

    def __init__(self, images: Any, experts: Mapping[str, SimoModel], folder: Path) -> None:
        super().__init__({task: expert.tasks[task] for task, expert in experts.items()}, len(images))
        self.images = images
        self.folder = folder
        self._logits: dict[str, np.ndarray] = {}
        height, width = next(iter(experts.values())).fit(images.image(0)[None]).shape[-2:]
        self.size = (int(height), int(width))
        with distributed.first_before_others():
            if not (folder / "done").exists():
                _write_predictions(images, self.size, experts, folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_logits": {}}  # a memory map would cross to a worker with all its content

    def image(self, index: int) -> Tensor:
        image: Tensor = self.images.image(index)
        return resized(image[None], self.size)[0]  # an image of very many patches was made smaller for the experts

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        found = {}
        for task in tasks:
            if task not in self._logits:
                self._logits[task] = np.load(self.folder / f"{task}.npy", mmap_mode="r")
            found[task] = torch.from_numpy(self._logits[task][index].astype(np.float32))
        return found


@torch.no_grad()
def _write_predictions(images: Any, size: tuple[int, ...], experts: Mapping[str, SimoModel], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        task: open_memmap(
            folder / f"{task}.npy", mode="w+", dtype=np.float16, shape=(len(images), expert.tasks[task].channels, *size)
        )
        for task, expert in experts.items()
    }
    needed = sum(array.nbytes for array in arrays.values())
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"{folder}: the experts' predictions on {len(images)} images need {needed / 1e9:.1f} GB, and"
            f" {free / 1e9:.1f} GB are free; use fewer images or another disk."
        )
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


def prediction_distances(model: SimoModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """How far each task's predictions are from the teacher's, whose logits the batch holds."""
    logits = model(batch["image"])
    return {name: task.distance(logits[name], batch[name]) for name, task in model.tasks.items()}


def realign_distill(
    model: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    settings: TrainSettings = DISTILL_SETTINGS,
    adapters: bool | Literal["lora"] = False,
    rank: int = 16,
    activation: str = "none",
    variant: Variant = "cross-tap",
    count: int | None = None,
    work_folder: str | Path | None = None,
    workers: int = 1,
) -> SimoModel:
    """Train heads, or adapters or LoRA and heads, to match the experts' predictions on unlabelled images.

    Args:
        model: a merged model; it stays as it is. Its heads are folded first where they can be, unless it was
            re-aligned before.
        experts: by task, those it was merged from.
        images: a folder of pictures, a sequence of images, or a dataset (its labels are not read); of one size.
        settings: of the training (of each head's, without adapters).
        adapters: train a low-rank adapter beside every block as well; "lora": LoRA in all linear layers instead,
            folded into the encoder's weights at the end.
        rank: of the adapters or of LoRA, whose alpha is the rank; see `realign_adapters` and `realign_lora`.
        activation: of the adapters; LoRA has none.
        variant: of the fold it starts from.
        count: of the images; all by default.
        work_folder: where predictions, features and the state of a killed run are kept, of this very re-alignment
            and no other; a temporary folder by default.
        workers: heads trained at once, each in its process.

    Raises:
        InputError: experts that do not fit the model, images of several sizes, or none; adapters or LoRA for a model
            that has adapters, and what `realign_lora` refuses.

    Example:
        >>> model = realign_distill(model, experts, "photos/", count=256)     # doctest: +SKIP
    """
    if adapters not in (True, False, "lora"):
        raise InputError(f"adapters={adapters!r}: use True, False or 'lora'.")
    if adapters:
        check_no_adapters(model, "distill its heads alone, or the model they were made from")
    config = _lora_config(model, rank, activation) if adapters == "lora" else None  # refuses before it computes
    experts = matching_experts(model, experts)
    source = as_images(images, count).readable(one_size=True)
    start = model if model.provenance.get("realign") else _folded(model, experts, source, variant)
    result = copy.deepcopy(start)
    with distributed.temporary_folder() as temporary:
        work = Path(work_folder or temporary)
        taught = TeacherPredictions(source, experts, work / "predictions")
        if adapters:
            cost = _train_with_adapters(result, taught, settings, config, rank, activation, work)
        else:
            cost = train_heads(result, taught, settings, work, workers, "distance")
    record = {
        "method": "distill",
        "adapters": adapters,
        **(lora_record(config, ALL_LINEAR) if config else {"rank": rank, "activation": activation} if adapters else {}),
        **asdict(settings),
        "unlabelled_images": len(source),
        "labelled_images": 0,
        **cost,
    }
    result.provenance = {**start.provenance, "realign": after(start, record)}
    return result.eval()


def _folded(model: SimoModel, experts: Mapping[str, SimoModel], images: Any, variant: Variant) -> SimoModel:
    """The model with those of its heads folded that can be."""
    tasks = [task for task, head in model.heads.items() if is_foldable(head)]
    if not tasks:
        return model
    folded = realign_fold(model.select(tasks), {t: experts[t] for t in tasks}, images, variant)
    heads = {task: folded.heads[task] if task in tasks else head for task, head in model.heads.items()}
    return SimoModel(model.encoder, model.tasks, heads, folded.provenance)


def _lora_config(model: SimoModel, rank: int, activation: str) -> Any:
    if activation != "none":
        raise InputError(f"activation {activation!r} is of adapters, and LoRA has none: leave it out.")
    return lora_config(model.encoder, rank)


def _train_with_adapters(
    model: SimoModel,
    taught: TeacherPredictions,
    settings: TrainSettings,
    config: Any,
    rank: int,
    activation: str,
    work: Path,
) -> dict[str, Any]:
    """Heads together with LoRA, where there is a config of it, or else adapters, in place; what it cost."""
    only_heads_learn(model, settings.seed)
    encoder, state_file = model.encoder, work / ("lora.pt" if config else "adapters.pt")
    with lora(encoder, config) if config else nullcontext(encoder.add_adapters(rank, activation)):
        return train_with_heads(model, taught, settings, state_file, "distill", prediction_distances)
