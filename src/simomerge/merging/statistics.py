"""Methods that weight the experts by statistics of data: RegMean by layer inputs, Fisher by gradients.

`simomerge.training.statistics` computes the statistics beforehand, as arrays by expert and tensor. They may use the
names of tensors on disk or in memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from simomerge.checkpoints import canonicalise
from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.engine.stream import TaskVectors, TaskVectorStream
from simomerge.merging.method import MergeMethod, register

Statistics = Mapping[str, Mapping[str, np.ndarray]]
"""expert -> tensor name -> array"""

_RIDGE = 1e-9
"""RegMean's ridge, relative to the mean square of each input channel. It is small enough to change nothing that the
inputs determine, and large enough for float64 to solve what they do not determine."""


def _given(help: str) -> Any:
    """A dataclass field for statistics. They are not checked as numbers, and are too large to print or compare."""
    return field(default_factory=dict, metadata={"help": help}, repr=False, compare=False)


class StatisticsMethod(MergeMethod):
    """theta_0 + scale * `combine`. Tensors without statistics from all experts get the mean of the task vectors.

    Class attributes: ``given`` (the parameter that holds the statistics) and ``function`` (what computes them).
    """

    needs_data = True
    needs_statistics = True
    given: ClassVar[str]
    function: ClassVar[str]

    scale: float

    @abstractmethod
    def statistics_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that the statistics of a tensor with this shape may have; empty if it has none."""

    @abstractmethod
    def combine(self, task_vectors: Sequence[np.ndarray], statistics: Sequence[np.ndarray]) -> np.ndarray:
        """Merge the task vectors of one tensor, with one array of statistics per expert; float64."""

    def prepare(self, stream: TaskVectorStream) -> Statistics:
        """Check the statistics, and key them by expert and canonical name.

        Raises:
            InputError: An expert has none, or an array belongs to no tensor, has a wrong shape, or is not finite.
        """
        given, what = getattr(self, self.given), f"{self.name}: {self.given}"
        if missing := [expert for expert in stream.experts if not given.get(expert)]:
            raise InputError(
                f"{what} are needed of every expert, and there are none of {', '.join(missing)}: compute them with"
                f" simomerge.training.statistics.{self.function} and give a dict of what it returns, by expert."
            )
        found: dict[str, dict[str, np.ndarray]] = {expert: {} for expert in stream.experts}
        for expert in stream.experts:
            for name, own_name in canonicalise(given[expert]).items():
                place = f"{what} of '{expert}', '{own_name}'"
                if name not in stream.shapes:
                    raise InputError(f"{place}: the encoders have no such tensor; give statistics of this encoder.")
                array, shape = np.asarray(given[expert][own_name]), stream.shapes[name]
                needed = self.statistics_shapes(shape)
                if array.shape not in needed:
                    wanted = " or ".join(map(str, needed)) or "none"
                    raise InputError(f"{place}: the shape is {array.shape}, but a tensor {shape} needs {wanted}.")
                if not np.isfinite(array).all():
                    raise InputError(f"{place}: holds NaN or infinite values; compute it again.")
                found[expert][name] = array
        return found

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        taus = list(task_vectors.values())
        if all(name in statistics[expert] for expert in task_vectors):
            merged = self.combine(taus, [statistics[expert][name] for expert in task_vectors])
        else:
            merged = _mean(taus)
        return np.asarray(base + self.scale * merged, np.float32)


@register(
    "regmean", "Dataless knowledge fusion by merging weights (Jin et al., 2023)", "https://arxiv.org/abs/2212.09849"
)
@dataclass(frozen=True)
class RegMean(StatisticsMethod):
    """Regression mean: merge each linear layer and convolution so that its outputs change least (Jin et al., 2023).

    For a linear layer with weights W_t (out, in) and Gram matrices G_t (in, in) of its inputs in expert t:
    W = (sum_t W_t G_t) (sum_t G_t)^-1, which minimises sum_t ||X_t W^T - X_t W_t^T||^2. The merged weights are
    base + scale * (W - base). Entries of G_t off the diagonal are first multiplied by ``shrink`` (alpha in the paper;
    regmean_reduce_nondiag in the authors' code; reduce_non_diagonal_ratio, 1 by default, in MergeLM and fusion_bench).

    Grams are means over tokens, so that each expert has the same weight however many images it saw; the same holds in
    MergeLM and fusion_bench. A convolution is a linear layer whose inputs are the patches under its kernel; one of g
    groups has the Grams (g, in, in), where ``in`` are the inputs of a group times the places of the kernel. The paper
    has no convolutions. Tensors without Grams from all experts are averaged (``scale`` applies to the mean).

    Where the inputs do not determine W (a channel that is always zero; shrink 1 and fewer tokens than channels), W is
    the mean of the experts: the difference from their mean is solved for, with a ridge of 1e-9 of each channel's mean
    square. Public code inverts the sum as it is, which then fails or gives huge values.

    Example:
        >>> grams = {"a": {"w": np.diag([3.0, 0.0])}, "b": {"w": np.diag([1.0, 0.0])}}
        >>> method = RegMean(grams=grams)
        >>> experts = {"a": {"w": np.array([[4.0, 4.0]])}, "b": {"w": np.array([[0.0, 0.0]])}}
        >>> statistics = method.prepare(TaskVectorStream({"w": np.zeros((1, 2))}, experts))
        >>> method.merge_tensor("w", np.zeros((1, 2)), {e: m["w"] for e, m in experts.items()}, statistics)
        array([[3., 2.]], dtype=float32)
    """

    given = "grams"
    function = "input_grams(encoder, images)"

    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
    shrink: float = parameter(0.9, low=0.0, high=1.0, help="factor of the Gram matrices' entries off the diagonal")
    grams: Statistics = _given("expert -> weight name -> Gram matrix of the inputs, (in, in) or (groups, in, in)")

    def statistics_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(shape) == 2:
            return [(shape[1], shape[1])]
        inputs = int(np.prod(shape[1:]))
        return [(groups, inputs, inputs) for groups in _divisors(shape[0])] if len(shape) == 4 else []

    def combine(self, task_vectors: Sequence[np.ndarray], statistics: Sequence[np.ndarray]) -> np.ndarray:
        """(sum_t tau_t G_t) (sum_t G_t)^-1, for each group of a convolution."""
        shape = task_vectors[0].shape
        if len(shape) == 2:
            return self._combine(task_vectors, statistics)
        groups, inputs, _ = statistics[0].shape
        rows = [tau.reshape(groups, -1, inputs) for tau in task_vectors]
        merged = [self._combine([tau[g] for tau in rows], [gram[g] for gram in statistics]) for g in range(groups)]
        return np.stack(merged).reshape(shape)

    def _combine(self, task_vectors: Sequence[np.ndarray], statistics: Sequence[np.ndarray]) -> np.ndarray:
        """The same for task vectors (out, in) and Grams (in, in)."""
        mean = _mean(task_vectors)
        total, weighted = np.zeros(statistics[0].shape), np.zeros(mean.shape)
        for tau, gram in zip(task_vectors, statistics, strict=True):
            shrunk = gram.astype(np.float64)
            shrunk *= self.shrink
            np.fill_diagonal(shrunk, np.diag(gram))
            total += shrunk
            weighted += (tau - mean) @ shrunk
        # Channels differ in size by orders of magnitude. A unit diagonal solves all to the same relative precision, and
        # shrink 0.9 then bounds the condition number by ten times the number of channels.
        squares = np.diag(total)
        size = np.sqrt(np.where(squares > 0, squares, 1.0))
        total /= np.outer(size, size)
        total[np.diag_indices_from(total)] += np.where(squares > 0, _RIDGE, 1.0)
        return np.asarray(mean + np.linalg.solve(total.T, (weighted / size).T).T / size)


@register(
    "fisher",
    "Merging models with Fisher-weighted averaging (Matena and Raffel, 2022)",
    "https://arxiv.org/abs/2111.09832",
)
@dataclass(frozen=True)
class Fisher(StatisticsMethod):
    """Fisher-weighted average: sum_t F_t theta_t / sum_t F_t (Matena and Raffel, 2022). It needs no base.

    F_t is the diagonal Fisher information of expert t, per entry. Tensors without Fishers from all experts are
    averaged. F_t is at least ``floor`` times the mean of the tensor's Fishers (over all entries and experts), so that
    entries that matter to no expert get the plain mean. The authors' code has an absolute floor of 1e-6 (by default
    only for the first model), and fusion_bench adds 1e-6: if all Fishers of a tensor are smaller than that, only the
    plain mean is left.

    Losses with different units give Fishers of different size, and the largest one wins. ``normalise="norm"`` divides
    each expert's Fishers by their L2 norm over all tensors, as the authors' code does by default. The paper's formula,
    and the default here, does not.

    Example:
        >>> method = Fisher(fishers={"a": {"w": np.array([3.0, 0.0])}, "b": {"w": np.array([1.0, 0.0])}})
        >>> experts = {"a": {"w": np.array([4.0, 4.0])}, "b": {"w": np.array([0.0, 0.0])}}
        >>> statistics = method.prepare(TaskVectorStream({"w": np.zeros(2)}, experts))
        >>> method.merge_tensor("w", np.zeros(2), {e: m["w"] for e, m in experts.items()}, statistics)
        array([3., 2.], dtype=float32)
    """

    needs_base = False
    needs_labels = True
    given = "fishers"
    function = "fisher_information(model, data)"
    scale = 1.0

    floor: float = parameter(1e-6, above=0.0, help="smallest Fisher, relative to the mean of the tensor's")
    normalise: str = parameter(
        "none", choices=("none", "norm"), help="norm: divide each expert's Fishers by their norm"
    )
    fishers: Statistics = _given("expert -> tensor name -> diagonal Fisher information, of the tensor's shape")

    def statistics_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [shape]

    def prepare(self, stream: TaskVectorStream) -> Statistics:
        """Check the Fishers, key them by expert and canonical name, and normalise them if asked."""
        found = super().prepare(stream)
        return {e: _unit_norm(fishers) for e, fishers in found.items()} if self.normalise == "norm" else found

    def combine(self, task_vectors: Sequence[np.ndarray], statistics: Sequence[np.ndarray]) -> np.ndarray:
        """sum_t F_t tau_t / sum_t F_t."""
        means = [float(fisher.sum(dtype=np.float64)) / max(fisher.size, 1) for fisher in statistics]
        lowest = self.floor * sum(means) / len(means)
        if not lowest > 0:
            lowest = 1.0  # All Fishers are zero, so any equal weights give the mean.
        weighted, total = np.zeros(task_vectors[0].shape), np.zeros(task_vectors[0].shape)
        for tau, fisher in zip(task_vectors, statistics, strict=True):
            weight = np.maximum(fisher.astype(np.float64), lowest)
            weighted += weight * tau
            total += weight
        return weighted / total


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _mean(taus: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(taus, axis=0, dtype=np.float64))


def _unit_norm(fishers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divide by the L2 norm over all tensors. Zero stays zero."""
    norm = np.sqrt(sum(float(np.square(fisher, dtype=np.float64).sum()) for fisher in fishers.values()))
    return {name: fisher / (norm or 1.0) for name, fisher in fishers.items()}
