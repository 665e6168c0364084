"""The folder of a run. It may be at a URL: each machine then works in a folder of its own, and fetches what it needs.

A stage is at the URL when its ``log.json`` is there, which is written last.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simomerge.core import distributed
from simomerge.core.assets import expanded
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder, atomic_write_bytes
from simomerge.core.model_files import DESCRIPTION, is_model_file
from simomerge.core.remote import (
    Unreachable,
    copy_here,
    copy_there,
    is_url,
    local_copy,
    local_place,
    names_there,
    one_at_a_time,
    remove_there,
    shown_url,
)

STAGES = "stages"
"""The folder of the stages in a run folder."""

MODEL = "model"
"""The folder of the recommended model in a run folder."""

LOG = "log.json"
"""The file of a stage that says what it cost and found."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its stages and results.

    Args:
        path: The folder on this machine, absolute.
        given: The path or URL as the user wrote it, with ``~`` expanded.
        url: Where its content is kept; empty if that is the folder itself.
    """

    path: Path
    given: str
    url: str = ""

    @classmethod
    def of(cls, place: str | os.PathLike[str] | RunFolder) -> RunFolder:
        """The run folder at a path or a URL. The folder on this machine for a URL is in the cache folder."""
        if isinstance(place, RunFolder):
            return place
        if is_url(place):
            url = str(place).rstrip("/")
            return cls(local_place("runs", url), url, url)
        path = expanded(place)
        return cls(path.resolve(), path.as_posix())

    def shown(self, name: str = "") -> str:
        """The folder, or something in it, as the user may type it."""
        return f"{shown_url(self.url)}/{name}".rstrip("/") if self.url else (Path(self.given) / name).as_posix()

    def stage(self, name: str) -> Path:
        """The folder of a stage on this machine."""
        return self.path / STAGES / name

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled for another machine: a URL has a path of its own there, another folder the same."""
        return (RunFolder.of, (self.url,)) if self.url else (RunFolder, (self.path, self.given))

    @contextmanager
    def token(self) -> Iterator[str]:
        """The name of a file in the folder, while the block runs: who `sees` it sees the folder.

        Raises:
            InputError: The folder or the URL cannot be written.
        """
        token = self.path / f".seen-{uuid.uuid4().hex[:12]}"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        try:
            if self.url:
                try:
                    copy_there(token, self._at(token))
                except InputError as error:
                    raise InputError(str(error).replace(f"/{token.name}", "", 1)) from error
            try:
                yield token.name
            finally:
                if self.url:
                    remove_there(self._at(token))
        finally:
            token.unlink()

    def sees(self, token: str) -> bool:
        """Whether this process sees a token. Raises InputError if the URL cannot be reached."""
        return bool(names_there(f"{self.url}/{token}")) if self.url else (self.path / token).exists()

    def check(self) -> None:
        """Raise InputError, before any work, if a URL cannot be written or a process of torchrun has another disk."""
        if self.url:
            if distributed.is_first():
                with self.token():
                    pass
            distributed.wait()
            distributed.check_seen(self.path)

    def check_replaceable(self) -> None:
        """Raise InputError if the URL is a model, or has files in place of the run's model that a run did not write."""
        if not self.url or not distributed.is_first():
            return
        for name in (DESCRIPTION, "config.json"):
            if names_there(f"{self.url}/{name}"):
                raise InputError(f"{self.url} is the folder of a model; give a run a folder of its own.")
        if others := [name for name in names_there(f"{self.url}/{MODEL}") if not is_model_file(name)]:
            raise InputError(
                f"{self.url}/{MODEL} holds {others[0]!r}, which simomerge did not write and would delete; give another"
                " URL."
            )

    def done(self, outputs: Iterable[Path]) -> set[Path]:
        """Which of some stages are done, here or at the URL."""
        kept = self._kept() if self.url else set()
        return {output for output in outputs if output.exists() or output.name in kept}

    def fetch(self, outputs: Iterable[Path]) -> None:
        """Copy the folders of stages from the URL, unless they are here."""
        for output in outputs if self.url else ():
            with one_at_a_time(output):
                if not output.exists():
                    with atomic_folder(output, durable=False) as folder:
                        copy_here(self._at(output), folder)
                        if not (folder / LOG).is_file():
                            raise Unreachable(f"{self._at(output)}: another run is writing it; repeat the command.")

    def log(self, output: Path) -> Path:
        """The log of a stage on this machine. Without the stage's folder, a copy in the cache folder."""
        log = output / LOG
        return log if output.exists() or not self.url else local_copy(self._at(log))

    def restored(self, name: str) -> Path:
        """The path of a file that only grows, after copying it from the URL unless this machine's has more."""
        if self.url and names_there(f"{self.url}/{name}"):
            copy, place = local_place("urls", f"{self.url}/{name}"), self.path / name
            copy_here(f"{self.url}/{name}", copy)
            there = copy.read_bytes()
            if not (place.is_file() and place.read_bytes().startswith(there)):
                atomic_write_bytes(place, there)
        return self.path / name

    def send(self, *names: str) -> None:
        """Copy files and folders to the URL, if they exist. Stages and the model there are replaced."""
        for place in (self.path / name for name in names) if self.url and distributed.is_first() else ():
            if place.exists():
                model = place.name == MODEL
                last = DESCRIPTION if model else LOG
                copy_there(place, self._at(place), last=last, exact=model or place.parent.name == STAGES)

    def send_stages(self, outputs: Iterable[Path]) -> None:
        """Copy the folders of stages to the URL, unless they are there."""
        if self.url and distributed.is_first() and (here := [output for output in outputs if output.exists()]):
            one = here[0].name if len(here) == 1 else ""
            kept = self._kept(one)
            self.send(*(output.relative_to(self.path).as_posix() for output in here if output.name not in kept))

    def _kept(self, name: str = "") -> set[str]:
        """The names of the stages at the URL, or the one name, if that stage is there."""
        if name:  # listing all stages after each of them would take the square of their number
            return {name} if names_there(f"{self.url}/{STAGES}/{name}/{LOG}") else set()
        names = (each.split("/") for each in names_there(f"{self.url}/{STAGES}"))
        return {parts[0] for parts in names if parts[1:] == [LOG]}

    def _at(self, path: Path) -> str:
        return f"{self.url}/{path.relative_to(self.path).as_posix()}"
