"""Methods that add weighted task vectors: zero-shot, average, weighted average, task arithmetic."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.engine.depth import Depth
from simomerge.merging.engine.stream import TaskVectors, TaskVectorStream
from simomerge.merging.method import MergeMethod, PerExpert, of_expert, register

_SOUPS = "Model soups (Wortsman et al., 2022)", "https://arxiv.org/abs/2203.05482"


@register(
    "zero-shot",
    "Single-Input Multi-Output Model Merging (Garcia Giraldo et al., 2025)",
    "https://arxiv.org/abs/2504.11268",
)
@dataclass(frozen=True)
class ZeroShot(MergeMethod):
    """The base, unchanged; the experts contribute only their heads. The lower bound in the paper's tables.

    Example:
        >>> ZeroShot().merge_tensor("w", np.ones(2, np.float32), {}, None)
        array([1., 1.], dtype=float32)
    """

    elementwise = True

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        return base.copy()

    def shares(self, name: str, experts: Collection[str], statistics: Any) -> dict[str, float]:
        return {}


class LinearMethod(MergeMethod):
    """theta_0 + sum_t w_t * tau_t. Subclasses define the weights; `algebra.with_experts` edits such merges."""

    elementwise = True

    def prepare(self, stream: TaskVectorStream) -> Depth:
        return stream.depth

    @abstractmethod
    def weights(self, name: str, experts: Collection[str], depth: Depth | None) -> dict[str, float]:
        """Expert -> weight of its task vector in the tensor ``name``, with the experts in sorted order."""

    def shares(self, name: str, experts: Collection[str], statistics: Depth | None) -> dict[str, float]:
        weights = self.weights(name, experts, statistics)
        total = sum(weights.values())
        return {expert: weight / total for expert, weight in weights.items()} if total > 0 else {}

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Depth | None
    ) -> np.ndarray:
        merged = base.copy()
        for expert, weight in self.weights(name, task_vectors, statistics).items():
            tau = task_vectors[expert]
            tau *= np.float32(weight)  # In place: a new array for every block would cost as much as the product.
            merged += tau
        return merged


@register("average", *_SOUPS)
@dataclass(frozen=True)
class Average(LinearMethod):
    """The mean of the experts: theta_0 + 1/T * sum_t tau_t. It needs no base.

    Example:
        >>> Average().merge_tensor("w", np.zeros(1), {"a": np.array([1.0]), "b": np.array([3.0])}, None)
        array([2.])
    """

    needs_base = False

    def weights(self, name: str, experts: Collection[str], depth: Depth | None) -> dict[str, float]:
        return dict.fromkeys(experts, 1 / len(experts))


@register("weighted-average", *_SOUPS)
@dataclass(frozen=True)
class WeightedAverage(LinearMethod):
    """The weighted mean of the experts: theta_0 + sum_t w_t * tau_t / sum_t w_t. It needs no base.

    Example:
        >>> method = WeightedAverage(weight={"a": 3.0, "b": 1.0})
        >>> method.merge_tensor("w", np.zeros(1), {"a": np.array([1.0]), "b": np.array([5.0])}, None)
        array([2.])
    """

    needs_base = False

    weight: PerExpert = parameter(1.0, low=0.0, per_expert=True, help="weight of an expert relative to the others")

    def weights(self, name: str, experts: Collection[str], depth: Depth | None) -> dict[str, float]:
        given = {expert: of_expert(self.weight, expert) for expert in experts}
        total = sum(given.values())
        if total <= 0:
            raise InputError("weighted-average: all weights are 0; give at least one expert a positive weight.")
        return {expert: value / total for expert, value in given.items()}


@register(
    "task-arithmetic",
    "Editing models with task arithmetic (Ilharco et al., 2023)",
    "https://arxiv.org/abs/2212.04089",
)
@dataclass(frozen=True)
class TaskArithmetic(LinearMethod):
    """Add the scaled task vectors to the base: theta_0 + sum_t alpha_t * tau_t, usually with one alpha for all.

    The default scale is the one recommended if no validation data are available. With validation data, the paper
    searches 0, 0.1, ..., 1. Instead of a number, an expert may have a sequence of one scale per block, as learned by
    AdaMerging. Embeddings then use the scale of the first block, and the final norm that of the last.

    Example:
        >>> method = TaskArithmetic(scale={"a": 0.5, "b": 0.25})
        >>> method.merge_tensor("w", np.zeros(1), {"a": np.array([2.0]), "b": np.array([4.0])}, None)
        array([2.])
    """

    scale: float | Sequence[float] | Mapping[str, float | Sequence[float]] = parameter(
        0.4, low=0.0, per_expert=True, per_block=True, help="weight of the task vectors: one number, or one per expert"
    )

    def prepare(self, stream: TaskVectorStream) -> Depth:
        depth = stream.depth
        for expert, value in self.scale.items() if isinstance(self.scale, Mapping) else ():
            if isinstance(value, Sequence) and len(value) != max(depth.blocks, 1):
                raise InputError(
                    f"task-arithmetic: scale of '{expert}' has {len(value)} values for {depth.blocks} blocks: "
                    "give one for each, or one number."
                )
        return depth

    def weights(self, name: str, experts: Collection[str], depth: Depth | None) -> dict[str, float]:
        scales = {expert: of_expert(self.scale, expert) for expert in experts}
        return {e: s[depth.position(name)] if depth and isinstance(s, Sequence) else s for e, s in scales.items()}
