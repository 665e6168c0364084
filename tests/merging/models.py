"""Small random models, as hypothesis strategies and from a seed, and slow merges to compare with."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

Tensors = dict[str, np.ndarray]
SHAPES = {"encoder.weight": (3, 4), "encoder.bias": (5,), "scalar": ()}

# Few distinct magnitudes, all exact in float16: ties at the threshold and sums of exactly zero are common.
COARSE = st.sampled_from([-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0])
FINE = st.floats(-8, 8, width=32)


def tensors(values: Any = FINE) -> Any:
    return st.fixed_dictionaries(
        {name: hnp.arrays(np.float32, shape, elements=values) for name, shape in SHAPES.items()}
    )


def experts(values: Any = FINE, minimum: int = 1) -> Any:
    return st.lists(tensors(values), min_size=minimum, max_size=3).map(
        lambda models: dict(zip(("depth", "seg", "normals"), models, strict=False))
    )


def assert_close(left: Tensors, right: Tensors, tolerance: float = 1e-4) -> None:
    assert set(left) == set(right)
    for name, array in left.items():
        np.testing.assert_allclose(array, right[name], rtol=0, atol=tolerance, err_msg=name)


# The values of each tensor are 10 times as large as those of the next one.
APART = {"patch": (4, 3, 2, 5), "matrix": (6, 5), "wide": (2, 40), "bias": (37,), "one": (1,), "scalar": ()}


def ten_times_apart(seed: int, count: int = 3) -> tuple[Tensors, dict[str, Tensors]]:
    """A base and experts; names are not in alphabetical order."""
    rng = np.random.default_rng(seed)

    def model() -> Tensors:
        drawn = {name: rng.standard_normal(shape) / 10**i for i, (name, shape) in enumerate(APART.items())}
        return {name: np.asarray(values, np.float32) for name, values in drawn.items()}

    return model(), {expert: model() for expert in ("seg", "depth", "normals", "edges")[:count]}


def merge_slowly(
    base: Tensors, models: dict[str, Tensors], merge: Callable[[str, dict[str, list[float]]], list[float]]
) -> Tensors:
    """``merge(tensor name, expert -> flat task vector)`` in Python floats, added to the base."""
    merged = {}
    for name, values in base.items():
        taus = {e: [float(v) for v in np.ravel(models[e][name] - values)] for e in sorted(models)}
        merged[name] = values + np.array(merge(name, taus), np.float64).reshape(values.shape)
    return merged


def assert_same(merged: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    """Equal up to float32's rounding of the largest value of the tensor."""
    for name, array in expected.items():
        assert merged[name].dtype == np.float32 and merged[name].shape == array.shape
        limit = tolerance * max(float(np.abs(array).max()), 1e-30)
        np.testing.assert_allclose(merged[name], array, rtol=tolerance, atol=limit, err_msg=name)
