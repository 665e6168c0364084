"""Methods based on angles: slerp and the Karcher mean of the weights, model stock of the task vectors.

Each processes one tensor at a time, flattened. The merged weights are a weighted sum of the experts' weights (or task
vectors), and the factors depend only on their dot products. So the methods work on a T x T matrix of dot products and
read the tensors themselves twice. All arithmetic is in float64, because the angle between two experts is often below
1e-2 and its cosine within 1e-5 of 1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import parameter
from simomerge.merging.engine.stream import TaskVectors
from simomerge.merging.method import MergeMethod, register

_COLLINEAR = 0.9995  # Slerp interpolates linearly if the absolute cosine is above this, as in mergekit.


@register(
    "slerp", "Animating rotation with quaternion curves (Shoemake, 1985)", "https://doi.org/10.1145/325334.325242"
)
@dataclass(frozen=True)
class Slerp(MergeMethod):
    """Spherical linear interpolation between two experts (Shoemake, 1985). It needs no base.

    As in mergekit, for each tensor, on the flattened **weights** (not the task vectors), which are not normalised:
    (sin((1 - t) * angle) * first + sin(t * angle) * second) / sin(angle). If the absolute cosine is above 0.9995, as it
    mostly is for experts of one base, the result is (1 - t) * first + t * second.

    The first and the second expert go by name: t = 0 gives the first in sorted order. In mergekit, the base is one of
    the two. If one tensor is zero, there is no angle, and the interpolation is linear; mergekit takes 90 degrees.

    Example:
        >>> method = Slerp(t=0.5)
        >>> method.merge_tensor("w", np.zeros(2), {"a": np.array([2.0, 0.0]), "b": np.array([0.0, 2.0])}, None)
        array([1.4142135, 1.4142135], dtype=float32)
    """

    needs_base = False
    minimum_experts = 2

    t: float = parameter(0.5, low=0.0, high=1.0, help="0 is the first expert by name, 1 the second")

    def for_experts(self, experts: Sequence[str]) -> MergeMethod:
        """Raises InputError unless there are exactly two experts."""
        if len(experts) != 2:
            raise InputError(f"'slerp' merges exactly 2 experts, got {len(experts)}: {', '.join(experts)}.")
        return super().for_experts(experts)

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        weights = _flattened(task_vectors, base)
        return _combined(_slerp_factors(weights @ weights.T, self.t), weights, base)

    def shares(self, name: str, experts: Collection[str], statistics: Any) -> dict[str, float]:
        return dict(zip(experts, (1 - self.t, self.t), strict=True))


@register(
    "karcher",
    "Riemannian center of mass and mollifier smoothing (Karcher, 1977)",
    "https://doi.org/10.1002/cpa.3160300502",
)
@dataclass(frozen=True)
class Karcher(MergeMethod):
    """The Riemannian centre of mass (Karcher mean) of the experts' weights on the sphere. It needs no base.

    For each tensor, flattened: the directions of the weights are points on the unit sphere, and their mean is the point
    with the least sum of squared angles to them. It is found by fixed-point iteration: step by the mean of the tangent
    vectors towards the experts, until the step is below ``tolerance`` (an angle) or ``iterations`` are done. The result
    has the mean of the experts' norms.

    As in mergekit, but run to convergence (mergekit: 10 iterations, tolerance 1e-5; a step costs next to nothing here).
    A tensor that is zero has no direction and contributes only to the mean of the norms (mergekit: norms below 1e-5).
    An expert opposite to the mean has no tangent towards it and is left out of the step. If the directions cancel, the
    iteration starts at the first expert by name. Both happen in tensors of one entry.

    Example:
        >>> three = {"a": np.array([3.0, 0.0]), "b": np.array([0.0, 1.0]), "c": np.array([0.0, 2.0])}
        >>> merged = Karcher().merge_tensor("w", np.zeros(2), three, None)
        >>> print(np.degrees(np.arctan2(merged[1], merged[0])).round(3), np.linalg.norm(merged).round(3))
        60.0 2.0
    """

    needs_base = False

    iterations: int = parameter(100, low=1, help="maximum number of steps; experts of one base need two or three")
    tolerance: float = parameter(1e-7, above=0.0, help="step, in radians, at which the iteration stops")

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        weights = _flattened(task_vectors, base)
        factors = _karcher_factors(weights @ weights.T, self.iterations, self.tolerance)
        return _combined(factors, weights, base)


@register("model-stock", "Model Stock (Jang et al., 2024)", "https://arxiv.org/abs/2403.19522")
@dataclass(frozen=True)
class ModelStock(MergeMethod):
    """Move from the base towards the mean, as far as the angles between the experts suggest (Jang et al., 2024).

    For each tensor ("layer-wise"), flattened: theta_0 + t * mean(tau) with t = T * c / (1 + (T - 1) * c), where c is
    the cosine of the angle between two task vectors. With more than two, as in mergekit, c is the mean of the cosines
    of all pairs, each clamped to [-1, 1] (fusion_bench: the cosine of the mean angle).

    If a task vector is zero, its cosines count as 0. mergekit does the same, but replaces products of two norms below
    1e-6 by 1e-6, which makes the cosines of small biases too small; here they are exact.

    Task vectors that point apart give a negative t, as in public code, where t has no bound: it goes to minus infinity
    as c goes to -1 / (T - 1), which is the cosine in every tensor of one entry on which two experts disagree. Here t is
    at least -1, a step no longer than the mean.

    Example:
        >>> both = {"a": np.array([2.0, 0.0]), "b": np.array([1.0, np.sqrt(3)])}  # 60 degrees apart: t = 2/3
        >>> ModelStock().merge_tensor("w", np.zeros(2), both, None)
        array([1.        , 0.57735026], dtype=float32)
    """

    minimum_experts = 2

    def merge_tensor(self, name: str, base: np.ndarray, task_vectors: TaskVectors, statistics: Any) -> np.ndarray:
        taus = _flattened(task_vectors)
        factor = _stock_ratio(taus @ taus.T) / len(taus)
        return np.asarray(base + factor * taus.sum(axis=0).reshape(base.shape), np.float32)


def _flattened(task_vectors: TaskVectors, base: np.ndarray | None = None) -> np.ndarray:
    """The flattened task vectors, or, if the base is given, the weights of all experts: (T, entries), float64."""
    rows = np.stack([tau.reshape(-1) for tau in task_vectors.values()], dtype=np.float64)
    if base is not None:
        rows += base.reshape(-1)
    return rows


def _combined(factors: np.ndarray, weights: np.ndarray, base: np.ndarray) -> np.ndarray:
    return (factors @ weights).reshape(base.shape).astype(np.float32)


def _slerp_factors(dots: np.ndarray, t: float) -> np.ndarray:
    """The factors of two vectors, from their dot products (2, 2)."""
    norms = np.sqrt(dots[0, 0] * dots[1, 1])
    cosine = dots[0, 1] / norms if norms > 0 else 1.0
    if abs(cosine) > _COLLINEAR:
        return np.array([1 - t, t])
    angle = np.arccos(cosine)
    return np.sin(angle * np.array([1 - t, t])) / np.sin(angle)


def _karcher_factors(dots: np.ndarray, iterations: int, tolerance: float) -> np.ndarray:
    """The factors that combine T vectors to their Karcher mean, from their dot products (T, T)."""
    norms = np.sqrt(np.diag(dots))
    units = np.flatnonzero(norms)
    factors = np.zeros(len(norms))
    if not units.size:
        return factors
    cosines = dots[np.ix_(units, units)] / np.outer(norms[units], norms[units])
    factors[units] = _mean_direction(cosines, iterations, tolerance) / norms[units]
    return factors * norms.mean()


def _mean_direction(cosines: np.ndarray, iterations: int, tolerance: float) -> np.ndarray:
    """The factors that combine unit vectors to their Karcher mean, from their dot products."""
    count = len(cosines)
    mean = np.full(count, 1 / count)
    if _norm(mean, cosines) < 1e-6:
        mean = np.eye(count)[0]
    for _ in range(iterations):
        mean = mean / _norm(mean, cosines)
        dots = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(dots)
        # angle / sin(angle), which is 1 at 0. At 180 degrees there is no tangent, and rounding would choose one.
        pull = np.where(angles < np.pi - 1e-6, 1 / np.sinc(angles / np.pi), 0) / count
        tangent = pull - (pull @ dots) * mean
        step = _norm(tangent, cosines)
        if step < tolerance:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
    return mean / _norm(mean, cosines)


def _norm(factors: np.ndarray, cosines: np.ndarray) -> float:
    return float(np.sqrt(max(factors @ cosines @ factors, 0)))


def _stock_ratio(dots: np.ndarray) -> float:
    """Model stock's t, from the dot products of the task vectors (T, T)."""
    count = len(dots)
    norms = np.sqrt(np.diag(dots))
    cosines = [
        np.clip(dots[i, j] / (norms[i] * norms[j]), -1, 1) if norms[i] * norms[j] > 0 else 0.0
        for i, j in combinations(range(count), 2)
    ]
    mean = float(np.mean(cosines))
    below = 1 + (count - 1) * mean
    # t >= -1 if T * c >= -(1 + (T - 1) * c). Comparing these avoids a division by zero.
    return count * mean / below if count * mean > -below else -1.0
