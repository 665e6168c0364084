"""The experts' task vectors as vectors: their lengths and directions, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from simomerge.core.progress import progress
from simomerge.merging import TaskArithmetic, TaskVectorStream, check_models
from simomerge.models.model import SimoModel

ALL = "all"
"""Name of the part that is the whole encoder."""
OUTSIDE = "outside"
"""Name of the part that is in no block: embeddings and the final norm."""


@dataclass(frozen=True)
class PartGeometry:
    """The task vectors within one block, or within the whole encoder.

    The matrices are symmetric, over the tasks in order. A number that does not exist, such as the angle to a task
    vector of zeros, is NaN.

    Attributes:
        name: ``all``, ``outside`` or the number of the block, counted from 1.
        norms: Euclidean norm of each task vector.
        relative: the norms divided by the norm of the base's weights in this part.
        cosine: cosine of the angle between two task vectors.
        conflict: of the entries that both experts changed, the share that they changed in opposite directions; 0.5 for
            unrelated task vectors.
        weighted_conflict: the same with each entry weighted by the product of the two magnitudes. It does not change
            when a task vector is made longer.
    """

    name: str
    norms: list[float]
    relative: list[float]
    cosine: list[list[float]]
    conflict: list[list[float]]
    weighted_conflict: list[list[float]]


@dataclass(frozen=True)
class Geometry:
    """Task-vector geometry of some experts.

    Attributes:
        tasks: the tasks, in the order of all lists.
        parts: the whole encoder, then everything outside of the blocks, then the blocks in order.
    """

    tasks: list[str]
    parts: list[PartGeometry]

    @property
    def all(self) -> PartGeometry:
        """Geometry of the whole encoder."""
        return self.parts[0]

    @property
    def blocks(self) -> list[PartGeometry]:
        """Geometry of each block, in order."""
        return [part for part in self.parts if part.name not in (ALL, OUTSIDE)]


def geometry(base: Any, experts: Mapping[str, Any]) -> Geometry:
    """Norms of the experts' task vectors, their cosines and their sign conflicts, per block and for the whole encoder.

    Tensors are read one by one, in float32, and summed in float64. No images are used.

    Args:
        base: the foundation encoder, as a model or as a mapping of names to tensors.
        experts: experts by task, in the same form.

    Raises:
        InputError: tensors that differ in name or shape, or values that are not finite.

    Example:
        >>> found = geometry({"w": np.zeros(2)}, {"a": {"w": np.array([3.0, 4])}, "b": {"w": np.array([3.0, -4])}})
        >>> found.all.norms, round(found.all.cosine[0][1], 2), found.all.conflict[0][1]
        ([5.0, 5.0], -0.28, 0.5)
    """
    weights = {task: _weights(expert) for task, expert in experts.items()}
    check_models(TaskArithmetic(), _weights(base), weights)
    blocks = base.encoder.layout.names if isinstance(base, SimoModel) else ()
    stream = TaskVectorStream(_weights(base), weights, blocks=blocks)
    tasks, depth = list(experts), stream.depth
    totals: dict[str, _Sums] = {}

    def sums(name: str) -> _Sums:
        values, vectors = stream.read(name)
        return _Sums.of(values, [vectors[task] for task in tasks])

    for done, (name, found) in enumerate(stream.map(sums), start=1):
        block = depth.index(name)
        for part in (ALL, OUTSIDE if block is None else str(block + 1)):
            totals[part] = totals[part] + found if part in totals else found
        progress("task vectors", done, len(stream.names), "")
    order = [ALL, OUTSIDE, *(str(block + 1) for block in range(depth.blocks))]
    return Geometry(tasks, [totals[part].measure(part) for part in order if part in totals])


def _weights(model: Any) -> Mapping[str, Any]:
    return model.encoder.backbone.state_dict() if isinstance(model, SimoModel) else model


@dataclass(frozen=True)
class _Sums:
    """Sums over the entries of some tensors, float64.

    Attributes:
        base: squares of the base's weights.
        tables: (4, T, T), for each pair of task vectors: products of their entries, absolute values of these products,
            entries with opposite signs, and entries that both experts changed.
    """

    base: float
    tables: np.ndarray

    @classmethod
    def of(cls, base: np.ndarray, vectors: list[np.ndarray]) -> _Sums:
        flat = [vector.reshape(-1) for vector in vectors]
        signs = [np.sign(vector).astype(np.int8) for vector in flat]
        tables = np.zeros((4, len(flat), len(flat)))
        for i, vector in enumerate(flat):
            square = np.square(vector, dtype=np.float64).sum()
            tables[:, i, i] = square, square, 0, np.count_nonzero(signs[i])
        for i, j in combinations(range(len(flat)), 2):
            product, sign = np.multiply(flat[i], flat[j], dtype=np.float64), signs[i] * signs[j]
            sums = product.sum(), np.abs(product).sum(), np.count_nonzero(sign < 0), np.count_nonzero(sign)
            tables[:, i, j] = tables[:, j, i] = sums
        return cls(float(np.square(base, dtype=np.float64).sum()), tables)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.base + other.base, self.tables + other.tables)

    def measure(self, name: str) -> PartGeometry:
        products, magnitudes, opposite, both = self.tables
        norms = np.sqrt(products.diagonal())
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = np.clip(products / np.outer(norms, norms), -1, 1)
            relative = norms / np.sqrt(self.base)
            weighted = np.clip((magnitudes - products) / (2 * magnitudes), 0, 1)
            tables = (table.tolist() for table in (cosine, opposite / both, weighted))
        return PartGeometry(name, norms.tolist(), relative.tolist(), *tables)
