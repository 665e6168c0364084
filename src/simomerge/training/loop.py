"""The training loop: AdamW with a one-cycle schedule, gradient clipping, early stopping and resuming."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.core.errors import DivergedError, InputError
from simomerge.core.files import atomic_write_bytes
from simomerge.core.machine import arrange_convolutions, autocast, loader_workers, mixed_precision
from simomerge.core.progress import progress
from simomerge.datasets.batches import Transform, ordered_batches, training_batches
from simomerge.models.encoders import Encoder
from simomerge.training.evaluate import evaluating
from simomerge.training.optimizer import make_optimizer
from simomerge.training.settings import TrainSettings
from simomerge.training.tracking import tracked_accelerator
from simomerge.training.weighting import GradientWeighting, Weighting

Losses = Callable[[Mapping[str, Any]], dict[str, Tensor]]
"""batch -> loss of each task."""


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    Args:
        losses: batch -> loss of each task, a mean over labels or images.
        counts: batch -> number of values in each task's mean, by which processes that share a batch weight their
            losses. The default is the number of images.
        weighting: Combines the task losses into one. The default is their unweighted mean (the paper's joint loss).
        keep_start: Also validate at the start, so that the weights at the start are kept if no others are better.
    """

    losses: Losses
    counts: Losses | None = None
    weighting: Weighting = field(default_factory=lambda: Weighting(1))
    keep_start: bool = False


@dataclass
class TrainLog:
    """What a training run did."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_step: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)

    def images_per_second(self) -> float:
        """Mean speed of all attempts together."""
        return self.samples / max(self.seconds, 1e-9)


def fit(
    module: nn.Module,
    losses: Losses | Objective,
    train: Any,
    settings: TrainSettings,
    validation: Any = None,
    transform: Transform | None = None,
    state_file: Path | None = None,
    label: str = "training",
) -> TrainLog:
    """Train the parameters of ``module`` that require a gradient, in place.

    Under torchrun the processes share every batch. The result is that of one process, except for rounding.

    Args:
        module: The module to train. Its buffers and trainable parameters are saved in the state file.
        losses: A function batch -> loss of each task, or an `Objective`. It calls the module or a part of it.
        train: A map-style dataset.
        validation: A map-style dataset. Its loss, the unweighted mean of the task losses, decides about early stopping.
        transform: Augmentation of the training samples.
        state_file: Where to save the state. If the file exists, training resumes from it with the same batches.
        label: Name of the training in progress reports and trackers.

    Returns:
        Steps, samples, seconds (of all attempts together) and validation losses.

    Raises:
        DivergedError: The loss became NaN or infinite; a lower learning rate helps. The module then has the weights of
            the best validation, if there was one.
        InputError: Memory does not suffice; the message says what needs less.
    """
    if min(settings.batch_size, len(train)) < distributed.processes():
        raise InputError(f"{label}: {distributed.processes()} processes cannot share batches of {settings.batch_size}.")
    objective = losses if isinstance(losses, Objective) else Objective(losses)
    home = next(module.parameters()).device
    # Under torchrun: encoders have parameters that no loss depends on, such as the mask token.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    options = {"mixed_precision": mixed_precision(trained=module), "kwargs_handlers": [ddp]}
    with tracked_accelerator(label, vars(settings), **options) as accelerator:
        trainer = _Trainer(accelerator, module, objective, settings, label, state_file)
        try:
            log = trainer.run(train, validation, transform)
        except DivergedError as error:
            error.kept, error.best_step = trainer.state.restore_best(), trainer.log.best_step
            raise
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise InputError(
                    f"{label}: memory does not suffice for {settings.batch_size} images per step; use a smaller batch"
                    " or smaller images. If the encoder is trained, gradient checkpointing and fewer blocks help too."
                ) from error
            raise
        finally:
            module.to(home).eval()
    return log


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


class _TaskLosses(nn.Module):
    """A module and a function that computes losses with it, as one module.

    DistributedDataParallel wraps this one, so that the forward pass of the losses goes through it.
    """

    def __init__(self, module: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.module = module
        self.losses = losses

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.losses(batch)


class _Trainer:
    """One training run; see `fit`."""

    def __init__(
        self,
        accelerator: Any,
        module: nn.Module,
        objective: Objective,
        settings: TrainSettings,
        label: str,
        state_file: Path | None,
    ) -> None:
        self.accelerator, self.module, self.objective = accelerator, module, objective
        self.settings, self.label = settings, label
        self.weighting = objective.weighting.to(accelerator.device)
        arrange_convolutions(module.to(accelerator.device))
        named = (*module.named_parameters(), *self.weighting.named_parameters())
        trainable = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.trainable = list(trainable.values())
        encoder = getattr(module, "encoder", None)
        blocks = encoder.layout.names if isinstance(encoder, Encoder) else ()
        self.optimizer = make_optimizer(trainable, settings, blocks)
        self.task_losses = accelerator.prepare(_TaskLosses(module, objective.losses))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            total_steps=settings.steps + 1,
            pct_start=max(settings.warmup, 1e-3),
        )
        self.state = _State(module, self.weighting, self.optimizer, self.schedule, state_file)
        self.log = self.state.resume()

    def run(self, train: Any, validation: Any, transform: Transform | None) -> TrainLog:
        settings, log = self.settings, self.log
        began = time.monotonic() - log.seconds
        batches = training_batches(
            train,
            settings.batch_size,
            settings.steps,
            settings.seed,
            start=settings.steps if self._is_flat() else log.steps,  # a run that had stopped early stays stopped
            transform=transform,
            loader_workers=loader_workers(self.accelerator.device),
        )
        if self.objective.keep_start and validation is not None and not log.steps:
            self._validate(validation)
        self.module.train()
        for batch in batches:
            losses, total = self._step(batch)
            log.steps += 1
            log.samples += min(settings.batch_size, len(train))
            log.seconds = time.monotonic() - began
            if log.steps % 10 == 0 or log.steps == settings.steps:
                self._report(losses, total)
            if not self._is_time_to_validate(validation):
                self.state.save_once_in_a_while(log)
                continue
            self._validate(validation)
            if self._is_flat():
                break
        self.state.restore_best()
        log.seconds = time.monotonic() - began
        if log.steps < settings.steps:
            note = f"stopped at step {log.steps}: the validation loss is flat"
            progress(self.label, settings.steps, settings.steps, note)
        return log

    def _step(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step; the task losses and the total loss of the batch."""
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        losses = _over_processes(self.task_losses(batch), batch, self.objective.counts)
        stacked = torch.stack(list(losses.values()))
        if isinstance(self.weighting, GradientWeighting):
            self.weighting.look(_gradient_products(self.module, losses), stacked)
        total = self.weighting(stacked)
        self.accelerator.backward(total)
        self.accelerator.clip_grad_norm_(self.trainable, self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses, total

    def _report(self, losses: Mapping[str, Tensor], total: Tensor) -> None:
        log = self.log
        log.losses = {name: float(value.detach()) for name, value in losses.items()}
        for name, value in log.losses.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{self.label}: the loss of {name!r} is {value} at step {log.steps}; lower the learning rate.",
                    log.steps,
                )
        tracked = {"loss": float(total.detach()), "images_per_second": log.images_per_second()}
        tracked |= {f"loss/{name}": value for name, value in log.losses.items()}
        tracked |= {f"lr/{group['part']}": float(group["lr"]) for group in self.optimizer.param_groups}
        self.accelerator.log(tracked, step=log.steps)
        shown = " ".join(f"{name} {value:.4f}" for name, value in log.losses.items())
        progress(self.label, log.steps, self.settings.steps, f"{shown}  {log.images_per_second():.0f} img/s")

    def _is_time_to_validate(self, validation: Any) -> bool:
        settings, step = self.settings, self.log.steps
        if validation is None or not settings.validate_every:
            return False
        return step % settings.validate_every == 0 or step == settings.steps

    def _validate(self, validation: Any) -> None:
        log = self.log
        value = validation_loss(self.module, self.objective.losses, validation, self.settings.batch_size)
        log.validation.append((log.steps, value))
        self.accelerator.log({"validation/loss": value}, step=log.steps)
        if value <= min(loss for _, loss in log.validation):
            log.best_step = log.steps
            self.state.keep_best()
        self.state.save(log)

    def _is_flat(self) -> bool:
        """Whether the last ``patience`` validations brought no lower loss."""
        log, settings = self.log, self.settings
        return bool(log.validation) and (
            log.validation[-1][0] - log.best_step >= settings.patience * settings.validate_every
        )


@torch.no_grad()
def validation_loss(module: nn.Module, losses: Losses, dataset: Any, batch_size: int = 32) -> float:
    """Mean over the dataset of the mean task loss, in evaluation mode."""
    device = next(module.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)
    with evaluating(module):
        for batch in ordered_batches(dataset, batch_size, shared=True):
            with autocast(device):
                found = losses(send_to_device(batch, device))
            size = _batch_size(batch)
            sums += torch.tensor([float(torch.stack(list(found.values())).mean()) * size, size], dtype=torch.float64)
    distributed.add_up(sums)
    return float(sums[0] / sums[1])


def _over_processes(
    losses: dict[str, Tensor], batch: Mapping[str, Any], counts: Losses | None = None
) -> dict[str, Tensor]:
    """Losses of a batch that all processes share, from the losses of this process's share.

    The values are those of the full batch. The gradients are those of the share, multiplied by the number of processes
    and by the share's part of the count, so that their mean over the processes, which DistributedDataParallel takes, is
    the gradient of the full batch.
    """
    if distributed.processes() < 2:
        return losses
    if counts is None:
        own = torch.full((len(losses),), float(_batch_size(batch)), dtype=torch.float64)
    else:
        found = counts(batch)
        own = torch.stack([found[name].double().cpu() for name in losses])
    total = own.clone()
    distributed.add_up(total)
    shares = own / total.clamp(min=1)
    values = shares * torch.stack([loss.detach().double().cpu() for loss in losses.values()])
    distributed.add_up(values)
    factors = (shares * distributed.processes()).tolist()
    # A loss minus itself is exactly zero, so all processes have identical values and take the same decisions.
    return {
        name: value.to(loss) + factor * (loss - loss.detach())
        for (name, loss), value, factor in zip(losses.items(), values, factors, strict=True)
    }


def _gradient_products(module: nn.Module, losses: Mapping[str, Tensor]) -> Tensor:
    """Inner products (T, T) of the gradients of the task losses on the encoder."""
    encoder = [p for name, p in module.named_parameters() if p.requires_grad and name.startswith("encoder.")]
    if not encoder:
        raise InputError("this weighting looks at the encoder's gradients, and the encoder is frozen; choose another.")
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, encoder, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([each.flatten() for each in found]).float() / distributed.processes())
    distributed.add_up(*rows)
    return torch.stack([torch.stack([one @ other for other in rows]) for one in rows])


_WEIGHTING = "loss_weighting."


@dataclass
class _State:
    """The state of a run, from which it resumes: weights, optimiser, schedule, log, and the best weights so far."""

    module: nn.Module
    weighting: Weighting
    optimizer: Any
    schedule: Any
    path: Path | None
    best: dict[str, Tensor] | None = None
    saved_at: float = field(default_factory=time.monotonic)

    def _weights(self) -> dict[str, Tensor]:
        frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        own = {name: value for name, value in self.module.state_dict().items() if name not in frozen}
        return own | self.weighting.state_dict(prefix=_WEIGHTING)

    def resume(self) -> TrainLog:
        if self.path is None or not self.path.exists():
            return TrainLog()
        data = torch.load(self.path, weights_only=True)
        weights = data["module"]
        self.module.load_state_dict(weights, strict=False)
        self.weighting.load_state_dict(
            {name.removeprefix(_WEIGHTING): weights[name] for name in weights if name.startswith(_WEIGHTING)}
        )
        self.optimizer.load_state_dict(data["optimizer"])
        self.schedule.load_state_dict(data["schedule"])
        self.best = data["best"]
        return TrainLog(**data["log"])

    def save_once_in_a_while(self, log: TrainLog, seconds: float = 20.0) -> None:
        if time.monotonic() - self.saved_at >= seconds:
            self.save(log)

    def save(self, log: TrainLog) -> None:
        if self.path is None or not distributed.is_first():
            return
        data = {
            "module": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "log": vars(log),
        }
        buffer = io.BytesIO()
        torch.save(data, buffer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self.path, buffer.getvalue())
        self.saved_at = time.monotonic()

    def keep_best(self) -> None:
        self.best = {name: value.detach().clone() for name, value in self._weights().items()}

    def restore_best(self) -> bool:
        """Give the module the weights of the best validation; whether there was one."""
        if self.best is not None:
            self.module.load_state_dict(self.best, strict=False)
        return self.best is not None


def _batch_size(batch: Mapping[str, Any]) -> int:
    first = next(iter(batch.values()))
    return len(first[0]) if isinstance(first, list) else len(first)
