"""Methods that merge singular vectors: Iso-C, Iso-CTS, TSV-M. They process one matrix at a time.

A matrix is a tensor of two dimensions. All other tensors (biases, norms, patch and position embeddings) get the mean
of the task vectors, as in all public code. The scale applies to them too.

Public code computes singular value decompositions in float32, whose polar factors lose digits with the condition number
of the matrix (measured errors: 3e-5 to 1e-4 at 1e5, 2e-3 to 1e-2 at 1e7). Here the arithmetic is in float64, on the
eigenvectors of the smaller Gram matrix, which takes a quarter to a half of the time of the float32 decompositions of
public code. See `_MIN_EIGENVALUE` for the matrices to which this does not apply.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simomerge.core.caution import warn
from simomerge.core.registry import parameter
from simomerge.merging.engine.stream import TaskVectors, TaskVectorStream
from simomerge.merging.method import MergeMethod, register

_ISO = "No Task Left Behind (Marczak et al., 2025)", "https://arxiv.org/abs/2502.04959"

_MIN_EIGENVALUE = 1e-10
"""Smallest eigenvalue of a Gram matrix relative to its largest. It is a condition number of 1e5, which a Gram matrix
squares. At this bound, polar factors differ by 3e-8 from those of a float64 decomposition (measured). Below it,
the matrix itself is decomposed."""

_ROUNDING = 1e-6
"""Singular values relative to the largest that are taken for rounding of float32 weights. Their vectors depend on the
linear algebra library, so none of the methods here uses them. The task vectors of LoRA experts have many of them."""

_Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class SpectralMethod(MergeMethod):
    """theta_0 + scale * `merge_matrices` of the task vectors."""

    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")

    @abstractmethod
    def merge_matrices(self, task_vectors: Sequence[np.ndarray]) -> np.ndarray:
        """Merge task vectors (m, n), float32, into one (m, n), float64."""

    def prepare(self, stream: TaskVectorStream) -> None:
        """Warn if the encoder has no matrices, as a convolutional one."""
        if not any(len(shape) == 2 for shape in stream.shapes.values()):
            warn(f"{self.name} merges matrices, and this encoder has none: the result is the mean of the experts.")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        taus = list(task_vectors.values())
        merged = self.merge_matrices(taus) if base.ndim == 2 and base.size else _sum(taus) / len(taus)
        return np.asarray(base + self.scale * merged, np.float32)


@register("iso-c", *_ISO)
@dataclass(frozen=True)
class IsoC(SpectralMethod):
    """Replace all singular values of the summed task vectors by their mean (Marczak et al., 2025, section 4).

    "Isotropic merging in the common space": for each matrix, the **sum** of the task vectors is U diag(sigma) V^T, and
    the merged task vector is mean(sigma) * U V^T, with the mean over all min(m, n) singular values. fusion_bench does
    the same. The copy of the method in the code of the TSV authors decomposes the mean of the task vectors, which
    amounts to scale 1/T. Other tensors: the mean.

    A sum of zero gives zero. If the sum has a lower rank than min(m, n), as that of LoRA experts has, only the
    directions of this rank are kept, and the mean is that of their singular values. Public code fills the other
    directions with vectors that depend on the linear algebra library, at the same size as the rest.

    Example:
        >>> IsoC().merge_tensor("w", np.zeros((2, 2)), {"a": np.diag([4.0, 1.0]), "b": np.diag([0.0, 1.0])}, None) + 0
        array([[3., 0.],
               [0., 3.]], dtype=float32)
    """

    def merge_matrices(self, task_vectors: Sequence[np.ndarray]) -> np.ndarray:
        return _isotropic(_sum(task_vectors))


@register("iso-cts", *_ISO)
@dataclass(frozen=True)
class IsoCts(SpectralMethod):
    """Iso-C, with some directions reserved for each task (Marczak et al., 2025, section 4).

    "Isotropic merging in common and task-specific spaces". For each matrix of rank r = min(m, n), with T experts, as in
    fusion_bench's port of the authors' code:

    1. Each expert gets k = round((r - int(r * common)) / T) directions (halves round to even), the common space the
       other r - T * k. In public code, T * k exceeds r if ``common`` is near 0, and the code fails; here k is at most
       r // T.
    2. The common directions are the first singular triplets of the sum of the task vectors. The directions of an expert
       are the first k of its task vector after the common left vectors are projected out: tau - U U^T tau.
    3. All left vectors side by side are replaced by their polar factor, all right vectors by theirs, and all singular
       values by their mean.

    With k = 0, this is Iso-C. Directions whose singular value is zero up to rounding, as in task vectors of a low rank,
    take no part in step 3. In public code their vectors depend on the linear algebra library. A sum of zero gives zero.
    Other tensors: the mean.

    Example:
        >>> both = {"a": np.diag([4.0, 2.0, 0.0]), "b": np.diag([4.0, 0.0, 2.0])}
        >>> IsoCts(common=0.4).merge_tensor("w", np.zeros((3, 3)), both, None) + 0  # the mean of 8, 2 and 2
        array([[4., 0., 0.],
               [0., 4., 0.],
               [0., 0., 4.]], dtype=float32)
    """

    common: float = parameter(0.8, low=0.0, high=1.0, help="fraction of the rank that all tasks share")

    def merge_matrices(self, task_vectors: Sequence[np.ndarray]) -> np.ndarray:
        total = _sum(task_vectors)
        rank, experts = min(total.shape), len(task_vectors)
        each = min(round((rank - int(rank * self.common)) / experts), rank // experts)
        if each == 0 or not total.any():
            return _isotropic(total)
        left, sigma, right = _singular_triplets(total, rank - experts * each)
        triplets = [(left, sigma, right)]
        for tau in task_vectors:
            if tau.any():
                triplets.append(_singular_triplets(tau - left @ (left.T @ tau), each, float(np.linalg.norm(tau))))
        lefts, sigmas, rights = _side_by_side(triplets)
        return sigmas.mean() * (_polar(lefts)[0] @ _polar(rights)[0])


@register("tsv-m", "Task Singular Vectors (Gargiulo et al., 2025)", "https://arxiv.org/abs/2412.00081")
@dataclass(frozen=True)
class TsvM(SpectralMethod):
    """Merge the leading singular vectors of each task vector (TSV-Merge, Gargiulo et al., 2025).

    As in the authors' code (``compute_and_sum_svd_mem_reduction``), for each matrix: take the first
    r = min(m, n) // T singular triplets of each of the T task vectors. All left vectors side by side are replaced by
    their polar factor, all right vectors by theirs: polar(U) diag(sigma) polar(V).

    r is at least 1. In public code, a matrix with min(m, n) < T (DINOv2's mask token, (1, C)) keeps nothing, and
    r = int(min(m, n) * (1 / T)) is one too small if the product is rounded down (49 * (1 / 49)). Triplets whose sigma
    is zero up to rounding take no part: an expert that did not move in a matrix has only such triplets, and a LoRA
    expert of rank 8 has 8 others. In public code their vectors, which depend on the linear algebra library, change the
    polar factors. Other tensors: the mean.

    Example:
        >>> TsvM().merge_tensor("w", np.zeros((2, 2)), {"a": np.diag([4.0, 1.0]), "b": np.diag([0.0, 1.0])}, None) + 0
        array([[4., 0.],
               [0., 1.]], dtype=float32)
    """

    def merge_matrices(self, task_vectors: Sequence[np.ndarray]) -> np.ndarray:
        rank = max(min(task_vectors[0].shape) // len(task_vectors), 1)
        triplets = [_singular_triplets(tau.astype(np.float64), rank) for tau in task_vectors if tau.any()]
        if not triplets:
            return np.zeros(task_vectors[0].shape)
        left, sigma, right = _side_by_side(triplets)
        return (_polar(left)[0] * sigma) @ _polar(right)[0]


def _sum(task_vectors: Sequence[np.ndarray]) -> np.ndarray:
    total = task_vectors[0].astype(np.float64)
    for tau in task_vectors[1:]:
        total += tau
    return total


def _isotropic(matrix: np.ndarray) -> np.ndarray:
    """The matrix with every singular value replaced by the mean of all. A zero matrix stays zero."""
    if not matrix.any():
        return np.zeros_like(matrix)
    factor, mean = _polar(matrix)
    factor *= mean
    return factor


def _polar(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """The polar factor U V^T of a matrix U diag(sigma) V^T, and the mean of its singular values, without rounding."""
    if matrix.shape[0] < matrix.shape[1]:
        factor, mean = _polar(matrix.T)
        return factor.T, mean
    eigenvalues, vectors = np.linalg.eigh(matrix.T @ matrix)
    if not _is_well_conditioned(eigenvalues):
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        kept = sigma > _ROUNDING * sigma[0]
        return left[:, kept] @ right[kept], float(sigma[kept].mean())
    sigma = np.sqrt(eigenvalues)
    # M (M^T M)^(-1/2) needs one product with the large matrix, and none with U and V.
    return matrix @ ((vectors / sigma) @ vectors.T), float(sigma.mean())


def _singular_triplets(matrix: np.ndarray, count: int, whole: float = 0.0) -> _Triplets:
    """The ``count`` largest singular triplets: U (m, count), sigma (count,), V^T (count, n), in no particular order.

    There are fewer of them if the others are rounding of ``matrix``, or of a matrix whose norm is ``whole``.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, sigma, right = _singular_triplets(matrix.T, count, whole)
        return right.T, sigma, left.T
    eigenvalues, vectors = np.linalg.eigh(matrix @ matrix.T)
    first = len(eigenvalues) - count  # They are in ascending order.
    if _is_well_conditioned(eigenvalues[first:]):
        sigma, left = np.sqrt(eigenvalues[first:]), vectors[:, first:]
        right = left.T @ matrix
        right /= sigma[:, None]
    else:
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        left, sigma, right = left[:, :count], sigma[:count], right[:count]
    kept = sigma > _ROUNDING * max(whole, sigma.max(initial=0.0))
    return (left, sigma, right) if kept.all() else (left[:, kept], sigma[kept], right[kept])


def _is_well_conditioned(eigenvalues: np.ndarray) -> bool:
    return not eigenvalues.size or bool(eigenvalues[0] > _MIN_EIGENVALUE * eigenvalues[-1])


def _side_by_side(triplets: Sequence[_Triplets]) -> _Triplets:
    left, sigma, right = zip(*triplets, strict=True)
    return np.concatenate(left, axis=1), np.concatenate(sigma), np.concatenate(right, axis=0)
