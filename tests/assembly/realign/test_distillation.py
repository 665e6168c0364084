"""Training towards the experts' predictions: units, held-out images, what learns, and what is kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simomerge.assembly.realign import Distill, distillation, get_realignment, held_out, realign
from simomerge.assembly.realign.agreement import least_distance
from simomerge.assembly.realign.distillation import ExpertDistances
from simomerge.assembly.realign.held_out import split_off
from simomerge.assembly.realign.method import distance_ratio, heads_were_changed
from simomerge.assembly.realign.predictions import TeacherPredictions, UnlabelledImages
from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.core.text import size_text
from simomerge.datasets import groups
from simomerge.datasets.base import DenseDataset, random_flip
from simomerge.datasets.batches import training_batches
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder
from simomerge.models.model import SimoModel
from simomerge.training.features import bytes_per_image
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


def unfolded(start: SimoModel, experts: Mapping[str, SimoModel]) -> SimoModel:
    return SimoModel(start.encoder, TASKS, {task: copy.deepcopy(e.heads[task]) for task, e in experts.items()})


def distil(model: SimoModel, experts: Mapping[str, SimoModel], images: Any = IMAGES, **given: Any) -> SimoModel:
    given = {"training": SETTINGS, "hold_out": 0.25, "retry": False, **given}
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


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_unit_of_a_regression_changes_no_ratio(norm: str) -> None:
    task, power = Task("level", "regression", norm=norm), {"l1": 1, "l2": 2}[norm]
    predictions = torch.rand((6, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    least = least_distance(task, predictions)
    assert 1e-7 < least < 1e-6
    for factor in (1e-5, 1e5):
        small = factor * predictions
        assert least_distance(task, small) == pytest.approx(factor**power * least, rel=0.2)
        before, after = (float(task.distance(small + factor * by, small)) for by in (0.01, 0.09))
        assert distance_ratio(before, after, least_distance(task, small)) == pytest.approx(9**power, rel=1e-2)
        assert distance_ratio(factor**power * 1e-8, factor**power * 9e-8, least_distance(task, small)) == 1
    assert least_distance(task, torch.zeros(2, 1, 4, 4)) == 1e-6


def test_predictions_of_many_values_are_compared_two_by_two(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, distances = UnlabelledImages(as_images(IMAGES), experts), ExpertDistances(experts, stored=False)
    whole = distances._predictions(start, data)
    assert {len(found) for found in whole.values()} == {len(IMAGES)}
    monkeypatch.setattr("simomerge.assembly.realign.distillation.MOST_VALUES", 1)
    for task, found in distances._predictions(start, data).items():
        torch.testing.assert_close(found, whole[task][[0, -1]], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("float32")
def test_a_task_of_small_values_counts_as_much_as_another(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    task = Task("depth", "regression", norm="l2")

    def small(model: SimoModel) -> SimoModel:
        head: Any = copy.deepcopy(model.heads["depth"])
        with torch.no_grad():
            head.output.weight.mul_(1e-5)
            head.output.bias.mul_(1e-5)
        return SimoModel(model.encoder, {"depth": task}, {"depth": head}).eval()

    given, model = {"depth": small(experts["depth"])}, small(start)
    data = UnlabelledImages(as_images(IMAGES), given)
    distances = ExpertDistances(given, stored=False)
    before = distances.measured(model, data)["depth"]
    units = distances.in_units_of(model, data)
    assert 0 < before < 1e-9 and units.units["depth"] == pytest.approx(before, rel=1e-3)
    assert units.measured(model, data)["depth"] == pytest.approx(before)  # these are without units
    images = torch.stack([data.image(index) for index in range(len(data))])
    with torch.no_grad():
        assert float(units(model, {"image": images})["depth"]) == pytest.approx(1, rel=1e-3)
    assert distances.least(model, data)["depth"] < 1e-3 * before


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


@pytest.mark.usefixtures("float32")
def test_layer_decay_lowers_the_rate_from_block_to_block(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    """The first step of AdamW changes each weight by the rate, whatever its gradient."""
    result = distil(start, experts, hold_out=0, training=replace(SETTINGS, steps=1, layer_decay=0.5, weight_decay=0.0))
    before, after = state(start.encoder.backbone), state(result.encoder.backbone)
    changes = [
        max(float((after[name] - before[name]).abs().median()) for name in before if f".{block}.mlp.fc1.w" in name)
        for block in range(4)
    ]
    assert changes[0] > 0
    assert [later / earlier for earlier, later in pairwise(changes)] == pytest.approx([2, 2, 2], rel=0.02)


@pytest.mark.usefixtures("float32")
def test_checkpointing_changes_nothing_but_the_memory(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    switched, switch = list[bool](), Encoder.checkpoint_gradients
    monkeypatch.setattr(Encoder, "checkpoint_gradients", lambda self, on: switched.append(on) or switch(self, on))
    short = replace(SETTINGS, steps=3)
    plain = distil(start, experts, hold_out=0, training=short)
    saving = distil(start, experts, hold_out=0, training=short, checkpointing=True)
    assert switched == [False, False, True, False] and not same(state(plain), state(start))
    for name, value in state(plain).items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding noise
            torch.testing.assert_close(state(saving)[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_features_learn_after_a_cross_tap_fold(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    """The folded heads read all taps where the experts' read one, and compute outputs of the same shapes."""
    merged = unfolded(start, experts)
    folded = realign(merged, experts, IMAGES, variant="cross-tap", ridge=1.0)  # which leaves some error
    assert any(a.shape != b.shape for a, b in zip(folded.parameters(), start.parameters(), strict=True))
    result = distil(folded, experts, features=1.0, training=replace(SETTINGS, steps=40))
    data, inside = UnlabelledImages(as_images(IMAGES), experts), ExpertDistances(experts, stored=False, features=1.0)
    before, after = inside.measured(folded, data), inside.measured(result, data)
    assert set(before) == {"depth", "parts", "depth/features", "parts/features"}
    ratios = {name: after[name] / before[name] for name in before}
    assert all(ratios[f"{task}/features"] < 0.9 for task in TASKS) and np.mean(list(ratios.values())) < 0.8, ratios


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
    needed = (4 * 1 + 2 * 3) * 16 * 24 * 32  # bytes and channels of both tasks, images, pixels
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
    needed = (4 * 1 + 2 * 3) * 16 * 24 * 32
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


@pytest.mark.parametrize("share", [0.125, 0.5])
def test_of_4096_images_all_held_out_ones_are_measured_and_of_more_no_more(
    experts: dict[str, SimoModel], share: float
) -> None:
    def places(count: int) -> tuple[list[int], list[int]]:
        """The places of the images for training and of the measured ones."""
        data = UnlabelledImages(as_images(IMAGES[:1] * count), experts)
        train, measured = split_off(data, share)
        assert measured is not None
        return list(train.indices), list(measured.indices)  # type: ignore[attr-defined]

    most = int(4096 * share)
    train, measured = places(4096)
    assert sorted(train + measured) == list(range(4096)) and len(measured) == most
    train, measured = places(10_000)
    out = groups.held_out(range(10_000), share)
    assert len(measured) == len(set(measured)) == most < len(out) and measured == sorted(measured)
    assert {measured[0], measured[-1]} == {out[0], out[-1]} and set(measured) <= set(out)
    positions = np.searchsorted(out, measured)
    assert np.diff(positions).max() - np.diff(positions).min() <= 1  # evenly
    assert sorted([*train, *out]) == list(range(10_000))  # whole groups stay apart from the training images


def test_the_fold_before_it_sees_enough_images_spread_evenly(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = unfolded(start, experts)
    still = replace(SETTINGS, steps=1, lr=1e-12)
    monkeypatch.setattr(held_out, "ENOUGH_IMAGES", 6)
    record = of(distil(merged, experts, training=still))
    assert (record["unlabelled_images"], record["after"]["unlabelled_images"]) == (16, 6)
    assert record["held_out_images"] == 2  # a quarter of 6, rounded up
    alone = realign(merged, experts, IMAGES, count=12)
    assert alone.provenance["realign"]["unlabelled_images"] == 12  # a fold on its own sees what it is given


@pytest.mark.parametrize("trains", ["heads", "encoder"])
def test_too_few_images_to_hold_one_out_are_said(start: SimoModel, experts: dict[str, SimoModel], trains: str) -> None:
    given: dict[str, Any] = {"method": "distill", "trains": trains, "training": replace(SETTINGS, steps=1)}
    with pytest.warns(UserWarning, match=r"7 images are too few to hold one out \(hold_out is 0\.125\).*give 8 images"):
        few = realign(start, experts, IMAGES[:7], **given)
    assert of(few)["held_out_images"] == 0 and of(few)["distance_ratio"] == {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*too few to hold one out")
        assert of(realign(start, experts, IMAGES[:8], **given))["held_out_images"] == 1
        assert of(realign(start, experts, IMAGES[:7], **given, hold_out=0))["held_out_images"] == 0


def test_the_start_is_kept_where_training_only_does_harm(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    near = distil(start, experts, training=replace(SETTINGS, steps=60))
    with pytest.warns(UserWarning, match=r"stopped at step 1, because .* lower the learning rate"):
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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_head_that_diverges_stays_as_it_was_and_the_others_learn(
    start: SimoModel, experts: dict[str, SimoModel], workers: int
) -> None:
    broken = copy.deepcopy(start)
    with torch.no_grad():
        bias: Any = broken.heads["depth"].output.bias
        bias.fill_(float("nan"))
    given: dict[str, Any] = {"method": "distill", "training": SETTINGS, "hold_out": 0.25, "workers": workers}
    with pytest.warns(UserWarning, match=r"distill depth: .*lower the learning rate\. The head stays as it was\."):
        result = realign(broken, experts, IMAGES, **given)
    assert of(result)["diverged"] == ["depth"] and of(result)["distance_ratio"]["parts"] < 0.95
    for name, value in state(broken.heads["depth"]).items():
        torch.testing.assert_close(state(result.heads["depth"])[name], value, rtol=0, atol=0, equal_nan=True)
    assert not same(state(result.heads["parts"]), state(broken.heads["parts"]))


def of_held_out(factor: float) -> Callable[..., dict[str, Tensor]]:
    """Distances that grow, outside of training, by a factor with each validation after the first one."""
    distances = ExpertDistances.__call__

    def changed(self: ExpertDistances, model: SimoModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        found = distances(self, model, batch)
        if model.training:
            return found
        changed.calls += 1  # type: ignore[attr-defined]
        return {name: 0 * value + factor ** (changed.calls - 1) for name, value in found.items()}  # type: ignore[attr-defined]

    changed.calls = 0  # type: ignore[attr-defined]
    return changed


@pytest.mark.parametrize(("factor", "steps"), [(2.1, 16), (3.1, 12), (9.9, 8), (10.1, 4), (1.01, 40), (1.0, 40)])
def test_training_stops_where_the_distance_is_ten_times_that_at_the_start(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch, factor: float, steps: int
) -> None:
    settings = replace(SETTINGS, steps=40, validate_every=4, patience=10)
    monkeypatch.setattr(distillation.ExpertDistances, "__call__", of_held_out(factor))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = distil(start, experts, training=settings)
    said = [str(each.message) for each in caught if "are kept" in str(each.message)]
    assert of(result)["steps"] == steps
    assert of(result)["best_step"] == (0 if factor > 1 else 40) and same(state(result), state(start)) == (factor > 1)
    if steps < 40:
        (text,) = said
        assert f"stopped at step {steps}, because" in text and "The best weights are kept, those of step 0." in text
        assert f"was {factor ** (steps / 4):.1f} times that at the start" in text
    elif factor > 1:
        (text,) = said
        assert text.startswith("distill: no step was better than the start on held-out images, so the weights at the")
    else:
        assert not said


def test_a_start_that_is_kept_is_trained_again_at_a_lower_rate(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second training is the one that a user would have had with this rate, bit for bit."""
    monkeypatch.setattr(held_out, "RETRY_RATE", SETTINGS.lr)
    training = replace(SETTINGS, steps=40)
    expected = distil(start, experts, training=training, retry=True)
    assert of(expected)["best_step"] > 0 and "lr_factor" not in of(expected)
    given = {"training": replace(training, lr=1.0), "retry": True, "work_folder": tmp_path}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are kept")
        result = distil(start, experts, **given)
        again = distil(start, experts, **given)  # as after a kill at the end
    assert same(state(result), state(expected)) and same(state(again), state(expected))
    assert (tmp_path / "state-again.safetensors").exists()
    assert of(result)["lr_factor"] == SETTINGS.lr and of(result)["steps"] > 40
    assert of(result)["distance_ratio"] == of(expected)["distance_ratio"]
    with pytest.warns(UserWarning, match="weights at the start are kept|The best weights are kept, those of step 0"):
        kept = distil(start, experts, **{**given, "retry": False, "work_folder": tmp_path / "other"})
    assert same(state(kept), state(start))


@pytest.mark.parametrize(("given", "steps"), [({}, 40), ({"patience": 2}, 10), ({"validate_every": 4}, 40)])
def test_training_stops_early_only_if_asked(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch, given: dict[str, int], steps: int
) -> None:
    monkeypatch.setattr(distillation.ExpertDistances, "__call__", of_held_out(1.01))
    with pytest.warns(UserWarning, match="no step was better than the start"):
        result = distil(start, experts, steps=40, **given)
    assert of(result)["steps"] == steps


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


class TwoSizes(DenseDataset):
    """A dataset of images of two sizes with as many pixels."""

    def image(self, index: int) -> Tensor:
        return torch.from_numpy(IMAGES[index]).permute(2, 0, 1).reshape(3, *((24, 32), (16, 48))[index // 12])

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("predictions", ["live", "stored"])
def test_a_dataset_of_two_sizes_is_refused_before_the_fold(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch, predictions: str
) -> None:
    monkeypatch.setattr(Distill, "_fold", lambda *_: pytest.fail("folded"))
    merged = unfolded(start, experts)
    with pytest.raises(InputError, match=r"image 12 is 48 x 16 pixels, the first 32 x 24; .*let the dataset resize"):
        distil(merged, experts, TwoSizes({}, 16), predictions=predictions)


def test_memory_that_does_not_suffice_says_what_needs_less(
    start: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("simomerge.training.loop._Trainer._step", full)
    with pytest.raises(
        InputError, match=r"memory does not suffice for 8 images per step; use a smaller batch .*last-blocks"
    ):
        distil(start, experts)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free space of the disk in bytes, which a test may change."""
    free = [1000]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))
    monkeypatch.setattr(Distill, "_fold", lambda *_: pytest.fail("folded before the space was checked"))
    return free


def test_predictions_that_do_not_fit_the_disk_are_refused_with_their_size_before_the_fold(
    start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path, free: list[int]
) -> None:
    message = r"16 images need 123 kB for the experts' predictions, and 1 kB are free; use fewer images"
    with pytest.raises(InputError, match=message):
        distil(unfolded(start, experts), experts, predictions="stored", work_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.json"]


def test_for_the_heads_predictions_and_features_are_checked_together(
    start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path, free: list[int]
) -> None:
    given: dict[str, Any] = {"method": "distill", "hold_out": 0.25, "training": replace(SETTINGS, steps=1)}
    features = 12 * bytes_per_image(start.encoder, torch.zeros(3, 24, 32))  # a quarter of 16 images is held out
    free[0] = 122_880 + features - 1
    message = (
        rf"16 images need 123 kB for the experts' predictions and {size_text(features)} for the encoder's features"
    )
    with pytest.raises(InputError, match=message):
        realign(unfolded(start, experts), experts, IMAGES, **given, work_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.json"]
    free[0] += 1
    realign(start, experts, IMAGES, **given, work_folder=tmp_path)
    written = sum(np.load(file, mmap_mode="r").nbytes for file in tmp_path.rglob("*.npy"))
    assert written == free[0]
    free[0] = 0  # what is there needs no space
    realign(start, experts, IMAGES, **given, work_folder=tmp_path)


def test_predictions_that_auto_does_not_store_are_said(
    start: SimoModel, experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    still = replace(SETTINGS, steps=1)
    message = r"run for each batch.*on 16 images need 123 kB: the budget is 120 kB, and [\d.]+ GB are free"
    with pytest.warns(UserWarning, match=message):
        distil(start, experts, work_folder=tmp_path, cache_budget="120kB", training=still)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*run for each batch")
        for chosen in ({"cache_budget": "125kB"}, {"predictions": "live"}, {"features": 0.5}):
            distil(start, experts, training=still, **chosen)


def test_the_size_is_announced_before_a_file_is_made(experts: dict[str, SimoModel], tmp_path: Path) -> None:
    lines: list[tuple[str, int]] = []
    with show_progress(lambda *line: lines.append((line[3], len(list(tmp_path.rglob("*.npy")))))):
        TeacherPredictions(as_images(IMAGES), experts, tmp_path / "predictions")
    assert lines[0] == ("123 kB on disk", 0) and lines[1][1] == 2


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
    with pytest.raises(InputError, match="no head declares its first layers, so features does nothing"):
        distil(corrected, experts, features=0.5)


def test_it_folds_where_an_earlier_re_alignment_left_the_heads_alone() -> None:
    changed = {"realign": {"method": "fold", "after": {"method": "prodistill"}}}
    assert heads_were_changed(changed) and heads_were_changed({"realign": {"method": "of-another-version"}})
    assert not heads_were_changed({}) and not heads_were_changed({"realign": {"method": "prodistill"}})


def test_the_fold_before_it_does_not_see_the_held_out_images(start: SimoModel, experts: dict[str, SimoModel]) -> None:
    merged = unfolded(start, experts)
    other = [*IMAGES[:12], *(1 - image for image in IMAGES[12:])]  # the last four of sixteen are held out
    still = replace(SETTINGS, steps=1, lr=1e-12)
    first, second = (distil(merged, experts, images, training=still) for images in (IMAGES, other))
    assert of(first)["after"]["unlabelled_images"] == 12
    for task in TASKS:
        for one, two in zip(first.heads[task].parameters(), second.heads[task].parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
