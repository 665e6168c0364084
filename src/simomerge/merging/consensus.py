"""Methods in which the task vectors vote on every entry: MagMax, TALL-masks, consensus, EMR."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.engine.stream import TaskVectorStream
from simomerge.merging.method import MergeMethod, of_expert, register

_TALL = "TALL-masks and consensus merging (Wang et al., 2024)"
_TALL_LINK = "https://arxiv.org/abs/2405.07813"


@register
@dataclass(frozen=True)
class MagMax(MergeMethod):
    """Per entry the task vector's value of the greatest magnitude (Marczak et al., 2024).

    Of two opposite values of that magnitude the positive one is taken. The authors' code takes the later expert's,
    so that the order of the experts matters there.

    Example:
        >>> task_vectors = {"a": np.array([1.0, -2.0, -4.0]), "b": np.array([-3.0, 2.0, 1.0])}
        >>> MagMax().merge_tensor("w", np.zeros(3), task_vectors, None)
        array([-3.,  2., -4.])
    """

    name: ClassVar[str] = "magmax"
    paper: ClassVar[str] = "MagMax (Marczak et al., 2024)"
    link: ClassVar[str] = "https://arxiv.org/abs/2407.06322"
    elementwise: ClassVar[bool] = True

    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        highest = reduce(np.maximum, task_vectors.values())
        lowest = reduce(np.minimum, task_vectors.values())
        return base + np.where(highest >= -lowest, highest, lowest) * np.float32(self.scale)


class MaskMethod(MergeMethod):
    """A method with masks by which one expert's encoder can be got back: its parameter ``task`` names the expert."""

    task: str

    def for_experts(self, experts: Sequence[str]) -> MergeMethod:
        if self.task and self.task not in experts:
            raise InputError(f"{self.name}: task is '{self.task}', but the experts are {', '.join(experts)}.")
        return super().for_experts(experts)


@register
@dataclass(frozen=True)
class TallMask(MaskMethod):
    """The encoder of one expert from the sum of all and its mask (Wang et al., 2024).

    theta_0 + scale * m_task * tau_MTL with tau_MTL = sum_t tau_t and m_t = |tau_t| > threshold * |tau_MTL - tau_t|
    (see :func:`tall_mask`): the paper's compression, in which theta_0, tau_MTL and one bit per entry and expert
    stand for all experts. Without ``task`` the mask is the union of all: the one merged encoder of ``consensus`` with
    k = 1, without the weights that no expert needs. The authors' code chooses the threshold per expert from 0.2,
    0.3 ... 0.6 on validation data. One public library compares with theta_0 instead of tau_MTL, by mistake.

    Example:
        >>> task_vectors = {"a": np.array([1.0, 4.0, 3.0]), "b": np.array([8.0, 0.0, -3.0])}
        >>> TallMask(task="a").merge_tensor("w", np.zeros(3), task_vectors, None)
        array([0., 4., 0.])
    """

    name: ClassVar[str] = "tall-mask"
    paper: ClassVar[str] = _TALL
    link: ClassVar[str] = _TALL_LINK
    elementwise: ClassVar[bool] = True

    threshold: float | Sequence[float] | Mapping[str, float] = parameter(
        0.4, above=0.0, per_expert=True, help="the paper's lambda: one number, or one per expert"
    )
    task: str = parameter("", help="the expert whose encoder to give; without it what any expert needs is kept")
    scale: float = parameter(1.0, low=0.0, help="weight of the masked sum of task vectors")

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        tau_mtl = reduce(np.add, task_vectors.values())
        wanted = {self.task: task_vectors[self.task]} if self.task else task_vectors
        masks = (tall_mask(tau, tau_mtl, _threshold(self, expert)) for expert, tau in wanted.items())
        return base + np.where(reduce(np.logical_or, masks), tau_mtl, np.float32(0)) * np.float32(self.scale)


@register
@dataclass(frozen=True)
class Consensus(MergeMethod):
    """The sum of the task vectors where at least k experts need it (Wang et al., 2024).

    theta_0 + scale * tau_MTL * [sum_t m_t >= k] with the masks of ``tall-mask``. At k = 2, the authors' default,
    weights that no expert ("catastrophic") or only one ("selfish") needs stay the base's; a k above the number of
    experts gives the base. tau_MTL is the sum of the task vectors (the paper's consensus task arithmetic, not its
    variant with TIES). The authors choose the thresholds per expert and the scale on validation data.

    Example:
        >>> task_vectors = {"a": np.array([2.0, 4.0]), "b": np.array([2.0, 0.0])}
        >>> Consensus(scale=1.0).merge_tensor("w", np.zeros(2), task_vectors, None)
        array([4., 0.])
    """

    name: ClassVar[str] = "consensus"
    paper: ClassVar[str] = _TALL
    link: ClassVar[str] = _TALL_LINK
    elementwise: ClassVar[bool] = True

    threshold: float | Sequence[float] | Mapping[str, float] = parameter(
        0.4, above=0.0, per_expert=True, help="the paper's lambda: one number, or one per expert"
    )
    k: int = parameter(2, low=1, help="how many experts must need an entry for it to be kept")
    scale: float = parameter(0.4, low=0.0, help="weight of the masked sum of task vectors")

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        tau_mtl = reduce(np.add, task_vectors.values())
        votes = np.zeros(base.shape, np.int32)
        for expert, tau in task_vectors.items():
            votes += tall_mask(tau, tau_mtl, _threshold(self, expert))
        return base + np.where(votes >= self.k, tau_mtl, np.float32(0)) * np.float32(self.scale)


@register
@dataclass(frozen=True)
class Emr(MaskMethod):
    """Elect one task vector for all; for one expert, mask and rescale it (Huang et al., 2024).

    The unified task vector has per entry the sign of the sum of the task vectors, and of the values with that sign
    the greatest magnitude (see :func:`elect`); without ``task`` it is what is added. With ``task`` it is masked to
    the entries that have the sign of that expert's, and rescaled so that its L1 norm over the whole encoder is the
    expert's: sum|tau_t| / sum|m_t * tau_uni|, in float64. The scale, 1 in the paper, multiplies either.

    Where the sum is exactly zero nothing is elected; the authors' code elects minus there. Its vision part sums the
    tensors' mean magnitudes for the rescaling, in which a bias counts as much as a matrix; the paper's formula, ours,
    sums over all entries.

    Example:
        >>> task_vectors = {"a": np.array([1.0, 5.0, -2.0]), "b": np.array([3.0, -2.0, 2.0])}
        >>> Emr().merge_tensor("w", np.zeros(3), task_vectors, None)
        array([3., 5., 0.])
    """

    name: ClassVar[str] = "emr"
    paper: ClassVar[str] = "EMR-Merging (Huang et al., 2024)"
    link: ClassVar[str] = "https://arxiv.org/abs/2405.17461"
    elementwise: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True

    task: str = parameter("", help="the expert whose encoder to give; without it the unified one")
    scale: float = parameter(1.0, low=0.0, help="weight of the unified task vector")

    def prepare(self, stream: TaskVectorStream) -> float | None:
        """The factor that gives the masked vector of ``task`` the L1 norm of its expert; None without ``task``."""
        if not self.task:
            return None

        def norms(name: str) -> tuple[float, float]:
            expert = masked = 0.0
            for part in stream.blocks(name):
                task_vectors = stream.read(name, part)[1]
                tau, unified = task_vectors[self.task], elect(task_vectors.values())
                expert += float(np.abs(tau).sum(dtype=np.float64))
                masked += float(np.abs(agreeing(unified, tau)).sum(dtype=np.float64))
            return expert, masked

        found = [pair for _, pair in stream.map(norms)]
        total = sum(masked for _, masked in found)
        # Nothing left to scale (the expert is the base, or outvoted everywhere): any factor will do.
        return sum(expert for expert, _ in found) / total if total else 1.0

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: float | None
    ) -> np.ndarray:
        unified = elect(task_vectors.values())
        if self.task:
            unified = agreeing(unified, task_vectors[self.task])
        return base + unified * np.float32(self.scale * (1.0 if statistics is None else statistics))


def tall_mask(tau: np.ndarray, tau_mtl: np.ndarray, threshold: float) -> np.ndarray:
    """Where a task vector matters more than what the others add to it: |tau| > threshold * |tau_mtl - tau|.

    Args:
        tau: of one expert, float32, any shape.
        tau_mtl: the multi-task vector, of the same shape.
        threshold: the paper's lambda; the smaller, the more entries are marked.

    Returns:
        bool, the shape of ``tau``; false where it is 0.

    Example:
        >>> tall_mask(np.array([1.0, 4.0, 0.0]), np.array([9.0, 4.0, 0.0]), 0.4)
        array([False,  True, False])
    """
    return np.abs(tau) > np.float32(threshold) * np.abs(tau_mtl - tau)


def elect(task_vectors: Iterable[np.ndarray]) -> np.ndarray:
    """EMR's unified task vector: the sign of the sum, and of the values with that sign the greatest magnitude.

    Example:
        >>> elect([np.array([1.0, 5.0]), np.array([3.0, -2.0]), np.array([-1.0, -9.0])])
        array([ 3., -9.])
    """
    taus = list(task_vectors)
    sign = np.sign(reduce(np.add, taus))
    # Turned by the elected sign, the values that have it are the positive ones, and there is at least one.
    return sign * reduce(np.maximum, (tau * sign for tau in taus))


def agreeing(unified: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """The unified task vector where it has the sign of ``tau``, and 0 elsewhere.

    Example:
        >>> agreeing(np.array([3.0, -9.0, 2.0]), np.array([1.0, 5.0, 0.0]))
        array([3., 0., 0.])
    """
    return np.where(np.sign(unified) * tau > 0, unified, np.float32(0))


def _threshold(method: TallMask | Consensus, expert: str) -> float:
    return of_expert(method.threshold, expert)  # type: ignore[arg-type]
