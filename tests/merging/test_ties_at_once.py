"""TIES that counts the majority sign while it merges: the same bits as when it counts first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.checkpoints import TensorInfo, open_checkpoint, write_safetensors, write_sharded
from simomerge.core.errors import InputError
from simomerge.merging import Merged, Ties, merge_state_dicts, merge_tensors, ties
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.merging.disk.output import Output
from simomerge.merging.engine import stream

from .models import COARSE, FINE, SHAPES, Tensors, experts, tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
some = settings(max_examples=60, deadline=None)
SIGNED = st.one_of(COARSE, st.just(-0.0))
GATED = "encoder.layer.0.mlp.weights_in.weight"  # one tensor on disk, two in memory


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count while merging even where everything cancels."""
    monkeypatch.setattr(ties, "_MOST_UNDECIDED", 2.0)


def slow_ties(base: Tensors, models: dict[str, Tensors], density: float, scale: float) -> Tensors:
    """Threshold, count, merge: whole models at once."""
    taus = np.stack(
        [
            np.concatenate([(model[n].astype("f4") - base[n].astype("f4")).ravel() for n in base])
            for _, model in sorted(models.items())
        ]
    )
    rank = taus.shape[1] - int(taus.shape[1] * density)
    for tau in taus:
        tau[np.abs(tau) < (np.sort(np.abs(tau))[rank - 1] if rank else 0)] = 0
    total = np.zeros_like(taus[0])
    for tau in taus:
        total = total + tau
    positive = (total > 0) | (total == 0) & ((total > 0).sum() > (total < 0).sum())
    agreeing = np.where(positive, np.maximum(taus, 0), np.minimum(taus, 0))
    mean = np.zeros_like(total)
    for row in agreeing:
        mean = mean + row
    mean = np.float32(scale) * (mean / np.maximum((agreeing != 0).sum(0), 1).astype("f4"))
    merged = {}
    for name, values in base.items():
        merged[name] = values + mean[: values.size].reshape(values.shape)
        mean = mean[values.size :]
    return merged


def at_once(base: Tensors, models: dict[str, Tensors], method: Ties, threads: int | None = None) -> Tensors:
    merged = Merged(method, base, models, threads=threads).at_once()
    assert len(models) == 1 or method.trim == "tensor" or type(merged) is not Merged
    result = {name: merged[name].copy() for name in reversed(list(merged))}  # in any order
    for name, start, values in merged.corrections():
        result[name].reshape(-1)[start : start + values.size] = values
    return result


def assert_same_bits(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> None:
    assert set(left) == set(right)
    for name in left:
        a, b = np.ascontiguousarray(left[name]), np.ascontiguousarray(right[name])
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name


@some
@given(
    tensors(SIGNED),
    st.one_of(experts(COARSE, minimum=2), experts(FINE, minimum=2)),
    st.booleans(),
    st.sampled_from([0.2, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([1, 2, 3, 1 << 17]),
    st.sampled_from([1, 3]),
)
def test_the_same_bits_as_counting_first(
    base: Tensors, models: dict[str, Tensors], mirrored: bool, density: float, scale: float, block: int, threads: int
) -> None:
    if mirrored:  # Everything that both keep cancels; where there is a third expert, it decides.
        first, second, *_ = models
        models[second] = {name: 2 * base[name] - array for name, array in models[first].items()}
    method = Ties(density=density, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK", block)
        patch.setattr(ties, "_MOST_UNDECIDED", 2.0)
        found = at_once(base, models, method, threads)
        assert_same_bits(found, dict(merge_tensors(base, models, method, threads=threads)))
        assert_same_bits(found, merge_state_dicts(base, models, method, threads=threads))
    for name, values in slow_ties(base, models, density, scale).items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("majority", [1.0, -1.0])
def test_every_dtype_on_disk_and_in_shards(
    tmp_path: Path, dtype: str, majority: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK", 7)
    shapes = {"encoder.layer.0.a.weight": (5, 6), GATED: (8, 5), "encoder.layer.1.b.bias": (11,), "count": (3,)}
    base = {name: np.arange(np.prod(shape), dtype="f4").reshape(shape) for name, shape in shapes.items()}
    rng, levels = np.random.default_rng(3), [-1.0, -0.5, 0.0, 0.5, 1.0]
    models = {e: {n: a + rng.choice(levels, a.shape).astype("f4") for n, a in base.items()} for e in "abc"}
    for model in models.values():
        model["encoder.layer.1.b.bias"] = base["encoder.layer.1.b.bias"] + np.float32(majority)
    write_safetensors(tmp_path / "base.safetensors", base)
    for name, model in models.items():
        write_safetensors(tmp_path / f"{name}.safetensors", model)
    storage = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    counted_first = dict(merge_tensors(base, models, Ties(density=0.7)))
    expected = open_checkpoint(write_safetensors(tmp_path / "expected.safetensors", counted_first, storage))
    merged = Merged(Ties(density=0.7), base, models).at_once()
    assert set(dict(merged)) == set(base)  # reads every tensor
    waiting = {(name, place >= 20) for name, place, _ in merged.corrections()}
    assert {(GATED, False), (GATED, True)} <= waiting
    paths = {name: tmp_path / f"{name}.safetensors" for name in models}
    for output in (Output(tmp_path / "out.safetensors", dtype), Output(tmp_path / "out", dtype, max_shard_size=130)):
        merge_on_disk(tmp_path / "base.safetensors", paths, output, Ties(density=0.7))
        assert_same_bits(open_checkpoint(output.path), expected)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_half_precision_is_counted_first_because_much_of_it_cancels() -> None:
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((300, 300)).astype("f4")}
    fine = {e: {"w": base["w"] + rng.standard_normal((300, 300)).astype("f4") / 16} for e in "ab"}
    rounded = {e: {"w": model["w"].astype("f2").astype("f4")} for e, model in fine.items()}
    half = {"w": base["w"].astype("f2").astype("f4")}
    assert type(Merged(Ties(), base, fine).at_once()) is not Merged
    assert type(Merged(Ties(), half, rounded).at_once()) is Merged
    assert_same_bits(merge_state_dicts(half, rounded, Ties()), dict(merge_tensors(half, rounded, Ties())))


class Counted(Mapping[str, np.ndarray]):
    """Tensors that count how many values are read."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.read = tensors, 0

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].shape, "F32")

    def flat(self, name: str, part: slice) -> np.ndarray:
        values = self.tensors[name].reshape(-1)[part]
        self.read += values.size
        return values

    def __getitem__(self, name: str) -> np.ndarray:
        self.read += self.tensors[name].size
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_every_value_is_read_twice_and_not_three_times() -> None:
    rng = np.random.default_rng(1)
    base = {f"w{i}": rng.standard_normal(1_100_000, dtype="f4") for i in range(4)}
    models = {e: Counted({n: a + rng.standard_normal(a.size, dtype="f4") / 8 for n, a in base.items()}) for e in "ab"}
    merge_state_dicts(base, models, Ties(), threads=1)
    size = sum(values.size for values in base.values())
    # The thresholds also take a sample of a million, and the guess of how many cancel the first 65,536 of each tensor.
    sample = 1_000_000 + 4 * 65_536
    for model in models.values():
        assert 2 * size < model.read < 2 * size + sample + size / 10


@pytest.mark.usefixtures("always")
def test_a_value_that_waits_never_overflows_too_early(tmp_path: Path) -> None:
    """Plus would be too large for float16 where minus, which is elected at the end, is not."""
    base = {"w": np.full(1, 60000, "f4"), "v": np.zeros(3, "f4")}
    up, down = np.float32(8192), -np.ones(3, "f4")
    models = {"a": {"w": base["w"] + up, "v": down}, "b": {"w": base["w"] - up, "v": down}}
    for name, model in {"base": base, **models}.items():
        write_safetensors(tmp_path / f"{name}.safetensors", model)
    experts = {name: tmp_path / f"{name}.safetensors" for name in models}
    output = Output(tmp_path / "out.safetensors", "float16")
    merge_on_disk(tmp_path / "base.safetensors", experts, output, Ties(density=1.0))
    assert open_checkpoint(output.path)["w"] == np.float16(60000 - 8192)
    models["a"]["v"], models["b"]["v"] = -down, -down
    with pytest.raises(InputError, match=r"'w' holds 6.82e\+04, too large for F16"):
        merge_state_dicts({n: a.astype("f2") for n, a in base.items()}, models, Ties(density=1.0))


class Corrected(dict[str, np.ndarray]):
    """Tensors of which parts are written again at the end."""

    def corrections(self) -> Iterator[tuple[str, int, np.ndarray]]:
        yield "b", 1, np.array([7, 8], np.float32)
        yield "a", 3, np.array([9], np.float32)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_writers_write_corrections_over_what_they_wrote(tmp_path: Path, dtype: str) -> None:
    given = Corrected({"a": np.zeros(4, "f4"), "b": np.ones((2, 3), "f4"), "c": np.full(9, 2, "f4")})
    expected = {"a": np.array([0, 0, 0, 9], "f4"), "b": np.array([[1, 7, 8], [1, 1, 1]], "f4"), "c": given["c"]}
    write_safetensors(tmp_path / "one.safetensors", given, dtype)
    assert_same_bits(dict(open_checkpoint(tmp_path / "one.safetensors")), expected)
    assert len(write_sharded(tmp_path / "shards", given, dtype, max_shard_size=24)) > 1
    assert_same_bits(dict(open_checkpoint(tmp_path / "shards")), expected)


def test_no_corrections_without_cancellations() -> None:
    base = {name: np.zeros(shape, "f4") for name, shape in SHAPES.items()}
    models = {e: {n: np.full(a.shape, v, "f4") for n, a in base.items()} for e, v in (("a", 1.0), ("b", 2.0))}
    merged = Merged(Ties(), base, models).at_once()
    assert [merged[name].tolist() for name in ("scalar", "encoder.bias")] == [1.5, [1.5] * 5]
    assert type(merged) is not Merged and list(merged.corrections()) == []
