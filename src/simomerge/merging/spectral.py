"""Methods that merge singular vectors: Iso-C, Iso-CTS, TSV-M. They look at one matrix at a time.

A matrix is a tensor of two dimensions. All other tensors (biases, norms, patch and position embeddings) get the
mean of the task vectors, as in all public code; the scale applies to them too.

Public code computes the singular value decompositions in float32, whose polar factors lose digits with the condition
number of the matrix (measured: 3e-5 to 1e-4 off at 1e5, 2e-3 to 1e-2 at 1e7). Here the arithmetic is in float64, and
goes over the eigenvectors of the smaller Gram matrix: a method takes a quarter to a half of the time of the float32
decompositions that public code makes. See `_MIN_EIGENVALUE` for where that would not do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from simomerge.core.registry import parameter
from simomerge.merging.method import MergeMethod, register

_ISO = "No Task Left Behind (Marczak et al., 2025)"
_ISO_LINK = "https://arxiv.org/abs/2502.04959"

_MIN_EIGENVALUE = 1e-10
"""Of a Gram matrix, relative to its largest: a condition number of 1e5, as squaring squares it. At this bound polar
factors are 3e-8 off those of a float64 decomposition (measured); below it the matrix itself is decomposed."""


class SpectralMethod(MergeMethod):
    """theta_0 + scale * (what `merge_matrices` makes of the task vectors)."""

    scale: float

    def merge_matrices(self, task_vectors: Sequence[np.ndarray]) -> np.ndarray:
        """Merge task vectors (m, n), float32, into one (m, n), float64."""
        raise NotImplementedError

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        taus = list(task_vectors.values())
        merged = self.merge_matrices(taus) if base.ndim == 2 and base.size else _sum(taus) / len(taus)
        return np.asarray(base + self.scale * merged, np.float32)


@register
@dataclass(frozen=True)
class IsoC(SpectralMethod):
    """Isotropic merging in the common space (Marczak et al., 2025, section 4).

    Per matrix: the **sum** of the task vectors is U diag(sigma) V^T; the merged task vector is mean(sigma) * U V^T,
    the mean over all min(m, n) singular values. fusion_bench does the same; the copy of the method in the code of
    the TSV authors decomposes the mean of the task vectors, which comes to scale 1/T. Other tensors: the mean.

    A sum of zero gives zero. Of any other, all min(m, n) directions are kept, as in public code, also those of
    (nearly) no singular value: where the sum is rank-deficient (experts of a few low-rank factors), their U V^T is
    some orthonormal completion, of the same size as the rest, and depends on the linear algebra library.

    Example:
        >>> IsoC().merge_tensor("w", np.zeros((2, 2)), {"a": np.diag([4.0, 1.0]), "b": np.diag([0.0, 1.0])}, None) + 0
        array([[3., 0.],
               [0., 3.]], dtype=float32)
    """

    name: ClassVar[str] = "iso-c"
    paper: ClassVar[str] = _ISO
    link: ClassVar[str] = _ISO_LINK

    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")

    def merge_matrices(self, task_vectors: Sequence[np.ndarray]) -> np.ndarray:
        return _isotropic(_sum(task_vectors))


@register
@dataclass(frozen=True)
class IsoCts(SpectralMethod):
    """Isotropic merging in common and task-specific spaces (Marczak et al., 2025, section 4).

    Per matrix of r = min(m, n), with T experts, as in fusion_bench's port of the authors' code:

    1. Each expert gets k = round((r - int(r * common)) / T) directions (halves to the even number), the common
       space the other r - T * k. Public code lets T * k exceed r where ``common`` is near 0 and stops there; here
       k is r // T at most.
    2. The common directions are the first singular triplets of the sum of the task vectors; an expert's are the
       first k of its task vector once the common left vectors are projected out: tau - U U^T tau.
    3. All left vectors side by side are replaced by their polar factor, all right vectors by theirs, and all
       singular values by their mean.

    k = 0 is Iso-C. Experts whose task vector is zero here have no directions, and take no part in 3; public code
    takes the first unit vectors for them. A sum of zero gives zero. Other tensors: the mean.

    Example:
        >>> both = {"a": np.diag([4.0, 2.0, 0.0]), "b": np.diag([4.0, 0.0, 2.0])}
        >>> IsoCts(common=0.4).merge_tensor("w", np.zeros((3, 3)), both, None) + 0  # the mean of 8, 2 and 2
        array([[4., 0., 0.],
               [0., 4., 0.],
               [0., 0., 4.]], dtype=float32)
    """

    name: ClassVar[str] = "iso-cts"
    paper: ClassVar[str] = _ISO
    link: ClassVar[str] = _ISO_LINK

    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")
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
                triplets.append(_singular_triplets(tau - left @ (left.T @ tau), each))
        lefts, sigmas, rights = _side_by_side(triplets)
        return sigmas.mean() * (_polar(lefts)[0] @ _polar(rights)[0])


@register
@dataclass(frozen=True)
class TsvM(SpectralMethod):
    """Task singular vectors, merged (Gargiulo et al., 2025, TSV-Merge).

    As in the authors' code (``compute_and_sum_svd_mem_reduction``), per matrix: the first r = min(m, n) // T
    singular triplets of each of the T task vectors; all left vectors side by side are replaced by their polar
    factor, all right vectors by theirs: polar(U) diag(sigma) polar(V).

    r is at least 1. In public code a matrix with min(m, n) < T (DINOv2's mask token, (1, C)) keeps nothing, and
    r = int(min(m, n) * (1 / T)) loses one where the product is rounded down (49 * (1 / 49)). Experts whose task
    vector is zero here have no singular vectors and take no part; public code takes the first unit vectors for
    them, with sigma 0. Other tensors: the mean.

    Example:
        >>> TsvM().merge_tensor("w", np.zeros((2, 2)), {"a": np.diag([4.0, 1.0]), "b": np.diag([0.0, 1.0])}, None) + 0
        array([[4., 0.],
               [0., 1.]], dtype=float32)
    """

    name: ClassVar[str] = "tsv-m"
    paper: ClassVar[str] = "Task Singular Vectors (Gargiulo et al., 2025)"
    link: ClassVar[str] = "https://arxiv.org/abs/2412.00081"

    scale: float = parameter(1.0, low=0.0, help="weight of the merged task vector")

    def merge_matrices(self, task_vectors: Sequence[np.ndarray]) -> np.ndarray:
        rank = max(min(task_vectors[0].shape) // len(task_vectors), 1)
        triplets = [_singular_triplets(tau.astype(np.float64), rank) for tau in task_vectors if tau.any()]
        if not triplets:
            return np.zeros(task_vectors[0].shape)
        left, sigma, right = _side_by_side(triplets)
        return (_polar(left)[0] * sigma) @ _polar(right)[0]


_Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]


def _sum(task_vectors: Sequence[np.ndarray]) -> np.ndarray:
    total = task_vectors[0].astype(np.float64)
    for tau in task_vectors[1:]:
        total += tau
    return total


def _isotropic(matrix: np.ndarray) -> np.ndarray:
    """The matrix with every singular value replaced by their mean; zero stays zero."""
    if not matrix.any():
        return np.zeros_like(matrix)
    factor, mean = _polar(matrix)
    factor *= mean
    return factor


def _polar(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """The polar factor U V^T of a matrix U diag(sigma) V^T, and mean(sigma), over all min(m, n) of them.

    Example:
        >>> factor, mean = _polar(np.array([[0.0, 2.0], [4.0, 0.0], [0.0, 0.0]]))
        >>> factor.round(6) + 0, round(mean, 6)
        (array([[0., 1.],
               [1., 0.],
               [0., 0.]]), 3.0)
    """
    if matrix.shape[0] < matrix.shape[1]:
        factor, mean = _polar(matrix.T)
        return factor.T, mean
    eigenvalues, vectors = np.linalg.eigh(matrix.T @ matrix)
    if not _is_well_conditioned(eigenvalues):
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        return left @ right, float(sigma.mean())
    sigma = np.sqrt(eigenvalues)
    # M (M^T M)^(-1/2): one product with the large matrix, none with U and V.
    return matrix @ ((vectors / sigma) @ vectors.T), float(sigma.mean())


def _singular_triplets(matrix: np.ndarray, count: int) -> _Triplets:
    """The ``count`` largest singular triplets: U (m, count), sigma (count,), V^T (count, n); in no order.

    Example:
        >>> left, sigma, right = _singular_triplets(np.diag([3.0, 1.0, 2.0])[:2], 1)
        >>> np.abs(left).T, sigma, np.abs(right)
        (array([[1., 0.]]), array([3.]), array([[1., 0., 0.]]))
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, sigma, right = _singular_triplets(matrix.T, count)
        return right.T, sigma, left.T
    eigenvalues, vectors = np.linalg.eigh(matrix @ matrix.T)
    first = len(eigenvalues) - count  # they come in ascending order
    if not _is_well_conditioned(eigenvalues[first:]):
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], sigma[:count], right[:count]
    sigma, left = np.sqrt(eigenvalues[first:]), vectors[:, first:]
    right = left.T @ matrix
    right /= sigma[:, None]
    return left, sigma, right


def _is_well_conditioned(eigenvalues: np.ndarray) -> bool:
    return not eigenvalues.size or bool(eigenvalues[0] > _MIN_EIGENVALUE * eigenvalues[-1])


def _side_by_side(triplets: Sequence[_Triplets]) -> _Triplets:
    left, sigma, right = zip(*triplets, strict=True)
    return np.concatenate(left, axis=1), np.concatenate(sigma), np.concatenate(right, axis=0)
