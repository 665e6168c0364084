"""Merging mappings: names, buffers, files, and errors. What holds for every method is in test_invariants."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.checkpoints import open_checkpoint, write_safetensors
from simomerge.core.errors import InputError
from simomerge.merging import Merged, TaskArithmetic, get_method, merge_state_dicts, merge_tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
PLAIN = ("average", "task-arithmetic", "ties", "zero-shot")
VARIANTS = [(name, {}) for name in PLAIN] + [("ties", {"trim": "tensor"}), ("ties", {"density": 1.0})]


def test_buffers_that_are_no_floats_come_from_the_base() -> None:
    base = {"w": torch.zeros(2), "steps": torch.tensor([1, 2]), "mask": torch.tensor(True)}
    models = {"a": {"w": torch.ones(2), "steps": torch.tensor([8, 8]), "mask": torch.tensor(False)}}
    merged = merge_state_dicts(base, models, "average")
    assert merged["steps"].tolist() == [1, 2] and merged["mask"].item() is True
    assert merged["steps"].dtype == torch.int64 and merged["mask"].dtype == torch.bool
    merged["steps"] += 1
    assert base["steps"].tolist() == [1, 2]


def test_base_and_experts_may_mix_names_on_disk_and_in_memory() -> None:
    base = {"encoder.layer.0.attention.attention.query.bias": np.zeros(2, np.float32)}
    models = {"a": {"backbone.encoder.layer.0.attention.q_proj.bias": np.ones(2, np.float32)}}
    merged = merge_state_dicts(base, models, scale=1.0)
    assert list(merged) == list(base) and all((array == 1).all() for array in merged.values())


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_checkpoints_stream_from_file_to_file(tmp_path: Path, name: str, parameters: dict) -> None:
    rng = np.random.default_rng(0)
    models = {
        model: {n: rng.standard_normal(s).astype(np.float16) for n, s in (("w", (4, 3)), ("b", (3,)))}
        for model in ("base", "a", "b")
    }
    files = {m: write_safetensors(tmp_path / f"{m}.safetensors", tensors) for m, tensors in models.items()}
    opened = {model: open_checkpoint(file) for model, file in files.items()}
    base = opened.pop("base")
    merged = merge_tensors(base, opened, name, **parameters)
    layout = {n: base.info(n) for n in base}
    written = open_checkpoint(write_safetensors(tmp_path / "merged.safetensors", merged, layout=layout))
    expected = merge_state_dicts(models.pop("base"), models, name, **parameters)
    assert {written.info(n).dtype for n in written} == {"F16"}
    for n in expected:
        np.testing.assert_array_equal(written[n], expected[n].astype(np.float32))


def test_a_method_object_takes_no_further_parameters() -> None:
    base, models = {"w": np.zeros(1, np.float32)}, {"a": {"w": np.ones(1, np.float32)}}
    assert merge_state_dicts(base, models, TaskArithmetic(scale=0.5))["w"] == 0.5
    with pytest.raises(TypeError, match="parameters go with a method given by name"):
        merge_state_dicts(base, models, get_method("ties"), scale=0.5)


def test_contracts_are_checked_in_the_call_not_at_the_first_tensor() -> None:
    with pytest.raises(InputError, match="is missing 1 tensor of the base"):
        merge_tensors({"w": np.zeros(1)}, {"a": {}})


@pytest.mark.parametrize("name", ["task-arithmetic", "ties"])
def test_a_merge_is_a_mapping_whose_tensors_may_be_read_in_any_order_and_again(name: str) -> None:
    rng = np.random.default_rng(0)
    base = {n: rng.standard_normal((4, 5)).astype(np.float32) for n in "abc"} | {"steps": np.array([3])}
    models = {e: {n: v if n == "steps" else v + rng.random(v.shape, np.float32) for n, v in base.items()} for e in "xy"}
    expected = dict(merge_tensors(base, models, name))
    merged = Merged(get_method(name), base, models)
    assert list(merged) == list(expected) == list(base) and len(merged) == 4
    for own in (*reversed(list(merged)), *merged):
        np.testing.assert_array_equal(merged[own], expected[own])
    with pytest.raises(KeyError):
        merged["no such tensor"]


def test_only_when_asked_a_merge_warns_of_an_expert_that_equals_the_base() -> None:
    base, moved = {"w": np.zeros(3)}, {"w": np.ones(3)}
    still = Merged(TaskArithmetic(), base, {"moved": moved, "still": dict(base)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dict(still)
        assert not caught
        still.warn_of_unchanged()
    assert "The task vector of still is zero" in str(caught[0].message) and len(caught) == 1


@pytest.mark.parametrize("kind", [torch.tensor, lambda values, dtype: np.array(values, np.float16)])
def test_a_result_too_large_for_its_dtype_is_refused(kind: Callable[..., Any]) -> None:
    base, expert = ({"w": kind([value], dtype=torch.float16)} for value in (6e4, 6.4e4))
    with pytest.raises(InputError, match=r"'w' holds 6\.8e\+04, too large for F16: store it as F32"):
        merge_state_dicts(base, {"a": expert}, scale=2.0)
    assert merge_state_dicts(base, {"a": expert}, scale=1.0)["w"] == expert["w"]


def test_a_merge_as_a_mapping_says_what_it_holds_without_merging() -> None:
    from simomerge.checkpoints import tensor_info
    from simomerge.merging import Merged, TaskArithmetic

    base = {"w": np.zeros((2, 3), np.float16), "count": np.array(3)}
    expert = {"w": np.ones((2, 3), np.float16), "count": np.array(3)}
    merged = Merged(TaskArithmetic(scale=0.5), base, {"a": expert})
    merged.prepare = lambda: pytest.fail("merged something")  # type: ignore[method-assign]
    assert "w" in merged and "v" not in merged
    assert (tensor_info(merged, "w").shape, tensor_info(merged, "w").dtype) == ((2, 3), "F32")
    assert tensor_info(merged, "count").dtype == "I64"
