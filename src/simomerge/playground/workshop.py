"""Merging, folding and predicting in memory, with what is needed again kept in small caches."""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from simomerge.assembly.experts import assemble, with_merged_encoder
from simomerge.assembly.images import prepare
from simomerge.assembly.judging import Judge
from simomerge.assembly.realign import realign
from simomerge.assembly.realign.agreement import Agreement, judging
from simomerge.assembly.realign.sums import HeadTargets, fold_heads, head_targets, with_heads
from simomerge.checkpoints.experts import as_many_pixels, trained_size
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.registry import settings
from simomerge.datasets.groups import LEAST_IMAGES, held_out
from simomerge.datasets.pictures import Images
from simomerge.datasets.tasks import Task
from simomerge.merging import MergeMethod, available, get_method
from simomerge.models.model import SimoModel
from simomerge.playground.opening import Opened
from simomerge.training.metrics import TaskMetrics, batched

Maps = Mapping[str, np.ndarray]
"""Predictions by task, as `SimoModel.predict` returns them."""

EXPERTS, MERGED, REPAIRED, MODEL = "experts", "merged", "repaired", "model"
"""The columns: the experts, their merge, the merge with folded heads, and a finished model."""

HEADS = {"the experts' heads": "", "folded": "per-tap", "folded across taps": "cross-tap"}
"""What can be done with the heads of a merge, and the variant of the fold."""

LONGEST = 518
"""The longest side in pixels at which experts predict that record no training size."""

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Choice:
    """What a user has chosen: a merge method, its scale (alpha) where it has one, and a key of `HEADS`."""

    method: str = "task-arithmetic"
    scale: float = 0.4
    heads: str = "folded"


def has_scale(method: str) -> bool:
    """Whether a name is that of a merge method with a scale.

    Example:
        >>> has_scale("ties"), has_scale("average")
        (True, False)
    """
    return method in available() and "scale" in {spec.name for spec in settings(available()[method])}


@dataclass(frozen=True)
class Look:
    """What there is to see for one photo.

    Attributes:
        photo: uint8 RGB (H, W, 3).
        tasks: The tasks by name.
        columns: Column -> predictions.
        distances: Column -> task -> the task's main metric against the expert's prediction for this photo.
        agreement: Column -> task -> agreement with the expert on held-out pictures: 1 is the expert, 0 is no better
            than its prediction for another picture. Empty without enough pictures.
        notes: Sentences about the pictures and the choice.
        seconds: How long it took.
    """

    photo: np.ndarray
    tasks: Mapping[str, Task]
    columns: Mapping[str, Maps]
    distances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    agreement: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seconds: float = 0.0


class Workshop:
    """Merges experts, folds the heads and predicts. One call runs at a time.

    Args:
        opened: The models.
        samples: Pictures to fold on if a user gives none, uint8 RGB (H, W, 3).
    """

    def __init__(self, opened: Opened, samples: Sequence[np.ndarray] = ()) -> None:
        self.opened, self.samples = opened, list(samples)
        self._lock = threading.Lock()
        self._predicted, self._pictures, self._merges = _Recent(8), _Recent(2), _Recent(2)

    @property
    def tasks(self) -> dict[str, Task]:
        """All tasks by name."""
        found = {name: expert.tasks[name] for name, expert in self.opened.experts.items()}
        return found or dict(self.opened.model.tasks if self.opened.model else {})

    @property
    def can_merge(self) -> bool:
        return bool(self.opened.experts)

    @property
    def export_size(self) -> tuple[int, int]:
        """(height, width) of an export in pixels: the training size, or else one of at most `LONGEST` pixels a side."""
        return self._trained_at() or (LONGEST * 3 // 4, LONGEST)

    @property
    def methods(self) -> list[str]:
        """The merge methods that work for these experts without images and without labels."""
        return [
            name
            for name, method in available().items()
            if not (method.needs_data or method.needs_labels) and self._suits(method)
        ]

    def _suits(self, method: type[MergeMethod]) -> bool:
        try:
            method().for_experts(sorted(self.opened.experts))
        except InputError:
            return False
        return method.minimum_experts <= len(self.opened.experts)

    def look(self, photo: np.ndarray, choice: Choice, pictures: Sequence[np.ndarray] = ()) -> Look:
        """Predict every task for a photo, uint8 RGB (H, W, 3), with the experts and with what the choice makes of them.

        Args:
            pictures: What to fold on, uint8 RGB (H, W, 3); the samples by default.

        Raises:
            InputError: The method does not work for these experts, or the pictures cannot be used.
        """
        began = time.monotonic()
        with self._lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            columns: dict[str, Maps] = {}
            key = _digest([photo])
            agreement: dict[str, dict[str, float]] = {}
            if self.can_merge:
                columns[EXPERTS] = self._predicted.get(key, lambda: self._of_experts(photo))
                merged = self._merges.get((choice.method, choice.scale), lambda: self._merge(choice))
                columns[MERGED] = self._predict(merged, photo)
                if HEADS[choice.heads]:
                    repaired, agreement = self._fold(merged, choice, pictures or self.samples)
                    columns[REPAIRED] = self._predict(repaired, photo)
            if self.opened.model is not None:
                columns[MODEL] = self._predicted.get((key, MODEL), lambda: self._of_model(photo))
        distances, seconds = _distances(self.tasks, columns), time.monotonic() - began
        return Look(photo, self.tasks, columns, distances, agreement, _sentences(caught), seconds)

    def result(self, choice: Choice, pictures: Sequence[np.ndarray] = ()) -> SimoModel:
        """The model of a choice, with its provenance, for saving.

        Raises:
            InputError: As for `look`; or there are no pictures to fold on.
        """
        if not self.can_merge:
            assert self.opened.model is not None
            return self.opened.model
        assert self.opened.base is not None
        with self._lock:
            model = assemble(self.opened.base, self.opened.experts, self._method(choice))
            if variant := HEADS[choice.heads]:
                images = self._prepared(self._checked(pictures or self.samples))
                model = realign(model, self.opened.experts, images, variant=variant)
        return model

    def _method(self, choice: Choice) -> Any:
        return get_method(choice.method, **({"scale": choice.scale} if has_scale(choice.method) else {}))

    def _merge(self, choice: Choice) -> SimoModel:
        assert self.opened.base is not None
        return with_merged_encoder(self.opened.base, self.opened.experts, self._method(choice))

    def _fold(
        self, merged: SimoModel, choice: Choice, pictures: Sequence[np.ndarray]
    ) -> tuple[SimoModel, dict[str, dict[str, float]]]:
        """The merge with folded heads, and by column its agreement with the experts on held-out pictures."""
        variant, given = HEADS[choice.heads], self._checked(pictures)
        kept = self._pictures.get((_digest(given), variant), lambda: self._observe(merged, given, variant))
        folded = fold_heads(merged, kept.targets, variant, "auto", kept.agreement)
        for note in [*kept.notes, *filter(None, [folded.sums.shortcoming()])]:
            warn(note)
        if kept.judge is None:
            return folded.model, {}
        ridges = {task: fit.ridge for task, fit in folded.fits.items()}
        judged = with_heads(merged, folded.sums.heads(ridges, hold_out=True))
        return folded.model, {
            MERGED: kept.judge.performance(kept.judge.scores(merged)),
            REPAIRED: kept.judge.performance(kept.judge.scores(judged)),
        }

    def _checked(self, pictures: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        if not pictures:
            raise InputError("a fold needs pictures: give some without labels, or keep the experts' heads.")
        return pictures

    def _observe(self, merged: SimoModel, pictures: Sequence[np.ndarray], variant: str) -> _Observed:
        """What the experts say about pictures; it serves every merge."""
        experts = self.opened.experts
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            images = self._prepared(pictures)
            agreement = Agreement(experts, judging(images))
            targets = list(head_targets(merged, experts, images, variant, agreement=agreement))
            judge = None
            if len(images) >= LEAST_IMAGES:
                judge = Judge(experts, images._subset(held_out(images)), labelled=False, lenient=True)
        return _Observed(targets, agreement, judge, _sentences(caught))

    def _prepared(self, pictures: Sequence[np.ndarray]) -> Images:
        """Pictures at the experts' training size, or at one size if they record none."""
        known = self._trained_at() is not None
        images = prepare(list(pictures), self.opened.experts, size=None if known else self._size(pictures[0]))
        return images.readable(one_size=True)

    def _of_experts(self, photo: np.ndarray) -> Maps:
        return {task: self._predict(expert, photo)[task] for task, expert in self.opened.experts.items()}

    def _of_model(self, photo: np.ndarray) -> Maps:
        assert self.opened.model is not None
        own = self.opened.model
        maps = self._predict(own, photo)
        return {task: maps[task] for task in self.tasks if task in maps}

    def _predict(self, model: SimoModel, photo: np.ndarray) -> Maps:
        found: Maps = model.predict(photo, size=self._size(photo))
        return found

    def _size(self, photo: np.ndarray) -> tuple[int, int]:
        """The size in pixels at which the models see a photo: its shape with the experts' number of pixels."""
        height, width = photo.shape[:2]
        trained = self._trained_at()
        if trained is not None:
            return as_many_pixels((height, width), trained)
        scale = min(1.0, LONGEST / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _trained_at(self) -> tuple[int, int] | None:
        models = [*self.opened.experts.values(), *([self.opened.model] if self.opened.model else [])]
        return next((size for model in models if (size := trained_size(model.provenance)) is not None), None)


@dataclass(frozen=True)
class _Observed:
    """What the experts say about pictures, and what there is to say about these."""

    targets: list[HeadTargets]
    agreement: Agreement
    judge: Judge | None
    notes: list[str]


class _Recent:
    """The last few results, by key."""

    def __init__(self, count: int) -> None:
        self.count, self._kept = count, OrderedDict[Hashable, Any]()

    def get(self, key: Hashable, make: Callable[[], _Found]) -> _Found:
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self.count:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        found: _Found = self._kept[key]
        return found


def _sentences(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Messages of recorded warnings for users, each once."""
    return list(dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, UserWarning)))


def _digest(pictures: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr(picture.shape).encode())
        digest.update(np.ascontiguousarray(picture).tobytes())
    return digest.hexdigest()


def _distances(tasks: Mapping[str, Task], columns: Mapping[str, Maps]) -> dict[str, dict[str, float]]:
    """The main metric of every prediction against the expert's, for one photo."""
    if EXPERTS not in columns:
        return {}
    found: dict[str, dict[str, float]] = {}
    for column, maps in columns.items():
        if column == EXPERTS:
            continue
        found[column] = {}
        for name, values in maps.items():
            metrics = TaskMetrics(tasks[name])
            metrics.update(batched(tasks[name], values), batched(tasks[name], columns[EXPERTS][name]))
            found[column][name] = metrics.compute()[tasks[name].metric]
    return found
