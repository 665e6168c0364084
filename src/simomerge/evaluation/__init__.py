"""Metrics, normalised performance, Delta_MTL."""

from simomerge.evaluation.metrics import TaskMetrics
from simomerge.evaluation.scores import Scores, delta_mtl, evaluate, normalised_performance

__all__ = ["Scores", "TaskMetrics", "delta_mtl", "evaluate", "normalised_performance"]
