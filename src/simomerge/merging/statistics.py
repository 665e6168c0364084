"""Methods that weigh the experts by what they saw: RegMean by their layers' inputs, Fisher by their gradients.

The statistics are arrays by expert and tensor, computed beforehand by `simomerge.training.statistics`. They may use
the names of tensors on disk or in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from simomerge.checkpoints import canonicalise
from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.engine.stream import TaskVectorStream
from simomerge.merging.method import MergeMethod, register

Statistics = Mapping[str, Mapping[str, np.ndarray]]
"""expert -> tensor name -> array"""

_RIDGE = 1e-9
"""Of RegMean, relative to each input channel's mean square: small enough to change nothing that the inputs determine,
large enough for float64 to solve where they do not."""


def _given(help: str) -> Any:
    """A dataclass field for given statistics: no number to check, and too long to print or compare."""
    return field(default_factory=dict, metadata={"help": help}, repr=False, compare=False)


@register
@dataclass(frozen=True)
class RegMean(MergeMethod):
    """Regression mean (Jin et al., 2023): linear layers merged so that their outputs change least.

    Per linear layer with weights W_t (out, in) and Gram matrices G_t (in, in) of its inputs in expert t:
    W = (sum_t W_t G_t) (sum_t G_t)^-1, which minimises sum_t ||X_t W^T - X_t W_t^T||^2, and the merged weights are
    base + scale * (W - base). Entries of G_t off the diagonal are first multiplied by ``shrink`` (alpha in the
    paper; regmean_reduce_nondiag in the authors' code; reduce_non_diagonal_ratio, 1 by default, in MergeLM and
    fusion_bench).

    Grams are means over tokens, so that each expert has one vote however many images it saw; the same holds in
    MergeLM and fusion_bench. Tensors that are not in the Grams of all experts are averaged, those of more or fewer
    dimensions than two always (and ``scale`` applies to the mean).

    Where the inputs do not determine W (a channel that is always zero; shrink 1 and fewer tokens than channels), it
    is the mean of the experts: solved for is the difference from their mean, with a ridge of 1e-9 of each channel's
    mean square. Public code inverts the sum as it is, which fails or explodes there.

    Example:
        >>> grams = {"a": {"w": np.diag([3.0, 0.0])}, "b": {"w": np.diag([1.0, 0.0])}}
        >>> method = RegMean(grams=grams)
        >>> experts = {"a": {"w": np.array([[4.0, 4.0]])}, "b": {"w": np.array([[0.0, 0.0]])}}
        >>> statistics = method.prepare(TaskVectorStream({"w": np.zeros((1, 2))}, experts))
        >>> method.merge_tensor("w", np.zeros((1, 2)), {e: m["w"] for e, m in experts.items()}, statistics)
        array([[3., 2.]], dtype=float32)
    """

    name: ClassVar[str] = "regmean"
    paper: ClassVar[str] = "Dataless knowledge fusion by merging weights (Jin et al., 2023)"
    link: ClassVar[str] = "https://arxiv.org/abs/2212.09849"
    needs_data: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True

    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
    shrink: float = parameter(0.9, low=0.0, high=1.0, help="factor of the Gram matrices' entries off the diagonal")
    grams: Statistics = _given("expert -> weight name -> Gram matrix of the layer's inputs (in, in)")

    def prepare(self, stream: TaskVectorStream) -> dict[str, dict[str, np.ndarray]]:
        """The Grams by canonical name, of the tensors that all experts have them for.

        Raises:
            InputError: an expert has none; one is of a tensor that is not there, of a wrong shape or not finite.
        """
        return _checked(self.grams, stream, "regmean: grams", "input_grams(encoder, images)", _gram_shape)

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        taus = list(task_vectors.values())
        if base.ndim == 2 and all(name in statistics[expert] for expert in task_vectors):
            merged = _regression_mean(taus, [statistics[expert][name] for expert in task_vectors], self.shrink)
        else:
            merged = _mean(taus)
        return np.asarray(base + self.scale * merged, np.float32)


@register
@dataclass(frozen=True)
class Fisher(MergeMethod):
    """Fisher-weighted average (Matena and Raffel, 2022): sum_t F_t theta_t / sum_t F_t. It needs no base.

    Per entry, with the diagonal Fisher information F_t of expert t. Tensors that are not in the Fishers of all
    experts are averaged. F_t is ``floor`` times the mean of the tensor's Fishers (over all entries and experts) at
    least, so that entries that matter to no expert get the plain mean. The authors' code floors at 1e-6 in absolute
    terms (and by default only the first model), fusion_bench adds 1e-6: where all Fishers of a tensor are smaller
    than that, only the plain mean is left.

    Losses of different units give Fishers of different size, and the largest wins. ``normalise="norm"`` divides
    each expert's by its L2 norm over all its tensors, as the authors' code does by default; the paper's formula,
    and the default here, does not.

    Example:
        >>> method = Fisher(fishers={"a": {"w": np.array([3.0, 0.0])}, "b": {"w": np.array([1.0, 0.0])}})
        >>> experts = {"a": {"w": np.array([4.0, 4.0])}, "b": {"w": np.array([0.0, 0.0])}}
        >>> statistics = method.prepare(TaskVectorStream({"w": np.zeros(2)}, experts))
        >>> method.merge_tensor("w", np.zeros(2), {e: m["w"] for e, m in experts.items()}, statistics)
        array([3., 2.], dtype=float32)
    """

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "Merging models with Fisher-weighted averaging (Matena and Raffel, 2022)"
    link: ClassVar[str] = "https://arxiv.org/abs/2111.09832"
    needs_base: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = True

    floor: float = parameter(1e-6, above=0.0, help="smallest Fisher, relative to the mean of the tensor's")
    normalise: str = parameter("none", choices=("none", "norm"), help="of each expert's Fisher: divide by its norm")
    fishers: Statistics = _given("expert -> tensor name -> diagonal Fisher information, of the tensor's shape")

    def prepare(self, stream: TaskVectorStream) -> dict[str, dict[str, np.ndarray]]:
        """The Fishers by canonical name, of the tensors that all experts have them for.

        Raises:
            InputError: an expert has none; one is of a tensor that is not there, of a wrong shape or not finite.
        """
        found = _checked(self.fishers, stream, "fisher: fishers", "fisher_information(model, data)", tuple)
        if self.normalise == "norm":
            found = {expert: _unit_norm(fishers) for expert, fishers in found.items()}
        return found

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        taus = list(task_vectors.values())
        if all(name in statistics[expert] for expert in task_vectors):
            merged = _fisher_mean(taus, [statistics[expert][name] for expert in task_vectors], self.floor)
        else:
            merged = _mean(taus)
        return np.asarray(base + merged, np.float32)


def _checked(
    given: Statistics,
    stream: TaskVectorStream,
    what: str,
    function: str,
    shape_for: Callable[[tuple[int, ...]], tuple[int, ...] | None],
) -> dict[str, dict[str, np.ndarray]]:
    """expert -> canonical name -> array, for the experts in the stream; see the callers' ``prepare``.

    Args:
        what: the method and its parameter, and ``function`` what computes it; both for messages.
        shape_for: shape of a tensor -> shape of its statistics, None if it has none.
    """
    if lacking := [expert for expert in stream.experts if not given.get(expert)]:
        raise InputError(
            f"{what} are needed of every expert, and there are none of {', '.join(lacking)}: compute them with"
            f" simomerge.training.statistics.{function} and give a dict of what it returns, by expert."
        )
    found: dict[str, dict[str, np.ndarray]] = {expert: {} for expert in stream.experts}
    for expert in stream.experts:
        for name, own_name in canonicalise(given[expert]).items():
            place = f"{what} of '{expert}', '{own_name}'"
            if name not in stream.shapes:
                raise InputError(f"{place}: the encoders have no such tensor; give statistics of this very encoder.")
            array = np.asarray(given[expert][own_name])
            needed = shape_for(stream.shapes[name])
            if array.shape != needed:
                raise InputError(
                    f"{place}: the shape is {array.shape}, but a tensor {stream.shapes[name]} needs {needed or 'none'}."
                )
            if not np.isfinite(array).all():
                raise InputError(f"{place}: holds NaN or infinite values; compute it again.")
            found[expert][name] = array
    return found


def _gram_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return (shape[1], shape[1]) if len(shape) == 2 else None


def _regression_mean(taus: Sequence[np.ndarray], grams: Sequence[np.ndarray], shrink: float) -> np.ndarray:
    """(sum_t tau_t G_t) (sum_t G_t)^-1 with task vectors (out, in) and Grams (in, in), float64."""
    mean = _mean(taus)
    total, weighted = np.zeros(grams[0].shape), np.zeros(mean.shape)
    for tau, gram in zip(taus, grams, strict=True):
        shrunk = gram.astype(np.float64)
        shrunk *= shrink
        np.fill_diagonal(shrunk, np.diag(gram))
        total += shrunk
        weighted += (tau - mean) @ shrunk
    # Channels differ in size by orders of magnitude. With a unit diagonal, every one is solved for to the same
    # relative precision, and shrink 0.9 bounds the condition number by ten times the number of channels.
    squares = np.diag(total)
    size = np.sqrt(np.where(squares > 0, squares, 1.0))
    total /= np.outer(size, size)
    total[np.diag_indices_from(total)] += np.where(squares > 0, _RIDGE, 1.0)
    return mean + np.linalg.solve(total.T, (weighted / size).T).T / size


def _fisher_mean(taus: Sequence[np.ndarray], fishers: Sequence[np.ndarray], floor: float) -> np.ndarray:
    """sum_t F_t tau_t / sum_t F_t, float64."""
    lowest = floor * sum(float(fisher.mean(dtype=np.float64)) for fisher in fishers) / len(fishers)
    if not lowest > 0:
        lowest = 1.0  # of no expert, so any number will do
    weighted, total = np.zeros(taus[0].shape), np.zeros(taus[0].shape)
    for tau, fisher in zip(taus, fishers, strict=True):
        weight = np.maximum(fisher.astype(np.float64), lowest)
        weighted += weight * tau
        total += weight
    return weighted / total


def _mean(taus: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(taus, axis=0, dtype=np.float64))


def _unit_norm(fishers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divided by the L2 norm over all tensors; zero stays zero."""
    norm = np.sqrt(sum(float(np.square(fisher, dtype=np.float64).sum()) for fisher in fishers.values()))
    return {name: fisher / (norm or 1.0) for name, fisher in fishers.items()}
