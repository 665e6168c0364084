"""The contract of all merge methods, checked for every registered one, including new ones.

If a method does not fulfil a part of the contract, one of the tables below says so, with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from simomerge.checkpoints import as_numpy, open_checkpoint, write_safetensors, write_sharded
from simomerge.core.errors import InputError
from simomerge.core.parallel import ordered_map
from simomerge.core.registry import settings
from simomerge.merging import MergeMethod, available, get_method, merge_state_dicts, merge_tensors
from simomerge.merging.engine import stream

from .models import Tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = hypothesis_settings(max_examples=3, deadline=None)

# Tensors of every rank, smaller and larger than a block of seven. Some matrices have fewer rows than there are experts.
SHAPES = {
    "embeddings.patch_embeddings.projection.weight": (5, 3, 2, 2),
    "embeddings.mask_token": (1, 6),
    "encoder.layer.0.attention.attention.query.weight": (6, 6),
    "encoder.layer.0.mlp.fc1.weight": (11, 6),
    "encoder.layer.1.mlp.fc2.weight": (6, 11),
    "encoder.layer.1.norm2.bias": (17,),
    "encoder.layer.2.layer_scale1.lambda1": (1,),
    "layernorm.weight": (7,),
    "scalar": (),
    "one.by.one": (1, 1),
    "empty": (0, 4),
    "no.columns": (3, 0),
}
NAMES = ("seg", "depth", "normals")  # not in alphabetical order
OTHER_ORDERS = {2: [(1, 0)], 3: [(2, 1, 0), (1, 2, 0)]}

# Parameters that change what a method does. The defaults of each method are checked in any case.
MORE: list[tuple[str, dict[str, Any]]] = [
    ("consensus", {"k": 1}),
    ("emr", {"task": "depth"}),
    ("fisher", {"normalise": "norm"}),
    ("iso-cts", {"common": 0.3}),
    ("pcb", {"density": 0.6}),
    ("sce", {"density": 0.4}),
    ("slerp", {"t": 0.3}),
    ("tall-mask", {"task": "depth"}),
    ("task-arithmetic", {"scale": {"seg": 0.3, "depth": [0.1, 0.2, 0.7], "normals": 0.9}}),
    ("ties", {"trim": "tensor"}),
    ("ties", {"density": 1.0}),
]


@dataclass(frozen=True)
class Variant:
    """A method with some of its parameters."""

    name: str
    parameters: Mapping[str, Any]

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}".replace(" ", "") for key, value in self.parameters.items())])

    def names(self) -> tuple[str, ...]:
        """The names of as many experts as the method accepts, at most three."""
        try:
            get_method(self.name).for_experts(NAMES)
        except InputError:
            return NAMES[:2]
        return NAMES

    def method(self, experts: tuple[str, ...] | None = None, tensors: Any = SHAPES, seed: int = 0) -> MergeMethod:
        """The method, with random statistics of the experts if it needs statistics."""
        from_caller = {spec.name for spec in fields(available()[self.name])} - {
            spec.name for spec in settings(available()[self.name])
        }
        made = {
            what: {
                e: {n: s for n in tensors if (s := STATISTICS[what](seed, e, n)) is not None}
                for e in experts or self.names()
            }
            for what in from_caller
        }
        return get_method(self.name, **self.parameters, **made)


def random(seed: int, *words: str) -> np.random.Generator:
    return np.random.default_rng([seed, *"/".join(words).encode()])


def gram(seed: int, expert: str, name: str) -> np.ndarray | None:
    if len(SHAPES[name]) != 2:
        return None
    inputs = random(seed, expert, name).standard_normal((30, SHAPES[name][1]))
    return inputs.T @ inputs / len(inputs)


def fisher(seed: int, expert: str, name: str) -> np.ndarray:
    return random(seed, expert, name).standard_normal(SHAPES[name]) ** 2


STATISTICS: dict[str, Callable[[int, str, str], np.ndarray | None]] = {"grams": gram, "fishers": fisher}
"""Parameter that holds statistics -> the statistic of one expert and tensor, or None if the tensor has none."""


@cache
def variants() -> tuple[Variant, ...]:
    return tuple(Variant(name, {}) for name in available()) + tuple(Variant(*m) for m in MORE if m[0] in available())


def every(*, but: Mapping[str, str] = {}) -> Any:
    """Parametrise a test with every variant, except those in ``but``: method or variant -> why it makes no promise."""
    known = {str(v) for v in variants()} | set(available())
    assert set(but) <= known, f"no longer there: {set(but) - known}"
    chosen = [v for v in variants() if str(v) not in but and v.name not in but]
    return pytest.mark.parametrize("variant", chosen, ids=str)


def smooth(seed: int, experts: tuple[str, ...] = NAMES) -> tuple[Tensors, dict[str, Tensors]]:
    """Models as after fine-tuning: small changes of very different size, some entries unchanged, and a counter."""

    def draw(who: str, scale: float) -> Tensors:
        made = {}
        for name, shape in SHAPES.items():
            rng = random(seed, who, name)
            made[name] = np.asarray(scale * rng.standard_t(3, shape) * (rng.random(shape) < 0.8), np.float32)
        return made

    base, taus = draw("", 1.0), {expert: draw(expert, 0.05) for expert in experts}
    models = {e: {n: np.asarray(base[n] + tau[n], np.float32) for n in base} for e, tau in taus.items()}
    for value, model in enumerate((base, *models.values())):
        model["steps"] = np.array([7 + value, 8])
    return base, models


def coarse(seed: int, experts: tuple[str, ...] = NAMES) -> tuple[Tensors, dict[str, Tensors]]:
    """Few distinct values, all exact in float16 and bfloat16: ties and sums of exactly zero everywhere."""
    values = [-2.0, -1.0, -0.5, -0.25, 0.0, 0.0, 0.25, 0.5, 1.0, 2.0]

    def draw(who: str) -> Tensors:
        drawn = {name: random(seed, who, name).choice(values, shape) for name, shape in SHAPES.items()}
        return {name: np.asarray(array, np.float32) for name, array in drawn.items()} | {"steps": np.array([7, 8])}

    return draw(""), {expert: draw(expert) for expert in experts}


KINDS = {"smooth": smooth, "coarse": coarse}
kinds = pytest.mark.parametrize("kind", KINDS)


def merge(base: Any, models: Mapping[str, Any], method: MergeMethod, **options: Any) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy warns of divisions by zero and overflows.
        return dict(merge_tensors(base, models, method, **{"threads": 1, **options}))


def assert_same_bits(merged: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert list(merged) == list(expected)
    for name, array in expected.items():
        assert merged[name].dtype == array.dtype and merged[name].shape == array.shape, name
        if merged[name].tobytes() != array.tobytes():
            pytest.fail(f"{name} differs by up to {np.abs(merged[name] - array).max():.2g}")


def assert_near(merged: Mapping[str, np.ndarray], expected: Mapping[str, Any], tolerance: float = 1e-6) -> None:
    for name, array in expected.items():
        limit = tolerance * max(float(np.abs(array).max(initial=0)), 1.0)
        np.testing.assert_allclose(merged[name], array, rtol=0, atol=limit, err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_linear_algebra() -> Iterator[None]:
    """Limit the threads once for all tests. Otherwise each merge searches for the libraries, a fifth of the time."""
    open_work = ordered_map(str, (1, 2), threads=1)
    next(open_work)
    yield
    list(open_work)


# Experts ------------------------------------------------------------------------------------------------


@every()
@kinds
def test_the_order_of_the_experts_changes_no_bit(variant: Variant, kind: str) -> None:
    base, models = KINDS[kind](1, variant.names())
    method = variant.method()
    expected = merge(base, models, method)
    for order in OTHER_ORDERS[len(models)]:
        assert_same_bits(merge(base, {NAMES[i]: models[NAMES[i]] for i in order}, method), expected)


BY_NAME = {
    "karcher": {
        "scalar": "opposite directions cancel out in a tensor of one entry: the first expert by name decides",
        "encoder.layer.2.layer_scale1.lambda1": "as above",
        "one.by.one": "as above",
    }
}
"""Method -> tensors in which names matter."""


@every(
    but={
        "dare-linear": "what is dropped depends on the expert's name",
        "dare-ties": "what is dropped depends on the expert's name",
        "della": "what is dropped depends on the expert's name",
        "slerp t=0.3": "t counts from the first expert by name; 0.5 is in the middle",
    }
)
@few
@given(st.permutations(NAMES), st.integers(0, 1000))
def test_names_do_not_matter(variant: Variant, new: list[str], seed: int) -> None:
    base, models = smooth(seed, variant.names())
    renamed = dict(zip(models, [n for n in new if n in models], strict=True))
    method = variant.method(seed=seed)
    other: dict[str, Any] = {}
    for spec in fields(method):
        value = getattr(method, spec.name)
        if isinstance(value, Mapping):
            other[spec.name] = {renamed[expert]: one for expert, one in value.items()}
        elif isinstance(value, str) and value in models:
            other[spec.name] = renamed[value]
    moved = {renamed[expert]: model for expert, model in models.items()}
    merged, expected = merge(base, moved, replace(method, **other)), merge(base, models, method)
    # The order of additions changes the last digit.
    assert_near(merged, {n: a for n, a in expected.items() if n not in BY_NAME.get(variant.name, {})})


def with_scale() -> Iterator[Variant]:
    """The variants that have a scale. A scale per expert is replaced by the default."""
    for variant in variants():
        if "scale" in {spec.name for spec in settings(available()[variant.name])}:
            yield Variant(variant.name, {k: v for k, v in variant.parameters.items() if k != "scale"})


@pytest.mark.parametrize("variant", dict.fromkeys(map(str, with_scale())))
@kinds
def test_scale_zero_is_the_base_and_the_scale_is_a_factor(variant: str, kind: str) -> None:
    chosen = next(v for v in with_scale() if str(v) == variant)
    method = chosen.method()
    base, models = KINDS[kind](2, chosen.names())
    for name, array in merge(base, models, replace(method, scale=0.0)).items():
        np.testing.assert_array_equal(array, base[name], err_msg=name)
    once, twice = (merge(base, models, replace(method, scale=scale)) for scale in (0.4, 0.8))
    assert_near(twice, {name: 2 * once[name] - base[name] for name in SHAPES})


COMES_BACK: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 1.0, "scale": 1.0},
    "consensus": {"k": 1, "scale": 1.0},
    "dare-linear": {"density": 1.0, "scale": 1.0},
    "dare-ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "task-arithmetic": {"scale": 1.0},
    "ties": {"density": 1.0},
}
"""Parameters with which a single expert comes back, for methods whose defaults drop entries or scale."""


def full_scale() -> list[Variant]:
    return [Variant(name, parameters) for name, parameters in COMES_BACK.items()]


@every(
    but={
        "iso-c": "all singular values of a matrix become their mean",
        "iso-cts": "all singular values of a matrix become their mean",
        "model-stock": "takes two experts at least",
        "pcb": "clips the largest magnitudes and drops the smallest scores at any density",
        "sce density=0.4": "one expert does not vary, and only what varies is kept",
        "slerp": "takes two experts",
        "task-arithmetic scale={'seg':0.3,'depth':[0.1,0.2,0.7],'normals':0.9}": "is not at scale 1",
        "zero-shot": "is the base by definition",
    }
)
@kinds
def test_a_single_expert_at_full_scale_comes_back(variant: Variant, kind: str) -> None:
    base, models = KINDS[kind](3, ("depth",))
    parameters = {**COMES_BACK.get(variant.name, {}), **variant.parameters}
    method = Variant(variant.name, parameters).method(("depth",))
    assert_near(merge(base, models, method), {name: models["depth"][name] for name in SHAPES})


def test_the_table_of_single_experts_names_methods_that_exist() -> None:
    assert set(COMES_BACK) <= set(available())


@every()
@kinds
def test_experts_that_did_not_move_give_the_base(variant: Variant, kind: str) -> None:
    base, models = KINDS[kind](4, variant.names())
    still = {expert: {name: array.copy() for name, array in base.items()} for expert in models}
    merged = merge(base, still, variant.method())
    assert all(np.isfinite(array).all() for array in merged.values())
    assert_near(merged, base)
    one = {**models, "depth": still["depth"]}
    assert all(np.isfinite(array).all() for array in merge(base, one, variant.method()).values())


@every()
def test_a_base_of_zeros_and_experts_of_zeros_give_zeros(variant: Variant) -> None:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    merged = merge(zeros, {expert: dict(zeros) for expert in variant.names()}, variant.method())
    for name, array in merged.items():
        np.testing.assert_array_equal(array, zeros[name])


@pytest.mark.parametrize("variant", [v for v in variants() if not available()[v.name].needs_base], ids=str)
def test_without_a_base(variant: Variant) -> None:
    base, models = smooth(5, variant.names())
    del base["steps"]
    models = {expert: {name: model[name] for name in SHAPES} for expert, model in models.items()}
    method = variant.method()
    expected = merge(None, models, method)
    assert_near(expected, merge(base, models, method), 2e-6)
    for order in OTHER_ORDERS[len(models)]:
        assert_same_bits(merge(None, {NAMES[i]: models[NAMES[i]] for i in order}, method), expected)


# Tensors ------------------------------------------------------------------------------------------------

LOCAL = {
    "emr": "without a task nothing is rescaled",
    "ties trim=tensor": "ranks within each tensor",
    "regmean": "its statistics are of one tensor each",
    "fisher": "its statistics are of one tensor each",
}
"""Methods whose statistics do not depend on the whole encoder."""


def tensorwise() -> Any:
    unlike = {
        **{str(v): "statistics" for v in variants() if available()[v.name].needs_statistics and str(v) not in LOCAL},
        "task-arithmetic scale={'seg':0.3,'depth':[0.1,0.2,0.7],'normals':0.9}": "counts the blocks in the names",
    }
    return every(but=unlike)


@tensorwise()
@kinds
def test_a_tensor_does_not_depend_on_the_others(variant: Variant, kind: str) -> None:
    base, models = KINDS[kind](6, variant.names())
    together = merge(base, models, variant.method())
    for name in ("embeddings.mask_token", "encoder.layer.0.mlp.fc1.weight", "encoder.layer.1.norm2.bias", "scalar"):
        alone = {expert: {name: model[name]} for expert, model in models.items()}
        tensors = [name]
        if "grams" in {spec.name for spec in fields(available()[variant.name])} and len(SHAPES[name]) != 2:
            # The method needs statistics of at least one tensor.
            tensors.append("embeddings.mask_token")
            alone = {e: {n: models[e][n] for n in tensors} for e in models}
        own = {n: base[n] for n in tensors}
        merged = merge(own, alone, variant.method(tensors=tensors))
        assert_same_bits({name: merged[name]}, {name: together[name]})


@every()
@kinds
def test_counters_and_shapes_and_dtypes(variant: Variant, kind: str) -> None:
    base, models = KINDS[kind](7, variant.names())
    merged = merge(base, models, variant.method())
    assert list(merged) == list(base)
    for name, shape in SHAPES.items():
        assert merged[name].dtype == np.float32 and merged[name].shape == shape and merged[name].flags.writeable
    np.testing.assert_array_equal(merged["steps"], base["steps"])
    assert not any(np.shares_memory(array, base[name]) for name, array in merged.items())


@every()
def test_the_inputs_stay_as_they_are(variant: Variant) -> None:
    base, models = smooth(8, variant.names())
    method = variant.method()
    expected = merge(base, models, method)
    given_arrays = {"": base, **models}
    for spec in fields(method):
        value = getattr(method, spec.name)
        if "kind" not in spec.metadata:
            given_arrays |= {f"{spec.name} {expert}": arrays for expert, arrays in value.items()}
    for arrays in given_arrays.values():
        for array in arrays.values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False  # so that writing to it is an error
    before = {who: {n: a.copy() for n, a in arrays.items()} for who, arrays in given_arrays.items()}
    assert_same_bits(merge(base, models, method), expected)
    for who, arrays in given_arrays.items():
        assert_same_bits(arrays, before[who])


OVERWRITES = {"average", "task-arithmetic", "ties", "weighted-average"}
"""Methods that overwrite the task vectors they are given, which saves a new array per block."""


@pytest.mark.parametrize("variant", dict.fromkeys(map(str, (*variants(), *full_scale()))))
@kinds
def test_one_tensor_is_merged_into_a_new_array_and_the_base_is_only_read(variant: str, kind: str) -> None:
    chosen = next(v for v in (*variants(), *full_scale()) if str(v) == variant)
    base, models = KINDS[kind](16, chosen.names())
    method = chosen.method().for_experts(chosen.names())
    opened = stream.TaskVectorStream(base, models, 1)
    statistics = method.prepare(opened)

    def read(name: str, part: slice | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        values, taus = opened.read(name, part)
        for array in (values, *(taus.values() if method.name not in OVERWRITES else ())):
            array.flags.writeable = False  # so that writing to it is an error
        return values, taus

    for name in SHAPES:
        values, taus = read(name)
        merged = method.merge_tensor(name, values, taus, statistics)
        assert merged.dtype == np.float32 and merged.shape == values.shape
        assert not any(np.shares_memory(merged, array) for array in (values, *taus.values()))
        for part in (slice(0, 7), slice(7, None)) if method.elementwise else ():
            np.testing.assert_array_equal(
                method.merge_tensor(name, *read(name, part), statistics), merged.reshape(-1)[part]
            )


# Machines -----------------------------------------------------------------------------------------------


@every()
@pytest.mark.parametrize(
    ("threads", "schedule", "kind"), [(2, "lines", "coarse"), (5, None, "coarse"), (3, None, "smooth")]
)
def test_threads_change_no_bit(variant: Variant, threads: int, schedule: str | None, kind: str) -> None:
    base, models = KINDS[kind](9, variant.names())  # Coarse sums of zero need the majority sign in a worker thread.
    method = variant.method()
    expected = merge(base, models, method, schedule=schedule)
    assert_same_bits(merge(base, models, method, schedule=schedule, threads=threads), expected)


@every()
@kinds
def test_the_size_of_a_block_changes_no_bit(variant: Variant, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = KINDS[kind](10, variant.names())
    method = variant.method()
    expected = merge(base, models, method)
    monkeypatch.setattr(stream, "BLOCK", {"smooth": 7, "coarse": 1}[kind])
    assert_same_bits(merge(base, models, method), expected)


@every()
def test_a_dozen_experts_change_no_bit_either(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy adds eight or more adjacent numbers in another order, as they are in a block of one entry."""
    names = (*NAMES, *(f"x{number}" for number in range(9)))
    try:
        method = variant.method(names).for_experts(names)
    except InputError:
        return  # The method takes two experts only, or the parameters are for three.
    base, models = smooth(15, names)
    expected = merge(base, models, method)
    monkeypatch.setattr(stream, "BLOCK", 1)
    assert_same_bits(merge(base, dict(reversed(models.items())), method), expected)


def test_entries_of_elementwise_methods_stand_by_themselves() -> None:
    """The promise of ``elementwise``: permuting the entries permutes the result."""
    checked = set()
    for variant in variants():
        names = variant.names()
        method = variant.method().for_experts(names)
        if not method.elementwise:
            continue
        checked.add(variant.name)
        base, models = smooth(11, names)
        name = "encoder.layer.0.mlp.fc1.weight"
        own, taus = base[name].reshape(-1), {e: (models[e][name] - base[name]).reshape(-1) for e in sorted(names)}
        statistics = method.prepare(stream.TaskVectorStream(base, models, 1))
        together = method.merge_tensor(name, own, {e: tau.copy() for e, tau in taus.items()}, statistics)
        order = np.random.default_rng(0).permutation(own.size)
        moved = method.merge_tensor(name, own[order], {e: tau[order] for e, tau in taus.items()}, statistics)
        assert moved.tobytes() == together[order].tobytes(), str(variant)
    linear, voting = {"average", "task-arithmetic", "weighted-average"}, {"magmax", "tall-mask", "consensus", "emr"}
    assert {*linear, *voting, "ties", "pcb"} <= checked


# Storage ------------------------------------------------------------------------------------------------

STORAGES = {
    "float16": lambda array: array.astype(np.float16),
    "float64": lambda array: array.astype(np.float64),
    "torch float16": lambda array: torch.from_numpy(array.copy()).to(torch.float16),
    "torch bfloat16": lambda array: torch.from_numpy(array.copy()).to(torch.bfloat16),
    "torch parameters": lambda array: torch.nn.Parameter(torch.from_numpy(array.copy())),
}


SAME_VALUES = {
    "float32": ("float64", "torch parameters"),
    "float16": ("float16", "torch float16"),
    "torch bfloat16": ("torch bfloat16",),
}
Stored = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Storage -> base (key "base") and experts: as arrays, and as files and shards of the same values."""
    base, models = smooth(12)
    found: Stored = {"float32": {"base": base, **models}}
    for storage, convert in STORAGES.items():
        found[storage] = {
            who: {name: convert(array) if name in SHAPES else array for name, array in arrays.items()}
            for who, arrays in found["float32"].items()
        }
    for storage in SAME_VALUES:
        folder = tmp_path_factory.mktemp("stored")
        found[f"{storage} files"], found[f"{storage} shards"] = {}, {}
        for who, arrays in found[storage].items():
            file = write_safetensors(folder / f"{who}.safetensors", arrays)
            found[f"{storage} files"][who] = open_checkpoint(file)
            assert len(write_sharded(folder / who, arrays, max_shard_size=300)) > 2
            found[f"{storage} shards"][who] = open_checkpoint(folder / who)
    return found


def taken(models: Mapping[str, Any], variant: Variant) -> tuple[Any, dict[str, Any]]:
    return models["base"], {expert: models[expert] for expert in variant.names()}


@every()
@pytest.mark.parametrize("width", SAME_VALUES)
def test_files_and_shards_merge_as_float32_arrays(variant: Variant, width: str, stored: Stored) -> None:
    method = variant.method()
    wide = {
        who: {name: np.array(as_numpy(tensor)) for name, tensor in tensors.items()}
        for who, tensors in stored[width].items()
    }
    expected = merge(*taken(wide, variant), method)
    for storage in (f"{width} files", f"{width} shards"):
        merged = merge(*taken(stored[storage], variant), method)
        assert set(merged) == set(expected)
        assert_same_bits({name: merged[name] for name in expected}, expected)
    for storage in SAME_VALUES[width]:
        # The same values in memory. The result has the base's dtype and is rounded once.
        base, models = taken(stored[storage], variant)
        for name, value in merge_state_dicts(base, models, method, threads=1).items():
            assert value.dtype == base[name].dtype and type(value) in (np.ndarray, torch.Tensor)
            assert isinstance(value, np.ndarray) == isinstance(base[name], np.ndarray)
            assert not getattr(value, "requires_grad", False)
            rounded = STORAGES[storage](expected[name]) if name in SHAPES else base[name]
            np.testing.assert_array_equal(as_numpy(value), as_numpy(rounded), err_msg=name)


# Schedules ----------------------------------------------------------------------------------------------


@every()
def test_a_schedule_scales_the_merged_task_vector_of_every_method(variant: Variant) -> None:
    base, models = smooth(14, variant.names())
    method = variant.method()
    plain = merge(base, models, method)
    for name, array in merge(base, models, method, schedule=[0.0]).items():
        np.testing.assert_array_equal(array, base[name])
    assert_near(merge(base, models, method, schedule=[1.0, 1.0]), plain)
    half = merge(base, models, method, schedule="lines:alpha=0.5,beta=0")
    assert_near(half, {name: (plain[name] + base[name]) / 2 for name in SHAPES})
