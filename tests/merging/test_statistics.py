"""RegMean and Fisher against least squares, loops and inverses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging import get_method, merge_state_dicts

from .models import Tensors, assert_close

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)
WEIGHT = "encoder.layer.0.mlp.fc1.weight"


class Layer:
    """Experts of one linear layer, each with inputs of its own."""

    def __init__(self, seed: int, experts: int = 2, outputs: int = 4, inputs: int = 3, tokens: int = 20) -> None:
        rng = np.random.default_rng(seed)
        names = [f"e{i}" for i in range(experts)]
        self.base = {WEIGHT: rng.standard_normal((outputs, inputs)).astype(np.float32)}
        self.weights = {e: rng.standard_normal((outputs, inputs)).astype(np.float32) for e in names}
        # Correlated channels of very different size, as in a transformer.
        self.inputs = {e: rng.standard_normal((tokens, inputs)) @ rng.standard_normal((inputs, inputs)) for e in names}
        for x in self.inputs.values():
            x *= np.logspace(2, -2, inputs)

    @property
    def grams(self) -> dict[str, Tensors]:
        return {e: {WEIGHT: x.T @ x / len(x)} for e, x in self.inputs.items()}

    def merged(self, **parameters: object) -> np.ndarray:
        method = get_method("regmean", **{"grams": self.grams, **parameters})
        return merge_state_dicts(self.base, {e: {WEIGHT: w} for e, w in self.weights.items()}, method)[WEIGHT]

    def loss(self, weight: np.ndarray) -> float:
        """sum_t ||X_t W^T - X_t W_t^T||^2"""
        return sum(float(np.square(x @ (weight - self.weights[e]).T).sum()) for e, x in self.inputs.items())


def assert_agree(ours: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1))


@few
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_regmean_is_the_least_squares_solution(seed: int, experts: int, outputs: int, inputs: int) -> None:
    layer = Layer(seed, experts, outputs, inputs)
    size = np.linalg.norm(np.vstack(list(layer.inputs.values())), axis=0)  # Without it, lstsq is not exact enough.
    stacked = np.vstack(list(layer.inputs.values())) / size
    wanted = np.vstack([x @ layer.weights[e].T for e, x in layer.inputs.items()])
    best = (np.linalg.lstsq(stacked, wanted, rcond=None)[0] / size[:, None]).T
    ours = layer.merged(shrink=1.0)
    assert_agree(ours, best, 1e-5)  # columns of channels 10 000 times smaller than others
    assert layer.loss(ours) <= layer.loss(best) * (1 + 1e-6) + 1e-6


@few
@given(seeds, st.floats(0, 0.99), st.integers(1, 4))
def test_regmean_against_the_formula(seed: int, shrink: float, experts: int) -> None:
    layer = Layer(seed, experts, inputs=5)
    total, weighted = np.zeros((5, 5)), np.zeros((4, 5))
    for expert, x in layer.inputs.items():
        gram = x.T @ x / len(x)
        for i in range(5):
            for j in range(5):
                gram[i, j] *= shrink if i != j else 1
        total += gram
        weighted += layer.weights[expert] @ gram
    assert_agree(layer.merged(shrink=shrink), weighted @ np.linalg.inv(total))


def test_regmean_defaults_and_scale() -> None:
    layer = Layer(0)
    assert_close({"w": layer.merged()}, {"w": layer.merged(shrink=0.9, scale=1.0)}, 0)
    assert np.abs(layer.merged() - layer.merged(shrink=1.0)).max() > 1e-3
    half = layer.base[WEIGHT] + 0.5 * (layer.merged() - layer.base[WEIGHT])
    np.testing.assert_allclose(layer.merged(scale=0.5), half, rtol=1e-6)
    np.testing.assert_array_equal(layer.merged(scale=0.0), layer.base[WEIGHT])


@few
@given(seeds, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([1, 2, 50]))
def test_identical_experts_are_a_fixed_point(seed: int, shrink: float, tokens: int) -> None:
    layer = Layer(seed, experts=3, tokens=tokens)
    layer.weights = dict.fromkeys(layer.weights, layer.weights["e0"])
    experts = {e: {WEIGHT: w.copy()} for e, w in layer.weights.items()}
    method = get_method("regmean", grams=layer.grams, shrink=shrink)
    np.testing.assert_allclose(merge_state_dicts(layer.base, experts, method)[WEIGHT], layer.weights["e0"], atol=1e-6)


@few
@given(seeds)
def test_what_the_inputs_do_not_determine_is_the_mean(seed: int) -> None:
    layer = Layer(seed, inputs=4)
    for x in layer.inputs.values():
        x[:, 1] = 0
    for shrink in (0.9, 1.0):
        ours = layer.merged(shrink=shrink)
        np.testing.assert_allclose(ours[:, 1], np.mean(list(layer.weights.values()), axis=0)[:, 1], atol=1e-6)
    alive = [0, 2, 3]
    smaller = Layer(seed)
    smaller.base = {WEIGHT: layer.base[WEIGHT][:, alive]}
    smaller.weights = {e: w[:, alive] for e, w in layer.weights.items()}
    smaller.inputs = {e: x[:, alive] for e, x in layer.inputs.items()}
    np.testing.assert_allclose(layer.merged()[:, alive], smaller.merged(), atol=1e-5)


@few
@given(seeds)
def test_fewer_tokens_than_channels(seed: int) -> None:
    layer = Layer(seed, inputs=12, tokens=3)  # 6 tokens: the sum of the Grams is singular, and outputs can be kept
    ours = layer.merged(shrink=1.0)
    mean = np.mean(list(layer.weights.values()), axis=0)
    assert np.isfinite(ours).all() and layer.loss(ours) <= 1e-6 * layer.loss(mean)
    everything_zero = get_method("regmean", grams={e: {WEIGHT: np.zeros((12, 12))} for e in layer.weights})
    merged = merge_state_dicts(layer.base, {e: {WEIGHT: w} for e, w in layer.weights.items()}, everything_zero)
    np.testing.assert_allclose(merged[WEIGHT], mean, atol=1e-6)


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_tensors_without_statistics_are_averaged(name: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 2), "partly": (2, 2), "bias": (3,), "patch": (2, 3, 2, 2), "scalar": ()}
    base, a, b = ({n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(3))
    array = {"regmean": np.eye(2), "fisher": np.ones((3, 2))}[name]
    two_by_two = np.eye(2) + 1
    given = {"a": {"w": 3 * array, "partly": two_by_two}, "b": {"w": array}, "someone else": {"w": np.eye(9)}}
    parameter = {"regmean": "grams", "fisher": "fishers"}[name]
    merged = merge_state_dicts(base, {"b": b, "a": a}, get_method(name, **{parameter: given}))
    np.testing.assert_allclose(merged["w"], 0.75 * a["w"] + 0.25 * b["w"], atol=1e-6)
    for other in ("partly", "bias", "patch", "scalar"):
        np.testing.assert_allclose(merged[other], (a[other] + b[other]) / 2, atol=1e-6)
        assert merged[other].shape == shapes[other] and merged[other].dtype == np.float32


@few
@given(
    seeds, st.integers(1, 4), st.sampled_from([(), (1,), (6,), (3, 4), (2, 3, 2, 2)]), st.sampled_from([1e-12, 1, 1e6])
)
def test_fisher_against_the_formula(seed: int, count: int, shape: tuple[int, ...], size: float) -> None:
    rng = np.random.default_rng(seed)
    weights = {f"e{i}": rng.standard_normal(shape).astype(np.float32) for i in range(count)}
    fishers = {e: (size * rng.random(shape) + 0.1 * size).astype(np.float32) for e in weights}
    expected = np.zeros(int(np.prod(shape)))
    for i in range(expected.size):
        total = sum(float(fishers[e].flat[i]) for e in weights)
        expected[i] = sum(float(fishers[e].flat[i]) * float(weights[e].flat[i]) for e in weights) / total
    method = get_method("fisher", fishers={e: {"w": f} for e, f in fishers.items()})
    models = {e: {"w": w} for e, w in weights.items()}
    for base in (None, {"w": rng.standard_normal(shape).astype(np.float32)}):
        merged = merge_state_dicts(base, models, method)["w"]
        assert merged.shape == shape and merged.dtype == np.float32
        assert_agree(merged.reshape(-1), expected)
    there, back = (merge_state_dicts(base, dict(e), method) for e in (models.items(), reversed(models.items())))
    assert_close(there, back, 0)


@pytest.mark.parametrize("fisher", [0.0, 1e-30, 1e-9, 2.0])
def test_equal_fishers_give_the_average(fisher: float) -> None:
    models = {e: {"w": np.array([x, -x], np.float32)} for e, x in (("a", 1.0), ("b", 4.0))}
    method = get_method("fisher", fishers={e: {"w": np.full(2, fisher, np.float32)} for e in models})
    np.testing.assert_allclose(merge_state_dicts(None, models, method)["w"], [2.5, -2.5], rtol=1e-6)


def test_the_floor_is_for_entries_that_matter_to_no_expert() -> None:
    models = {"a": {"w": np.array([0, 0, 0], np.float32)}, "b": {"w": np.array([1, 1, 1], np.float32)}}
    fishers = {"a": {"w": np.array([3e-9, 0, 0])}, "b": {"w": np.array([1e-9, 0, 1e-9])}}  # public floors: 1e-6
    merged = merge_state_dicts(None, models, get_method("fisher", fishers=fishers))["w"]
    np.testing.assert_allclose(merged, [0.25, 0.5, 1.0], rtol=1e-5)
    merged = merge_state_dicts(None, models, get_method("fisher", fishers=fishers, floor=1.0))["w"]
    lowest = 5e-9 / 6
    np.testing.assert_allclose(merged, [0.25, 0.5, 1e-9 / (1e-9 + lowest)], rtol=1e-5)


def test_normalised_fishers() -> None:
    models = {
        "a": {"w": np.zeros(2, np.float32), "v": np.zeros(1)},
        "b": {"w": np.ones(2, np.float32), "v": np.ones(1)},
    }
    fishers = {
        "a": {"w": np.array([300.0, 0.0]), "v": np.array([400.0])},
        "b": {"w": np.ones(2), "v": np.array([np.sqrt(2)])},
    }
    merged = merge_state_dicts(None, models, get_method("fisher", fishers=fishers, normalise="norm"))
    np.testing.assert_allclose(merged["w"], [0.5 / 1.1, 1.0], rtol=1e-5)  # norms 500 and 2
    np.testing.assert_allclose(merged["v"], [np.sqrt(0.5) / (0.8 + np.sqrt(0.5))], rtol=1e-6)


@pytest.mark.parametrize(("name", "parameter"), [("regmean", "grams"), ("fisher", "fishers")])
def test_names_in_memory_and_on_disk(name: str, parameter: str) -> None:
    rng = np.random.default_rng(1)
    on_disk, in_memory = "encoder.layer.0.attention.attention.query.weight", "encoder.layer.0.attention.q_proj.weight"
    base, a, b = ({on_disk: rng.standard_normal((2, 2)).astype(np.float32)} for _ in range(3))
    given = {"a": {in_memory: 3 * np.ones((2, 2))}, "b": {f"backbone.{in_memory}": np.eye(2) + 1}}
    same = {e: dict.fromkeys([on_disk], *s.values()) for e, s in given.items()}
    one, other = (
        merge_state_dicts(base, {"a": a, "b": b}, get_method(name, **{parameter: g}))[on_disk] for g in (given, same)
    )
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - (a[on_disk] + b[on_disk]) / 2).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "regmean",
            {},
            r"grams are needed of every expert, and there are none of a, b.*input_grams\(encoder, images\)",
        ),
        (
            "fisher",
            {},
            r"fishers are needed of every expert.*none of a, b.*statistics\.fisher_information\(model, data\)",
        ),
        ("regmean", {"a": {"w": np.eye(3)}}, "none of b"),
        ("regmean", {"a": {"w": np.eye(3)}, "b": {}}, "none of b"),
        (
            "regmean",
            {"b": {"w": np.eye(2)}},
            r"grams of 'b', 'w': the shape is \(2, 2\), .* tensor \(2, 3\) needs \(3, 3\)",
        ),
        ("fisher", {"b": {"w": np.ones((3, 2))}}, r"fishers of 'b', 'w': the shape is \(3, 2\), .* needs \(2, 3\)"),
        ("regmean", {"b": {"bias": np.eye(2)}}, r"grams of 'b', 'bias': the shape is \(2, 2\), .* \(2,\) needs none"),
        ("fisher", {"b": {"x": np.ones(2)}}, "fishers of 'b', 'x': the encoders have no such tensor"),
        ("regmean", {"b": {"w": np.eye(3) * np.nan}}, "grams of 'b', 'w': holds NaN"),
        ("fisher", {"b": {"bias": np.array([1, np.inf])}}, "fishers of 'b', 'bias': holds NaN or infinite"),
    ],
)
def test_wrong_statistics_are_named(name: str, given: dict[str, Tensors], message: str) -> None:
    shapes = {"w": (2, 3), "bias": (2,)}
    base = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    experts = {e: {n: np.ones(s, np.float32) for n, s in shapes.items()} for e in "ab"}
    right = {"regmean": np.eye(3), "fisher": np.ones((2, 3))}[name]
    complete = {"a": {"w": right}, **given} if "b" in given and given["b"] and "a" not in given else given
    method = get_method(name, **{{"regmean": "grams", "fisher": "fishers"}[name]: complete})
    with pytest.raises(InputError, match=message):
        merge_state_dicts(base, experts, method)


def test_parameters() -> None:
    for name, parameter in (("regmean", "grams"), ("fisher", "fishers")):
        method = get_method(name)
        assert method == get_method(name) and "array" not in repr(
            get_method(name, **{parameter: {"a": {"w": np.eye(2)}}})
        )
        assert method.for_experts(["a", "b"]) == method and isinstance(hash(method), int)
        given = {"a": {"w": np.eye(2)}}
        resolved = get_method(name, **{parameter: given}).for_experts(["a", "b"])
        assert getattr(resolved, parameter) is given
    assert get_method("fisher").needs_labels and get_method("regmean").needs_data
    with pytest.raises(InputError, match="shrink must be a number at least 0 and at most 1, got 2"):
        get_method("regmean", shrink=2)
    with pytest.raises(InputError, match="floor must be a number above 0, got 0"):
        get_method("fisher", floor=0)
    with pytest.raises(InputError, match="normalise must be one of none, norm, got 'l2'"):
        get_method("fisher", normalise="l2")
