"""Contracts: what is wrong is named, before any result."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from simomerge.checkpoints import open_checkpoint, write_safetensors
from simomerge.core.errors import InputError
from simomerge.merging import merge_state_dicts, merge_tensors

BASE = {f"w{i}": np.full((2, 3), i, np.float32) for i in range(6)}
EXPERT = {name: array + 1 for name, array in BASE.items()}


def merged_with(**changed: object) -> None:
    expert = {**EXPERT, **changed}
    merge_state_dicts(BASE, {"seg": EXPERT, "depth": {n: a for n, a in expert.items() if a is not None}})


def test_missing_extra_and_misshapen() -> None:
    with pytest.raises(InputError, match=r"The expert 'depth' is missing 2 tensors of the base: w1, w4"):
        merged_with(w1=None, w4=None)
    with pytest.raises(
        InputError, match=r"'depth' has 1 tensor that the base does not have: classifier.*without heads"
    ):
        merged_with(classifier=np.zeros(3))
    wrong = {f"w{i}": np.zeros((3, 2), np.float32) for i in range(5)}
    with pytest.raises(InputError, match=r"shapes of 5 tensors: w0 \(2, 3\) and \(3, 2\), w1 .*, w2 .*, \.\.\."):
        merged_with(**wrong)
    with pytest.raises(InputError, match="dtypes of 1 tensor: w2 F32 and I64"):
        merged_with(w2=np.zeros((2, 3), np.int64))
    with pytest.raises(InputError, match="'w3' is a float"):
        merged_with(w3=1.0)
    with pytest.raises(InputError, match="The expert 'b' is missing 1 tensor of the expert 'a': w"):
        merge_state_dicts(None, {"a": {"w": np.zeros(1)}, "b": {}}, "average")


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties", "zero-shot"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(method: str, value: float) -> None:
    broken = EXPERT["w3"].copy()
    broken[1, 2] = value
    with pytest.raises(InputError, match="'w3' of the expert 'depth' holds NaN or infinite"):
        merge_state_dicts(BASE, {"seg": EXPERT, "depth": {**EXPERT, "w3": broken}}, method)
    with pytest.raises(InputError, match="'w3' of the base holds NaN or infinite"):
        merge_state_dicts({**BASE, "w3": broken}, {"seg": EXPERT}, method)


def test_a_value_found_late_leaves_no_file(tmp_path: Path) -> None:
    broken = {**EXPERT, "w5": EXPERT["w5"] * np.float32(np.nan)}
    file = write_safetensors(tmp_path / "base.safetensors", BASE)
    base = open_checkpoint(file)
    layout = {name: base.info(name) for name in base}
    with pytest.raises(InputError, match="'w5' of the expert 'seg'"):
        write_safetensors(tmp_path / "m.safetensors", merge_tensors(base, {"seg": broken}), layout=layout)
    assert list(tmp_path.iterdir()) == [file]


def test_large_finite_values_are_fine() -> None:
    big = {"w": np.full(4, 1e30, np.float32)}
    merged = merge_state_dicts({"w": np.zeros(4, np.float32)}, {"a": big}, scale=1.0)
    np.testing.assert_array_equal(merged["w"], big["w"])


def test_too_few_experts_or_no_base() -> None:
    with pytest.raises(InputError, match="needs at least 1 expert"):
        merge_state_dicts(BASE, {})
    with pytest.raises(InputError, match="needs at least 1 expert"):
        merge_state_dicts(None, {}, "average")
    with pytest.raises(InputError, match="'ties' needs the base"):
        merge_state_dicts(None, {"seg": EXPERT}, "ties")


def test_one_expert_given_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'a' and 'b' are the same"):
        merge_state_dicts(BASE, {"a": EXPERT, "b": EXPERT})
    file = write_safetensors(tmp_path / "expert.safetensors", EXPERT)
    with pytest.raises(InputError, match="'a' and 'b' are the same"):
        merge_state_dicts(BASE, {"a": open_checkpoint(file), "b": open_checkpoint(file)})


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties", "zero-shot"])
def test_an_expert_equal_to_the_base_is_a_warning(method: str) -> None:
    with pytest.warns(UserWarning, match="The task vector of depth is zero"):
        merge_state_dicts(BASE, {"seg": EXPERT, "depth": dict(BASE)}, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny = {**BASE, "w0": BASE["w0"] + np.float32(1e-30)}
        merge_state_dicts(BASE, {"seg": EXPERT, "depth": tiny}, method)
        if method == "average":
            merge_state_dicts(None, {"seg": EXPERT, "depth": BASE}, method)
