"""The registry, and parameters with their ranges."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest

from simomerge.core.errors import InputError
from simomerge.merging import MergeMethod, available, get_method, of_expert, parameter, register


def test_every_method_documents_itself() -> None:
    assert {"average", "task-arithmetic", "ties", "zero-shot"} <= set(available())
    assert list(available()) == sorted(available())
    for name, method in available().items():
        assert method.name == name and method.paper and method.link.startswith("https://")
        assert method.__doc__ and ">>> " in method.__doc__
        assert method.minimum_experts >= 1
        for spec in fields(method):
            assert spec.metadata["help"]
        assert get_method(name) == method()


def test_suggestions() -> None:
    with pytest.raises(InputError, match="no merge method 'task_arithmetic': did you mean 'task-arithmetic'"):
        get_method("task_arithmetic")
    with pytest.raises(InputError, match=r"no merge method 'xyz': choose from average, .*zero-shot"):
        get_method("xyz")
    with pytest.raises(InputError, match="'ties' has no parameter 'densty': did you mean 'density'"):
        get_method("ties", densty=0.1)
    with pytest.raises(InputError, match="'task-arithmetic' has no parameter 'density': choose from scale"):
        get_method("task-arithmetic", density=0.1)
    with pytest.raises(InputError, match="'average' has no parameter 'scale': it takes no parameters"):
        get_method("average", scale=0.1)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 20, float("nan"), float("inf"), True, "0.2", None, [0.2]])
def test_density_is_a_fraction(density: object) -> None:
    with pytest.raises(InputError, match=r"density must be a number above 0 and at most 1, got .*write 0.2 for 20"):
        get_method("ties", density=density)


def test_other_ranges() -> None:
    with pytest.raises(InputError, match="trim must be one of global, tensor, got 'layer'"):
        get_method("ties", trim="layer")
    with pytest.raises(InputError, match="scale must be a number at least 0, got -1"):
        get_method("ties", scale=-1)
    with pytest.raises(InputError, match=r"ties: scale must be a number at least 0, got \[0.1\]"):
        get_method("ties", scale=[0.1])
    assert get_method("ties", density=1, scale=2.5) == get_method("ties", density=1.0, scale=2.5)


def test_per_expert_values() -> None:
    method = get_method("task-arithmetic", scale=(0.1, 0.2))
    assert method.for_experts(["b", "a"]) == get_method("task-arithmetic", scale={"b": 0.1, "a": 0.2})
    assert get_method("task-arithmetic", scale=0.3).for_experts(["a"]) == get_method("task-arithmetic", scale=0.3)
    assert of_expert(0.5, "a") == of_expert({"a": 0.5}, "a") == 0.5


def test_a_new_method_is_one_class() -> None:
    @dataclass(frozen=True)
    class Incomplete(MergeMethod):
        power: int = parameter(2, low=1, high=4, help="an integer")

    class Taken(Incomplete):
        def merge_tensor(self, name: str, base: np.ndarray, task_vectors: Any, statistics: Any) -> np.ndarray:
            return base

    with pytest.raises(ValueError, match="'ties' is already registered"):
        register("ties", "none", "https://example.org")(Taken)
    assert Taken(power=4).power == 4
    with pytest.raises(InputError, match=r"power must be a number at least 1 and at most 4, got 2.5"):
        Taken(power=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"abstract method '?merge_tensor"):
        Incomplete()  # type: ignore[abstract]
