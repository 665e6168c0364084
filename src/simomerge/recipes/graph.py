"""Stages that wait for each other, done in a folder: what is there already is not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simomerge.core import distributed
from simomerge.core.files import remove_leftovers
from simomerge.core.progress import labelled_progress, progress
from simomerge.recipes.stages import read_log
from simomerge.training.pool import WorkerPool


@dataclass(frozen=True, eq=False)
class Stage:
    """One piece of work: a function of `simomerge.recipes.stages` and its arguments.

    The arguments are plain data; a stage among them stands for its folder, and is done before.
    """

    name: str
    function: Callable[..., None]
    arguments: Mapping[str, Any]
    cost: float = 1.0  # a guess, above zero; only ever compared with other stages'

    def needs(self) -> Iterator[Stage]:
        """The stages among the arguments."""
        yield from _stages_in(self.arguments)


class Run:
    """A folder of finished stages, each keyed by everything it depends on.

    Args:
        folder: of the run.
        base: where the foundation encoder is.
        salt: what else the results depend on (the base's weights, the version).
        contents: of a dataset as plain data, what tells it from others by the same name; empty where the name says all.
    """

    def __init__(self, folder: Path, base: str, salt: str, contents: Callable[[Mapping[str, Any]], str]) -> None:
        self.folder = folder
        self.base = base
        self.salt = salt
        self.contents = contents
        self._outputs: dict[Stage, Path] = {}

    def build(self, wanted: Iterable[Stage], pool: WorkerPool) -> None:
        """Do the stages that are not there yet, and those they need, side by side.

        Of those that can start, the one that the longest chain of others waits for starts first.
        """
        found = self.in_order(wanted)
        absent = distributed.from_first([str(path) for path in found if not path.exists()])
        missing = {path: stage for path, stage in found.items() if str(path) in set(absent)}
        for path in found.keys() - missing.keys():
            _lock(path).unlink(missing_ok=True)  # of a run that was killed when all but this was done
        needs = {path: [o for o in map(self.output, stage.needs()) if o in missing] for path, stage in missing.items()}
        chain = {path: stage.cost for path, stage in missing.items()}
        for path in reversed(missing):  # who waits comes before whom it waits for
            for need in needs[path]:
                chain[need] = max(chain[need], missing[need].cost + chain[path])
        order = sorted(missing, key=lambda path: -chain[path])
        place = {path: index for index, path in enumerate(order)}
        jobs = [
            (_do_once, {"stage": replace(missing[p], arguments=self._plain(missing[p].arguments)), "output": p})
            for p in order
        ]
        pool.run(jobs, after=[[place[need] for need in needs[path]] for path in order])

    def output(self, stage: Stage) -> Path:
        """The folder of a stage, done or not."""
        if stage not in self._outputs:
            # An argument that is a stage's folder carries that stage's key in its name, so keys chain.
            # Places of this machine do not count; the base counts by its weights, which the salt holds.
            plain = self._told_apart(self._plain(stage.arguments))
            arguments = _without_places(plain, {str(self.folder): "", self.base: "base"})
            named = json.dumps(arguments, sort_keys=True, default=str)
            key = hashlib.sha256(f"{self.salt} {stage.function.__name__} {named}".encode()).hexdigest()[:12]
            name = f"{stage.name.replace(' ', '-').replace('/', '-')}-{key}"
            self._outputs[stage] = self.folder / "stages" / name
        return self._outputs[stage]

    def log(self, stage: Stage) -> dict[str, Any]:
        """What a finished stage cost and found."""
        return read_log(self.output(stage))

    def in_order(self, wanted: Iterable[Stage]) -> dict[Path, Stage]:
        """The stages and those they need, by their folders, each after what it needs."""
        found: dict[Path, Stage] = {}
        for stage in wanted:
            if self.output(stage) not in found:
                found |= self.in_order(stage.needs())
                found[self.output(stage)] = stage
        return found

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Stage):
            return str(self.output(value))
        if isinstance(value, Mapping):
            return {key: self._plain(item) for key, item in value.items()}
        return value

    def _told_apart(self, value: Any) -> Any:
        """Arguments with what datasets hold in the place of where they are."""
        if not isinstance(value, Mapping):
            return value
        if {"spec", "split"} <= value.keys() and (contents := self.contents(value)):
            return {**value, "spec": contents}
        return {key: self._told_apart(item) for key, item in value.items()}


def _lock(output: Path) -> Path:
    return output.parent / f"{output.name}.lock"


def _do_once(stage: Stage, output: Path) -> None:
    """Do a stage whose arguments are plain, but for one that another run in the same folder does or has done."""
    with distributed.locked(_lock(output), lambda: progress(stage.name, 0, 1, "another run does it")):
        if distributed.is_first():
            remove_leftovers(output)
        if not distributed.from_first(output.exists()):
            with labelled_progress(stage.name):
                stage.function(output=output, label=stage.name, **stage.arguments)
    if distributed.is_first():
        _lock(output).unlink(missing_ok=True)  # who waited for it finds the stage done, and so does who comes later


def _stages_in(value: Any) -> Iterator[Stage]:
    if isinstance(value, Stage):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _stages_in(item)


def _without_places(value: Any, places: Mapping[str, str]) -> Any:
    """Plain data with the start of every path replaced."""
    if isinstance(value, Mapping):
        return {key: _without_places(item, places) for key, item in value.items()}
    if isinstance(value, str):
        for place, short in places.items():
            value = short + value[len(place) :].replace("\\", "/") if value.startswith(place) else value
    return value
