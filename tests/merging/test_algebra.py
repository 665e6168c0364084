"""Forget, interpolate, and add or remove experts afterwards, against formulas and new merges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.checkpoints import open_checkpoint, write_safetensors
from simomerge.core.errors import InputError
from simomerge.merging import (
    Average,
    TaskArithmetic,
    WeightedAverage,
    get_method,
    interpolate,
    merge_state_dicts,
    negate,
    with_experts,
)

from .models import Tensors, assert_close, tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = settings(max_examples=25, deadline=None)

SHAPES = {"embeddings.cls_token": (1, 1, 3), "layernorm.weight": (4,), "scalar": (), "empty": (0, 2)}
SHAPES |= {f"encoder.layer.{block}.mlp.fc1.weight": (3, 4) for block in range(2)}


def model(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    drawn = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
    return drawn | {"steps": np.array([seed, 1])}


BASE = model(0)
EXPERTS = {expert: model(seed) for seed, expert in enumerate(("normals", "depth", "seg", "edges"), start=1)}


def some(*names: str) -> dict[str, Tensors]:
    return {name: EXPERTS[name] for name in names}


def assert_near(merged: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 1e-6) -> None:
    assert list(merged) == list(expected)
    for name, array in expected.items():
        assert np.shape(merged[name]) == np.shape(array)
        np.testing.assert_allclose(merged[name], array, rtol=tolerance, atol=tolerance, err_msg=name)


# Forget -------------------------------------------------------------------------------------------------


@few
@given(tensors(), tensors(), st.floats(0.01, 3))
def test_negation_against_the_formula(base: Tensors, expert: Tensors, scale: float) -> None:
    expected = {n: base[n] - scale * (expert[n].astype(np.float64) - base[n]) for n in base}
    assert_close(negate(base, expert, scale), expected, 1e-5)


def test_negation_keeps_kind_and_dtype_and_counters_and_inputs() -> None:
    expert = EXPERTS["depth"]
    expected = {n: 2 * BASE[n].astype(np.float64) - expert[n] for n in SHAPES} | {"steps": BASE["steps"]}
    before = {name: array.copy() for name, array in BASE.items()}
    assert_near(negate(BASE, expert), expected)
    assert all(np.array_equal(BASE[name], before[name]) for name in before)
    half = {n: a.astype(np.float16) if n in SHAPES else a for n, a in BASE.items()}
    for name, value in negate(half, expert).items():
        assert isinstance(value, np.ndarray) and value.dtype == half[name].dtype and value.shape == half[name].shape
        exact = 2 * half[name].astype(np.float32) - expert[name] if name in SHAPES else half[name]
        np.testing.assert_array_equal(value, exact.astype(value.dtype), err_msg=name)  # rounded once
    mask = {"mask": torch.tensor([True, False])}
    torch_base = {n: torch.from_numpy(np.array(a)).to(torch.bfloat16) for n, a in BASE.items() if n in SHAPES} | mask
    torch_expert = {n: torch.from_numpy(np.array(expert[n])) for n in SHAPES} | {"mask": torch.tensor([False, False])}
    negated = negate(torch_base, torch_expert)
    assert all(type(value) is torch.Tensor for value in negated.values())
    assert negated["mask"].tolist() == [True, False] and negated["scalar"].dtype == torch.bfloat16
    negated["mask"][0] = False
    assert mask["mask"].tolist() == [True, False]
    assert negate({"mask": np.array([True]), **BASE}, {"mask": np.array([False]), **expert})["mask"].tolist() == [True]


def test_negation_undoes_addition() -> None:
    """The task vector of the negated expert, negated, is the expert."""
    assert_near(negate(BASE, negate(BASE, EXPERTS["seg"])), {**EXPERTS["seg"], "steps": BASE["steps"]}, 2e-6)


def test_files_can_be_negated(tmp_path: Path) -> None:
    files = {who: write_safetensors(tmp_path / f"{who}.safetensors", w) for who, w in {"b": BASE, **EXPERTS}.items()}
    opened = {who: open_checkpoint(file) for who, file in files.items()}
    negated = negate(opened["b"], opened["seg"], 0.5)
    assert_near({name: negated[name] for name in BASE}, negate(BASE, EXPERTS["seg"], 0.5), 0)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_negation_takes_a_positive_scale(scale: float) -> None:
    with pytest.raises(InputError, match="negate: scale must be a number above 0, got"):
        negate(BASE, EXPERTS["seg"], scale)


def test_negation_checks_the_models() -> None:
    with pytest.raises(InputError, match="is missing 1 tensor of the base"):
        negate(BASE, {name: array for name, array in EXPERTS["seg"].items() if name != "scalar"})


# Interpolate --------------------------------------------------------------------------------------------


@few
@given(tensors(), tensors(), st.one_of(st.floats(-3, 4), st.sampled_from([0.0, 1.0, 0.5, -1e-9, 1 + 1e-9])))
def test_interpolation_against_the_formula(first: Tensors, second: Tensors, weight: float) -> None:
    expected = {n: (1 - weight) * first[n].astype(np.float64) + weight * second[n] for n in first}
    assert_close(interpolate(first, second, weight), expected, 2e-5)


def test_the_ends_of_an_interpolation() -> None:
    first, second = EXPERTS["seg"], EXPERTS["depth"]
    assert_near(interpolate(first, second, 0), first, 0)
    assert_near(interpolate(first, second, 1), {**second, "steps": first["steps"]})
    for weight in (-0.7, 0.3, 1.6):  # the counter of the first, however far
        assert interpolate(first, second, weight)["steps"].tolist() == [3, 1]
    assert interpolate({"w": np.zeros(2, np.float16)}, {"w": np.ones(2)}, 1.5)["w"].dtype == np.float16


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_interpolation_takes_finite_weights(weight: float) -> None:
    with pytest.raises(InputError, match="interpolate: weight must be a finite number, got"):
        interpolate(BASE, EXPERTS["seg"], weight)


def test_interpolation_checks_the_models() -> None:
    for weight in (-0.5, 0.5, 1.5):
        with pytest.raises(InputError, match="differ in the shapes of 1 tensor: scalar"):
            interpolate(BASE, {**EXPERTS["seg"], "scalar": np.ones(2)}, weight)
        with pytest.raises(InputError, match=r"'scalar' of .* holds NaN"):
            interpolate(BASE, {**EXPERTS["seg"], "scalar": np.array(np.nan)}, weight)


# Add and remove -----------------------------------------------------------------------------------------

EDITS: list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = [
    (("depth",), ("seg",), ()),
    (("seg", "depth"), ("normals",), ()),  # not in alphabetical order
    (("seg", "depth"), ("normals", "edges"), ()),
    (("seg", "depth", "normals"), (), ("depth",)),
    (("seg", "depth", "normals"), (), ("normals", "seg")),
    (("seg", "depth"), ("edges",), ("seg",)),
    (("seg", "depth"), ("edges", "normals"), ("seg", "depth")),  # nothing stays
]
WEIGHTS = {"normals": 0.7, "depth": 0.2, "seg": 1.3, "edges": 0.4}
PER_BLOCK = {"normals": [0.1, 0.9], "depth": 0.3, "seg": [0.8, 0.2], "edges": (0.5, 0.6)}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("weighted-average", {}),
    ("weighted-average", {"weight": WEIGHTS}),
    ("task-arithmetic", {}),
    ("task-arithmetic", {"scale": 0.7}),
    ("task-arithmetic", {"scale": WEIGHTS}),
    ("task-arithmetic", {"scale": PER_BLOCK}),
    ("task-arithmetic", {"scale": {**WEIGHTS, "depth": 0.0}}),
]


def for_these(parameters: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The parameters as a merge of these experts takes them."""
    return {
        key: {name: value[name] for name in names} if isinstance(value, Mapping) else value
        for key, value in parameters.items()
    }


@pytest.mark.parametrize(("name", "parameters"), METHODS)
@pytest.mark.parametrize(("present", "add", "remove"), EDITS)
def test_editing_equals_a_new_merge(
    name: str, parameters: dict[str, Any], present: tuple[str, ...], add: tuple[str, ...], remove: tuple[str, ...]
) -> None:
    merged = merge_state_dicts(BASE, some(*present), name, **for_these(parameters, present))
    parameters = for_these(parameters, (*present, *add))
    edited = dict(with_experts(merged, BASE, name, present, some(*add), some(*remove), **parameters))
    after = tuple(expert for expert in present if expert not in remove) + add
    fresh = merge_state_dicts(BASE, some(*after), name, **for_these(parameters, after))
    # The rounding of the merged weights grows with what they are multiplied by (a weighted mean of small weights).
    assert_near(edited, fresh, 4e-6 if name == "weighted-average" else 1e-6)
    assert all(array.dtype == np.float32 for key, array in edited.items() if key in SHAPES)


def test_one_after_the_other_and_there_and_back() -> None:
    merged: Mapping[str, Any] = merge_state_dicts(BASE, some("depth"), "average")
    for present, new in ((["depth"], "seg"), (["depth", "seg"], "edges"), (["seg", "edges", "depth"], "normals")):
        merged = dict(with_experts(merged, BASE, "average", present, add=some(new)))
    assert_near(merged, merge_state_dicts(BASE, EXPERTS, "average"))
    for present, old in ((["normals", "depth", "seg", "edges"], "seg"), (["normals", "depth", "edges"], "edges")):
        merged = dict(with_experts(merged, BASE, "average", present, remove=some(old)))
    assert_near(merged, merge_state_dicts(BASE, some("normals", "depth"), "average"))


def test_a_sequence_goes_with_the_experts_in_their_order() -> None:
    """The order is: the present experts without those removed, then those added."""
    merged = merge_state_dicts(BASE, some("seg", "depth"), "task-arithmetic", scale=[0.9, 0.3])
    edited = with_experts(
        merged, BASE, "task-arithmetic", ["seg", "depth"], some("edges"), some("depth"), scale=[0.9, 0.3]
    )
    assert_near(dict(edited), merge_state_dicts(BASE, some("seg", "edges"), "task-arithmetic", scale=[0.9, 0.3]))


def test_the_method_may_be_an_object_and_models_may_be_torch_or_files(tmp_path: Path) -> None:
    merged = merge_state_dicts(BASE, some("seg"), TaskArithmetic(scale=0.3))
    expected = dict(with_experts(merged, BASE, "task-arithmetic", ["seg"], add=some("depth"), scale=0.3))
    as_torch = [
        {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
        for weights in (merged, BASE, EXPERTS["depth"])
    ]
    found = dict(with_experts(*as_torch[:2], TaskArithmetic(scale=0.3), ["seg"], add={"depth": as_torch[2]}))
    assert_near(found, expected, 0)
    files = [
        open_checkpoint(write_safetensors(tmp_path / f"{number}.safetensors", weights))
        for number, weights in enumerate((merged, BASE, EXPERTS["depth"]))
    ]
    edited = dict(with_experts(*files[:2], TaskArithmetic(scale=0.3), ["seg"], add={"depth": files[2]}))
    assert_near({name: edited[name] for name in BASE}, expected, 0)


def test_replaced_experts_leave_no_trace() -> None:
    """If all experts are removed, the old weights are not used at all, so their rounding does not matter."""
    far = {"seg": {name: 1e6 * EXPERTS["seg"][name] for name in SHAPES} | {"steps": BASE["steps"]}}
    merged = merge_state_dicts(BASE, far, "average")
    edited = dict(with_experts(merged, BASE, "average", ["seg"], some("depth"), far))
    assert_near(edited, merge_state_dicts(BASE, some("depth"), "average"))


NOT_LINEAR = sorted({"ties", "dare-linear", "magmax", "slerp", "model-stock", "zero-shot", "consensus", "pcb"})


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_other_methods_are_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=f"'{name}' is not a weighted sum of task vectors: merge all the experts again"
    ):
        with_experts(BASE, BASE, get_method(name), ["seg"], add=some("depth"))


def test_mistakes_are_reported_in_the_call() -> None:
    merged = merge_state_dicts(BASE, some("seg", "depth"), "average")

    def edit(add: Any = None, remove: Any = None, method: Any = "average", **more: Any) -> None:
        with_experts(merged, BASE, method, ["seg", "depth"], add, remove, **more)

    with pytest.raises(InputError, match="the expert 'seg' is in the merged model already: remove it first"):
        edit(add=some("seg"))
    with pytest.raises(InputError, match="the expert 'edges' is not in the merged model, which has seg, depth"):
        edit(remove=some("edges"))
    with pytest.raises(InputError, match="no expert would be left: use the base"):
        edit(remove=some("seg", "depth"))
    with pytest.raises(InputError, match="no merge method 'averge': did you mean 'average'"):
        edit(add=some("edges"), method="averge")
    with pytest.raises(InputError, match="'average' has no parameter 'scale'"):
        edit(add=some("edges"), scale=0.3)
    with pytest.raises(InputError, match="differ in the shapes of 1 tensor: scalar"):
        edit(add={"edges": {**EXPERTS["edges"], "scalar": np.ones(2)}})
    with pytest.raises(InputError, match="scale is given for seg, depth, but the experts are seg, depth, edges"):
        edit(add=some("edges"), method="task-arithmetic", scale={"seg": 0.1, "depth": 0.2})
    with pytest.raises(InputError, match="scale is given for depth, but the experts are seg, depth"):
        edit(remove=some("seg"), method="task-arithmetic", scale={"depth": 0.1})
    with pytest.raises(InputError, match="scale has 2 values for 3 experts"):
        edit(add=some("edges"), method="task-arithmetic", scale=[0.1, 0.2])


def test_mistakes_that_the_tensors_show() -> None:
    merged = merge_state_dicts(BASE, some("seg", "depth"), "average")
    broken = {"edges": {**EXPERTS["edges"], "layernorm.weight": np.full(4, np.nan)}}
    with pytest.raises(InputError, match=r"'layernorm\.weight' of the expert 'edges' holds NaN"):
        list(with_experts(merged, BASE, "average", ["seg", "depth"], broken))
    with pytest.raises(InputError, match="scale of 'seg' has 3 values for 2 blocks"):
        scale = {"seg": [0.1, 0.2, 0.3], "depth": 0.1, "edges": 0.1}
        list(with_experts(merged, BASE, "task-arithmetic", ["seg", "depth"], some("edges"), scale=scale))
    with pytest.raises(InputError, match="all weights are 0"):
        weight = {"seg": 1.0, "depth": 0.0}
        list(with_experts(merged, BASE, "weighted-average", ["seg", "depth"], None, some("seg"), weight=weight))


def test_weights_that_change_one_by_one_are_refused() -> None:
    class Squared(Average):
        """Weights that do not change by a common factor from two experts to three."""

        def weights(self, name: str, experts: Any, depth: Any) -> dict[str, float]:
            return {expert: float(place + len(experts) ** place) for place, expert in enumerate(sorted(experts))}

    with pytest.raises(InputError, match="changes the weights of the experts that stay unequally: merge all again"):
        list(with_experts(BASE, BASE, Squared(), ["seg", "depth"], some("normals")))


def test_a_weighted_average_of_equal_weights_is_the_average() -> None:
    fresh = merge_state_dicts(BASE, EXPERTS, "average")
    merged = merge_state_dicts(BASE, some("seg", "depth"), "average")
    for method in (Average(), WeightedAverage(), WeightedAverage(weight=2.5)):
        edited = with_experts(merged, BASE, method, ["seg", "depth"], some("normals", "edges"))
        assert_near(dict(edited), {name: fresh[name] for name in BASE})
