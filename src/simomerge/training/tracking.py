"""Where trainings report to besides the terminal, nowhere by default: TensorBoard, Weights & Biases, trackio.

It is not handed from function to function: it changes no result, and so is no argument of anything that is keyed by its
arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class Tracking:
    """Which trackers, and the folder for what they write on this machine."""

    trackers: tuple[str, ...]
    folder: Path


_current: Tracking | None = None


def current() -> Tracking | None:
    """What trainings of this process report to."""
    return _current


def use(tracking: Tracking | None) -> None:
    """Report to these from here on: for the processes of a `WorkerPool`."""
    global _current
    _current = tracking


@contextmanager
def track(trackers: Sequence[str], folder: str | Path) -> Iterator[None]:
    """Let every training in the block report its losses and learning rates; each is a run of the project "simomerge".

    Args:
        trackers: of `TRACKERS`; none does nothing.
        folder: for what they write on this machine; TensorBoard's files of a training are in ``folder/LABEL``.

    Raises:
        InputError: an unknown tracker, or one that is not installed.

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


def tracked_accelerator(label: str, **settings: Any) -> Any:
    """An accelerator whose `log` reports to the current trackers."""
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    if _current is None:
        return Accelerator(**settings)
    folder = _current.folder / re.sub(r"[^\w.+-]+", "-", label)
    folder.mkdir(parents=True, exist_ok=True)
    places = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder))
    return Accelerator(log_with=list(_current.trackers), project_config=places, **settings)


@contextmanager
def tracked_run(accelerator: Any, label: str, config: Mapping[str, Any]) -> Iterator[None]:
    """A training's run: begun with its settings, ended however the training ends."""
    if _current is None:
        yield
        return
    plain = {name: value for name, value in config.items() if value is not None}
    kwargs = {name: {"name": label} for name in _current.trackers if name != "tensorboard"}
    accelerator.init_trackers("simomerge", plain, kwargs)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # not end_training, which would also part the processes
            tracker.finish()
