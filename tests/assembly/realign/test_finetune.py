"""Fine-tuning on labels: joint training that starts from a merge and keeps what is best on held-out images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from simomerge.assembly.realign import realign
from simomerge.core.errors import DivergedError, InputError
from simomerge.datasets import DenseDataset
from simomerge.models.model import SimoModel
from simomerge.training import lpft
from simomerge.training.settings import TrainSettings, TuneOptions

from .contract import SETTINGS, same, weights


def finetuned(model: SimoModel, data: DenseDataset, **given: Any) -> SimoModel:
    return realign(model, data=data, method="finetune", **{"training": SETTINGS, **given})


def of(model: SimoModel) -> dict[str, Any]:
    return dict(model.provenance["realign"])


def loss(model: SimoModel, data: DenseDataset) -> float:
    """The mean over the images of the sum of the tasks' losses."""
    batch: dict[str, Tensor] = {key: torch.stack([data[i][key] for i in range(len(data))]) for key in data[0]}
    with torch.no_grad():
        logits = model.eval()(batch["image"])
    return float(sum(task.loss(logits[name], batch[name]) for name, task in model.tasks.items()))


@pytest.mark.parametrize("weighting", ["equal", "cagrad"])
def test_it_is_the_second_phase_of_joint_training_from_the_merge(
    merged: SimoModel, rooms: DenseDataset, weighting: str
) -> None:
    before, expected = weights(merged), copy.deepcopy(merged)
    settings = replace(SETTINGS, encoder_lr=0.4 * SETTINGS.lr)
    lpft.finetune(expected, rooms, settings, options=TuneOptions(weighting))
    result = finetuned(merged, rooms, hold_out=0, weighting=weighting)
    assert same(weights(expected), weights(result)) and same(before, weights(merged))
    after = weights(result)
    unchanged = [name for name, _ in merged.named_parameters() if torch.equal(before[name], after[name])]
    assert unchanged == ["encoder.backbone.embeddings.mask_token"]  # which no prediction reads
    assert str(result) == str(merged) and result.encoder_fingerprint() != merged.encoder_fingerprint()


def test_the_loss_falls_on_images_that_it_did_not_see(merged: SimoModel, rooms: DenseDataset) -> None:
    seen, unseen = rooms.take(6), rooms.skip(6)
    result = finetuned(merged, seen, hold_out=0, training=replace(SETTINGS, steps=20))
    assert loss(result, unseen) < 0.9 * loss(merged, unseen)


def test_the_best_weights_on_held_out_images_are_kept(merged: SimoModel, rooms: DenseDataset) -> None:
    training = replace(SETTINGS, steps=8, validate_every=1, patience=8)
    result = finetuned(merged, rooms, hold_out=0.25, training=training)
    record, held_out = of(result), rooms.skip(6)
    assert (record["held_out_images"], record["steps"], record["validate_every"]) == (2, 8, 1)
    alone = [copy.deepcopy(merged)]
    settings = replace(training, encoder_lr=0.4 * SETTINGS.lr, validate_every=0)

    def keep(model: SimoModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        alone.append(copy.deepcopy(model))  # the weights before every step
        return lpft.image_losses(model, batch)

    last = copy.deepcopy(merged)
    lpft.finetune(last, rooms.take(6), settings, losses=keep)
    losses = [loss(model, held_out) for model in [*alone[1:], last]]
    assert record["best_step"] == losses.index(min(losses)) > 0
    assert loss(result, held_out) == pytest.approx(min(losses), abs=1e-5)


def test_only_the_last_blocks_learn_if_asked(merged: SimoModel, rooms: DenseDataset) -> None:
    after = weights(finetuned(merged, rooms, hold_out=0, last_blocks=1).encoder.backbone)
    changed = {name for name, value in weights(merged.encoder.backbone).items() if not torch.equal(value, after[name])}
    assert changed and all("layer.3." in name or name.startswith("layernorm.") for name in changed)
    with pytest.raises(InputError, match="last_blocks is 9, and 4 blocks of the encoder are known"):
        finetuned(merged, rooms, last_blocks=9)


def test_the_start_is_kept_where_training_does_harm(merged: SimoModel, rooms: DenseDataset) -> None:
    with pytest.warns(UserWarning, match=r"finetune again: (no step was better than the start|stopped at step)"):
        result = finetuned(merged, rooms, training=replace(SETTINGS, lr=30.0))
    assert of(result)["best_step"] == 0 and same(weights(merged), weights(result))


def test_a_task_that_gets_worse_is_named(merged: SimoModel, rooms: DenseDataset) -> None:
    """Depth has been trained before, and segmentation is damaged, so that the sum of the losses falls for its sake."""
    start = finetuned(merged, rooms, hold_out=0, training=replace(SETTINGS, steps=60))
    with torch.no_grad():
        start.heads["segmentation"].output.bias[3] += 8
    with pytest.warns(UserWarning, match=r"finetune: depth is worse on held-out images .* abs_err went from [\d.]+ to"):
        result = finetuned(start, rooms, hold_out=0.25, training=replace(SETTINGS, steps=8, lr=5e-3))
    assert of(result)["best_step"] > 0


def test_a_diverging_training_is_an_error(merged: SimoModel, rooms: DenseDataset) -> None:
    with pytest.raises(DivergedError, match="lower"):
        finetuned(merged, rooms, hold_out=0, training=TrainSettings(steps=20, batch_size=4, lr=1e30))


def test_adapters_are_refused(merged: SimoModel, rooms: DenseDataset) -> None:
    merged.encoder.add_adapters(rank=2)
    with pytest.raises(InputError, match="the model has adapters already"):
        finetuned(merged, rooms)


def test_a_good_training_says_nothing(merged: SimoModel, rooms: DenseDataset) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of(finetuned(merged, rooms, training=replace(SETTINGS, lr=1e-3)))["labelled_images"] == 8
