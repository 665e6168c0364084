"""The experts as teachers: checks that they fit a merged model, and their features of unlabelled images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.assembly.experts import comparable
from simomerge.assembly.images import check_images
from simomerge.checkpoints.experts import check_merged_from, check_same_encoder, without_additions
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.datasets.comparison import check_same_task
from simomerge.datasets.groups import held_out
from simomerge.datasets.pictures import image_batches
from simomerge.models.encoders import Features
from simomerge.models.model import SimoModel, as_expert
from simomerge.training.familiarity import sketch

HALF_PRECISION = 2**-8
"""The relative error of a weight that was stored in bfloat16 is at most half of this."""

SKETCHED = 4096
"""Images whose features are compared with those of the experts' training images."""


@dataclass(frozen=True)
class Observation:
    """A batch of images and the experts' features of them.

    Attributes:
        indices: Indices of the images.
        images: Float (B, 3, H, W), as the encoders receive them.
        features: By task.
        held_out: Which of the images are held out, bool (B,); see `simomerge.datasets.groups`.
    """

    indices: list[int]
    images: Tensor
    features: dict[str, Features]
    held_out: Tensor


@torch.no_grad()
def observe(
    experts: Mapping[str, SimoModel],
    images: Any,
    batch_size: int = 32,
    label: str = "experts",
    shared: bool = False,
    check: bool = True,
    start: int = 0,
) -> Iterator[Observation]:
    """Encode images with every expert, a batch at a time.

    Args:
        experts: By task.
        images: As `simomerge.datasets.pictures.as_images` returns them.
        shared: Under torchrun, encode only this process's share of the images.
        start: The first image of this process's share, to go on after an interruption.
        check: Warn of images that do not suit the experts; see `simomerge.assembly.images.check_images`.
    """
    rank, world = (distributed.rank(), distributed.processes()) if shared else (0, 1)
    first = next(iter(experts.values()))
    device = next(first.parameters()).device
    done, out = 0, set(held_out(images))
    sketches: dict[str, list[Tensor]] = {task: [] for task in experts}
    size = (0, 0)
    for indices, batch in image_batches(images, batch_size, start=max(start, rank), step=world):
        batch = first.fit(batch.to(device))
        with evaluating(*experts.values()), autocast(device):
            features = {task: expert.encode(batch) for task, expert in experts.items()}
        size = size if done else (batch.shape[-2], batch.shape[-1])
        for task, each in features.items() if done < SKETCHED else ():
            sketches[task].append(sketch(each))
        yield Observation(indices, batch, features, torch.tensor([index in out for index in indices]))
        done += len(indices)
        progress(label, min(done * world, len(images)), len(images), "")
    if check and done and distributed.is_first():
        check_images(experts, {task: torch.cat(each) for task, each in sketches.items()}, size, len(images))


def matching_experts(model: SimoModel, experts: Mapping[str, SimoModel] | None) -> dict[str, SimoModel]:
    """The model's experts by task, in the model's order, after a check that their encoders fit the model's.

    Raises:
        InputError: There are no experts, one is missing or has no task in the model, or one differs from the model in
            its taps, normalisation, device or task.
    """
    if not experts:
        raise InputError("re-alignment without labels needs the experts: give each as TASK=EXPERT.")
    missing = [task for task in model.tasks if task not in experts]
    if missing:
        raise InputError(f"no expert given for task {missing[0]!r}; the model has {', '.join(model.tasks)}.")
    unknown = [task for task in experts if task not in model.tasks]
    if unknown:
        raise InputError(f"expert {unknown[0]!r}: the model has no such task; it has {', '.join(model.tasks)}.")
    named = {task: as_expert(experts[task], task) for task in model.tasks}
    # The model may have adapters or be a tree: these are parts of the encoder whose features the heads read.
    merged = without_additions(comparable(model))
    check_same_encoder({"the model": merged, **{task: comparable(expert) for task, expert in named.items()}})
    for task, expert in named.items():
        _check_device_and_task(model, task, expert)
    check_merged_from(model.provenance, named)
    return named


def _check_device_and_task(model: SimoModel, task: str, expert: SimoModel) -> None:
    here, there = (next(module.parameters()).device for module in (model, expert))
    if here != there:
        raise InputError(f"expert {task!r} is on {there}, the model on {here}: move one with .to({str(here)!r}).")
    check_same_task(model.tasks[task], expert.tasks[task], "model", "expert")


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules have the same weights, up to a storage in half precision."""
    return not _differences(ours, theirs, HALF_PRECISION)


def _differences(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-3) -> list[str]:
    """Names of the weights that differ, by more than a tolerance relative to their values."""
    mine, other = ours.state_dict(), theirs.state_dict()
    return [name for name in {**mine, **other} if not _same(mine.get(name), other.get(name), tolerance)]


def check_heads(model: SimoModel, experts: Mapping[str, SimoModel]) -> None:
    """Check that the model's heads are still the experts' heads.

    Raises:
        InputError: A head has another architecture or other weights; the message names the first tensor that differs.
    """
    for task, expert in experts.items():
        if wrong := _differences(model.heads[task], expert.heads[task]):
            ours, theirs = model.heads[task].state_dict(), expert.heads[task].state_dict()
            raise InputError(
                f"head {task!r} of the model is not its expert's ({_difference(wrong[0], ours, theirs)}): give the"
                " expert that it was merged from, and the merged model before any re-alignment."
            )


def _same(ours: Tensor | None, theirs: Tensor | None, tolerance: float) -> bool:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return False
    return torch.allclose(ours.float(), theirs.to(ours.device).float(), rtol=tolerance, atol=1e-6)


def _difference(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    def shape(tensors: Mapping[str, Tensor]) -> Sequence[int] | str:
        return tuple(tensors[name].shape) if name in tensors else "not there"

    if shape(ours) != shape(theirs):
        return f"{name}: {shape(ours)} in the model, {shape(theirs)} in the expert"
    return f"{name} has other values"
