"""Unlabelled images for merging and re-alignment: at the experts' training size, and compared with their images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simomerge.checkpoints.experts import is_other_size, trained_size
from simomerge.core.caution import warn
from simomerge.core.pixels import OWN_SIZE, resize_to
from simomerge.core.progress import progress
from simomerge.datasets.load import load_images
from simomerge.datasets.pictures import Images, as_images
from simomerge.models.model import SimoModel
from simomerge.training.familiarity import familiarity

FEW_IMAGES = 16
"""With fewer images a warning says so."""

FAR = 1.1
"""A shift above this, in standard deviations of the training images, is a warning."""

ALIKE = 0.65
"""A spread below this, relative to the training images, is a warning."""

LEAST_COPIES = 5
"""A warning if one of this number of images, or more, is a copy of another one."""

MOST_COMPARED = 1000
"""Images among which copies are searched."""


def prepare(source: Any, experts: Mapping[str, SimoModel], count: int | None = None, size: Any = None) -> Images:
    """What a user gives as images, at the size at which the experts were trained.

    Args:
        source, count: As in `as_images`; text may also name a dataset, as in `load_images`.
        experts: By task.
        size: (height, width) or "HEIGHTxWIDTH" in pixels to resize pictures to, or "own" for their own sizes. By
            default, pictures are cut at the centre to the shape of the experts' training images and resized to their
            size, if all experts record the same one. The images of a dataset keep their size.

    Raises:
        InputError: See `as_images` and `load_images`.
    """
    source = load_images(source) if isinstance(source, (str, Path)) else source
    images = as_images(source, count, resize_to(size))
    trained = _trained_sizes(experts)
    if size is not None or images.is_dataset or images.size is not None or len(trained) != 1:
        return images
    height, width = next(iter(trained))
    note = f"cut and resized to {width} x {height} pixels, the experts' training size; size {OWN_SIZE} keeps theirs"
    progress("images", len(images), len(images), note)
    return images.resized((height, width), crop=True)


def check_images(
    experts: Mapping[str, SimoModel], sketches: Mapping[str, Tensor], size: tuple[int, int], count: int
) -> None:
    """Warn of images that are few, frames of one video, unlike the experts' training images, alike, or of another size.

    Also shows how far they are from the training images.

    Args:
        experts: By task.
        sketches: By task, the features of images, as `simomerge.training.familiarity.sketch` gives them; under torchrun
            those of this process's share.
        size: (height, width) of the first images.
        count: Number of all images.
    """
    if others := {each: tasks for each, tasks in _trained_sizes(experts).items() if is_other_size(size, each)}:
        warn(
            f"the images have {size[1]} x {size[0]} pixels, those that the experts were trained on {_listed(others)};"
            " give the size at which the model will be used."
        )
    if count < FEW_IMAGES:
        warn(f"{count} images are few for a choice or a fit; give {FEW_IMAGES} or more of different scenes.")
    compared_here = next(iter(sketches.values()))[:MOST_COMPARED]
    if (copies := _copies(compared_here)) * LEAST_COPIES >= len(compared_here):
        warn(f"{copies} of {len(compared_here)} images are copies of others, and add nothing; give different ones.")
    if len(compared_here) >= FEW_IMAGES and _is_one_sequence(compared_here):
        warn(
            f"the {count} images seem to be frames of one video: all neighbours are more alike than most pairs. Such"
            " images show little of what the model will see; add other scenes, or fewer frames of more videos."
        )
    compared = {
        task: found
        for task, each in sketches.items()
        if (found := familiarity(_training(experts[task]).get("features", {}), each)) is not None
    }
    if not compared:
        return
    task, far = max(compared.items(), key=lambda pair: pair[1].shift)
    distance = f"mean features {far.shift:.1f} standard deviations from the training images (warned of above {FAR})"
    progress("images", count, count, distance)
    if far.shift > FAR:
        warn(
            f"the images differ from those that the experts were trained on: their mean features are {far.shift:.1f}"
            f" standard deviations away (expert {task}). The experts' predictions for them may be wrong."
        )
    task, alike = min(compared.items(), key=lambda pair: pair[1].spread)
    if alike.spread < ALIKE and count > 1:
        warn(
            f"the images are alike: their features vary {alike.spread:.2f} times as much as those of the training"
            f" images (expert {task}). Give images of different scenes."
        )


def _trained_sizes(experts: Mapping[str, SimoModel]) -> dict[tuple[int, int], list[str]]:
    """The tasks of the experts that were trained on images of each (height, width); without those that record none."""
    found: dict[tuple[int, int], list[str]] = {}
    for task, expert in experts.items():
        if (size := trained_size(expert.provenance)) is not None:
            found.setdefault(size, []).append(task)
    return found


def _listed(sizes: Mapping[tuple[int, int], list[str]]) -> str:
    return " and ".join(f"{width} x {height} ({', '.join(tasks)})" for (height, width), tasks in sizes.items())


def _copies(sketches: Tensor) -> int:
    """How many images have the features (n, D) of an earlier one, up to rounding in bfloat16."""
    near = torch.cdist(sketches, sketches) < 1e-3 * float(sketches.std(0, correction=0).norm())
    return int(near.tril(-1).any(1).sum())


def _is_one_sequence(sketches: Tensor) -> bool:
    """Whether no two neighbours are as far apart as half of all pairs are. In any other order, one pair in two is."""
    distances = torch.cdist(sketches, sketches)
    pairs = distances[torch.triu(torch.ones_like(distances, dtype=torch.bool), diagonal=1)]
    return bool(distances.diagonal(1).max() < pairs.median())


def _training(model: SimoModel) -> Mapping[str, Any]:
    record = model.provenance.get("training", {})
    return record if isinstance(record, Mapping) else {}
