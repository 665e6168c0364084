"""The experts' task vectors as vectors: how long they are, and how they point, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from simomerge.core.progress import progress
from simomerge.merging import TaskArithmetic, TaskVectorStream, check_models
from simomerge.merging.engine.depth import Depth
from simomerge.models.model import SimoModel

ALL = "all"
"""The name of the whole encoder among the blocks."""
OUTSIDE = "outside"
"""The name of what is in no block: embeddings and the final norm."""


@dataclass(frozen=True)
class PartGeometry:
    """The task vectors within one block, or within the whole encoder.

    The matrices are symmetric, over the tasks in order. A figure that does not exist (the angle to a task vector of
    zeros) is NaN.

    Attributes:
        name: ``all``, ``outside`` or the number of the block, from 1.
        norms: Euclidean norm of each task vector.
        relative: the same, divided by the norm of the base's weights there.
        cosine: of the angle between two task vectors.
        conflict: share of the entries that both experts changed where the signs of the changes differ; unrelated task
            vectors have one half.
        weighted_conflict: the same, each entry weighted by the product of the two magnitudes: the share of the weight
            that pulls apart. It does not change when one task vector is made longer.
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
        tasks: in the order of all lists.
        parts: the whole encoder first, then what is in no block, then the blocks in order.
    """

    tasks: list[str]
    parts: list[PartGeometry]

    @property
    def all(self) -> PartGeometry:
        """Of the whole encoder."""
        return self.parts[0]

    @property
    def blocks(self) -> list[PartGeometry]:
        """Of the blocks alone, in order."""
        return [part for part in self.parts if part.name not in (ALL, OUTSIDE)]


def geometry(base: Any, experts: Mapping[str, Any]) -> Geometry:
    """Norms of the experts' task vectors, their cosines and their conflicts of sign, per block and in all.

    Tensors are read one by one, in float32, and summed in float64. No image takes part.

    Args:
        base: the foundation encoder: a model, or name -> tensor.
        experts: by task, the same.

    Raises:
        InputError: tensors that differ in name or shape, or values that are not finite.

    Example:
        >>> found = geometry({"w": np.zeros(2)}, {"a": {"w": np.array([3.0, 4])}, "b": {"w": np.array([3.0, -4])}})
        >>> found.all.norms, round(found.all.cosine[0][1], 2), found.all.conflict[0][1]
        ([5.0, 5.0], -0.28, 0.5)
    """
    weights = {task: _weights(expert) for task, expert in experts.items()}
    check_models(TaskArithmetic(), _weights(base), weights)
    stream = TaskVectorStream(_weights(base), weights)
    tasks, depth = list(experts), Depth(stream.names)
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
    """Over the entries of some tensors, float64: of the base, and T x T of the task vectors."""

    base: float
    products: np.ndarray  # of two task vectors' entries
    magnitudes: np.ndarray  # of their absolute values
    unlike: np.ndarray  # entries whose signs differ
    both: np.ndarray  # entries that neither leaves as they were

    @classmethod
    def of(cls, base: np.ndarray, vectors: list[np.ndarray]) -> _Sums:
        flat = [vector.reshape(-1) for vector in vectors]
        signs = [np.sign(vector).astype(np.int8) for vector in flat]
        shape = (len(flat), len(flat))
        products, magnitudes, unlike, both = (np.zeros(shape) for _ in range(4))
        for i, vector in enumerate(flat):
            products[i, i] = magnitudes[i, i] = np.square(vector, dtype=np.float64).sum()
            both[i, i] = np.count_nonzero(signs[i])
        for i, j in combinations(range(len(flat)), 2):
            product, sign = np.multiply(flat[i], flat[j], dtype=np.float64), signs[i] * signs[j]
            for table, value in (
                (products, product.sum()),
                (magnitudes, np.abs(product).sum()),
                (unlike, np.count_nonzero(sign < 0)),
                (both, np.count_nonzero(sign)),
            ):
                table[i, j] = table[j, i] = value
        return cls(float(np.square(base, dtype=np.float64).sum()), products, magnitudes, unlike, both)

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.base + other.base,
            self.products + other.products,
            self.magnitudes + other.magnitudes,
            self.unlike + other.unlike,
            self.both + other.both,
        )

    def measure(self, name: str) -> PartGeometry:
        norms = np.sqrt(self.products.diagonal())
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = np.clip(self.products / np.outer(norms, norms), -1, 1)
            relative = norms / np.sqrt(self.base)
            conflict = self.unlike / self.both
            weighted = (self.magnitudes - self.products) / (2 * self.magnitudes)
        tables = (table.tolist() for table in (cosine, conflict, np.clip(weighted, 0, 1)))
        return PartGeometry(name, norms.tolist(), relative.tolist(), *tables)
