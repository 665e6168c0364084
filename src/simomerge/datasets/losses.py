"""Losses of predictions against targets, and distances from a teacher's predictions.

Logits are (B, C, H, W). A target is float (B, C, H, W), or int64 (B, H, W) for labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_LABEL = -1
"""Label of pixels that segmentation losses and metrics leave out (the paper's convention)."""


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors (B, 3, H, W) scaled to length one; on a CPU much faster than F.normalize, with the same result."""
    return vectors * vectors.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt()


# Losses -------------------------------------------------------------------------------------------------


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` where ``valid``; zero, with a gradient of zero, if nothing is valid."""
    weight = valid.to(values.dtype)
    return (torch.where(valid, values, values.new_zeros(())) * weight).sum() / weight.sum().clamp(min=1)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each pixel (B, H, W); zero where the label is `IGNORE_LABEL`."""
    return F.cross_entropy(logits, target, ignore_index=IGNORE_LABEL, reduction="none")


def l1(logits: Tensor, target: Tensor) -> Tensor:
    """Absolute difference of each value."""
    return (logits - target).abs()


def l2(logits: Tensor, target: Tensor) -> Tensor:
    """Squared difference of each value."""
    return l1(logits, target).square()


def end_point(logits: Tensor, target: Tensor) -> Tensor:
    """Length of the difference of two vectors (B, 2, H, W), the end-point error of optical flow."""
    # The square root has no gradient at zero; 1e-6 pixels do not matter.
    return (l1(logits, target).square().sum(1) + 1e-12).sqrt()


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each pixel; targets of -1, which do not count, are taken for 0."""
    return F.binary_cross_entropy_with_logits(logits, target.clamp(min=0), reduction="none")


def cosine(logits: Tensor, target: Tensor) -> Tensor:
    """1 - dot product of unit vectors (paper, Appendix: losses)."""
    # Normalising the logits with F.normalize first takes eight times as long on a CPU.
    return 1 - (logits * target).sum(1) * logits.square().sum(1).clamp(min=1e-24).rsqrt()


def edge_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy in which edge pixels have twice the weight.

    A tenth of the pixels are edges: L1, the paper's loss for all other tasks, is lowest for "no edge anywhere".
    """
    weight = torch.tensor(2.0, device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, target.clamp(min=0), pos_weight=weight, reduction="none")


# Distances from a teacher's predictions -----------------------------------------------------------------


def class_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the class probabilities from the teacher's, mean over the pixels."""
    own, wanted = F.log_softmax(logits.float(), 1), F.log_softmax(teacher.float(), 1)
    return (wanted.exp() * (wanted - own)).sum(1).mean()


def edge_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the edge probability from the teacher's, mean over the pixels."""
    wanted = torch.sigmoid(teacher.float())
    entropy = F.binary_cross_entropy_with_logits(teacher.float(), wanted)
    return F.binary_cross_entropy_with_logits(logits.float(), wanted) - entropy


def absolute_difference(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference."""
    return F.l1_loss(logits.float(), teacher.float())


def squared_difference(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference."""
    return F.mse_loss(logits.float(), teacher.float())


def mean_end_point(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean length of the difference of two vectors."""
    # Shifted by 1e-6 pixels, because the square root has no gradient at zero.
    return ((logits.float() - teacher.float()).square().sum(1) + 1e-12).sqrt().mean() - 1e-6


def angle(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine of the angle to the vectors of the teacher, where these are not zero."""
    wanted = unit_vectors(teacher.float())
    return masked_mean(cosine(logits.float(), wanted), wanted.square().sum(1) > 0)
