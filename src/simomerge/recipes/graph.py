"""Stages that depend on each other, run in a folder. A finished stage is not run again.

A killed run resumes inside a training: a stage keeps its state in a work folder next to its output until it is done.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from simomerge.core import distributed
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError
from simomerge.core.exclusive import remove_leftovers
from simomerge.core.progress import labelled_progress, progress
from simomerge.datasets.base import DenseDataset
from simomerge.datasets.load import load_data, load_images
from simomerge.datasets.pictures import as_images
from simomerge.training.pool import WorkerPool
from simomerge.training.run_folder import LOG, RunFolder

Data = Mapping[str, Any]
"""A dataset as plain data: the keyword arguments of `simomerge.datasets.load.load_data`. With ``unlabelled``, ``spec``
may also be a folder of pictures, of which ``count`` are used."""


OVERHEAD = 1_000_000_000
"""Bytes of memory that a stage needs in addition to models: torch, a batch of images, activations."""


def open_data(data: Data, **more: Any) -> DenseDataset:
    """The dataset that plain data describe; ``more`` are arguments that they may replace."""
    if data.get("unlabelled"):
        return as_images(load_images(data["spec"]), data["count"])
    return load_data(**{**more, **data})


@dataclass(frozen=True)
class Output:
    """The folder of a stage by its name: each machine may have the run folder under another path."""

    name: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Stage(ABC):
    """One piece of work that fills a folder.

    The fields are its inputs, as plain data. Other stages among them, also inside a mapping, are run first; for `run`
    they are replaced by their folders. If the class attribute ``keeps_labels`` is true, progress inside the stage shows
    its own labels after the stage's name.
    """

    keeps_labels: ClassVar[bool] = False

    name: str = field(metadata={"resource": True})

    @property
    def cost(self) -> float:
        """A guess of how long it takes, in training steps; it is only compared with other stages' costs."""
        return 20.0

    @property
    def models(self) -> float:
        """About how many times the encoder's weights are in memory: a training needs gradients and moments too."""
        return 2.0

    @abstractmethod
    def run(self, output: Path) -> None:
        """Do the work and write the folder ``output`` in one step."""

    def needs(self) -> Iterator[Stage]:
        """The stages among the inputs."""
        for spec in fields(self):
            yield from _stages_in(getattr(self, spec.name))


class Graph:
    """A folder of finished stages, each named by a key of everything that it depends on.

    Args:
        folder: The run folder.
        base: Where the foundation encoder is.
        salt: What else the results depend on: the base (see `encoder_identity`), the version.
        contents: For a dataset as plain data, what distinguishes it from other datasets of the same name; empty where
            the name says everything.
        weights: Bytes of the base's weights, by which a cluster finds room for each stage.
    """

    def __init__(
        self, folder: Path | RunFolder, base: str, salt: str, contents: Callable[[Data], str], weights: int = 0
    ) -> None:
        self.weights = weights
        self.run_folder = RunFolder.of(folder)
        self.folder = self.run_folder.path
        self.base = base
        self.salt = salt
        self.contents = contents
        self._outputs: dict[Stage, Path] = {}

    def build(self, wanted: Iterable[Stage], pool: WorkerPool) -> None:
        """Run the stages that are not done yet, and those that they need, in parallel where possible.

        Among the stages that can start, the one with the longest chain of waiting stages starts first.
        """
        found = self.in_order(wanted)
        done = distributed.from_first(self.run_folder.done(found))
        missing = {path: stage for path, stage in found.items() if path not in done}
        for path in found.keys() - missing.keys():
            _lock(path).unlink(missing_ok=True)  # left by a run that was killed after the stage was done
        self.run_folder.send_stages(done)  # of a run that was killed before it could do that
        needs = {path: [o for o in map(self.output, stage.needs()) if o in missing] for path, stage in missing.items()}
        chain = {path: stage.cost for path, stage in missing.items()}
        for path in reversed(missing):  # a stage comes before the stages that it waits for
            for need in needs[path]:
                chain[need] = max(chain[need], missing[need].cost + chain[path])
        order = sorted(missing, key=lambda path: -chain[path])
        place = {path: index for index, path in enumerate(order)}
        do = _do_once if pool.needs_locks else do_stage
        jobs = [(do, self._job(missing[path])) for path in order]
        memory = [OVERHEAD + int(missing[path].models * self.weights) for path in order]
        pool.run(jobs, [[place[need] for need in needs[path]] for path in order], memory)

    def output(self, stage: Stage) -> Path:
        """The folder of a stage, done or not."""
        if stage not in self._outputs:
            named = json.dumps(self._inputs(stage), sort_keys=True, default=str)
            key = hashlib.sha256(f"{self.salt} {type(stage).__name__} {named}".encode()).hexdigest()[:12]
            name = f"{stage.name.replace(' ', '-').replace('/', '-')}-{key}"
            self._outputs[stage] = self.run_folder.stage(name)
        return self._outputs[stage]

    def fetched(self, stage: Stage) -> Path:
        """The folder of a finished stage, with its content on this machine."""
        self.run_folder.fetch([self.output(stage)])
        return self.output(stage)

    def log(self, stage: Stage) -> dict[str, Any]:
        """The log of a finished stage: what it cost and found."""
        return _read_log(self.run_folder.log(self.output(stage)))

    def in_order(self, wanted: Iterable[Stage]) -> dict[Path, Stage]:
        """The stages and those that they need, by their folders, each after what it needs."""
        found: dict[Path, Stage] = {}
        for stage in wanted:
            if self.output(stage) not in found:
                found |= self.in_order(stage.needs())
                found[self.output(stage)] = stage
        return found

    def _job(self, stage: Stage) -> dict[str, Any]:
        """The arguments of `do_stage`."""
        named = _replaced(stage, Stage, lambda need: Output(self.output(need).name))
        return {"stage": named, "output": Output(self.output(stage).name), "folder": self.run_folder}

    def _inputs(self, value: Any) -> dict[str, Any]:
        """The fields of a dataclass that decide results, as they enter a key."""
        deciding = [spec.name for spec in fields(value) if not spec.metadata.get("resource")]
        return {name: self.key_of(getattr(value, name)) for name in deciding}

    def key_of(self, value: Any) -> Any:
        """An input as it enters the stage's key.

        A stage enters by the name of its folder, which contains its own key, so keys depend on all earlier stages. A
        dataset enters by its content and the base by its identity (in the salt), so both may be moved.
        """
        if isinstance(value, Stage):
            return self.output(value).name
        if is_dataclass(value) and not isinstance(value, type):
            return {"class": type(value).__name__, **self._inputs(value)}
        if isinstance(value, Mapping):
            plain = {key: self.key_of(item) for key, item in value.items()}
            is_data = "spec" in value and ("split" in value or "unlabelled" in value)
            return {**plain, "spec": self.contents(value) or value["spec"]} if is_data else plain
        return "base" if value == self.base else value


def read_log(output: Path) -> dict[str, Any]:
    """The log of a finished stage that is on this machine."""
    return _read_log(output / LOG)


def _read_log(file: Path) -> dict[str, Any]:
    log: dict[str, Any] = read_json(file, "remove the stage's folder, and run the recipe again.")
    return log


def _lock(output: Path) -> Path:
    return output.parent / f"{output.name}.lock"


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Run the block in one program at a time, on all machines that share the disk.

    All processes of a program enter the block together. The lock of a program that died is free.

    Args:
        path: The lock file.
        on_wait: Called if another program is in the block.

    Raises:
        InputError: The disk has no lock service, as some network disks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        if distributed.is_first():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not supported"
        raise InputError(
            f"{path.parent}: its disk cannot lock files ({reason}), which keeps two runs out of one folder."
            " Choose a folder on another disk, or share the work by --ray, which needs no locks."
        ) from error
    try:
        distributed.wait()
        yield
        distributed.wait()
    finally:
        lock.release()


def do_stage(stage: Stage, output: Output, folder: RunFolder) -> None:
    """Do a stage, unless it is done. No other program may be doing it.

    Args:
        stage: The stage, with `Output` in the place of other stages.
        output: Its folder.
        folder: The run folder. If it is at a URL, the stage's folder is copied there.
    """
    place, needs = folder.stage(output.name), []

    def found(need: Output) -> Path:
        needs.append(folder.stage(need.name))
        return needs[-1]

    stage = _replaced(stage, Output, found)
    if distributed.is_first():
        remove_leftovers(place)
    if not distributed.from_first(place.exists()):
        with labelled_progress(stage.name, keep=stage.keeps_labels):
            folder.fetch(needs)
            stage.run(place)
    folder.send_stages([place])


def _do_once(stage: Stage, output: Output, folder: RunFolder) -> None:
    """Do a stage, unless another run in the same folder is doing it or has done it."""
    lock = _lock(folder.stage(output.name))
    with locked(lock, lambda: progress(stage.name, 0, 1, "another run does it")):
        do_stage(stage, output, folder)
    if distributed.is_first():
        lock.unlink(missing_ok=True)  # waiting and later runs will find the finished stage


def _replaced(stage: Stage, kind: type, by: Callable[[Any], Any]) -> Stage:
    """A copy of a stage in which ``by(value)`` replaces every input of a type, also inside mappings."""

    def replaced(value: Any) -> Any:
        if isinstance(value, kind):
            return by(value)
        return {key: replaced(item) for key, item in value.items()} if isinstance(value, Mapping) else value

    return replace(stage, **{spec.name: replaced(getattr(stage, spec.name)) for spec in fields(stage)})


def _stages_in(value: Any) -> Iterator[Stage]:
    if isinstance(value, Stage):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _stages_in(item)
