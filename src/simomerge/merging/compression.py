"""Task vectors as one shared vector plus one bit per entry and task: the arithmetic of compression.

TALL-masks (Wang et al., 2024, https://arxiv.org/abs/2405.07813): the sum of the task vectors, tau_MTL, still contains
most of each of them, and a mask m says where. Here a task vector is restored as ``s * m * tau_MTL`` with one scale s
per tensor, fitted by least squares. The paper has s = 1. Where several experts changed an entry in the same direction,
their sum is too long for each of them, and s corrects this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simomerge.merging.consensus import tall_mask

THRESHOLDS: tuple[float, ...] = tuple(round(0.2 * step, 1) for step in range(1, 11))
"""The values of lambda to try by default: 0.2, 0.4, ..., 2."""

_BLOCK = 1 << 15  # Entries processed at once. They and a mask per threshold stay in the cache of a core.


def squared_errors(tau: np.ndarray, tau_mtl: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """``||tau - s * m * tau_mtl||^2`` for the mask of each threshold, each with its least-squares scale s.

    Args:
        tau: The vector of one task, float32, any shape.
        tau_mtl: The merged task vector, with the same shape.
        thresholds: The values of lambda to try.

    Returns:
        float64, one per threshold.

    Example:
        >>> squared_errors(np.array([1.0, 2.0, 0.0]), np.array([2.0, 4.0, 3.0]), [0.5, 2.0])
        array([0., 5.])
    """
    total = 0.0
    # For each mask, the sums of tau * tau_mtl and of tau_mtl^2 over its entries give the scale and the error.
    sums = np.zeros((len(thresholds), 2))
    tau, tau_mtl = tau.reshape(-1), tau_mtl.reshape(-1)
    for start in range(0, len(tau), _BLOCK):
        own, shared = tau[start : start + _BLOCK], tau_mtl[start : start + _BLOCK]
        masks = np.stack([tall_mask(own, shared, threshold) for threshold in thresholds]).astype(own.dtype)
        sums += masks @ np.stack([own * shared, shared * shared], axis=1)
        total += float(np.dot(own, own))
    products, squares = sums.T
    explained = np.divide(products**2, squares, out=np.zeros(len(thresholds)), where=squares > 0)
    return np.maximum(total - explained, 0.0)


def least_squares_scale(tau: np.ndarray, masked: np.ndarray) -> float:
    """The s for which ``s * masked`` is nearest to ``tau``, rounded to float32; 0 if ``masked`` is 0.

    Example:
        >>> least_squares_scale(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
        0.5
    """
    masked = masked.reshape(-1)
    square = float(np.dot(masked, masked))
    return float(np.float32(float(np.dot(tau.reshape(-1), masked)) / square)) if square > 0 else 0.0


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """A boolean array of n entries, any shape -> uint8 (ceil(n / 8),), with the first entry in the highest bit.

    Example:
        >>> pack_mask(np.array([[True, False], [True, True]]))
        array([176], dtype=uint8)
    """
    return np.packbits(mask.reshape(-1))


def masked_by(packed: np.ndarray, tau_mtl: np.ndarray) -> np.ndarray:
    """``tau_mtl`` where the mask packed by `pack_mask` is true, and 0 elsewhere; float32, with its shape.

    Example:
        >>> masked_by(np.array([0b10000000], np.uint8), np.array([3.0, 4.0], np.float32))
        array([3., 0.], dtype=float32)
    """
    mask = np.unpackbits(packed, count=tau_mtl.size).view(np.bool_).reshape(tau_mtl.shape)
    return np.where(mask, tau_mtl, np.float32(0))
