"""Experiment trackers that trainings report to: TensorBoard, Weights & Biases, trackio; none by default.

The choice is global and not an argument of the training functions: it changes no result, so it must not become part of
a cache key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from simomerge.core.errors import InputError
from simomerge.training.choices import TRACKERS


@dataclass(frozen=True)
class Tracking:
    """The trackers, and the folder for what they write on this machine."""

    trackers: tuple[str, ...]
    folder: Path


_current: Tracking | None = None


def current() -> Tracking | None:
    """The tracking of this process."""
    return _current


def use(tracking: Tracking | None) -> None:
    """Set the tracking of this process; `WorkerPool` calls this in its workers."""
    global _current
    _current = tracking


@contextmanager
def track(trackers: Sequence[str], folder: str | Path) -> Iterator[None]:
    """Report losses and learning rates of all trainings in the block; each is a run of the project "simomerge".

    Args:
        trackers: Names from `simomerge.training.choices.TRACKERS`; may be empty.
        folder: Folder for what they write on this machine. TensorBoard writes to ``folder/LABEL``.

    Raises:
        InputError: A tracker is unknown or not installed.

    Example:
        >>> with track(["tensorboard"], "runs/logs"):                                # doctest: +SKIP
        ...     finetune(model, data, settings)
    """
    for name in trackers:
        if name not in TRACKERS:
            raise InputError(f"unknown tracker {name!r}; choose among: {', '.join(TRACKERS)}.")
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed: pip install {name}.")
    before = _current
    use(Tracking(tuple(trackers), Path(folder)) if trackers else before)
    try:
        yield
    finally:
        use(before)


@contextmanager
def tracked_accelerator(label: str, config: Mapping[str, Any], **settings: Any) -> Iterator[Any]:
    """An `accelerate.Accelerator` whose ``log`` reports to the current trackers, as one run named ``label``.

    Args:
        config: Settings to show with the run.
        settings: Arguments of the Accelerator.
    """
    if _current is None:
        yield Accelerator(**settings)
        return
    folder = _current.folder / re.sub(r"[^\w.+-]+", "-", label)
    folder.mkdir(parents=True, exist_ok=True)
    folders = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder))
    accelerator = Accelerator(log_with=list(_current.trackers), project_config=folders, **settings)
    shown = {name: value for name, value in config.items() if value is not None}
    names = {name: {"name": label} for name in _current.trackers if name != "tensorboard"}
    accelerator.init_trackers("simomerge", shown, names)
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:  # end_training would also disconnect the processes
            tracker.finish()
