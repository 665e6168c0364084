"""The sums of a fold on disk, so that a pass over many images goes on where it was interrupted.

Each process keeps a file of its own in the work folder. A start with another number of processes begins from the start.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from simomerge.assembly.realign.agreement import Agreement
from simomerge.assembly.realign.sums import HeadSums
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_bytes

EVERY = 30.0
"""Seconds between two times that the sums are saved; more where saving takes longer than a twentieth of that."""

_NEXT = "next"


@dataclass
class SavedSums:
    """The sums of this process, and the place of its next image.

    Args:
        folder: The work folder.
        sums: The sums; `resume` fills them.
        agreement: The held-out images and predictions that belong to them.

    Raises:
        InputError: The file is damaged, or belongs to another fold.
    """

    folder: Path
    sums: HeadSums
    agreement: Agreement | None = None
    saved_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def path(self) -> Path:
        """The file of this process."""
        return self.folder / f"sums-{distributed.rank()}-of-{distributed.processes()}.safetensors"

    def save_once_in_a_while(self, following: int) -> None:
        """Save if the last time is long ago; ``following`` is the index of this process's next image."""
        if time.monotonic() - self.saved_at >= max(EVERY, 20 * self.seconds):
            self.save(following)

    def save(self, following: int) -> None:
        """Write the file."""
        began = time.monotonic()
        tensors = {**self.sums.tensors(), _NEXT: torch.tensor(following)}
        if self.agreement is not None:
            tensors |= self.agreement.tensors()
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self.path, save({name: value.cpu().contiguous() for name, value in tensors.items()}))
        self.saved_at = time.monotonic()
        self.seconds = self.saved_at - began

    def resume(self) -> int:
        """Fill the sums from the file, if there is one; the index of this process's next image."""
        if not self.path.exists():
            return 0
        try:
            tensors: dict[str, Tensor] = load(self.path.read_bytes())
            self.sums.fill(tensors)
            if self.agreement is not None:
                self.agreement.fill(tensors)
            return int(tensors[_NEXT])
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise InputError(f"{self.path}: cannot resume from it ({error}); remove it to start again.") from error

    def remove(self) -> None:
        """Remove the file, when all images are summed."""
        self.path.unlink(missing_ok=True)
