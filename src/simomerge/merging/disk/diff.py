"""Compare two checkpoints, or the task vectors of two experts, tensor by tensor."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from simomerge.merging import TaskArithmetic, TaskVectorStream, check_models
from simomerge.merging.disk.sources import open_experts, open_source


@dataclass(frozen=True)
class Difference:
    """The comparison of two tensors a and b (with a base: two task vectors); norms are Euclidean.

    Attributes:
        name: canonical name; ``"all"`` for the complete encoder.
        first, second: norms of a and b.
        distance: norm of b - a.
        cosine: cosine of the angle between them; NaN if one is zero.
        sign_agreement: fraction of the entries with the same sign, among those where a or b is not zero; NaN if
            there are none.
    """

    name: str
    first: float
    second: float
    distance: float
    cosine: float
    sign_agreement: float


def diff_on_disk(
    first: str | os.PathLike[str], second: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> list[Difference]:
    """Compare two checkpoints, or with ``base`` the task vectors of two experts, one tensor at a time.

    Returns:
        The complete encoder first, then every float tensor in the file's order.

    Raises:
        InputError: a missing or damaged file, or models with different tensors.

    Example:
        >>> from simomerge.checkpoints import write_safetensors
        >>> for name, value in (("a", 1), ("b", 2)):
        ...     _ = write_safetensors(f"{name}.safetensors", {"w": np.full(4, value, np.float32)})
        >>> diff_on_disk("a.safetensors", "b.safetensors")[0].distance
        2.0
    """
    if base is None:
        reference = open_source(first)
        other = open_source(second, reference.weights)
        check_models(TaskArithmetic(), reference.weights, {"second": other.weights})
        stream, others = (TaskVectorStream(source.weights, {}) for source in (reference, other))
    else:
        reference, opened = open_experts(base, {"a": first, "b": second})
        weights = {key: source.weights for key, source in opened.items()}
        check_models(TaskArithmetic(), reference.weights, weights)
        stream = TaskVectorStream(reference.weights, weights)

    def sums(name: str) -> np.ndarray:
        a, b = (stream.base(name), others.base(name)) if base is None else stream.read(name)[1].values()
        return _sums(a.reshape(-1), b.reshape(-1))

    found = dict(stream.map(sums))
    total = np.sum(list(found.values()), axis=0) if found else np.zeros(6)
    return [_difference("all", total), *(_difference(name, values) for name, values in found.items())]


def as_dicts(differences: list[Difference]) -> list[dict[str, Any]]:
    """The differences as plain data, with None for a number that does not exist."""
    return [
        {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in asdict(one).items()}
        for one in differences
    ]


def _sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums over the entries: a^2, b^2, (b - a)^2, a * b, equal signs, and entries where a or b is not zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    signed = int(np.count_nonzero((a != 0) | (b != 0)))
    equal = int(np.count_nonzero(np.sign(a) == np.sign(b))) - (a.size - signed)
    gap = b - a
    return np.array([a @ a, b @ b, gap @ gap, a @ b, equal, signed])


def _difference(name: str, sums: np.ndarray) -> Difference:
    first, second, distance = np.sqrt(sums[:3])
    cosine = np.clip(sums[3] / (first * second), -1, 1) if first * second > 0 else np.nan
    agreement = sums[4] / sums[5] if sums[5] else np.nan
    return Difference(name, *(float(value) for value in (first, second, distance, cosine, agreement)))
