"""Experts in, one model out: the arithmetic is that of merging, heads stay as they are, misfits are refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import simomerge
from simomerge.assembly.experts import assemble, check_experts, load_experts
from simomerge.assembly.merge import merge
from simomerge.assembly.scale import SCALE_GRID, search_scale
from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.datasets import DenseDataset, load_data
from simomerge.merging import Average, MergeMethod, TaskArithmetic, Ties, merge_state_dicts
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import delta_mtl, evaluate

TASKS = ("depth", "normals")
METHODS: dict[str, dict[str, Any]] = {
    "zero-shot": {},
    "average": {},
    "task-arithmetic": {"scale": 0.3},
    "ties": {"scale": 0.7, "density": 0.4},
}


@pytest.fixture(scope="module")
def rooms() -> DenseDataset:
    return load_data("rooms", split="val", count=8, size=(24, 32))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def move(model: SimoModel, seed: int, size: float = 0.05) -> None:
    """Fine-tune by dice."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.encoder.backbone.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def base(make_model: Callable[..., SimoModel]) -> SimoModel:
    model = make_model({})
    model.source = "the-base"
    return model


@pytest.fixture
def make_expert(make_model: Callable[..., SimoModel], rooms: DenseDataset, base: SimoModel) -> Callable[..., SimoModel]:
    def make(task: str, seed: int = 0, recorded: bool = True) -> SimoModel:
        expert = make_model({task: rooms.tasks[task]}, seed=seed)
        expert.heads[task].start_at(rooms.tasks[task].mean_target([rooms[0][task]]))
        move(expert, seed)
        expert.source = f"runs/{task}"
        if recorded:
            expert.provenance = {"base": {"source": "the-base", "fingerprint": base.encoder_fingerprint()}}
        return expert

    return make


@pytest.fixture
def experts(make_expert: Callable[..., SimoModel]) -> dict[str, SimoModel]:
    return {task: make_expert(task, seed) for seed, task in enumerate(TASKS, start=1)}


# What a merge is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_is_what_merging_makes_of_the_weights(
    method: str, base: SimoModel, experts: dict[str, SimoModel]
) -> None:
    model = merge(base, experts, method, **METHODS[method])
    expected = merge_state_dicts(
        base.encoder.backbone.state_dict(),
        {task: expert.encoder.backbone.state_dict() for task, expert in experts.items()},
        method,
        **METHODS[method],
    )
    assert same(weights(model.encoder.backbone), expected)


def test_task_arithmetic_by_hand(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    model = merge(base, experts, scale=0.25)
    theta = base.encoder.backbone.state_dict()
    for name, value in model.encoder.backbone.state_dict().items():
        taus = [expert.encoder.backbone.state_dict()[name] - theta[name] for expert in experts.values()]
        torch.testing.assert_close(value, theta[name] + 0.25 * sum(taus), msg=name)


def test_heads_are_carried_over_bit_by_bit_and_nothing_given_changes(
    base: SimoModel, experts: dict[str, SimoModel]
) -> None:
    before = [weights(model) for model in (base, *experts.values())]
    records = copy.deepcopy([expert.provenance for expert in experts.values()])
    model = merge(base, experts, "ties", scale=0.5)
    assert list(model.tasks) == list(TASKS) and not model.training
    for task, expert in experts.items():
        assert same(weights(model.heads[task]), weights(expert.heads[task]))
        assert model.tasks[task] == expert.tasks[task]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # and nothing is shared
    assert all(same(old, weights(new)) for old, new in zip(before, (base, *experts.values()), strict=True))
    assert records == [expert.provenance for expert in experts.values()]


def test_scale_zero_is_the_base_s_encoder(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    for method in ("task-arithmetic", "ties", "zero-shot"):
        model = merge(base, experts, method, **({} if method == "zero-shot" else {"scale": 0.0}))
        assert model.encoder_fingerprint() == base.encoder_fingerprint(), method


def test_taps_and_normalisation_are_the_experts(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    for expert in experts.values():
        expert.encoder.taps = (1, 4, 2, 3)
        expert.encoder.mean.fill_(0.3)
    model = merge(base, experts)
    assert model.encoder.taps == (1, 4, 2, 3) and model.encoder.preprocessing["mean"] == [0.3] * 3
    assert base.encoder.taps == (1, 2, 3, 4) and base.encoder.preprocessing["mean"] == [0.5, 0.45, 0.4]


def test_the_provenance_names_base_experts_and_method(
    base: SimoModel, experts: dict[str, SimoModel], tmp_path: Path
) -> None:
    model = merge(base, experts, "ties", density=0.3, scale=0.6)
    assert model.provenance == {
        "base": {"source": "the-base", "fingerprint": base.encoder_fingerprint()},
        "experts": {
            task: {"source": f"runs/{task}", "fingerprint": expert.encoder_fingerprint()}
            for task, expert in experts.items()
        },
        "merge": {"method": "ties", "density": 0.3, "scale": 0.6, "trim": "global"},
    }
    model.save_pretrained(tmp_path / "scene")
    assert simomerge.load(tmp_path / "scene").provenance == model.provenance


def test_a_merge_hashes_every_model_only_once(
    base: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[dict[str, Tensor]] = []
    monkeypatch.setattr("simomerge.models.fingerprints.fingerprint", lambda weights: hashed.append(weights) or "0" * 64)
    for expert in experts.values():
        expert.provenance = {"base": {"source": "the-base", "fingerprint": "0" * 64}}
    move(base, 5)
    checked = check_experts(base, experts)
    for _ in range(3):
        assemble(base, checked, TaskArithmetic())
    assert len(hashed) == 1 + len(experts)


def test_a_method_object_merges_as_its_name_does(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    named = merge(base, experts, "ties", density=0.4, scale=0.7)
    assert same(weights(named), weights(merge(base, experts, Ties(density=0.4, scale=0.7))))
    assert same(weights(named), weights(merge(base, experts, Ties(density=0.4), scale=0.7)))
    with pytest.raises(InputError, match="'average' has no parameter 'scale'"):
        merge(base, experts, Average(), scale=0.7)


def test_one_expert_at_full_scale_is_itself(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    model = merge(base, {"depth": experts["depth"]}, scale=1.0)
    image = torch.rand(1, 3, 24, 32)
    torch.testing.assert_close(model(image)["depth"], experts["depth"](image)["depth"], atol=1e-5, rtol=1e-5)


def test_load_experts_reads_folders_by_task(experts: dict[str, SimoModel], tmp_path: Path) -> None:
    folders = {task: expert.save_pretrained(tmp_path / task) for task, expert in experts.items()}
    loaded = load_experts(**folders)
    assert list(loaded) == list(TASKS)
    for task, expert in loaded.items():
        assert same(weights(expert), weights(experts[task])) and expert.source == str(folders[task])


# Names --------------------------------------------------------------------------------------------------


def test_a_single_task_may_be_given_another_name(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    model = merge(base, {"distance": experts["depth"], "normals": experts["normals"]})
    assert list(model.tasks) == ["distance", "normals"]
    assert model.tasks["distance"].kind == "depth" and model.tasks["distance"].name == "distance"
    assert same(weights(model.heads["distance"]), weights(experts["depth"].heads["depth"]))
    assert list(experts["depth"].tasks) == ["depth"]


def test_one_task_of_several_is_taken_by_its_name(
    make_model: Callable[..., SimoModel], rooms: DenseDataset, base: SimoModel, experts: dict[str, SimoModel]
) -> None:
    joint = make_model(rooms.select(["depth", "edges"]).tasks, seed=7)
    joint.provenance = experts["depth"].provenance
    move(joint, 7)
    model = merge(base, {"edges": joint, "normals": experts["normals"]})
    assert list(model.tasks) == ["edges", "normals"]
    assert same(weights(model.heads["edges"]), weights(joint.heads["edges"]))
    with pytest.raises(InputError, match="expert 'seg' has the tasks depth, edges; name one of them"):
        merge(base, {"seg": joint})
    with pytest.raises(InputError, match="has the tasks none"):
        merge(base, {"seg": base})


# Refusals -----------------------------------------------------------------------------------------------


def test_no_experts_are_refused(base: SimoModel) -> None:
    with pytest.raises(InputError, match="no experts given"):
        merge(base, {})


def change_taps(expert: SimoModel) -> None:
    expert.encoder.taps = (1, 2, 3)


def change_normalisation(expert: SimoModel) -> None:
    expert.encoder.mean.add_(0.1)


def change_patch_size(expert: SimoModel) -> None:
    expert.encoder.layout = replace(expert.encoder.layout, strides=[4] * 4)


def change_layer_norm(expert: SimoModel) -> None:
    expert.encoder.apply_layernorm = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_taps, r"'depth' and 'normals' differ in taps: \[1, 2, 3, 4\] and \[1, 2, 3\]"),
        (change_normalisation, r"differ in image normalisation: .*0\.5, 0\.45, 0\.4.* and .*0\.6, 0\.55, 0\.5"),
        (change_patch_size, "differ in patch size: 8 and 4"),
        (change_layer_norm, "differ in final layer norm: True and False"),
    ],
)
def test_experts_that_read_images_differently_are_refused(
    base: SimoModel, experts: dict[str, SimoModel], change: Callable[[SimoModel], None], message: str
) -> None:
    change(experts["normals"])
    with pytest.raises(InputError, match=message):
        merge(base, experts)


def test_an_expert_with_adapters_is_refused(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    experts["normals"].encoder.add_adapters(2)
    with pytest.raises(InputError, match="expert 'normals' has adapters"):
        merge(base, experts)


def test_an_expert_of_another_base_is_refused_with_the_name_of_its_own(
    base: SimoModel, experts: dict[str, SimoModel]
) -> None:
    move(base, 9, 1e-3)
    with pytest.raises(InputError, match=r"expert 'depth' .* was fine-tuned from another base.*; give the-base\."):
        merge(base, experts)


def test_an_expert_without_a_recorded_base_is_a_warning_with_evidence(
    base: SimoModel, make_expert: Callable[..., SimoModel], experts: dict[str, SimoModel]
) -> None:
    silent = make_expert("normals", 2, recorded=False)
    with pytest.warns(
        UserWarning, match=r"'normals' does not record its base.*by \d+% of.*plausible for a fine"
    ) as log:
        merge(base, {**experts, "normals": silent})
    assert len(log) == 1  # the other expert records it
    move(silent, 3, 10.0)
    with pytest.warns(UserWarning, match="this looks like another base"):
        merge(base, {**experts, "normals": silent})


def test_recorded_bases_that_fit_give_no_warning(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(base, experts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_diverged_is_named_with_its_tensor(
    base: SimoModel, experts: dict[str, SimoModel], value: float
) -> None:
    with torch.no_grad():
        experts["normals"].encoder.backbone.layernorm.weight[3] = value
    with pytest.raises(InputError, match=r"'layernorm.weight' of the expert 'normals' holds NaN or infinite"):
        merge(base, experts)


def other_architecture(**changes: int) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    settings = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 80}
    return Dinov2Model(Dinov2Config(**{**settings, "mlp_ratio": 2, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "differ in the shapes of"),
        ({"num_hidden_layers": 5}, "The expert 'depth' has 18 tensors that the base does not have"),
        ({"image_size": 64}, r"position_embeddings \(1, 101, 32\) and \(1, 65, 32\)"),
    ],
)
def test_another_architecture_is_refused_with_the_difference(
    base: SimoModel,
    make_expert: Callable[..., SimoModel],
    changes: dict[str, int],
    message: str,
) -> None:
    from simomerge.models.encoders import Encoder

    expert = make_expert("depth", 1, recorded=False)
    expert.encoder = Encoder(other_architecture(**changes), expert.encoder.taps)
    with pytest.warns(UserWarning, match="does not record"), pytest.raises(InputError, match=message):
        merge(base, {"depth": expert})


def test_missing_tensors_are_named(base: SimoModel, make_expert: Callable[..., SimoModel]) -> None:
    expert = make_expert("depth", 1, recorded=False)
    expert.encoder.backbone.layernorm = nn.Identity()
    with (
        pytest.warns(UserWarning, match="does not record"),
        pytest.raises(InputError, match=r"is missing 2 tensors of the"),
    ):
        merge(base, {"depth": expert})


def test_misspelt_methods_and_parameters_are_corrected(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    with pytest.raises(InputError, match="did you mean 'ties'"):
        merge(base, experts, "tie")
    with pytest.raises(InputError, match="did you mean 'density'"):
        merge(base, experts, "ties", densty=0.2)
    with pytest.raises(InputError, match=r"scale 'best': give a number, 'auto' or 'learned'"):
        merge(base, experts, scale="best")


# Scale --------------------------------------------------------------------------------------------------


search_unaligned = partial(search_scale, align=False)
"""As the paper searches: the heads are not folded before each look."""


def curve(base: SimoModel, experts: dict[str, SimoModel], data: DenseDataset, scales: Any) -> list[float]:
    """Delta_MTL by scale, from the models that task arithmetic gives, written out here."""
    baseline = {task: evaluate(expert, data)[task] for task, expert in experts.items()}
    values = []
    for scale in scales:
        model = copy.deepcopy(experts["depth"])
        theta = base.encoder.backbone.state_dict()
        taus = [{n: e.encoder.backbone.state_dict()[n] - v for n, v in theta.items()} for e in experts.values()]
        model.encoder.backbone.load_state_dict({n: v + scale * sum(tau[n] for tau in taus) for n, v in theta.items()})
        gains = []
        for task, expert in experts.items():
            one = SimoModel(model.encoder, {task: expert.tasks[task]}, {task: expert.heads[task]})
            metric = expert.tasks[task].metric
            value, reference = evaluate(one, data)[task][metric], baseline[task][metric]
            gains.append((reference - value) / reference)  # both metrics are errors
        values.append(100 * sum(gains) / len(gains))
    return values


def test_the_scale_found_is_the_best_of_the_curve(
    base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    lines: list[Any] = []
    scales = (0.0, 0.5, 1.0, 3.0)
    with show_progress(lambda *line: lines.append(line)):
        found = search_unaligned(base, experts, "task-arithmetic", rooms, scales)
    expected = curve(base, experts, rooms, scales)
    assert found.scales == list(scales)
    assert found.delta_mtl == pytest.approx(expected, abs=0.05)
    assert max(expected) - sorted(expected)[-2] > 0.2  # no near tie, so the choice below means something
    assert found.scale == scales[expected.index(max(expected))]
    assert same(weights(found.model), weights(merge(base, experts, scale=found.scale)))
    assert found.model.provenance["merge"]["scale"] == found.scale
    assert found.model.provenance["merge"]["scale_chosen_on"] == "8 labelled images, unaligned"
    shown = [line for line in lines if line[0] == "scale"]
    assert [line[1:3] for line in shown] == [(1, 4), (2, 4), (3, 4), (4, 4)] and "Delta_MTL" in shown[0][3]


def test_the_parts_of_the_curve_agree(base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset) -> None:
    found = search_unaligned(base, experts, "ties", rooms, (0.2, 0.8), density=0.5)
    baseline = {task: evaluate(expert, rooms)[task] for task, expert in experts.items()}
    for index, scale in enumerate(found.scales):
        model = merge(base, experts, "ties", density=0.5, scale=scale)
        assert found.delta_mtl[index] == pytest.approx(
            delta_mtl(evaluate(model, rooms), baseline, model.tasks), abs=0.05
        )
    assert set(found.normalised) == set(TASKS) and all(len(values) == 2 for values in found.normalised.values())


class Counted(DenseDataset):
    """The rooms, counting what is read of them."""

    def __init__(self, rooms: DenseDataset) -> None:
        super().__init__(rooms.tasks, len(rooms))
        self.rooms, self.read = rooms, set()

    def image(self, index: int) -> Tensor:
        self.read.add(index)
        return self.rooms.image(index)

    def targets(self, index: int, tasks: Any) -> dict[str, Any]:
        return self.rooms.targets(index, tasks)


def test_auto_reads_only_the_validation_data_it_is_given(
    base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Counted(rooms)
    monkeypatch.setattr("simomerge.datasets.load_data", lambda *_, **__: pytest.fail("loaded other data"))
    model = merge(base, experts, scale="auto", validation=data)
    assert data.read == set(range(8))
    found = search_scale(base, experts, "task-arithmetic", rooms)
    assert found.scales == list(SCALE_GRID) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert model.provenance["merge"]["scale"] == found.scale


def test_a_search_compares_tensors_without_floats_once(
    base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
) -> None:
    models = copy.deepcopy({"base": base, **experts})
    for number, model in enumerate(models.values()):
        model.encoder.backbone.register_buffer("index", torch.arange(3) + number)
        model.provenance = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = search_scale(models.pop("base"), models, "task-arithmetic", rooms, (0.1, 0.3))
    said = [str(each.message) for each in caught if "no floats" in str(each.message)]
    assert len(said) == 1 and "differ in 1 tensor that holds no floats: index." in said[0]
    assert found.scales == [0.1, 0.3]


def test_a_known_baseline_is_not_measured_again(
    base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = {task: evaluate(expert, rooms)[task] for task, expert in experts.items()}
    plain = search_unaligned(base, experts, "task-arithmetic", rooms, (0.3,))
    seen: list[list[str]] = []

    def watched(model: SimoModel, *arguments: Any, **more: Any) -> Any:
        seen.append(list(model.tasks))
        return evaluate(model, *arguments, **more)

    monkeypatch.setattr("simomerge.assembly.scale.evaluate", watched)
    known = search_unaligned(base, experts, "task-arithmetic", rooms, (0.3,), baseline=baseline)
    assert known.delta_mtl == plain.delta_mtl and seen == [list(TASKS)]


@pytest.mark.parametrize("method", [TaskArithmetic(), Ties(density=0.5)])
def test_a_method_object_is_searched_as_its_name_is(
    base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, method: MergeMethod
) -> None:
    parameters = {"density": 0.5} if method.name == "ties" else {}
    by_name = search_unaligned(base, experts, method.name, rooms, (0.0, 2.0), **parameters)
    by_object = search_unaligned(base, experts, method, rooms, (0.0, 2.0))
    assert by_object.delta_mtl == by_name.delta_mtl and by_object.delta_mtl[0] != by_object.delta_mtl[1]


def test_what_auto_cannot_do_is_reported(base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset) -> None:
    with pytest.raises(InputError, match="give validation="):
        merge(base, experts, scale="auto")
    with pytest.raises(InputError, match="no labels of normals"):
        merge(base, experts, scale="auto", validation=rooms.select(["depth"]))
    with pytest.raises(InputError, match="'average' has no parameter 'scale'"):
        merge(base, experts, "average", scale="auto", validation=rooms)
    with pytest.raises(InputError, match="'average' has no parameter 'scale'"):
        merge(base, experts, Average(), scale="auto", validation=rooms)
    with pytest.raises(InputError, match="at least one scale"):
        search_unaligned(base, experts, "ties", rooms, ())


def test_experts_come_back_with_the_one_task_they_are_named_for(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    checked = check_experts(base, {"far": experts["depth"], "normals": experts["normals"]})
    assert {name: list(expert.tasks) for name, expert in checked.items()} == {"far": ["far"], "normals": ["normals"]}


# Names in place of models -------------------------------------------------------------------------------


def test_folders_may_be_given_in_place_of_models(
    base: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, tmp_path: Path
) -> None:
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(tmp_path / name)
    folders = {task: str(tmp_path / task) for task in experts}
    merged = simomerge.merge(str(tmp_path / "base"), folders, scale=0.4)
    assert same(weights(merged), weights(merge(base, experts, scale=0.4)))
    merged.save_pretrained(tmp_path / "scene")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = simomerge.realign(str(tmp_path / "scene"), folders, images=rooms)
        expected = simomerge.realign(merged, experts, images=rooms)
    assert same(weights(found), weights(expected))
    assert simomerge.evaluate(tmp_path / "scene", rooms) == evaluate(merged, rooms)


def test_what_is_no_model_is_named(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    wrong: Any = [*experts.values()]
    with pytest.raises(InputError, match="experts is a list: give them by task"):
        merge(base, wrong)
    wrong = {"depth": experts["depth"].encoder}
    with pytest.raises(InputError, match="Encoder given where a model is needed"):
        merge(base, wrong)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        merge("./nowhere", experts)
    with pytest.raises(InputError, match=r"dataset is the text 'rooms': give sm\.data\('rooms', split='test'\)"):
        simomerge.evaluate(experts["depth"], "rooms")


def test_size_resizes_the_pictures_of_a_re_alignment(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    merged = merge(base, experts, scale=0.4)
    pictures = list(torch.rand((8, 3, 30, 50), generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = simomerge.realign(merged, experts, pictures, size=(24, 32))
        large = simomerge.realign(merged, experts, pictures)
    assert not same(weights(small), weights(large))
