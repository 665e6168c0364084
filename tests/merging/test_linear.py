"""Zero-shot, average and task arithmetic, against their formulas written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.core.errors import InputError
from simomerge.merging import merge_state_dicts

from .models import Tensors, assert_close, experts, tensors

pytestmark = pytest.mark.filterwarnings("ignore:The task vector of")
few = settings(max_examples=20, deadline=None)


def slow_sum(base: Tensors, models: dict[str, Tensors], scales: dict[str, float]) -> Tensors:
    """theta_0 + sum_t alpha_t (theta_t - theta_0), entry by entry in Python floats."""
    merged = {}
    for name, values in base.items():
        flat = [
            float(b) + sum(scales[e] * (float(m[name].flat[i]) - float(b)) for e, m in models.items())
            for i, b in enumerate(values.flat)
        ]
        merged[name] = np.array(flat, np.float32).reshape(values.shape)
    return merged


@few
@given(tensors(), experts(), st.floats(0, 2), st.data())
def test_against_the_formula(base: Tensors, models: dict[str, Tensors], scale: float, data: st.DataObject) -> None:
    assert_close(merge_state_dicts(base, models, "zero-shot"), base, 0)
    same = dict.fromkeys(models, scale)
    assert_close(merge_state_dicts(base, models, "task-arithmetic", scale=scale), slow_sum(base, models, same))
    mean = merge_state_dicts(base, models, "average")
    assert_close(mean, slow_sum(base, models, dict.fromkeys(models, 1 / len(models))))
    assert_close(mean, merge_state_dicts(None, models, "average"))
    scales = {expert: data.draw(st.floats(0, 2)) for expert in models}
    merged = merge_state_dicts(base, models, "task-arithmetic", scale=scales)
    assert_close(merged, slow_sum(base, models, scales))
    in_order = merge_state_dicts(base, models, "task-arithmetic", scale=list(scales.values()))
    assert_close(in_order, merged, 0)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([0.1], "scale has 1 values for 2 experts"),
        ({"a": 0.1, "c": 0.1}, "scale is given for a, c, but the experts are a, b"),
        ([0.1, -0.1], "scale must be a number at least 0, got -0.1"),
        ([0.1, float("nan")], "got nan"),
        ("0.1", "got '0.1'"),
    ],
)
def test_bad_scales(scale: object, message: str) -> None:
    models = {"a": {"w": np.ones(1)}, "b": {"w": np.ones(1)}}
    with pytest.raises(InputError, match=message):
        merge_state_dicts({"w": np.zeros(1)}, models, "task-arithmetic", scale=scale)
