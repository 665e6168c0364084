"""Slerp, Karcher mean and model stock against slow implementations on the vectors themselves."""

import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging import get_method, merge_state_dicts, spherical

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)
shapes = st.sampled_from([(), (1,), (5,), (3, 4), (2, 3, 2, 2)])
Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def combine(factors: Vector, vectors: list[Vector]) -> Vector:
    return [math.fsum(f * v[i] for f, v in zip(factors, vectors, strict=True)) for i in range(len(vectors[0]))]


def slow_slerp(a: Vector, b: Vector, t: float) -> Vector:
    lengths = math.sqrt(dot(a, a) * dot(b, b))
    if lengths == 0 or abs(dot(a, b) / lengths) > 0.9995:
        return combine([1 - t, t], [a, b])
    angle = math.acos(dot(a, b) / lengths)
    return combine([math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)], [a, b])


def slow_karcher(vectors: list[Vector], iterations: int = 300) -> Vector:
    lengths = [math.sqrt(dot(v, v)) for v in vectors]
    units = [[x / n for x in v] for v, n in zip(vectors, lengths, strict=True) if n > 0]
    if not units:
        return [0.0] * len(vectors[0])
    mean = combine([1 / len(units)] * len(units), units)
    for _ in range(iterations):
        mean = [x / math.sqrt(dot(mean, mean)) for x in mean]
        step = [0.0] * len(mean)
        for unit in units:
            cosine = max(-1.0, min(1.0, dot(mean, unit)))
            angle = math.acos(cosine)
            ratio = angle / math.sin(angle) if angle > 1e-9 else 1.0
            step = [s + ratio * (u - cosine * m) / len(units) for s, u, m in zip(step, unit, mean, strict=True)]
        length = math.sqrt(dot(step, step))
        if length > 0:
            mean = combine([math.cos(length), math.sin(length) / length], [mean, step])
    return [x * sum(lengths) / len(lengths) / math.sqrt(dot(mean, mean)) for x in mean]


def slow_stock(taus: list[Vector]) -> Vector:
    cosines = []
    for i in range(len(taus)):
        for j in range(i):
            lengths = math.sqrt(dot(taus[i], taus[i]) * dot(taus[j], taus[j]))
            cosines.append(max(-1.0, min(1.0, dot(taus[i], taus[j]) / lengths)) if lengths else 0.0)
    count, c = len(taus), sum(cosines) / len(cosines)
    t = count * c / (1 + (count - 1) * c) if 1 + (count - 1) * c > 1e-9 else -math.inf
    return combine([max(t, -1.0) / count] * count, taus)


def random_weights(seed: int, count: int, shape: tuple[int, ...], spread: float) -> dict[str, np.ndarray]:
    """Experts around one point; ``spread`` is the size of their differences relative to it."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(shape)
    return {f"e{i}": (centre + spread * rng.standard_normal(shape)).astype(np.float32) for i in range(count)}


def merged(
    weights: dict[str, np.ndarray], name: str, base: np.ndarray | None = None, **parameters: float
) -> np.ndarray:
    models = {expert: {"w": w} for expert, w in weights.items()}
    return merge_state_dicts(None if base is None else {"w": base}, models, get_method(name, **parameters))["w"]


def flat(weights: dict[str, np.ndarray]) -> list[Vector]:
    return [w.reshape(-1).astype(float).tolist() for w in weights.values()]


def assert_agree(ours: np.ndarray, expected: Vector, tolerance: float = 1e-6) -> None:
    size = max(map(abs, expected), default=0.0)
    np.testing.assert_allclose(ours.reshape(-1), expected, rtol=0, atol=tolerance * size)


@few
@given(seeds, shapes, st.sampled_from([1e-4, 0.02, 1.0, 100.0]), st.floats(0, 1))
def test_slerp(seed: int, shape: tuple[int, ...], spread: float, t: float) -> None:
    weights = random_weights(seed, 2, shape, spread)
    base = np.zeros(shape, np.float32)
    ours = merged(weights, "slerp", base, t=t)
    assert ours.shape == shape and ours.dtype == np.float32
    size = max(abs(x) for v in flat(weights) for x in v)
    np.testing.assert_allclose(ours.reshape(-1), slow_slerp(*flat(weights), t), rtol=0, atol=1e-6 * size)


def test_slerp_from_the_first_to_the_second_by_name() -> None:
    sixty_degrees = np.array([[1.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(spherical._slerp_factors(sixty_degrees, 0.5), [0.5774, 0.5774], atol=1e-4)
    weights = {"b": np.array([0.0, 3.0], np.float32), "a": np.array([1.0, 0.0], np.float32)}
    np.testing.assert_allclose(merged(weights, "slerp", t=0), [1, 0], atol=1e-7)
    np.testing.assert_allclose(merged(weights, "slerp", t=1), [0, 3], atol=1e-7)
    np.testing.assert_allclose(merged(weights, "slerp", t=1 / 3), [math.cos(math.pi / 6), 1.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([2.0, 0.0], [4.0, 0.0], [2.5, 0.0]),  # collinear
        ([2.0, 0.0], [-2.0, 0.0], [1.0, 0.0]),  # opposite: also linear, as in mergekit
        ([0.0, 0.0], [4.0, 4.0], [1.0, 1.0]),
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
        ([1.0, 0.0], [1.0, 0.03], [1.0, 0.0075]),  # cosine 0.99955
    ],
)
def test_slerp_is_linear_where_there_is_no_angle(a: Vector, b: Vector, expected: Vector) -> None:
    weights = {"a": np.array(a, np.float32), "b": np.array(b, np.float32)}
    np.testing.assert_allclose(merged(weights, "slerp", t=0.25), expected, rtol=1e-6)


@few
@given(seeds, st.integers(1, 4), st.sampled_from([(2,), (5,), (3, 4)]), st.sampled_from([1e-4, 0.02, 0.3]))
def test_karcher(seed: int, count: int, shape: tuple[int, ...], spread: float) -> None:
    weights = random_weights(seed, count, shape, spread)
    assert_agree(merged(weights, "karcher"), slow_karcher(flat(weights)))


def test_karcher_has_the_least_squared_angles() -> None:
    weights = random_weights(3, 4, (3,), 1.0)
    units = [w.astype(np.float64) / np.linalg.norm(w.astype(np.float64)) for w in weights.values()]

    def squared_angles(point: np.ndarray) -> float:
        return sum(np.arccos(np.clip(point @ unit / np.linalg.norm(point), -1, 1)) ** 2 for unit in units)

    found = scipy.optimize.minimize(squared_angles, np.mean(units, axis=0), method="BFGS", options={"gtol": 1e-10})
    ours = merged(weights, "karcher").astype(np.float64)
    np.testing.assert_allclose(ours / np.linalg.norm(ours), found.x / np.linalg.norm(found.x), atol=1e-5)
    assert squared_angles(ours) <= found.fun + 1e-9
    assert np.linalg.norm(ours) == pytest.approx(np.mean([np.linalg.norm(w) for w in weights.values()]), rel=1e-6)


def test_karcher_of_two_is_the_middle_of_slerp_for_equal_norms() -> None:
    weights = {e: w / np.linalg.norm(w) for e, w in random_weights(9, 2, (6,), 2.0).items()}
    np.testing.assert_allclose(merged(weights, "karcher"), merged(weights, "slerp"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[0.0, 0.0], [3.0, 0.0]], [1.5, 0.0]),  # zero counts in the norm only
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[2.0, 0.0], [-4.0, 0.0]], [3.0, 0.0]),  # they cancel out: the first one's direction
        ([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], [1.0, 0.0]),  # opposite to the mean: left out
        ([[2.0], [-4.0], [-3.0]], [-3.0]),
    ],
)
def test_karcher_without_a_direction(points: list[Vector], expected: Vector) -> None:
    weights = {f"e{i}": np.array(p, np.float32) for i, p in enumerate(points)}
    np.testing.assert_allclose(merged(weights, "karcher"), expected, rtol=1e-6)


def test_karcher_stops_by_iterations_and_by_tolerance() -> None:
    weights = random_weights(4, 3, (4,), 2.0)
    exact = slow_karcher(flat(weights))
    error = [np.abs(merged(weights, "karcher", iterations=n) - exact).max() for n in (1, 3, 100)]
    assert error[0] > error[1] > error[2] and error[2] < 1e-6
    assert np.abs(merged(weights, "karcher", tolerance=0.1) - exact).max() > error[2]


@few
@given(seeds, st.integers(2, 4), shapes, st.sampled_from([0.02, 1.0, 100.0]), st.booleans())
def test_model_stock(seed: int, count: int, shape: tuple[int, ...], spread: float, still: bool) -> None:
    taus = random_weights(seed, count, shape, spread)
    if still:
        taus["e1"] = np.zeros(shape, np.float32)
    base = np.zeros(shape, np.float32)
    # Where cosines cancel, digits are lost, so the tolerance is relative to the task vectors.
    size = max(abs(x) for v in flat(taus) for x in v)
    ours = merged(taus, "model-stock", base)
    assert ours.shape == shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours.reshape(-1), slow_stock(flat(taus)), rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[1.0, 0.0], [3.0, 0.0]], [2.0, 0.0]),  # one direction: the mean
        ([[1.0, 0.0], [0.0, 3.0]], [0.0, 0.0]),  # right angles: the base
        ([[1.0, 0.0], [-3.0, 0.0]], [1.0, 0.0]),  # opposite: t = -1, not minus infinity
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
        ([[1e-8, 0.0], [1e-8, 0.0]], [1e-8, 0.0]),  # mergekit's floor of 1e-6 would give 2e-18
    ],
)
def test_model_stock_in_special_cases(points: list[Vector], expected: Vector) -> None:
    taus = {f"e{i}": np.array(p, np.float32) for i, p in enumerate(points)}
    np.testing.assert_allclose(merged(taus, "model-stock", np.zeros(2, np.float32)), expected, rtol=1e-6)


@few
@given(seeds, shapes, st.sampled_from([0.02, 0.5, 100.0]), st.sampled_from(["slerp", "karcher"]))
def test_no_result_depends_on_a_point_of_reference_or_the_order(
    seed: int, shape: tuple[int, ...], spread: float, name: str
) -> None:
    # Without a base, the first expert given is the point of reference.
    weights = random_weights(seed, 2, shape, spread)
    base = random_weights(seed + 1, 1, shape, spread)["e0"]
    turned = dict(reversed(weights.items()))
    tolerance = 2e-6 * max(np.abs(w).max() for w in (base, *weights.values()))
    one, *others = (merged(weights, name), merged(turned, name), merged(weights, name, base))
    for other in others:
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(merged(weights, name, base), merged(turned, name, base))


def test_how_many_experts() -> None:
    three = {e: {"w": w} for e, w in random_weights(0, 3, (2,), 1.0).items()}
    with pytest.raises(InputError, match="'slerp' merges exactly 2 experts, got 3: e0, e1, e2"):
        merge_state_dicts(None, three, "slerp")
    one = {"a": three["e0"]}
    for name in ("slerp", "model-stock"):
        with pytest.raises(InputError, match=f"'{name}' needs at least 2 expert"):
            merge_state_dicts(three["e1"], one, name)
    with pytest.raises(InputError, match="'model-stock' needs the base"):
        merge_state_dicts(None, three, "model-stock")
    np.testing.assert_allclose(merge_state_dicts(None, one, "karcher")["w"], three["e0"]["w"], rtol=1e-6)


def test_ranges() -> None:
    for name, parameters in (
        ("slerp", {"t": 1.1}),
        ("slerp", {"t": -0.1}),
        ("karcher", {"iterations": 0}),
        ("karcher", {"iterations": 1.5}),
        ("karcher", {"tolerance": 0.0}),
    ):
        with pytest.raises(InputError, match="must be a number"):
            get_method(name, **parameters)
