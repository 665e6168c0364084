"""Training towards the experts' predictions: units, held-out images, what learns, and what is kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simomerge.assembly.realign import distillation, get_realignment, realign
from simomerge.assembly.realign.distillation import ExpertDistances, split_off
from simomerge.assembly.realign.method import heads_were_changed
from simomerge.assembly.realign.predictions import TeacherPredictions, UnlabelledImages
from simomerge.core.errors import InputError
from simomerge.datasets.base import random_flip
from simomerge.datasets.batches import training_batches
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.training.settings import TrainSettings

from .contract import same
from .contract import weights as state

TASKS = {"depth": Task("depth"), "parts": Task("parts", "segmentation", classes=("a", "b", "c"))}
HEADS_OF = {"depth": "dpt", "parts": "linear"}
IMAGES = list(np.repeat(np.repeat(np.random.default_rng(0).random((16, 4, 4, 3), np.float32), 6, 1), 8, 2))
Interrupted = Callable[[int], AbstractContextManager[None]]
SETTINGS = TrainSettings(steps=10, batch_size=8, lr=1e-3, seed=2)
pytestmark = pytest.mark.filterwarnings("ignore:.*stays close to the unfolded head:UserWarning")


def moved(model: SimoModel, seed: int, size: float) -> SimoModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.encoder.backbone.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        for head in model.heads.values():
            weight: Any = head.output.weight
            weight.normal_(generator=generator).mul_(0.3)
    return model


@pytest.fixture(scope="module")
def experts(make_model: Callable[..., SimoModel]) -> dict[str, SimoModel]:
    kinds = enumerate(HEADS_OF.items(), 1)
    return {task: moved(make_model([TASKS[task]], kind, seed), seed, 0.02) for seed, (task, kind) in kinds}


@pytest.fixture(scope="module")
def start(experts: dict[str, SimoModel]) -> SimoModel:
    """A merge with folded heads, so that distillation starts from it as it is."""
    encoder = copy.deepcopy(experts["depth"].encoder)
    weights = [expert.encoder.backbone.state_dict() for expert in experts.values()]
    encoder.backbone.load_state_dict({name: sum(w[name] for w in weights) / 2 for name in weights[0]})
    heads = {task: copy.deepcopy(expert.heads[task]) for task, expert in experts.items()}
    merged = SimoModel(encoder, TASKS, heads, {"merge": {"method": "average"}}).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return realign(merged, experts, IMAGES, ridge="none")


def distil(model: SimoModel, experts: Mapping[str, SimoModel], images: Any = IMAGES, **given: Any) -> SimoModel:
    given = {"training": SETTINGS, "hold_out": 0.25, **given}
    return realign(model, experts, images, method="distill-encoder", **given)


def of(model: SimoModel) -> dict[str, Any]:
    record: dict[str, Any] = model.provenance["realign"]
    return record


# The objective ------------------------------------------------------------------------------------------


def test_every_distance_is_one_at_the_start(start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path) -> None:
    data = TeacherPredictions(as_images(IMAGES), experts, tmp_path)
    distances = ExpertDistances(experts).in_units_of(start, data)
    batch = {key: torch.stack([data[i][key] for i in range(len(data))]) for key in ("image", *TASKS)}
    with torch.no_grad():
        raw = {task: float(TASKS[task].distance(start(batch["image"])[task], batch[task])) for task in TASKS}
        for task, value in distances(start, batch).items():
            assert float(value) == pytest.approx(1, rel=1e-4)
            assert distances.units[task] == pytest.approx(raw[task], rel=1e-4)
        for task, value in ExpertDistances(experts)(start, batch).items():  # without units, the distances themselves
            assert float(value) == pytest.approx(raw[task], rel=1e-4)
    assert max(raw.values()) > 1.5 * min(raw.values())  # without units one task would outweigh the other


def test_live_predictions_are_the_stored_ones(start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path) -> None:
    images = as_images(IMAGES)
    stored = ExpertDistances(experts).measured(start, TeacherPredictions(images, experts, tmp_path))
    live = ExpertDistances(experts, stored=False).measured(start, UnlabelledImages(images, experts))
    assert live == pytest.approx(stored, rel=2e-3)


def test_the_distance_of_the_first_layers_is_their_error_relative_to_the_variance(
    start: SimoModel, experts: dict[str, SimoModel]
) -> None:
    data = UnlabelledImages(as_images(IMAGES[:5]), experts)
    found = ExpertDistances(experts, stored=False, features=0.5).measured(start, data)
    images = torch.stack([data.image(index) for index in range(5)])
    for task, expert in experts.items():
        errors = []
        with torch.no_grad():
            ours, theirs = start.encode(images), expert.encode(images)
            for mine, wanted in zip(start.heads[task].projections(), expert.heads[task].projections(), strict=True):
                given, target = (each(features).double() for each, features in ((mine, ours), (wanted, theirs)))
                errors.append(float(((given - target) ** 2).mean() / target.var()))
        assert found[f"{task}/features"] == pytest.approx(np.mean(errors), rel=1e-3)
    units = ExpertDistances(experts, stored=False, features=0.5).in_units_of(start, data)
    with torch.no_grad():
        assert [float(value) for value in units(start, {"image": images}).values()] == pytest.approx([1.5, 1.5])


def test_training_is_adamw_on_the_mean_of_the_distances(
    start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    """Compare with a loop in plain torch: units, flips, rates of encoder and heads, clipping, one cycle."""
    settings = replace(SETTINGS, steps=5)
    trained = distil(start, experts, hold_out=0, training=settings)
    data, model = TeacherPredictions(as_images(IMAGES), experts, tmp_path), copy.deepcopy(start)
    samples = {key: torch.stack([data[i][key] for i in range(len(data))]) for key in ("image", *TASKS)}
    with torch.no_grad():
        logits = model(samples["image"])
        units = {task: float(TASKS[task].distance(logits[task], samples[task])) for task in TASKS}
    parts = ((model.encoder, 0.4 * settings.lr), (model.heads, settings.lr))
    groups = [
        {"params": [p for p in part.parameters() if (p.ndim > 1) == flat], "lr": lr, "weight_decay": 0.01 * flat}
        for part, lr in parts
        for flat in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=6, pct_start=0.05)
    model.train()
    for batch in training_batches(data, 8, 5, seed=2, transform=partial(random_flip, TASKS)):
        logits = model(batch["image"])
        sum(TASKS[task].distance(logits[task], batch[task]) / units[task] / 2 for task in TASKS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 25.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for name, value in state(model).items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding noise: softmax ignores a shift of all keys
            torch.testing.assert_close(state(trained)[name], value, atol=2e-5, rtol=1e-3, msg=name)


# What learns --------------------------------------------------------------------------------------------


def test_predictions_come_nearer_to_the_experts_with_no_more_parameters(
    start: SimoModel, experts: dict[str, SimoModel]
) -> None:
    result = distil(start, experts, training=replace(SETTINGS, steps=40))
    record = of(result)
    assert all(0 < ratio < 0.8 for ratio in record["distance_ratio"].values()), record
    assert (record["held_out_images"], record["unlabelled_images"], record["labelled_images"]) == (4, 16, 0)
    assert record["encoder_lr"] == pytest.approx(0.4 * SETTINGS.lr)
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in start.parameters())
    before = {name: value.shape for name, value in state(start).items()}
    assert {name: value.shape for name, value in state(result).items()} == before


def test_only_the_last_blocks_learn(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    result = distil(start, experts, hold_out=0, last_blocks=1)
    before, after = state(start.encoder.backbone), state(result.encoder.backbone)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(".3." in f".{name}" or "layernorm" in name for name in changed)
    with pytest.raises(InputError, match="last_blocks is 5, and 4 blocks of the encoder are known"):
        distil(start, experts, last_blocks=5)


@pytest.mark.parametrize("more", [{"features": 0.5}, {"augmentation": "scale-crop-flip"}, {"predictions": "live"}])
def test_what_cannot_be_stored_is_computed(
    start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path, more: dict[str, Any]
) -> None:
    result = distil(start, experts, work_folder=tmp_path, training=replace(SETTINGS, steps=40), **more)
    assert not (tmp_path / "predictions").exists()
    assert all(ratio < 0.9 for ratio in of(result)["distance_ratio"].values())


def test_predictions_are_stored_within_the_budget(
    start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    needed = 2 * (1 + 3) * 16 * 24 * 32  # bytes, channels of both tasks, images, pixels
    for budget, kept in ((needed, True), (needed - 1, False)):
        work = tmp_path / str(budget)
        distil(start, experts, work_folder=work, cache_budget=f"{budget}B", training=replace(SETTINGS, steps=1))
        assert (work / "predictions").exists() == kept


@pytest.mark.parametrize("stored", [True, False])
def test_a_restart_does_as_the_interrupted_run_although_the_free_space_has_changed(
    start: SimoModel,
    experts: dict[str, SimoModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: Interrupted,
    stored: bool,
) -> None:
    given = {"training": replace(SETTINGS, steps=40)}
    needed = 2 * (1 + 3) * 16 * 24 * 32
    expected = distil(start, experts, predictions="stored" if stored else "live", **given)
    assert of(expected)["best_step"] > 5  # so steps after the interruption decide
    free = [needed if stored else needed - 1]
    usage = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=free[0]))
    monkeypatch.setattr("simomerge.assembly.realign.distill.shutil", usage)
    with interrupted(6), pytest.raises(KeyboardInterrupt):
        distil(start, experts, work_folder=tmp_path, **given)
    free[0] = 0 if stored else needed
    resumed = distil(start, experts, work_folder=tmp_path, **given)
    assert (tmp_path / "predictions").exists() == stored
    assert same(state(resumed), state(expected)) and of(resumed)["best_step"] == of(expected)["best_step"]
    other = distil(start, experts, predictions="live" if stored else "stored", **given)
    assert not same(state(other), state(expected))  # so the choice matters


# What is kept -------------------------------------------------------------------------------------------


def test_held_out_images_are_a_run_of_neighbours(experts: dict[str, SimoModel]) -> None:
    data = UnlabelledImages(as_images(IMAGES), experts)
    train, held_out = split_off(data, 0.2)
    assert held_out is not None and (len(train), len(held_out)) == (13, 3)
    assert torch.equal(held_out.image(0), data.image(13)) and torch.equal(train.image(12), data.image(12))
    assert split_off(data, 0) == (data, None) and split_off(data, 0.03)[1] is None


def test_the_start_is_kept_where_training_only_does_harm(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    near = distil(start, experts, training=replace(SETTINGS, steps=60))
    result = distil(near, experts, training=replace(SETTINGS, lr=0.5))
    assert of(result)["best_step"] == 0 and set(of(result)["distance_ratio"].values()) == {1.0}
    trained = [name for name, _ in near.named_parameters()]
    assert all(torch.equal(state(result)[name], state(near)[name]) for name in trained)


def not_finite_after(calls: int) -> Callable[..., dict[str, Tensor]]:
    distances = ExpertDistances._distances

    def changed(self: ExpertDistances, model: SimoModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        changed.calls += model.training  # type: ignore[attr-defined]
        found = distances(self, model, batch)
        return {name: value * (float("nan") if changed.calls > calls else 1) for name, value in found.items()}  # type: ignore[attr-defined]

    changed.calls = 0  # type: ignore[attr-defined]
    return changed


def test_a_diverging_distillation_keeps_the_best_weights_and_says_so(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, steps=40, validate_every=5, patience=9)
    expected = distil(start, experts, training=settings, hold_out=0.25)
    monkeypatch.setattr(distillation.ExpertDistances, "_distances", not_finite_after(22))
    with pytest.warns(UserWarning, match=r"became NaN or infinite by step 25.*best weights before that are kept"):
        result = distil(start, experts, training=settings)
    assert of(result)["diverged"] and of(result)["steps"] == 25
    assert all(torch.isfinite(value).all() for value in state(result).values() if value.is_floating_point())
    assert not same(state(result), state(start)) and not same(state(result), state(expected))
    monkeypatch.setattr(distillation.ExpertDistances, "_distances", not_finite_after(2))
    with pytest.raises(InputError, match="lower the learning rate"):
        distil(start, experts, hold_out=0)  # nothing is held out, so nothing can be kept


def test_a_task_that_moves_away_is_named(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter(({"depth": 0.1, "parts": 0.2}, {"depth": 0.1, "parts": 0.2}, {"depth": 0.05, "parts": 0.25}))
    monkeypatch.setattr(ExpertDistances, "measured", lambda *_: next(measured))
    with pytest.warns(UserWarning, match=r"further from their experts: parts by 25\.0 %\."):
        distil(start, experts, training=replace(SETTINGS, steps=2))


# Mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": 1.0, "predictions": "stored"}, "fit neither augmentation='scale-crop-flip' nor features"),
        ({"hold_out": 0.6}, "hold_out must be a number at least 0 and at most 0.5, got 0.6"),
        ({"cache_budget": "much"}, "much"),
        ({"rank": 4}, "rank does nothing unless trains is adapters or lora"),
        ({"trains": "heads"}, "stands for distill with trains=encoder"),
    ],
)
def test_a_mistake_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_realignment("distill-encoder", **given)


def test_what_only_the_encoder_needs_is_refused_for_the_heads() -> None:
    with pytest.raises(InputError, match="checkpointing does nothing while only the heads learn"):
        get_realignment("distill", checkpointing=True)
    with pytest.raises(InputError, match="last_blocks does nothing unless trains is encoder"):
        get_realignment("distill", last_blocks=2)


def test_memory_that_does_not_suffice_says_what_needs_less(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("simomerge.training.loop._Trainer._step", full)
    with pytest.raises(InputError, match=r"memory does not suffice for 8 images per step; use a smaller batch"):
        distil(start, experts)


def test_predictions_that_do_not_fit_the_disk_are_refused_with_their_size(
    start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("simomerge.assembly.realign.predictions.shutil.disk_usage", lambda _: free)
    with pytest.raises(InputError, match=r"predictions on 16 images need 0\.0 GB, and 0\.0 GB are free"):
        distil(start, experts, predictions="stored", work_folder=tmp_path)
    assert not list((tmp_path / "predictions").iterdir())


def test_few_images_are_said(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    with pytest.warns(UserWarning, match=r"12 images are few, and the model may come to fit them alone"):
        distil(start, experts, training=replace(SETTINGS, steps=1))


@pytest.mark.parametrize("method", ["heads", "adapters", "surgery", "prodistill", "distill", "distill-adapters"])
def test_a_rate_of_the_encoder_that_has_no_effect_is_refused(method: str) -> None:
    with pytest.raises(InputError, match="encoder_lr does nothing, because the encoder's weights do not learn"):
        get_realignment(method, encoder_lr=1e-4)
    with pytest.raises(InputError, match="layer_decay does nothing"):
        get_realignment(method, layer_decay=0.5)


@pytest.mark.parametrize("method", ["lora", "distill-lora", "distill-encoder"])
def test_a_rate_of_the_encoder_is_taken_where_it_learns(method: str) -> None:
    made: Any = get_realignment(method, encoder_lr=1e-4, layer_decay=0.5)
    assert (made.training.encoder_lr, made.training.layer_decay) == (1e-4, 0.5)


def test_features_of_heads_that_declare_none_are_refused(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    plain = copy.deepcopy(start)
    plain.heads = nn.ModuleDict({task: copy.deepcopy(expert.heads[task]) for task, expert in experts.items()})
    corrected = realign(plain, experts, IMAGES, method="surgery", steps=1, batch_size=8)
    with pytest.raises(InputError, match="no head declares its first layers, so features has no effect"):
        distil(corrected, experts, features=0.5)


def test_it_folds_where_an_earlier_re_alignment_left_the_heads_alone() -> None:
    changed = {"realign": {"method": "fold", "after": {"method": "prodistill"}}}
    assert heads_were_changed(changed) and heads_were_changed({"realign": {"method": "of-another-version"}})
    assert not heads_were_changed({}) and not heads_were_changed({"realign": {"method": "prodistill"}})


def test_the_fold_before_it_does_not_see_the_held_out_images(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    merged = SimoModel(start.encoder, TASKS, {task: copy.deepcopy(e.heads[task]) for task, e in experts.items()})
    other = [*IMAGES[:12], *(1 - image for image in IMAGES[12:])]  # the last four of sixteen are held out
    still = replace(SETTINGS, steps=1, lr=1e-12)
    first, second = (distil(merged, experts, images, training=still) for images in (IMAGES, other))
    assert of(first)["after"]["unlabelled_images"] == 12
    for task in TASKS:
        for one, two in zip(first.heads[task].parameters(), second.heads[task].parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
