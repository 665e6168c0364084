"""Small random models, as hypothesis strategies."""

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
