"""The training of representation surgery: corrections of the merged features towards those of each expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from simomerge.assembly.realign.method import Inputs
from simomerge.assembly.realign.predictions import UnlabelledImages
from simomerge.core.modes import evaluating
from simomerge.datasets.batches import ordered_batches
from simomerge.models.heads.surgery import Corrections, SurgeryHead
from simomerge.models.model import SimoModel
from simomerge.training.features import CachedFeatures, cache_features
from simomerge.training.loop import fit
from simomerge.training.pool import WorkerPool
from simomerge.training.settings import TrainSettings


def train_corrections(model: SimoModel, inputs: Inputs, rank: int, settings: TrainSettings) -> dict[str, Any]:
    """Put a trained correction in front of each head of a model, in place; return the cost.

    Raises:
        InputError: No image can be read, two have different sizes, or the disk is too small for the features.
    """
    images = UnlabelledImages(inputs.images.readable(one_size=True), inputs.experts)
    work = inputs.work_folder
    for name, each in {"": model, **{f"-{task}": expert for task, expert in inputs.experts.items()}}.items():
        if not (folder := work / f"features{name}").exists():
            with evaluating(each):
                cache_features(each.encoder, images, folder)
    encoder, jobs = model.encoder, []
    for name, head in model.heads.items():
        torch.manual_seed(settings.seed)  # of every task, so that their order does not matter
        wrapped = SurgeryHead(encoder.channels, model.tasks[name].channels, head, rank=rank, cls=encoder.has_cls)
        model.heads[name] = wrapped.to(next(model.parameters()).device)
        given = {"corrections": wrapped.corrections, "task": name, "images": images}
        jobs.append((_train_one, {**given, "settings": settings, "work": work}))
    with WorkerPool(min(inputs.workers, len(jobs))) as pool:
        outcomes = pool.run(jobs)
    trained: list[Any] = [head.corrections for head in model.heads.values()]
    for corrections, (state, _log) in zip(trained, outcomes, strict=True):
        corrections.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return {
        "unlabelled_images": len(images),
        "steps": sum(log["steps"] for _state, log in outcomes),
        "seconds": sum(log["seconds"] for _state, log in outcomes),
        "trained_parameters": sum(p.numel() for corrections in trained for p in corrections.parameters()),
    }


def _train_one(
    corrections: Corrections, task: str, images: Any, settings: TrainSettings, work: Path
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Weights (as arrays, which are cheap to send between processes) and log of the training for one task."""
    pairs = FeaturePairs(work / "features", work / f"features-{task}", images)
    start = pairs.mean_distances(corrections)

    def losses(corrections: Corrections, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {task: (pairs.distances(corrections, batch) / start.to(batch["maps"][0].device)).mean()}

    log = fit(corrections, losses, pairs, settings, state_file=work / f"{task}.safetensors", label=f"surgery {task}")
    return {key: value.detach().cpu().numpy() for key, value in corrections.state_dict().items()}, vars(log)


class FeaturePairs(Dataset[dict[str, Any]]):
    """Cached features of the merged encoder with those of an expert's encoder.

    Args:
        merged, expert: Folders that `cache_features` wrote.
        images: The dataset that both were computed from.
    """

    def __init__(self, merged: Path, expert: Path, images: Any) -> None:
        self.merged, self.expert = (CachedFeatures(folder, images, []) for folder in (merged, expert))

    def __len__(self) -> int:
        return len(self.merged)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: ``maps`` and ``cls`` of the merged encoder, ``expert_maps`` and ``expert_cls``."""
        expert = self.expert[index]
        return {**self.merged[index], "expert_maps": expert["maps"], "expert_cls": expert["cls"]}

    def distances(self, corrections: Corrections, batch: Mapping[str, Any]) -> Tensor:
        """Mean absolute difference of corrected and expert features: one value per tap, for patches, then for CLS."""
        found = corrections(self.merged.features(batch))
        wanted = self.expert.features({"maps": batch["expert_maps"], "cls": batch["expert_cls"]})
        pairs = zip((*found.maps, *found.cls), (*wanted.maps, *wanted.cls), strict=True)
        return torch.stack([(ours - theirs).abs().mean() for ours, theirs in pairs])

    @torch.no_grad()
    def mean_distances(self, corrections: Corrections) -> Tensor:
        """The `distances` over all images, as numbers to divide by."""
        device = next(corrections.parameters()).device
        sums = []
        for batch in ordered_batches(self, 32):
            moved = {key: [each.to(device) for each in tensors] for key, tensors in batch.items()}
            sums.append(len(batch["maps"][0]) * self.distances(corrections, moved))
        return (torch.stack(sums).sum(0) / len(self)).clamp(min=torch.finfo(torch.float32).tiny)
