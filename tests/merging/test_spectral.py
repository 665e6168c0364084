"""Iso-C, Iso-CTS and TSV-M against slow float64 implementations that decompose everything, as public code does.

The tolerance is 1e-6 of the largest entry: float32 output is good to 6e-8, and the rest is what the Gram matrices
cost (at most 3e-8, see `spectral._MIN_EIGENVALUE`). The slow ones in float32, as in public code, are off by up to
1e-6 on matrices as small as these, and by 1e-3 and more on nearly singular ones.
"""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging import get_method, merge_state_dicts, spectral

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = settings(max_examples=25, deadline=None)
NAMES = ["iso-c", "iso-cts", "tsv-m"]
names = st.sampled_from(NAMES)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def slow_svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)


def slow_iso_c(taus: list[np.ndarray]) -> np.ndarray:
    u, s, v = slow_svd(sum(t.astype(np.float64) for t in taus))
    return u @ np.diag(np.full(len(s), s.mean())) @ v


def slow_iso_cts(taus: list[np.ndarray], common: float = 0.8) -> np.ndarray:
    rank, count = min(taus[0].shape), len(taus)
    each = round((rank - int(rank * common)) / count)
    shared = rank - each * count
    u, s, v = slow_svd(sum(t.astype(np.float64) for t in taus))
    left, sigma, right = np.zeros_like(u), np.zeros_like(s), np.zeros_like(v)
    for i, tau in enumerate(taus):
        u_own, s_own, v_own = slow_svd(tau - u[:, :shared] @ u[:, :shared].T @ tau)
        for k in range(each):
            left[:, i * each + k], sigma[i * each + k], right[i * each + k] = u_own[:, k], s_own[k], v_own[k]
    for k in range(shared):
        left[:, count * each + k], sigma[count * each + k], right[count * each + k] = u[:, k], s[k], v[k]
    return scipy.linalg.polar(left)[0] @ np.diag(np.full(rank, sigma.mean())) @ scipy.linalg.polar(right)[0]


def slow_tsv_m(taus: list[np.ndarray]) -> np.ndarray:
    keep = max(min(taus[0].shape) // len(taus), 1)
    columns, sigma, rows = [], [], []
    for tau in taus:
        u, s, v = slow_svd(tau)
        for k in range(keep):
            columns.append(u[:, k])
            sigma.append(s[k])
            rows.append(v[k])
    left, right = (scipy.linalg.polar(m)[0] for m in (np.stack(columns, axis=1), np.stack(rows)))
    return sum(np.outer(left[:, k], right[k]) * sigma[k] for k in range(len(sigma)))


SLOW = {"iso-c": slow_iso_c, "iso-cts": slow_iso_cts, "tsv-m": slow_tsv_m}


def random_taus(seed: int, count: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


def merged(taus: list[np.ndarray], name: str, base: np.ndarray | None = None, **parameters: float) -> np.ndarray:
    base = np.zeros(taus[0].shape, np.float32) if base is None else base
    experts = {f"expert{i}": {"w": base + tau} for i, tau in enumerate(taus)}
    return merge_state_dicts({"w": base}, experts, get_method(name, **parameters))["w"]


def assert_agree(ours: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@few
@given(names, shapes, st.integers(1, 5), st.integers(0, 10_000))
def test_against_the_slow_one(name: str, shape: tuple[int, int], count: int, seed: int) -> None:
    # Tall, wide, of one row or column, and more experts than singular vectors.
    taus = random_taus(seed, count, shape)
    assert_agree(merged(taus, name), SLOW[name](taus))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(48, 48), (40, 96), (96, 40)])
def test_against_the_slow_one_on_spectra_like_those_of_fine_tuning(name: str, shape: tuple[int, int]) -> None:
    # A few large singular values, a long tail, on a base a hundred times larger.
    rng = np.random.default_rng(1)
    base = rng.standard_normal(shape).astype(np.float32)
    scale = np.float32(0.01)
    taus = []
    for tau in random_taus(2, 3, shape):
        u, s, v = slow_svd(tau)
        taus.append(((u * scale / np.arange(1, len(s) + 1) ** 2) @ v).astype(np.float32))
    exact = [(base + tau) - base for tau in taus]  # what is left of them in float32
    expected = base + 0.7 * SLOW[name](exact)
    assert_agree(merged(taus, name, base, scale=0.7), expected, 1e-7)


@few
@given(st.floats(0, 1), st.sampled_from([(12, 12), (7, 20), (20, 7)]), st.integers(1, 4), st.integers(0, 100))
def test_the_common_fraction(common: float, shape: tuple[int, int], count: int, seed: int) -> None:
    rank = min(shape)
    if round((rank - int(rank * common)) / count) * count > rank:
        common = 0.5  # where public code ends in an error; see the next test
    taus = random_taus(seed, count, shape)
    assert_agree(merged(taus, "iso-cts", common=common), slow_iso_cts(taus, common))


def test_without_a_common_space_every_task_has_its_share() -> None:
    taus = random_taus(0, 3, (5, 8))  # round(5 / 3) = 2 each would be 6 of 5; 1 each, and 2 in common
    ours = merged(taus, "iso-cts", common=0.0)
    assert_agree(ours, slow_iso_cts(taus, 0.5))
    np.testing.assert_allclose(slow_svd(ours)[1], slow_svd(ours)[1][0], rtol=1e-6)
    with pytest.raises(InputError, match=r"common must be a number at least 0 and at most 1, got 1\.5"):
        get_method("iso-cts", common=1.5)


@pytest.mark.parametrize("name", ["iso-c", "iso-cts"])
@pytest.mark.parametrize("shape", [(6, 6), (5, 30), (30, 5)])
def test_the_spectrum_is_flat(name: str, shape: tuple[int, int]) -> None:
    taus = random_taus(3, 2, shape)
    sigma = slow_svd(merged(taus, name))[1]
    np.testing.assert_allclose(sigma, sigma.mean(), rtol=1e-6)
    if name == "iso-c":
        assert sigma.mean() == pytest.approx(slow_svd(taus[0] + taus[1])[1].mean(), rel=1e-6)


@few
@given(shapes, st.integers(0, 1000))
def test_one_expert(shape: tuple[int, int], seed: int) -> None:
    taus = random_taus(seed, 1, shape)
    assert_agree(merged(taus, "tsv-m"), taus[0])
    assert_agree(merged(taus, "iso-cts"), slow_iso_c(taus))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4), (3, 2, 2, 2)])
def test_all_but_matrices_are_averaged(name: str, shape: tuple[int, ...]) -> None:
    taus = random_taus(4, 3, shape)
    with pytest.warns(UserWarning, match=f"{name} merges matrices, and this encoder has none"):
        ours = merged(taus, name, np.ones(shape, np.float32), scale=0.5)
    np.testing.assert_allclose(ours, 1 + 0.5 * np.mean(taus, axis=0), rtol=1e-6)
    assert ours.shape == shape and ours.dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_zero_stays_zero(name: str) -> None:
    zero = np.zeros((4, 3), np.float32)
    np.testing.assert_array_equal(merged([zero, zero], name), zero)
    tau = random_taus(0, 1, (4, 3))[0]
    opposed = merged([tau, -tau], name)
    if name != "tsv-m":
        np.testing.assert_array_equal(opposed, zero)
    assert np.isfinite(opposed).all()


def test_an_expert_that_did_not_move_has_no_singular_vectors() -> None:
    taus = random_taus(5, 2, (9, 12))
    still = np.zeros((9, 12), np.float32)
    sigma = slow_svd(merged([*taus, still], "tsv-m"))[1]
    assert np.count_nonzero(sigma > 1e-5) == 2 * 3  # a third of the rank each
    left, right = [], []
    for tau in taus:
        u, _, v = slow_svd(tau)
        left.append(u[:, :3])
        right.append(v[:3])
    s = np.concatenate([slow_svd(tau)[1][:3] for tau in taus])
    expected = scipy.linalg.polar(np.hstack(left))[0] * s @ scipy.linalg.polar(np.vstack(right))[0]
    assert_agree(merged([*taus, still], "tsv-m"), expected)
    assert np.isfinite(merged([*taus, still], "iso-cts", common=0.2)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_rank_deficient_task_vectors_stay_within_bounds(name: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(6)
    taus = [np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1])).astype(np.float32) for _ in "ab"]
    sigma = slow_svd(merged(taus, name))[1]
    assert np.isfinite(sigma).all() and sigma[0] <= 1.001 * sum(slow_svd(tau)[1][0] for tau in taus)
    if name == "iso-c":  # the two directions of the sum are kept, and no other
        np.testing.assert_allclose(sigma[:2], slow_svd(taus[0] + taus[1])[1][:2].mean(), rtol=1e-5)
    assert sigma[2:].max() < 1e-6 * sigma[0]


def low_rank(seed: int, rank: int, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 64), (40, 96), (96, 40)])
def test_rounding_of_low_rank_task_vectors_has_no_directions(name: str, shape: tuple[int, int]) -> None:
    """Otherwise the result would depend on the last bits of the weights, and on the linear algebra library."""
    taus = [low_rank(seed, 4, shape) for seed in range(2)]
    noise = np.random.default_rng(9).standard_normal((2, *shape)).astype(np.float32)
    others = [tau + np.float32(1e-7) * each for tau, each in zip(taus, noise, strict=True)]
    assert_agree(merged(others, name), merged(taus, name), 1e-5)
    assert np.linalg.matrix_rank(merged(taus, name), tol=1e-3) == 8


@pytest.mark.parametrize("shape", [(64, 64), (40, 96), (96, 40)])
def test_tsv_m_of_low_rank_task_vectors(shape: tuple[int, int]) -> None:
    taus = [low_rank(seed, 4, shape) for seed in range(2)]
    first, second = map(slow_svd, taus)
    u, s, v = (np.concatenate([first[place], second[place]], int(place == 0)) for place in range(3))
    kept = s > 1e-3
    expected = (scipy.linalg.polar(u[:, kept])[0] * s[kept]) @ scipy.linalg.polar(v[kept])[0]
    assert kept.sum() == 8
    assert_agree(merged(taus, "tsv-m"), expected)
    assert_agree(merged([taus[0], taus[0]], "tsv-m"), taus[0])  # the same expert twice


def test_a_nearly_singular_matrix_is_decomposed_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    u, _, v = slow_svd(random_taus(7, 1, (20, 20))[0])
    easy, hard = ((u * np.logspace(0, -digits, 20)) @ v for digits in (3, 7))
    decomposed = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda m, **more: decomposed.append(m) or svd(m, **more))
    for matrix, times in ((easy, 0), (hard, 1), (hard[:, :15], 2), (hard[:15], 3)):
        factor, mean = spectral._polar(matrix)
        assert len(decomposed) == times
        left, sigma, right = svd(matrix, full_matrices=False)
        kept = sigma > 1e-6 * sigma[0]
        assert kept.all() == (matrix is not hard)
        np.testing.assert_allclose(factor, left[:, kept] @ right[kept], atol=1e-8)
        assert mean == pytest.approx(sigma[kept].mean())
    decomposed.clear()
    for matrix, count, times in ((easy, 20, 0), (hard, 5, 0), (hard, 20, 1), (hard[:, :15], 15, 2), (hard, 0, 2)):
        left, sigma, right = spectral._singular_triplets(matrix, count)
        assert len(decomposed) == times
        u, s, v = svd(matrix, full_matrices=False)
        count = int(np.count_nonzero(s[:count] > 1e-6 * s[0]))
        np.testing.assert_allclose(np.sort(sigma), s[:count][::-1], rtol=1e-6)
        np.testing.assert_allclose((left * sigma) @ right, (u[:, :count] * s[:count]) @ v[:count], atol=1e-9)


def test_polar_factors_and_singular_triplets_of_small_matrices() -> None:
    factor, mean = spectral._polar(np.array([[0.0, 2.0], [4.0, 0.0], [0.0, 0.0]]))
    np.testing.assert_allclose(factor, [[0, 1], [1, 0], [0, 0]], atol=1e-6)
    assert mean == pytest.approx(3)
    left, sigma, right = spectral._singular_triplets(np.diag([3.0, 1.0, 2.0])[:2], 1)
    np.testing.assert_array_equal(np.abs(left), [[1], [0]])
    np.testing.assert_array_equal(sigma, [3])
    np.testing.assert_array_equal(np.abs(right), [[1, 0, 0]])


@pytest.mark.parametrize("factor", [1e-30, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_very_small_and_very_large_task_vectors(name: str, factor: float) -> None:
    taus = random_taus(8, 2, (5, 7))
    scaled = [tau * np.float32(factor) for tau in taus]
    assert_agree(merged(scaled, name).astype(np.float64), SLOW[name](taus) * factor, 1e-6)
