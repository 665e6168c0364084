"""The state of a training, from which a killed run resumes, on any number of processes.

It is one safetensors file: weights, optimiser state and best weights, whole and under their names, and the log as JSON.
Tensors of a divided model are collected and written one after the other, so no process holds a second model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from simomerge.checkpoints import write_safetensors
from simomerge.checkpoints.tensors import value_info
from simomerge.core import distributed
from simomerge.core.errors import DivergedError, InputError
from simomerge.core.text import first_line
from simomerge.training.sharding import assign, own, whole

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LOG = "log"
_SHARE = 0.05
"""Part of the time that saving may take."""


@dataclass
class TrainLog:
    """What a training run did."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_step: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def rise(self) -> float:
        """The last validation loss, in units of the first one; 1 without a validation."""
        return self.validation[-1][1] / max(self.validation[0][1], 1e-12) if self.validation else 1.0

    def images_per_second(self) -> float:
        """Mean speed of all attempts together."""
        return self.samples / max(self.seconds, 1e-9)


@dataclass
class TrainingState:
    """Weights, optimiser, schedule and the best weights so far.

    Args:
        root: The module whose trainable parameters and buffers are saved.
        optimizer: AdamW on its parameters.
        schedule: A `OneCycleLR` of the optimiser.
        path: The file; without it, nothing is saved.
        label: Name of the training in messages.
    """

    root: nn.Module
    optimizer: Any
    schedule: Any
    path: Path | None
    label: str = "training"
    best: dict[str, Tensor] | None = None
    saved_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def _weights(self) -> dict[str, Tensor]:
        """The trainable parameters and the buffers, each once: branches of a tree share some under several names."""
        kept = self.root.state_dict()
        found: dict[str, Tensor] = {name: value for name, value in self.root.named_buffers() if name in kept}
        found |= {name: value for name, value in self.root.named_parameters() if value.requires_grad}
        return {name: value.detach() for name, value in found.items()}

    def _tensors(self) -> dict[str, Tensor]:
        groups = {"weights": self._weights(), "best": self.best or {}}
        for key in _MOMENTS:
            states = {name: self.optimizer.state.get(value) for name, value in self.root.named_parameters()}
            groups[key] = {name: state[key] for name, state in states.items() if state}
        return {f"{group}/{name}": value for group, tensors in groups.items() for name, value in tensors.items()}

    def save_once_in_a_while(self, log: TrainLog, seconds: float = 20.0) -> None:
        """Save if the last time is long ago; at most `_SHARE` of the time goes into saving."""
        due = time.monotonic() - self.saved_at >= max(seconds, self.seconds / _SHARE)
        if distributed.processes() > 1:  # the processes save together, and their clocks differ
            due = log.steps % 10 == 0 and distributed.from_first(due)
        if due:
            self.save(log)

    def save(self, log: TrainLog) -> None:
        """Write the file. All processes call this together.

        Raises:
            DivergedError: The state is not finite; the file stays as it is.
        """
        if self.path is None:
            return
        self.check_finite(log.steps)
        began, tensors = time.monotonic(), self._tensors()
        text = torch.tensor(list(json.dumps(asdict(log)).encode()), dtype=torch.uint8)
        layout = {name: value_info(value, name) for name, value in {**tensors, _LOG: text}.items()}

        def collected() -> Iterator[tuple[str, Tensor]]:
            yield _LOG, text
            for name, value in tensors.items():
                yield name, whole(value)

        if distributed.is_first():
            write_safetensors(self.path, collected(), layout=layout)
        else:
            for _ in collected():  # the other processes take part in collecting
                pass
        self.saved_at = time.monotonic()
        self.seconds = self.saved_at - began

    @torch.no_grad()
    def check_finite(self, step: int) -> None:
        """Raise DivergedError if a trained weight or a moment of the optimiser is NaN or infinite."""
        trained = [parameter for parameter in self.root.parameters() if parameter.requires_grad]
        moments = [self.optimizer.state[one][key] for one in trained if one in self.optimizer.state for key in _MOMENTS]
        finite = torch.stack([own(value).isfinite().all() for value in (*trained, *moments)]).all()
        broken = torch.tensor([0.0 if finite else 1.0])
        distributed.add_up(broken)  # of a divided model, another process may hold the value
        if broken.item():
            raise DivergedError(
                f"{self.label}: the weights became NaN or infinite by step {step}; lower the learning rate.", step
            )

    def resume(self) -> TrainLog:
        """Read the file, if there is one.

        Raises:
            InputError: The file is damaged, or belongs to another training.
        """
        if self.path is None or not self.path.exists():
            return TrainLog()
        try:
            with safe_open(self.path, framework="pt") as file:
                return self._read(file)
        except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.path}: cannot resume from it ({first_line(error)}); remove it to train from the start."
            ) from error

    def _read(self, file: Any) -> TrainLog:
        data = json.loads(bytes(file.get_tensor(_LOG).tolist()))
        log = TrainLog(**{**data, "validation": [(step, loss) for step, loss in data["validation"]]})
        if log.steps >= self.schedule.total_steps:
            raise ValueError(f"it is at step {log.steps}, and this training has {self.schedule.total_steps - 1} steps")
        for name, value in self._weights().items():
            assign(value, file.get_tensor(f"weights/{name}"))
        if log.validation:
            self.keep_best()
            for name, value in (self.best or {}).items():
                assign(value, file.get_tensor(f"best/{name}"))
        for name, parameter in self.root.named_parameters() if log.steps else ():
            if parameter.requires_grad and f"exp_avg/{name}" in file.keys():  # noqa: SIM118 - it is no mapping
                moments = {key: torch.zeros_like(parameter) for key in _MOMENTS}
                for key, value in moments.items():
                    assign(value, file.get_tensor(f"{key}/{name}"))
                step = torch.tensor(float(log.steps), device=parameter.device)
                self.optimizer.state[parameter] = {"step": step, **moments}
        if log.steps:  # the rates of the one-cycle schedule depend on the step alone
            self.schedule.load_state_dict(
                {**self.schedule.state_dict(), "last_epoch": log.steps - 1, "_step_count": log.steps}
            )
            self.schedule.step()
        return log

    def keep_best(self) -> None:
        """Remember the present weights as the best ones."""
        self.best = {name: value.detach().clone() for name, value in self._weights().items()}

    @torch.no_grad()
    def restore_best(self) -> bool:
        """Give the module the weights of the best validation; whether there was one."""
        if self.best is not None:
            for name, value in self._weights().items():
                value.copy_(self.best[name])
        return self.best is not None
