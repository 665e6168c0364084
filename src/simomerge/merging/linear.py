"""Methods that add the task vectors up: zero-shot, average, task arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simomerge.merging.method import MergeMethod, of_expert, parameter, register

_SIMO = "Single-Input Multi-Output Model Merging (Garcia Giraldo et al., 2025)"
_SIMO_LINK = "https://arxiv.org/abs/2504.11268"


@register
@dataclass(frozen=True)
class ZeroShot(MergeMethod):
    """The base as it is; the experts give their heads only. The lower bound of the paper's tables.

    Example:
        >>> ZeroShot().merge_tensor("w", np.ones(2, np.float32), {}, None)
        array([1., 1.], dtype=float32)
    """

    name: ClassVar[str] = "zero-shot"
    paper: ClassVar[str] = _SIMO
    link: ClassVar[str] = _SIMO_LINK

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        return base.copy()


@register
@dataclass(frozen=True)
class Average(MergeMethod):
    """The mean of the experts: theta_0 + 1/T * sum_t tau_t. It needs no base.

    Example:
        >>> Average().merge_tensor("w", np.zeros(1), {"a": np.array([1.0]), "b": np.array([3.0])}, None)
        array([2.])
    """

    name: ClassVar[str] = "average"
    paper: ClassVar[str] = "Model soups (Wortsman et al., 2022)"
    link: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    needs_base: ClassVar[bool] = False

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        return _add_scaled(base, task_vectors, 1.0 / len(task_vectors))


@register
@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """Add the task vectors to the base: theta_0 + sum_t alpha_t * tau_t, usually with one alpha for all.

    The default scale is the one recommended where no validation data choose it. With them, the paper searches
    0, 0.1 ... 1.

    Example:
        >>> method = TaskArithmetic(scale={"a": 0.5, "b": 0.1})
        >>> method.merge_tensor("w", np.zeros(1), {"a": np.array([2.0]), "b": np.array([10.0])}, None)
        array([2.])
    """

    name: ClassVar[str] = "task-arithmetic"
    paper: ClassVar[str] = "Editing models with task arithmetic (Ilharco et al., 2023)"
    link: ClassVar[str] = "https://arxiv.org/abs/2212.04089"

    scale: float | Sequence[float] | Mapping[str, float] = parameter(
        0.4, low=0.0, per_expert=True, help="weight of the task vectors: one number, or one per expert"
    )

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        assert isinstance(self.scale, (int, float, Mapping)), "a sequence is resolved by for_experts"
        return _add_scaled(base, task_vectors, self.scale)


def _add_scaled(
    base: np.ndarray, task_vectors: Mapping[str, np.ndarray], scale: float | Mapping[str, float]
) -> np.ndarray:
    merged = base.copy()
    for expert, tau in task_vectors.items():
        merged += tau * of_expert(scale, expert)
    return merged
