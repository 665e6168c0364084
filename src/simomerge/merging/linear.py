"""Methods that add the task vectors up: zero-shot, average, weighted average, task arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.engine.depth import Depth
from simomerge.merging.engine.stream import TaskVectorStream
from simomerge.merging.method import MergeMethod, of_expert, register

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
    elementwise: ClassVar[bool] = True

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        return base.copy()


class LinearMethod(MergeMethod):
    """theta_0 + sum_t w_t * tau_t. A subclass says what the weights are; see ``algebra`` for what follows from it."""

    elementwise: ClassVar[bool] = True

    def prepare(self, stream: TaskVectorStream) -> Depth:
        return Depth(stream.names)

    def weights(self, name: str, experts: Collection[str], depth: Depth | None) -> dict[str, float]:
        """expert -> weight of its task vector in the tensor ``name``; experts in sorted order."""
        raise NotImplementedError

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Depth | None
    ) -> np.ndarray:
        merged = base.copy()
        for expert, weight in self.weights(name, task_vectors, statistics).items():
            tau = task_vectors[expert]
            tau *= np.float32(weight)  # in place: a new array for every block costs as much as the product
            merged += tau
        return merged


@register
@dataclass(frozen=True)
class Average(LinearMethod):
    """The mean of the experts: theta_0 + 1/T * sum_t tau_t. It needs no base.

    Example:
        >>> Average().merge_tensor("w", np.zeros(1), {"a": np.array([1.0]), "b": np.array([3.0])}, None)
        array([2.])
    """

    name: ClassVar[str] = "average"
    paper: ClassVar[str] = "Model soups (Wortsman et al., 2022)"
    link: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    needs_base: ClassVar[bool] = False

    def weights(self, name: str, experts: Collection[str], depth: Depth | None) -> dict[str, float]:
        return dict.fromkeys(experts, 1 / len(experts))


@register
@dataclass(frozen=True)
class WeightedAverage(LinearMethod):
    """The weighted mean of the experts: theta_0 + sum_t w_t * tau_t / sum_t w_t. It needs no base.

    Example:
        >>> method = WeightedAverage(weight={"a": 3.0, "b": 1.0})
        >>> method.merge_tensor("w", np.zeros(1), {"a": np.array([1.0]), "b": np.array([5.0])}, None)
        array([2.])
    """

    name: ClassVar[str] = "weighted-average"
    paper: ClassVar[str] = "Model soups (Wortsman et al., 2022)"
    link: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    needs_base: ClassVar[bool] = False

    weight: float | Sequence[float] | Mapping[str, float] = parameter(
        1.0, low=0.0, per_expert=True, help="of each expert, relative to the others"
    )

    def weights(self, name: str, experts: Collection[str], depth: Depth | None) -> dict[str, float]:
        given = {expert: of_expert(self.weight, expert) for expert in experts}  # type: ignore[arg-type]
        total = sum(given.values())
        if total <= 0:
            raise InputError("weighted-average: all weights are 0; give at least one expert a positive weight.")
        return {expert: value / total for expert, value in given.items()}


@register
@dataclass(frozen=True)
class TaskArithmetic(LinearMethod):
    """Add the task vectors to the base: theta_0 + sum_t alpha_t * tau_t, usually with one alpha for all.

    The default scale is the one recommended where no validation data choose it. With them, the paper searches
    0, 0.1 ... 1. By expert name, a sequence gives one scale per block (AdaMerging's coefficients): embeddings go
    with the first block, the final norm with the last.

    Example:
        >>> method = TaskArithmetic(scale={"a": 0.5, "b": 0.25})
        >>> method.merge_tensor("w", np.zeros(1), {"a": np.array([2.0]), "b": np.array([4.0])}, None)
        array([2.])
    """

    name: ClassVar[str] = "task-arithmetic"
    paper: ClassVar[str] = "Editing models with task arithmetic (Ilharco et al., 2023)"
    link: ClassVar[str] = "https://arxiv.org/abs/2212.04089"

    scale: float | Sequence[float] | Mapping[str, float | Sequence[float]] = parameter(
        0.4, low=0.0, per_expert=True, per_block=True, help="weight of the task vectors: one number, or one per expert"
    )

    def prepare(self, stream: TaskVectorStream) -> Depth:
        depth = Depth(stream.names)
        for expert, value in self.scale.items() if isinstance(self.scale, Mapping) else ():
            if isinstance(value, Sequence) and len(value) != depth.blocks:
                raise InputError(
                    f"task-arithmetic: scale of '{expert}' has {len(value)} values for {depth.blocks} blocks: "
                    "give one for each, or one number."
                )
        return depth

    def weights(self, name: str, experts: Collection[str], depth: Depth | None) -> dict[str, float]:
        found = {}
        for expert in experts:
            value = of_expert(self.scale, expert)  # type: ignore[arg-type]
            found[expert] = value[depth.position(name)] if depth and isinstance(value, Sequence) else value
        return found
