"""How two checkpoints differ, against numpy's formulas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.checkpoints import write_safetensors, write_sharded
from simomerge.core.errors import InputError
from simomerge.merging.disk.diff import Difference, as_dicts, diff_on_disk

from .conftest import assert_equal, content, tensors_of, weights


def expected(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[Difference]:
    """Of each float tensor and of all of them as one vector, first."""
    names = [name for name, array in a.items() if array.dtype == np.float32]
    vectors = {name: (a[name].astype(np.float64).ravel(), b[name].astype(np.float64).ravel()) for name in names}
    whole = tuple(np.concatenate([pair[side] for pair in vectors.values()]) for side in (0, 1))
    return [compare(name, *pair) for name, pair in [("all", whole), *vectors.items()]]


def compare(name: str, a: np.ndarray, b: np.ndarray) -> Difference:
    norms = np.linalg.norm(a), np.linalg.norm(b)
    signed = (a != 0) | (b != 0)
    return Difference(
        name,
        float(norms[0]),
        float(norms[1]),
        float(np.linalg.norm(b - a)),
        float(a @ b / (norms[0] * norms[1])) if norms[0] * norms[1] else math.nan,
        float((np.sign(a) == np.sign(b))[signed].mean()) if signed.any() else math.nan,
    )


def assert_agree(found: list[Difference], wanted: list[Difference], tolerance: float = 1e-6) -> None:
    by_name = {one.name: one for one in found}
    assert found[0].name == "all" and set(by_name) == {one.name for one in wanted} and len(by_name) == len(found)
    for one in wanted:
        for key, value in vars(one).items():
            ours = getattr(by_name[one.name], key)
            if key != "name":
                assert ours == pytest.approx(value, rel=tolerance, abs=1e-9, nan_ok=True), (one.name, key)


def less(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a[name] - b[name] for name in a}


def test_weights_against_numpy(files: dict[str, Path]) -> None:
    found = diff_on_disk(files["base"], files["depth"])
    assert_agree(found, expected(weights(), weights(1)))
    assert [one.name for one in found[1:]] == [name for name in tensors_of(files["base"]) if name != "steps"]
    turned = diff_on_disk(files["depth"], files["base"])
    for one, other in zip(found, turned, strict=True):
        assert (one.first, one.second) == pytest.approx((other.second, other.first))
        assert (one.distance, one.cosine) == pytest.approx((other.distance, other.cosine))


def test_task_vectors_against_numpy(files: dict[str, Path]) -> None:
    found = diff_on_disk(files["normals"], files["depth"], files["base"])  # not in alphabetical order
    assert_agree(found, expected(less(weights(2), weights()), less(weights(1), weights())))
    assert abs(found[0].cosine) < 0.5 < diff_on_disk(files["normals"], files["depth"])[0].cosine


def test_equal_opposite_and_zero_tensors(tmp_path: Path) -> None:
    base = {
        name: np.array(values, np.float32) for name, values in (("same", [1, -2]), ("turned", [3, 4]), ("o", [0, 0]))
    }
    other = {"same": base["same"], "turned": -base["turned"], "o": np.array([0, 5], np.float32)}
    zeros = {name: np.zeros(2, np.float32) for name in base}
    paths = {
        n: write_safetensors(tmp_path / f"{n}.safetensors", t) for n, t in (("a", base), ("b", other), ("0", zeros))
    }
    whole, o, same, turned = sorted(diff_on_disk(paths["a"], paths["b"]), key=lambda one: one.name)
    assert same == Difference("same", pytest.approx(5**0.5), pytest.approx(5**0.5), 0.0, pytest.approx(1), 1.0)
    assert turned == Difference("turned", 5.0, 5.0, 10.0, pytest.approx(-1.0), 0.0)
    assert (o.first, o.second, o.distance, o.sign_agreement) == (0, 5, 5, 0) and math.isnan(o.cosine)
    assert whole.sign_agreement == 2 / 5  # of the entries that are not zero in both
    still = diff_on_disk(paths["0"], paths["0"])
    assert [(one.first, one.distance) for one in still] == [(0, 0)] * 4
    assert all(math.isnan(one.cosine) and math.isnan(one.sign_agreement) for one in still)
    nothing = {"name": "all", "first": 0.0, "second": 0.0, "distance": 0.0, "cosine": None, "sign_agreement": None}
    assert as_dicts(still)[0] == nothing
    assert json.dumps(as_dicts(still), allow_nan=False)


def test_an_encoder_of_counters_only(tmp_path: Path) -> None:
    paths = [write_safetensors(tmp_path / f"{n}.safetensors", {"steps": np.array([n])}) for n in (1, 2)]
    (whole,) = diff_on_disk(*paths)
    assert (whole.name, whole.first, whole.distance) == ("all", 0, 0) and math.isnan(whole.cosine)


def test_every_kind_of_source(
    files: dict[str, Path],
    models: dict[str, Path],
    tiny_base: Path,
    folder_of: Callable[..., Path],
    adapter_of: Callable[..., tuple[Path, np.ndarray]],
    tmp_path: Path,
) -> None:
    wanted = expected(tensors_of(tiny_base), tensors_of(models["depth"]))
    assert_agree(diff_on_disk(tiny_base, models["depth"]), wanted)
    assert_agree(diff_on_disk(tiny_base / "model.safetensors", models["depth"] / "encoder"), wanted)
    folder = folder_of("plain", 3)
    taus = (less(tensors_of(path), tensors_of(tiny_base)) for path in (folder, models["normals"]))
    assert_agree(diff_on_disk(folder, models["normals"], tiny_base), expected(*taus), 1e-5)
    write_sharded(tmp_path / "shards", weights(1), max_shard_size=250)
    torch.save({name: torch.from_numpy(array) for name, array in weights(1).items()}, tmp_path / "depth.pt")
    for same in (tmp_path / "shards", tmp_path / "depth.pt"):
        assert_agree(diff_on_disk(files["base"], same), expected(weights(), weights(1)))
    adapter, delta = adapter_of("adapter", "encoder.layer.1.mlp.fc1", (9, 6))
    found = {one.name: one for one in diff_on_disk(files["base"], adapter)}
    assert found["all"].distance == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert found["layernorm.weight"].distance == 0 and found["layernorm.weight"].cosine == pytest.approx(1)
    found = {one.name: one for one in diff_on_disk(adapter, files["depth"], files["base"])}
    assert found["all"].first == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    tau = less(weights(1), weights())["encoder.layer.1.mlp.fc1.weight"].ravel().astype(np.float64)
    cosine = delta.ravel() @ tau / np.linalg.norm(delta) / np.linalg.norm(tau)
    assert found["encoder.layer.1.mlp.fc1.weight"].cosine == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("storage", ["F16", "BF16"])
def test_narrow_storage_is_compared_in_full(storage: str, tmp_path: Path) -> None:
    paths = [write_safetensors(tmp_path / f"{n}.safetensors", weights(n), storage) for n in (0, 1)]
    assert_agree(diff_on_disk(*paths), expected(*(tensors_of(path) for path in paths)))


def test_large_and_small_values_neither_overflow_nor_vanish(tmp_path: Path) -> None:
    for size in (1e30, 1e-30):
        tensors = [{"w": (size * np.array([3, 4, sign], np.float32)).astype(np.float32)} for sign in (0, 1)]
        paths = [write_safetensors(tmp_path / f"{n}.safetensors", one) for n, one in enumerate(tensors)]
        assert_agree(diff_on_disk(*paths), expected(*tensors))


def test_small_values_next_to_large_ones_are_exact(tmp_path: Path) -> None:
    tensors = [{"w": np.array(values, np.float32)} for values in ([1, -1, 1], [1e-12, -2e-12, 2e-12])]
    paths = [write_safetensors(tmp_path / f"{n}.safetensors", one) for n, one in enumerate(tensors)]
    assert_agree(diff_on_disk(*paths), expected(*tensors))
    assert diff_on_disk(*paths)[0].sign_agreement == 1


def test_mistakes(
    files: dict[str, Path], folder_of: Callable[..., Path], tmp_path: Path, models: dict[str, Path]
) -> None:
    other = write_safetensors(tmp_path / "other.safetensors", {**weights(1), "scalar": np.ones(2, np.float32)})
    nan = write_safetensors(tmp_path / "nan.safetensors", {**weights(1), "scalar": np.array(np.nan, np.float32)})
    less_of_it = write_safetensors(tmp_path / "less.safetensors", {"scalar": np.array(1.0, np.float32)})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files["depth"].read_bytes()[:-3])
    before = content(tmp_path)
    depth, base = files["depth"], files["base"]
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((depth, tmp_path / "nowhere"), "nowhere does not exist"),
        ((tmp_path / "nowhere", depth), "nowhere does not exist"),
        ((depth, files["normals"], tmp_path / "nowhere"), "nowhere does not exist"),
        ((depth, cut), r"cut\.safetensors is not a complete safetensors file"),
        ((depth, other), r"differ in the shapes of 1 tensor: scalar \(\) and \(2,\)"),
        ((depth, less_of_it), "is missing 6 tensors of the base: "),
        ((less_of_it, depth), "has 6 tensors that the base does not have: "),
        ((depth, nan), r"'scalar' of .* \(.*nan\.safetensors\) holds NaN"),
        ((nan, depth), r"'scalar' of .* \(.*nan\.safetensors\) holds NaN"),
        ((depth, nan, base), r"'scalar' of the expert 'b' \(.*nan\.safetensors\) holds NaN"),
        ((depth, other, base), "differ in the shapes of 1 tensor: scalar"),
        ((depth, depth, base), "are the same"),
        ((depth, models["depth"]), "is missing"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            diff_on_disk(*arguments)
    assert content(tmp_path) == before


def test_a_model_and_itself(models: dict[str, Path]) -> None:
    found = diff_on_disk(models["depth"], models["depth"])
    assert all(one.distance == 0 for one in found)
    assert found[0].cosine == pytest.approx(1) and found[0].sign_agreement == 1
    assert_equal({"cosine": np.array(found[0].cosine)}, {"cosine": 1.0}, 1e-12)
