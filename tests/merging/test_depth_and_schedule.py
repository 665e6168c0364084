"""Blocks found in tensor names, factors over them, and methods as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging import (
    LayerScales,
    Lines,
    as_schedule,
    available,
    describe_method,
    described_method,
    get_method,
    merge_state_dicts,
    merge_tensors,
)
from simomerge.merging.engine.depth import Depth

from .models import Tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = settings(max_examples=25, deadline=None)

# Depth --------------------------------------------------------------------------------------------------

# Encoder -> its number of blocks, and the block of each canonical tensor name. None stands for outside all blocks, and
# "<" for outside all blocks but counted as the first.
ENCODERS: dict[str, tuple[int, dict[str, int | str | None]]] = {
    "dinov2": (
        12,
        {
            "embeddings.cls_token": "<",
            "embeddings.mask_token": "<",
            "embeddings.patch_embeddings.projection.weight": "<",
            **{f"encoder.layer.{i}.attention.attention.query.weight": i for i in range(12)},
            "encoder.layer.10.layer_scale1.lambda1": 10,
            "encoder.layer.2.mlp.fc1.bias": 2,
            "layernorm.weight": None,
        },
    ),
    "dinov3": (
        3,
        {
            "embeddings.register_tokens": "<",
            **{f"layer.{i}.attention.q_proj.weight": i for i in range(3)},
            "layer.2.mlp.up_proj.weight": 2,
            "norm.weight": None,
        },
    ),
    "vit": (
        12,
        {
            "embeddings.position_embeddings": "<",
            **{f"encoder.layer.{i}.intermediate.dense.weight": i for i in range(12)},
            "encoder.layer.11.output.dense.bias": 11,
            "layernorm.bias": None,
            "pooler.dense.weight": None,
        },
    ),
    "timm's vit": (
        12,
        {
            "patch_embed.proj.weight": "<",
            "pos_embed": "<",
            **{f"blocks.{i}.attn.qkv.weight": i for i in range(12)},
            "norm.weight": None,
            "fc_norm.weight": None,
        },
    ),
    "swin": (
        6,
        {
            "embeddings.patch_embeddings.projection.weight": "<",
            "embeddings.norm.weight": "<",
            "encoder.layers.0.blocks.0.attention.self.query.weight": 0,
            "encoder.layers.0.blocks.1.layernorm_before.weight": 1,
            "encoder.layers.0.downsample.reduction.weight": 1,
            "encoder.layers.1.blocks.0.attention.self.query.weight": 2,
            "encoder.layers.1.blocks.1.attention.self.relative_position_bias_table": 3,
            "encoder.layers.1.blocks.2.output.dense.weight": 4,
            "encoder.layers.1.downsample.norm.bias": 4,
            "encoder.layers.2.blocks.0.output.dense.weight": 5,
            "layernorm.weight": None,
        },
    ),
    "convnext": (
        7,
        {
            "embeddings.patch_embeddings.weight": "<",
            "encoder.stages.0.layers.0.dwconv.weight": 0,
            "encoder.stages.0.layers.1.layer_scale_parameter": 1,
            "encoder.stages.0.layers.2.pwconv1.bias": 2,
            "encoder.stages.1.downsampling_layer.0.weight": 4,
            "encoder.stages.1.layers.0.dwconv.weight": 3,
            "encoder.stages.1.layers.1.dwconv.weight": 4,
            "encoder.stages.2.layers.0.dwconv.weight": 5,
            "encoder.stages.2.layers.1.dwconv.weight": 6,
            "layernorm.weight": None,
        },
    ),
    "timm's convnext": (
        3,
        {
            "stem.0.weight": "<",
            "stages.0.blocks.0.conv_dw.weight": 0,
            "stages.0.blocks.1.conv_dw.weight": 1,
            "stages.1.downsample.1.weight": 2,
            "stages.1.blocks.0.conv_dw.weight": 2,
            "head.norm.weight": None,
        },
    ),
    "clip": (
        12,
        {
            "embeddings.class_embedding": "<",
            "embeddings.patch_embedding.weight": "<",
            **{f"encoder.layers.{i}.self_attn.k_proj.weight": i for i in range(12)},
            "encoder.layers.11.layer_norm2.bias": 11,
            "post_layernorm.weight": None,
        },
    ),
    "open_clip": (2, {"transformer.resblocks.0.ln_1.weight": 0, "transformer.resblocks.1.ln_1.weight": 1}),
    "gpt": (2, {"h.0.attn.weight": 0, "h.1.attn.weight": 1, "wte.weight": None}),
    "a bare file": (0, {"encoder.weight": None, "bias": None, "patch_embed.weight": "<"}),
    "nothing": (0, {}),
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_blocks_are_found_in_the_names(encoder: str, backwards: bool) -> None:
    blocks, places = ENCODERS[encoder]
    depth = Depth(reversed(places) if backwards else places)  # The order of the file does not matter.
    assert depth.blocks == blocks
    for name, place in places.items():
        assert depth.index(name) == (None if place == "<" else place), name
        last = max(blocks - 1, 0)
        assert depth.position(name) == (0 if place == "<" else last if place is None else place), name
    assert depth.index("something.else") is None


@pytest.mark.parametrize("kind", ["dinov2", "vit", "swin", "convnext", "clip"])
def test_blocks_of_encoders_of_transformers(kind: str) -> None:
    """Names of models of transformers in memory, converted to the convention on disk."""
    import transformers

    from simomerge.checkpoints import canonicalise

    plain = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    images = {"image_size": 16, "patch_size": 8}
    model = {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**plain, **images)),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**plain, **images)),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**plain, **images)),
        "swin": lambda: transformers.SwinModel(
            transformers.SwinConfig(embed_dim=4, depths=[1, 2], num_heads=[1, 2], image_size=32, window_size=2)
        ),
        "convnext": lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(depths=[1, 2], hidden_sizes=[4, 8], num_stages=2)
        ),
    }[kind]()
    names = canonicalise(model.state_dict())
    depth = Depth(names)
    assert depth.blocks == 3
    outside = {name for name in names if depth.index(name) is None}
    assert outside and all(("embed" in n or "norm" in n or "layrnorm" in n or "pooler" in n) for n in outside)
    assert {depth.index(name) for name in names} == {None, 0, 1, 2}


# Layer scales -------------------------------------------------------------------------------------------

NAMES = ["embeddings.cls_token", *(f"encoder.layer.{i}.mlp.fc1.bias" for i in range(5)), "layernorm.weight"]


def test_one_factor_per_block_is_taken_as_it_is() -> None:
    values = (0.9, 0.1, 0.5, 0.3, 0.7)
    factor = LayerScales(values).over(Depth(NAMES))
    assert [factor(name) for name in NAMES] == pytest.approx([0.9, *values, 0.7], abs=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.3,), [0.3] * 5),
        ((0.0, 1.0), [0, 0.25, 0.5, 0.75, 1]),
        ((0.0, 1.0, 0.0), [0, 0.5, 1, 0.5, 0]),
        ((1.0, 0.0, 0.0, 3.0), [1, 0.25, 0, 0.75, 3]),
    ],
)
def test_fewer_factors_are_interpolated(values: tuple[float, ...], expected: list[float]) -> None:
    factor = LayerScales(values).over(Depth(NAMES))
    assert [factor(name) for name in NAMES] == pytest.approx([expected[0], *expected, expected[-1]])


@few
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=7), st.integers(7, 30))
def test_interpolation_against_a_slow_one(values: list[float], blocks: int) -> None:
    factor = LayerScales(tuple(values)).over(Depth(f"blocks.{i}.w" for i in range(blocks)))
    for block in range(blocks):
        position = block * (len(values) - 1) / (blocks - 1)
        left = min(int(position), len(values) - 2) if len(values) > 1 else 0
        share = position - left
        right = values[left + 1] if len(values) > 1 else values[0]
        assert factor(f"blocks.{block}.w") == pytest.approx((1 - share) * values[left] + share * right, abs=1e-9)


# Merging with a schedule --------------------------------------------------------------------------------


def model(seed: int, size: float = 1.0) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {"embeddings.cls_token": (1, 1, 4), "layernorm.weight": (4,)}
    shapes |= {f"encoder.layer.{i}.mlp.fc1.weight": (4, 5) for i in range(3)}
    shapes |= {f"encoder.layer.{i}.norm1.bias": (4,) for i in range(3)}
    return {name: np.asarray(size * rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


BASE = model(0)
TAUS = {expert: model(seed, 0.1) for seed, expert in enumerate(("seg", "depth", "normals"), start=1)}
MODELS = {expert: {name: BASE[name] + tau[name] for name in BASE} for expert, tau in TAUS.items()}


def block_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("encoder") else None


def scaled(merged: Tensors, factors: Mapping[str, float]) -> Tensors:
    return {name: BASE[name] + factors[name] * (merged[name] - BASE[name].astype(np.float64)) for name in BASE}


def assert_near(merged: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 1e-6) -> None:
    assert list(merged) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name], array, rtol=0, atol=tolerance, err_msg=name)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("task-arithmetic", {"scale": 0.3}),
    ("task-arithmetic", {"scale": {"seg": 0.1, "depth": 0.5, "normals": 1.0}}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.4, "trim": "tensor", "scale": 0.6}),
]
methods = pytest.mark.parametrize(("method", "parameters"), METHODS)


@methods
@pytest.mark.parametrize("schedule", ["0.2,0.9,0.4", [0.2, 0.9, 0.4], LayerScales((0.2, 0.9, 0.4))])
def test_layer_scales_multiply_the_merged_task_vector(method: str, parameters: Any, schedule: Any) -> None:
    plain = merge_state_dicts(BASE, MODELS, method, **parameters)
    places = {"embeddings.cls_token": 0, "layernorm.weight": 2}
    values = (0.2, 0.9, 0.4)
    expected = scaled(plain, {name: values[places.get(name, block_of(name) or 0)] for name in BASE})
    assert_near(merge_state_dicts(BASE, MODELS, method, schedule, **parameters), expected)


@methods
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.5), (1.0, 0.0), (0.0, 1.3), (None, 0.5), (None, 0.0)])
def test_lines_against_the_slow_formula(method: str, parameters: Any, alpha: float | None, beta: float) -> None:
    plain = merge_state_dicts(BASE, MODELS, method, **parameters)
    factor = alpha
    if factor is None:  # the paper: the norm of the sum over that of the merged task vector, over T
        sums = {n: zip(*(tau[n].flat for tau in TAUS.values()), strict=True) for n in BASE}
        summed = sum(abs(sum(map(float, entries))) for columns in sums.values() for entries in columns)
        merged = sum(float(np.abs(plain[n].astype(np.float64) - BASE[n]).sum()) for n in BASE)
        factor = summed / merged / len(TAUS)
    factors = {}
    for name in BASE:
        block = block_of(name)
        factors[name] = factor + (0 if block is None else beta * block / 2)  # three blocks: l / (L - 1)
    given_schedule = Lines(alpha, beta)
    assert_near(merge_state_dicts(BASE, MODELS, method, given_schedule, **parameters), scaled(plain, factors), 2e-6)
    text = f"lines:beta={beta}" + ("" if alpha is None else f",alpha={alpha}")
    by_text = merge_state_dicts(BASE, MODELS, method, text, **parameters)
    for name in BASE:
        np.testing.assert_array_equal(
            by_text[name], merge_state_dicts(BASE, MODELS, method, given_schedule, **parameters)[name]
        )


def test_automatic_alpha_averages_shallow_blocks_whatever_the_scale() -> None:
    """Task arithmetic: sum of task vectors over scale times that, over T: alpha * scale is 1 / T."""
    mean = merge_state_dicts(BASE, MODELS, "average")
    for scale in (0.1, 0.4, 1.0):
        merged = merge_state_dicts(BASE, MODELS, "task-arithmetic", "lines:beta=0", scale=scale)
        assert_near(merged, mean)


def test_automatic_alpha_of_a_merge_that_changes_nothing_is_no_division_by_zero() -> None:
    with np.errstate(all="raise"):
        merged = merge_state_dicts(BASE, MODELS, "task-arithmetic", "lines", scale=0.0)
        still = merge_state_dicts(BASE, {"a": BASE, "b": dict(BASE)}, "ties", "lines")
        far = {"a": {name: np.full_like(array, 1e12) for name, array in BASE.items()}}
        assert_near(merge_state_dicts(BASE, far, "task-arithmetic", "lines", scale=0.0), BASE, 0)
    assert_near(merged, BASE, 0)
    assert_near(still, BASE, 0)


def test_lines_of_one_block_and_of_none() -> None:
    names = ["encoder.layer.0.w", "layernorm.weight"]
    assert [Lines(0.3, 0.5).over(Depth(names), 0.3)(name) for name in names] == [0.3, 0.3]
    assert Lines(0.3, 0.5).over(Depth(["w"]), 0.3)("w") == 0.3


def test_a_schedule_needs_a_base() -> None:
    with pytest.raises(InputError, match="a schedule scales the task vectors: give the base"):
        merge_tensors(None, MODELS, "average", "lines")


def test_a_schedule_needs_blocks_and_not_more_values_than_blocks() -> None:
    with pytest.raises(InputError, match="schedule of 4 values for 3 blocks: give at most one per block"):
        merge_state_dicts(BASE, MODELS, schedule=[0.1, 0.2, 0.3, 0.4])
    base, models = {"w": np.zeros(2)}, {"a": {"w": np.ones(2)}}
    for schedule in ([0.1, 0.2], "lines", "lines:alpha=0.25"):
        with pytest.raises(InputError, match="needs blocks, and the tensors' names have no numbered ones"):
            merge_state_dicts(base, models, schedule=schedule)
    # One number needs no depth.
    assert merge_state_dicts(base, models, scale=1.0, schedule=[0.5])["w"].tolist() == [0.5, 0.5]


# What a user writes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        (None, None),
        ("lines", Lines()),
        ("lines:", Lines()),
        ("lines:beta=0.3", Lines(beta=0.3)),
        ("lines:alpha=0.2,beta=1", Lines(0.2, 1.0)),
        ("lines:beta=1,alpha=-0.2", Lines(-0.2, 1.0)),
        ("0.5", LayerScales((0.5,))),
        ("0.2, 0.5,1", LayerScales((0.2, 0.5, 1.0))),
        ((0.2, 1), LayerScales((0.2, 1.0))),
        ([np.float32(0.5)], LayerScales((0.5,))),
        (Lines(0.1), Lines(0.1)),
        (LayerScales((1.0,)), LayerScales((1.0,))),
    ],
)
def test_schedules_as_they_are_written(given_text: Any, expected: Any) -> None:
    assert as_schedule(given_text) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "line", "Lines", "linesbeta", "lines beta=0.3", "lines:beta", "lines:0.5", "lines:gamma=1"),
        *("lines:beta=much", "lines:beta=1=2", "0.2;0.5", "0.2,", "a", ["a"], [None], 0.5),
    ],
)
def test_other_texts_are_refused_with_the_valid_forms(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"schedule .*: give numbers over the depth as 0.2,0.5,1, or lines, or"):
        as_schedule(wrong)
    with pytest.raises(InputError, match="give numbers over the depth"):
        merge_tensors(BASE, MODELS, schedule=wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "give at least one finite number"),
        ([0.5, float("nan")], "at least one finite number"),
        ("0.5,inf", "at least one finite number"),
        ("lines:beta=nan", "lines: beta must be a finite number, got nan"),
        ("lines:alpha=inf", "lines: alpha must be a finite number, got inf"),
    ],
)
def test_numbers_must_be_finite(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_schedule(wrong)


def test_lines_check_their_numbers() -> None:
    with pytest.raises(InputError, match="beta must be a finite number, got 'much'"):
        Lines(beta="much")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="beta must be a finite number, got None"):
        Lines(beta=None)  # type: ignore[arg-type]


# Plain data ---------------------------------------------------------------------------------------------

SCHEDULES = [None, Lines(), Lines(0.25, 1 / 3), Lines(beta=2), LayerScales((0.1, 1 / 3)), LayerScales((1.0,))]


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_method_comes_back_from_json(name: str, schedule: Any) -> None:
    method = get_method(name)
    described = describe_method(method, schedule)
    assert described["method"] == name and ("schedule" in described) == (schedule is not None)
    assert described_method(json.loads(json.dumps(described))) == (method, schedule)


def test_other_parameters_than_the_defaults_come_back() -> None:
    found = 0
    for name, kind in available().items():
        for spec in fields(kind):
            if "kind" not in spec.metadata:
                continue
            values: list[Any] = []
            if isinstance(spec.default, str):
                values += spec.metadata["choices"] or ["depth"]
            else:
                values += [spec.default + 1 if isinstance(spec.default, int) else spec.default * 0.97]
                values += [np.float32(spec.default)] if isinstance(spec.default, float) else [np.int64(spec.default)]
                if spec.metadata["per_expert"]:
                    values += [{"depth": 0.5, "seg": 1 / 3}, MappingProxyType({"depth": np.float64(0.5)})]
            for value in values:
                described = json.loads(json.dumps(describe_method(get_method(name, **{spec.name: value}))))
                method, schedule = described_method(described)
                assert getattr(method, spec.name) == value and schedule is None, (name, spec.name)
                found += 1
    assert found > 80


def test_scales_per_block_come_back_and_merge_alike() -> None:
    method = get_method("task-arithmetic", scale={"seg": (0.1, 0.2, 0.3), "depth": 0.5, "normals": [1, 2, 3]})
    again, _ = described_method(json.loads(json.dumps(describe_method(method))))
    assert again == get_method("task-arithmetic", scale={"seg": [0.1, 0.2, 0.3], "depth": 0.5, "normals": [1, 2, 3]})
    for name, array in merge_state_dicts(BASE, MODELS, method).items():
        np.testing.assert_array_equal(merge_state_dicts(BASE, MODELS, again)[name], array)


def test_statistics_are_no_plain_data_and_are_left_out() -> None:
    grams = {expert: {"encoder.layer.0.mlp.fc1.weight": np.eye(5)} for expert in MODELS}
    assert describe_method(get_method("regmean", grams=grams)) == {"method": "regmean", "scale": 1.0, "shrink": 0.9}


def test_notes_are_passed_over_and_unknown_words_are_not() -> None:
    described = {"method": "task-arithmetic", "scale": 0.3, "scale_chosen_on": "256 labelled images"}
    assert described_method(described) == (get_method("task-arithmetic", scale=0.3), None)
    with pytest.raises(InputError, match="no merge method 'tie': did you mean 'ties'"):
        described_method({"method": "tie"})
    with pytest.raises(InputError, match="no merge method ''"):
        described_method({})
    with pytest.raises(InputError, match="'ties' has no parameter 'temperature'"):
        described_method({"method": "ties", "temperature": 1.0})
    with pytest.raises(InputError, match="density must be"):
        described_method({"method": "ties", "density": 20})
    with pytest.raises(InputError, match="give numbers over the depth"):
        described_method({"method": "ties", "schedule": "cosine"})


# Scales per task and block ------------------------------------------------------------------------------


def test_scales_per_task_and_block_against_a_loop() -> None:
    scale = {"seg": [0.1, 0.2, 0.3], "depth": [0.9, 0.5, 0.0], "normals": 0.7}
    expected = {}
    for name, values in BASE.items():
        place = {"embeddings.cls_token": 0, "layernorm.weight": 2}.get(name, block_of(name) or 0)
        total = values.astype(np.float64)
        for expert, given_scale in scale.items():
            total = total + (given_scale if isinstance(given_scale, float) else given_scale[place]) * TAUS[expert][name]
        expected[name] = total
    assert_near(merge_state_dicts(BASE, MODELS, "task-arithmetic", scale=scale), expected)
    tuples = {expert: tuple(s) if isinstance(s, list) else s for expert, s in scale.items()}
    assert_near(merge_state_dicts(BASE, MODELS, "task-arithmetic", scale=tuples), expected)


def test_scales_per_block_and_a_schedule_multiply() -> None:
    scale = {"seg": [0.1, 0.2, 0.3], "depth": [0.9, 0.5, 0.0], "normals": 0.7}
    plain = merge_state_dicts(BASE, MODELS, "task-arithmetic", scale=scale)
    merged = merge_state_dicts(BASE, MODELS, "task-arithmetic", [0.5], scale=scale)
    assert_near(merged, {name: (plain[name] + BASE[name]) / 2 for name in BASE})


@pytest.mark.parametrize("values", [[0.1, 0.2], [0.1] * 4, []])
def test_another_number_of_blocks_is_refused(values: list[float]) -> None:
    scale = {"seg": 0.1, "depth": values, "normals": 0.7}
    with pytest.raises(InputError, match=f"scale of 'depth' has {len(values)} values for 3 blocks: give one for each"):
        merge_state_dicts(BASE, MODELS, "task-arithmetic", scale=scale)


@pytest.mark.parametrize("wrong", [[0.1, -0.2, 0.3], [0.1, float("nan"), 0.3], [0.1, "0.2", 0.3], [0.1, [0.2], 0.3]])
def test_bad_numbers_per_block(wrong: list[Any]) -> None:
    with pytest.raises(InputError, match="scale must be a number at least 0, got"):
        get_method("task-arithmetic", scale={"seg": wrong})


def test_other_methods_take_no_scales_per_block() -> None:
    with pytest.raises(InputError, match="scale must be a number"):
        get_method("dare-linear", scale={"seg": [0.1, 0.2, 0.3]})
