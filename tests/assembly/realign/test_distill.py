"""Distillation: the experts' predictions are the teacher, and no label is read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from simomerge.assembly.realign import predictions as predictions_module
from simomerge.assembly.realign import realign
from simomerge.assembly.realign.agreement import Agreement, judging
from simomerge.assembly.realign.fold import Fold
from simomerge.assembly.realign.predictions import TeacherPredictions
from simomerge.assembly.realign.teacher import observe
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset
from simomerge.datasets.groups import held_out
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import KINDS, Task
from simomerge.models.encoders import Features
from simomerge.models.heads import HEADS
from simomerge.models.model import SimoModel
from simomerge.training.settings import TrainSettings

from .contract import same
from .contract import weights as state

SETTINGS = TrainSettings(steps=12, batch_size=8, lr=3e-3, seed=1)
HEADS_OF = {"depth": "dpt", "parts": "linear"}
TASKS = {"depth": Task("depth"), "parts": Task("parts", "segmentation", classes=("a", "b", "c"))}
FEW = "ignore:.*the fold stays close to the unfolded head:UserWarning"
pytestmark = pytest.mark.filterwarnings(FEW)


def smooth_images(count: int, height: int = 24, width: int = 32, seed: int = 0) -> list[np.ndarray]:
    coarse = np.random.default_rng(seed).random((count, 4, 4, 3)).astype(np.float32)
    return list(np.repeat(np.repeat(coarse, height // 4, 1), width // 4, 2))


IMAGES = smooth_images(24)


def moved(model: SimoModel, seed: int, size: float = 0.05, heads: bool = True) -> SimoModel:
    """Fine-tuned by dice."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.encoder.backbone.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        for head in model.heads.values() if heads else ():
            weight: Any = head.output.weight
            weight.normal_(generator=generator).mul_(0.3)
    return model


@pytest.fixture(scope="module")
def experts(make_model: Callable[..., SimoModel]) -> dict[str, SimoModel]:
    return {
        task: moved(make_model([TASKS[task]], kind, seed), seed)
        for seed, (task, kind) in enumerate(HEADS_OF.items(), 1)
    }


@pytest.fixture(scope="module")
def scene(experts: dict[str, SimoModel]) -> SimoModel:
    encoder = copy.deepcopy(experts["depth"].encoder)
    weights = [expert.encoder.backbone.state_dict() for expert in experts.values()]
    encoder.backbone.load_state_dict({name: sum(w[name] for w in weights) / 2 for name in weights[0]})
    heads = {task: copy.deepcopy(expert.heads[task]) for task, expert in experts.items()}
    return SimoModel(encoder, TASKS, heads, {"merge": {"method": "average"}}).eval()


def batch_of(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def distances(
    model: SimoModel, experts: Mapping[str, SimoModel], images: list[np.ndarray] | None = None
) -> dict[str, float]:
    batch = batch_of(IMAGES if images is None else images)
    with torch.no_grad():
        logits = model(batch)
        return {t: float(model.tasks[t].distance(logits[t], e(batch)[t])) for t, e in experts.items()}


class Unlabelled(DenseDataset):
    """Has images; whoever asks for a label fails."""

    def __init__(self) -> None:
        super().__init__(TASKS, len(IMAGES))

    def image(self, index: int) -> Tensor:
        return torch.from_numpy(IMAGES[index].copy()).permute(2, 0, 1)

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        raise AssertionError("read a label")


# The teacher --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float32")
def test_the_teacher_is_the_experts_logits(experts: dict[str, SimoModel], tmp_path: Path) -> None:
    images = smooth_images(5, 20, 28)  # no whole number of patches
    predictions = TeacherPredictions(as_images(images), experts, tmp_path / "predictions")
    assert len(predictions) == 5 and list(predictions.tasks) == ["depth", "parts"]
    for task, expert in experts.items():
        with torch.no_grad():
            wanted = expert(batch_of(images))[task]
        assert wanted.shape == (5, TASKS[task].channels, 20, 28)
        for index in range(5):
            found = predictions[index][task]
            assert found.dtype == torch.float32
            if task == "depth":  # in metres, without bounds: in full precision
                torch.testing.assert_close(found, wanted[index], rtol=1e-5, atol=1e-5)
                continue
            assert torch.equal(found, found.half().float())
            torch.testing.assert_close(found, wanted[index], rtol=2e-3, atol=1e-3)
    assert torch.equal(predictions[3]["image"], as_images(images).image(3)) and list(
        predictions.targets(0, ["parts"])
    ) == ["parts"]


def test_a_second_look_reads_what_the_first_wrote(
    experts: dict[str, SimoModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TeacherPredictions(as_images(IMAGES[:4]), experts, tmp_path / "predictions")
    monkeypatch.setattr(predictions_module, "observe", lambda *_, **__: pytest.fail("the experts predict again"))
    second = TeacherPredictions(as_images(IMAGES[:4]), experts, tmp_path / "predictions")
    assert all(torch.equal(second[i][task], first[i][task]) for i in range(4) for task in experts)


def test_what_crosses_to_a_worker_is_neither_the_logits_nor_an_expert(
    experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    """Heads are trained in processes of their own; each maps the same file."""
    for index, image in enumerate(IMAGES):
        Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / f"{index:02}.png")
    predictions = TeacherPredictions(as_images(tmp_path), experts, tmp_path / "predictions")
    data = pickle.dumps(predictions)
    kept = sum(path.stat().st_size for path in (tmp_path / "predictions").iterdir())
    assert len(data) < 20_000 < kept / 5
    again = pickle.loads(data)
    assert all(torch.equal(again[7][key], predictions[7][key]) for key in ("image", "depth", "parts"))


def test_logits_too_large_for_half_precision_stay_finite(experts: dict[str, SimoModel], tmp_path: Path) -> None:
    given = copy.deepcopy(experts["parts"])
    with torch.no_grad():
        bias: Any = given.heads["parts"].output.bias
        bias.fill_(1e6)
    predictions = TeacherPredictions(as_images(IMAGES[:2]), {"parts": given}, tmp_path / "predictions")
    assert torch.isfinite(predictions[0]["parts"]).all() and predictions[0]["parts"].min() > 5e4


@pytest.mark.usefixtures("float32")
def test_logits_in_units_of_the_target_are_kept_in_full(experts: dict[str, SimoModel], tmp_path: Path) -> None:
    """A pressure in Pa has more than float16 holds, and a depth in mm falls between its steps."""
    given = copy.deepcopy(experts["depth"])
    with torch.no_grad():
        bias: Any = given.heads["depth"].output.bias
        bias.fill_(101325.0)
    images = as_images(IMAGES[:16])
    predictions = TeacherPredictions(images, {"depth": given}, tmp_path / "predictions")
    with torch.no_grad():
        wanted = given(batch_of(IMAGES[:16]))["depth"]
    for index in range(16):
        torch.testing.assert_close(predictions[index]["depth"], wanted[index], rtol=1e-6, atol=0)
    files = {path.name: path.stat().st_size for path in (tmp_path / "predictions").glob("*.npy")}
    assert predictions.bytes_of_predictions == 4 * 16 * 24 * 32 == files["depth.npy"] - 128
    agreement = Agreement({"depth": given}, judging(images))
    for batch in observe({"depth": given}, images, check=False):
        agreement.add(batch)
    torch.testing.assert_close(torch.cat([each["depth"] for each in agreement.logits]), wanted[held_out(images)])


def test_predictions_that_an_earlier_version_rounded_are_not_used(
    experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    images, given = as_images(IMAGES[:4]), {"depth": experts["depth"]}
    expected = TeacherPredictions(images, given, tmp_path)[3]["depth"]
    rounded = np.zeros((4, 1, 24, 32), np.float16)
    np.save(tmp_path / "depth.npy", rounded)
    with pytest.raises(InputError, match=rf"depth\.npy: holds float16 .*; remove the folder {tmp_path}, and repeat"):
        TeacherPredictions(images, given, tmp_path).targets(3, ["depth"])
    (tmp_path / "done").unlink()  # as after an interruption
    (tmp_path / "next-0-of-1").write_text("4")
    assert torch.equal(TeacherPredictions(images, given, tmp_path)[3]["depth"], expected)
    with pytest.raises(RuntimeError, match=r"its predictions of .* are torch\.float16"):
        Agreement(given, []).fill(
            {"agreement/0/image": torch.zeros(1), "agreement/0/logits/depth": torch.zeros(1).half()}
        )


def test_images_of_several_sizes_are_refused_with_the_sizes(
    scene: SimoModel, experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    mixed = [*IMAGES[:3], *smooth_images(2, 16, 40)]
    message = r"images of one size; the first is 32 x 24 pixels, image 3 40 x 16: .*--size HEIGHTxWIDTH"
    with pytest.raises(InputError, match=message):
        TeacherPredictions(as_images(mixed), experts, tmp_path / "predictions")
    with pytest.raises(InputError, match=r"image 3 is 40 x 16 pixels, the first 32 x 24; .*give size="):
        realign(scene, experts, mixed, method="distill", training=SETTINGS)
    resized = as_images(mixed, size="24x32")
    assert len(TeacherPredictions(resized, experts, tmp_path / "again")) == 5


def test_a_picture_that_cannot_be_read_is_left_out(
    scene: SimoModel, experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    for i in range(8):
        Image.fromarray((IMAGES[i] * 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 8 .*1\.png"):
        result = realign(scene, experts, tmp_path, method="distill", training=replace(SETTINGS, steps=2))
    assert result.provenance["realign"]["unlabelled_images"] == 7


def test_large_images_of_one_size_are_not_said_to_differ(
    experts: dict[str, SimoModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder sees images of many patches made smaller; that is no fault of the images."""
    fit = SimoModel.fit
    monkeypatch.setattr(SimoModel, "fit", lambda self, image, max_patches=6: fit(self, image, max_patches))
    predictions = TeacherPredictions(as_images(IMAGES[:3]), experts, tmp_path / "predictions")
    assert len(predictions) == 3 and predictions.size[0] * predictions.size[1] < 24 * 32
    assert predictions[2]["depth"].shape == (1, *predictions.size) == (1, *predictions[2]["image"].shape[1:])


# Distilling ---------------------------------------------------------------------------------------------


def settings_of(trains: str, rank: int) -> dict[str, Any]:
    """What is trained, with the rank of adapters and LoRA."""
    return {"method": "distill", "trains": trains, **({"rank": rank} if trains in ("adapters", "lora") else {})}


@pytest.mark.parametrize("trains", ["heads", "adapters", "lora", "encoder"])
def test_every_prediction_comes_nearer_to_its_experts(
    scene: SimoModel, experts: dict[str, SimoModel], trains: str
) -> None:
    start = realign(scene, experts, IMAGES, ridge="none")  # re-aligned by nothing: what is learned is all there is
    result = realign(start, experts, IMAGES, training=replace(SETTINGS, steps=25, lr=1e-3), **settings_of(trains, 4))
    before, after = distances(scene, experts), distances(result, experts)
    assert all(after[task] < 0.75 * before[task] for task in experts)
    assert (result.encoder.adapters is not None) == (trains == "adapters") and not result.training
    unchanged = same(state(result.encoder.backbone), state(scene.encoder.backbone))
    assert unchanged == (trains not in ("lora", "encoder"))


def test_it_mends_what_the_fold_has_left(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    scene, experts = copy.deepcopy((scene, experts))
    moved(scene.select(["parts"]), 9, 0.1, heads=False)
    images = smooth_images(64)
    start = realign(scene, experts, images[:56], variant="per-tap")  # the last 8 images are held out
    few = replace(SETTINGS, steps=30, lr=1e-3)
    result = realign(scene, experts, images, method="distill", training=few, variant="per-tap")
    merged, before, after = (distances(model, experts, images[56:])["parts"] for model in (scene, start, result))
    assert after < 0.9 * before < 0.5 * merged


def test_the_provenance_records_the_fold_before(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    few = replace(SETTINGS, steps=2)
    record = realign(scene, experts, IMAGES, method="distill", training=few, variant="per-tap", count=12)
    fold = record.provenance["realign"]["after"]
    assert (fold["method"], fold["variant"], fold["unlabelled_images"]) == ("fold", "per-tap", 11)
    options: dict[str, Any] = {"trains": "adapters", "rank": 3, "activation": "relu"}
    result = realign(scene, experts, IMAGES[:8], method="distill", training=few, **options)
    assert result.provenance["realign"]["after"]["variant"] == "cross-tap"


def test_it_folds_first_unless_the_model_was_re_aligned_before(
    scene: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(SETTINGS, steps=1, lr=1e-9)  # it ends where it began
    folded = realign(scene, experts, IMAGES[:12])
    result = realign(scene, experts, IMAGES[:12], method="distill", training=few, variant="per-tap", hold_out=0)
    for task, value in distances(result, experts).items():
        assert value == pytest.approx(distances(folded, experts)[task], rel=0.05)
    monkeypatch.setattr(Fold, "apply", lambda *_, **__: pytest.fail("folded again"))
    again = realign(folded, experts, IMAGES[:12], method="distill", training=few)
    assert again.provenance["realign"]["after"] == folded.provenance["realign"]
    for task, value in distances(again, experts).items():
        assert value == pytest.approx(distances(folded, experts)[task], rel=0.05)


def test_a_model_with_adapters_gets_no_second_ones(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    few = replace(SETTINGS, steps=2)
    adapted = realign(scene, experts, IMAGES[:8], method="distill", training=few, trains="adapters", rank=2)
    with pytest.raises(InputError, match="has adapters already; distill its heads alone"):
        realign(adapted, experts, IMAGES[:8], method="distill", training=few, trains="adapters")


def test_no_label_is_read(scene: SimoModel, experts: dict[str, SimoModel]) -> None:
    few = replace(SETTINGS, steps=2)
    for trains in ("heads", "adapters"):
        result = realign(scene, experts, Unlabelled(), training=few, **settings_of(trains, 2))
        assert result.provenance["realign"]["labelled_images"] == 0
    named = realign(scene, experts, Unlabelled(), method="distill", training=few)
    assert named.provenance["realign"]["unlabelled_images"] == 24


class Own(nn.Module):
    """A user's head, which says nothing of its first layer."""

    def __init__(self, in_channels: Any, out_channels: int, **extra: Any) -> None:
        super().__init__()
        self.settings: dict[str, Any] = extra
        self.output = nn.Conv2d(sum(in_channels), out_channels, 1)

    def forward(self, features: Features) -> Tensor:
        return F.interpolate(self.output(torch.cat(features.maps, 1)), features.padded_size)


def test_a_head_without_projections_can_be_distilled(
    scene: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the fold, which refuses it, says: re-align with method='distill'."""
    scene, experts = copy.deepcopy((scene, experts))
    kinds: Any = HEADS
    monkeypatch.setitem(kinds, "own", Own)
    torch.manual_seed(0)
    experts["parts"].heads["parts"] = Own(scene.encoder.channels, 3).eval()
    scene.heads["parts"] = copy.deepcopy(experts["parts"].heads["parts"])
    result = realign(scene, experts, IMAGES, method="distill", training=replace(SETTINGS, steps=25))
    assert distances(result, experts)["parts"] < distances(scene, experts)["parts"]


# Distances ----------------------------------------------------------------------------------------------

EVERY = pytest.mark.parametrize("kind", KINDS)


def task_of(kind: str) -> Task:
    return Task(kind, kind, classes=("a", "b", "c", "d") if kind == "segmentation" else ())


def two_logits(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, task_of(kind).channels, 4, 5)
    return 2 * torch.randn(shape, generator=generator), 2 * torch.randn(shape, generator=generator)


@EVERY
def test_a_distance_is_zero_where_predictions_agree_and_positive_elsewhere(kind: str) -> None:
    distance = task_of(kind).distance
    logits, teacher = two_logits(kind)
    assert float(distance(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(distance(logits, teacher)) > 0.1
    between = [float(distance(teacher + t * (logits - teacher), teacher)) for t in (0.0, 0.25, 0.5, 1.0)]
    assert between == sorted(between)
    assert distance(logits, teacher).shape == () and distance(logits.half(), teacher.half()).dtype == torch.float32


@EVERY
def test_the_gradient_of_a_distance_is_finite_and_zero_at_the_teacher(kind: str) -> None:
    distance = task_of(kind).distance
    logits, teacher = two_logits(kind)
    for scale in (1.0, 100.0):
        given = (scale * logits).requires_grad_()
        distance(given, scale * teacher).backward()
        assert given.grad is not None and torch.isfinite(given.grad).all() and given.grad.abs().sum() > 0
    there = teacher.clone().requires_grad_()
    distance(there, teacher).backward()
    assert there.grad is not None and there.grad.abs().max() < 1e-6


@EVERY
def test_a_distance_is_the_mean_over_the_images(kind: str) -> None:
    logits, teacher = two_logits(kind)
    distance = task_of(kind).distance
    each = [float(distance(logits[i : i + 1], teacher[i : i + 1])) for i in range(2)]
    assert float(distance(logits, teacher)) == pytest.approx(sum(each) / 2, rel=1e-5)


def test_the_distance_of_classes_is_the_divergence_from_the_teacher() -> None:
    logits, teacher = two_logits("segmentation")
    ours, wanted = (Categorical(logits=t.permute(0, 2, 3, 1)) for t in (logits, teacher))
    found = task_of("segmentation").distance(logits, teacher)
    torch.testing.assert_close(found, kl_divergence(wanted, ours).mean())
    shifted = task_of("segmentation").distance(logits + 5, teacher - 3)  # the same probabilities
    torch.testing.assert_close(shifted, found, rtol=1e-4, atol=1e-5)


def test_the_distance_of_edges_is_the_divergence_from_the_teacher() -> None:
    logits, teacher = two_logits("edges")
    found = task_of("edges").distance(logits, teacher)
    torch.testing.assert_close(found, kl_divergence(Bernoulli(logits=teacher), Bernoulli(logits=logits)).mean())


def test_the_distance_of_normals_does_not_see_lengths() -> None:
    logits, teacher = two_logits("normals")
    distance = task_of("normals").distance
    found = float(distance(logits, teacher))
    assert found == pytest.approx(float((1 - F.cosine_similarity(logits, teacher, dim=1)).mean()), rel=1e-4)
    assert found == pytest.approx(float(distance(0.01 * logits, 100 * teacher)), rel=1e-4)
    assert float(distance(-teacher, teacher)) == pytest.approx(2)


@pytest.mark.parametrize("kind", ["depth", "disparity", "texture", "keypoints", "autoencoder"])
def test_the_distance_of_other_maps_is_their_mean_absolute_difference(kind: str) -> None:
    logits, teacher = two_logits(kind)
    found = float(task_of(kind).distance(logits, teacher))
    assert found == pytest.approx(float((logits - teacher).abs().double().mean()), rel=1e-5)
