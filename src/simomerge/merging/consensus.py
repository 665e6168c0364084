"""Methods in which the task vectors vote on every entry: MagMax, TALL-masks, consensus, EMR."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.engine.stream import TaskVectors, TaskVectorStream
from simomerge.merging.method import MergeMethod, PerExpert, of_expert, register

_TALL = "TALL-masks and consensus merging (Wang et al., 2024)", "https://arxiv.org/abs/2405.07813"


@register("magmax", "MagMax (Marczak et al., 2024)", "https://arxiv.org/abs/2407.06322")
@dataclass(frozen=True)
class MagMax(MergeMethod):
    """Per entry, the value of greatest magnitude among the task vectors (Marczak et al., 2024).

    Of two opposite values of that magnitude, the positive one is taken. The authors' code takes that of the later
    expert, so its result depends on the order of the experts.

    Example:
        >>> task_vectors = {"a": np.array([1.0, -2.0, -4.0]), "b": np.array([-3.0, 2.0, 1.0])}
        >>> MagMax().merge_tensor("w", np.zeros(3), task_vectors, None)
        array([-3.,  2., -4.])
    """

    elementwise = True

    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        highest = reduce(np.maximum, task_vectors.values())
        lowest = reduce(np.minimum, task_vectors.values())
        return base + np.where(highest >= -lowest, highest, lowest) * np.float32(self.scale)


class MaskMethod(MergeMethod):
    """A method whose masks can restore the encoder of one expert, which its parameter ``task`` names."""

    task: str

    def for_experts(self, experts: Sequence[str]) -> MergeMethod:
        if self.task and self.task not in experts:
            raise InputError(f"{self.name}: task is '{self.task}', but the experts are {', '.join(experts)}.")
        return super().for_experts(experts)

    def shares(self, name: str, experts: Collection[str], statistics: Any) -> dict[str, float]:
        return {self.task: 1.0} if self.task else super().shares(name, experts, statistics)


@register("tall-mask", *_TALL)
@dataclass(frozen=True)
class TallMask(MaskMethod):
    """The encoder of one expert, restored from the sum of all task vectors and the expert's mask (Wang et al., 2024).

    theta_0 + scale * m_task * tau_MTL with tau_MTL = sum_t tau_t and m_t = |tau_t| > threshold * |tau_MTL - tau_t|
    (see `tall_mask`). This is the paper's compression: theta_0, tau_MTL and one bit per entry and expert represent all
    experts. Without ``task``, the mask is the union of all masks, which gives the merged encoder of ``consensus`` with
    k = 1: the sum without the weights that no expert needs. The authors' code chooses the threshold of each expert from
    0.2, 0.3, ..., 0.6 on validation data. One public library compares with theta_0 instead of tau_MTL by mistake.

    Example:
        >>> task_vectors = {"a": np.array([1.0, 4.0, 3.0]), "b": np.array([8.0, 0.0, -3.0])}
        >>> TallMask(task="a").merge_tensor("w", np.zeros(3), task_vectors, None)
        array([0., 4., 0.])
    """

    elementwise = True

    threshold: PerExpert = parameter(0.4, above=0.0, per_expert=True, help="the paper's lambda, one or per expert")
    task: str = parameter("", help="the expert to restore; without it, what any expert needs is kept")
    scale: float = parameter(1.0, low=0.0, help="weight of the masked sum of task vectors")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        tau_mtl = reduce(np.add, task_vectors.values())
        wanted = {self.task: task_vectors[self.task]} if self.task else task_vectors
        masks = (tall_mask(tau, tau_mtl, of_expert(self.threshold, expert)) for expert, tau in wanted.items())
        return base + np.where(reduce(np.logical_or, masks), tau_mtl, np.float32(0)) * np.float32(self.scale)


@register("consensus", *_TALL)
@dataclass(frozen=True)
class Consensus(MergeMethod):
    """The sum of the task vectors, in the entries that at least k experts need (Wang et al., 2024).

    theta_0 + scale * tau_MTL * [sum_t m_t >= k] with the masks of ``tall-mask``. With k = 2, the authors' default,
    weights that no expert needs ("catastrophic") or only one ("selfish") stay the base's. With fewer experts than k,
    all of them must need an entry. tau_MTL is the sum of the task vectors (the paper's consensus task arithmetic, not
    its variant with TIES). The authors choose the thresholds per expert and the scale on validation data.

    Example:
        >>> task_vectors = {"a": np.array([2.0, 4.0]), "b": np.array([2.0, 0.0])}
        >>> Consensus(scale=1.0).merge_tensor("w", np.zeros(2), task_vectors, None)
        array([4., 0.])
    """

    elementwise = True

    threshold: PerExpert = parameter(0.4, above=0.0, per_expert=True, help="the paper's lambda, one or per expert")
    k: int = parameter(2, low=1, help="how many experts must need an entry for it to be kept")
    scale: float = parameter(0.4, low=0.0, help="weight of the masked sum of task vectors")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        tau_mtl = reduce(np.add, task_vectors.values())
        votes = np.zeros(base.shape, np.int32)
        for expert, tau in task_vectors.items():
            votes += tall_mask(tau, tau_mtl, of_expert(self.threshold, expert))
        return base + np.where(votes >= min(self.k, len(task_vectors)), tau_mtl, np.float32(0)) * np.float32(self.scale)


@register("emr", "EMR-Merging (Huang et al., 2024)", "https://arxiv.org/abs/2405.17461")
@dataclass(frozen=True)
class Emr(MaskMethod):
    """Elect one task vector for all experts; to restore one expert, mask and rescale it (Huang et al., 2024).

    In each entry, the unified task vector has the sign of the sum of the task vectors, and the greatest magnitude of
    the values with that sign (see `elect`). Without ``task``, it is added as it is. With ``task``, it is masked to the
    entries that have the sign of that expert's task vector, and rescaled so that its L1 norm over the whole encoder is
    the expert's: sum|tau_t| / sum|m_t * tau_uni|, in float64. The scale, 1 in the paper, multiplies either.

    If the sum is exactly zero, nothing is elected; the authors' code then elects minus. For the rescaling, its vision
    part sums the mean magnitudes of the tensors, so that a bias counts as much as a matrix. Here, as in the paper's
    formula, the sum is over all entries.

    Example:
        >>> task_vectors = {"a": np.array([1.0, 5.0, -2.0]), "b": np.array([3.0, -2.0, 2.0])}
        >>> Emr().merge_tensor("w", np.zeros(3), task_vectors, None)
        array([3., 5., 0.])
    """

    elementwise = True
    needs_statistics = True

    task: str = parameter("", help="the expert to restore; without it, the unified task vector is added")
    scale: float = parameter(1.0, low=0.0, help="weight of the unified task vector")

    def prepare(self, stream: TaskVectorStream) -> float | None:
        """The factor that gives the masked vector of ``task`` the L1 norm of its expert; None without ``task``."""
        if not self.task:
            return None

        def norms(name: str) -> tuple[float, float]:
            expert = masked = 0.0
            for _, _, task_vectors in stream.read_blocks(name):
                tau, unified = task_vectors[self.task], elect(task_vectors.values())
                expert += float(np.abs(tau).sum(dtype=np.float64))
                masked += float(np.abs(agreeing(unified, tau)).sum(dtype=np.float64))
            return expert, masked

        found = [pair for _, pair in stream.map(norms)]
        total = sum(masked for _, masked in found)
        # If nothing is left to scale (the expert is the base, or outvoted everywhere), the factor has no effect.
        return sum(expert for expert, _ in found) / total if total else 1.0

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: float | None
    ) -> np.ndarray:
        unified = elect(task_vectors.values())
        if self.task:
            unified = agreeing(unified, task_vectors[self.task])
        return base + unified * np.float32(self.scale * (1.0 if statistics is None else statistics))


def tall_mask(tau: np.ndarray, tau_mtl: np.ndarray, threshold: float) -> np.ndarray:
    """The entries in which a task vector outweighs the others: |tau| > threshold * |tau_mtl - tau|.

    Args:
        tau: The task vector of one expert, float32, any shape.
        tau_mtl: The multi-task vector, with the same shape.
        threshold: The paper's lambda. A smaller one marks more entries.

    Returns:
        bool, with the shape of ``tau``; false where ``tau`` is 0.

    Example:
        >>> tall_mask(np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 0.0]), 0.4)
        array([False,  True, False])
    """
    return np.abs(tau) > np.float32(threshold) * np.abs(tau_mtl - tau)


def elect(task_vectors: Iterable[np.ndarray]) -> np.ndarray:
    """EMR's unified task vector: the sign of the sum, with the greatest magnitude of the values with that sign.

    Example:
        >>> elect([np.array([1.0, 5.0]), np.array([3.0, -2.0]), np.array([-1.0, -9.0])])
        array([ 3., -9.])
    """
    taus = list(task_vectors)
    sign = np.sign(reduce(np.add, taus))
    # Multiplied by the elected sign, the values that have it become positive, and there is at least one.
    return sign * reduce(np.maximum, (tau * sign for tau in taus))


def agreeing(unified: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """The unified task vector where it has the sign of ``tau``, and 0 elsewhere.

    Example:
        >>> agreeing(np.array([3.0, -9.0, 2.0]), np.array([1.0, 5.0, 0.0]))
        array([3., 0., 0.])
    """
    return np.where(np.sign(unified) * tau > 0, unified, np.float32(0))
