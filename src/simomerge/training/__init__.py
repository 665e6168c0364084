"""Training: one loop, LP-FT experts and joint MTL, cached features, jobs side by side."""

from simomerge.training.features import CachedFeatures, cache_features
from simomerge.training.loop import TrainLog, TrainSettings, fit
from simomerge.training.lpft import (
    ModelLosses,
    finetune,
    fresh_head,
    image_losses,
    lpft,
    train_head,
    trainable_parameters,
)
from simomerge.training.pool import WorkerPool
from simomerge.training.tracking import track
from simomerge.training.weighting import WEIGHTINGS, Weighting

__all__ = [
    "WEIGHTINGS",
    "CachedFeatures",
    "ModelLosses",
    "TrainLog",
    "TrainSettings",
    "Weighting",
    "WorkerPool",
    "cache_features",
    "finetune",
    "fit",
    "fresh_head",
    "image_losses",
    "lpft",
    "track",
    "train_head",
    "trainable_parameters",
]
