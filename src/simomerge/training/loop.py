"""The training loop: AdamW with a one-cycle schedule, gradient clipping, early stopping and resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.core.errors import DivergedError, InputError
from simomerge.core.machine import in_float64, is_out_of_memory, loader_workers, mixed_precision
from simomerge.core.modes import evaluating
from simomerge.core.progress import progress
from simomerge.datasets.batches import Transform, ordered_batches_of_all, training_batches
from simomerge.merging.engine.depth import Depth
from simomerge.models.encoders import Encoder
from simomerge.training import sharding
from simomerge.training.optimizer import make_optimizer, one_cycle
from simomerge.training.settings import TrainSettings
from simomerge.training.state import TrainingState, TrainLog
from simomerge.training.tracking import tracked_accelerator
from simomerge.training.weighting import GradientWeighting, Weighting

HIGHEST_RISE = 10.0
"""A validation loss above this, in units of the one at the start, ends a training that may keep its start.

A start that is good already gets up to three times worse at the peak of the learning rate, and better in the end.
"""

PATIENCE = 5
"""Validations without a lower loss after which training stops, unless the settings say how many."""

Losses = Callable[[Any, Mapping[str, Any]], dict[str, Tensor]]
"""(module, batch) -> loss of each task. The module is the one that is trained, or its divided twin."""


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    Args:
        losses: (module, batch) -> loss of each task, a mean over labels or images.
        counts: batch -> number of values in each task's mean, by which processes that share a batch weight their
            losses. The default is the number of images.
        weighting: Combines the task losses into one. The default is their unweighted mean (the paper's joint loss).
        keep_start: Also validate at the start, so that the weights at the start are kept if no others are better.
            Training stops if the validation loss is more than `HIGHEST_RISE` times that at the start.
    """

    losses: Losses
    counts: Callable[[Mapping[str, Any]], dict[str, Tensor]] | None = None
    weighting: Weighting = field(default_factory=lambda: Weighting(1))
    keep_start: bool = False


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

    Under torchrun the processes share every batch, and inside `simomerge.training.sharding.sharded` also the model. The
    result is that of one process, except for rounding and dropout, which every process draws by itself.

    Args:
        module: The module to train. Its buffers and trainable parameters are saved in the state file.
        losses: A function (module, batch) -> loss of each task, or an `Objective`.
        train: A map-style dataset.
        validation: A map-style dataset. Its loss, the unweighted mean of the task losses, decides about early stopping.
        transform: Augmentation of the training samples.
        state_file: Where to save the state. If the file exists, training resumes from it with the same batches.
        label: Name of the training in progress reports and trackers.

    Returns:
        Steps, samples, seconds (of all attempts together) and validation losses.

    Raises:
        DivergedError: The loss or the weights became NaN or infinite; a lower learning rate helps. The module then has
            the weights of the best validation, if there was one, and the state file is the last one that was finite.
        InputError: Memory does not suffice; the message says what needs less.
    """
    check_shares(settings, label, len(train))
    objective = losses if isinstance(losses, Objective) else Objective(losses)
    home = next(module.parameters()).device
    # Under torchrun: encoders have parameters that no loss depends on, such as the mask token.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)
    with tracked_accelerator(label, vars(settings), kwargs_handlers=[ddp]) as accelerator:
        try:
            trainer = _Trainer(accelerator, module, objective, settings, label, state_file)
            try:
                log = trainer.run(train, validation, transform)
            except DivergedError as error:
                error.kept, error.best_step = trainer.state.restore_best(), trainer.log.best_step
                trainer.collect(home)
                raise
            trainer.collect(home)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise InputError(
                    f"{label}: memory does not suffice for {settings.batch_size} images per step; use a smaller batch"
                    " (--batch-size) or smaller images. If the encoder is trained, gradient checkpointing and, with"
                    " several processes, --shard help too; in a re-alignment, --last-blocks and stored predictions."
                ) from error
            raise
        finally:
            module.to(home).eval()
    return log


def check_shares(settings: TrainSettings, label: str, images: int | None = None) -> None:
    """Check that every process of torchrun gets a part of each batch. Raises InputError."""
    batch = settings.batch_size if images is None else min(settings.batch_size, images)
    if batch < distributed.processes():
        raise InputError(f"{label}: {distributed.processes()} processes cannot share batches of {batch}.")


class _Losses(nn.Module):
    """A module with its objective, as one module that DistributedDataParallel or FSDP2 can wrap.

    In training, the losses are those of the full batch that all processes share, and come with their weighted sum. In
    evaluation, they are those of the given batch.
    """

    def __init__(self, module: nn.Module, objective: Objective, device: torch.device) -> None:
        super().__init__()
        self.module, self.weighting, self.objective, self.device = module, objective.weighting, objective, device
        self.is_bf16 = mixed_precision(device, module) == "bf16"

    def forward(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        batch = send_to_device(batch, self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            losses = {name: loss.float() for name, loss in self.objective.losses(self.module, batch).items()}
        if not self.training:
            return losses, None
        values = _of_full_batch(torch.stack(list(losses.values())), self._counts(losses, batch))
        total = None if isinstance(self.weighting, GradientWeighting) else self.weighting(values)
        return {name: value.clone() for name, value in zip(losses, values, strict=True)}, total  # FSDP2 takes no views

    def _counts(self, losses: Iterable[str], batch: Mapping[str, Any]) -> Tensor:
        """Number of values (T,) in the mean that each task's loss is."""
        if self.objective.counts is None:
            return torch.tensor([float(_batch_size(batch)) for _ in losses], device=self.device)
        counts = self.objective.counts(batch)
        return torch.stack([counts[name] for name in losses])


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
        encoder = getattr(module, "encoder", None)
        # The products of gradients are sums over the shares of gradients that FSDP2 has averaged over the processes.
        by_gradients = isinstance(objective.weighting, GradientWeighting) and distributed.processes() > 1
        how = sharding.current() if isinstance(encoder, Encoder) else None
        self.shards = how or (sharding.Sharding() if by_gradients else None)
        if self.shards:
            self.root = _Losses(sharding.twin(module), objective, accelerator.device)
            sharding.divide(self.root, getattr(self.root.module, "encoder", None), accelerator.device, self.shards)
            sharding.release(module)
        else:
            self.root = _Losses(module, objective, accelerator.device).to(accelerator.device)
        trainable = {name.removeprefix("module."): p for name, p in self.root.named_parameters() if p.requires_grad}
        self.trainable = list(trainable.values())
        self.encoder = [p for name, p in trainable.items() if name.startswith("encoder.")]
        depth_of = encoder.depth if isinstance(encoder, Encoder) else Depth
        self.optimizer = make_optimizer(trainable, settings, depth_of)
        self.wrapped = self.root if self.shards else accelerator.prepare(self.root)
        self.schedule = one_cycle(self.optimizer, settings)
        self.state = TrainingState(self.root, self.optimizer, self.schedule, state_file, label)
        self.log = self.state.resume()
        if distributed.from_first(self.log.steps) != self.log.steps:
            raise InputError(
                f"{label}: this process would resume at step {self.log.steps}, the first one elsewhere; choose a folder"
                f" that all machines share instead of {state_file and state_file.parent}."
            )

    def run(self, train: Any, validation: Any, transform: Transform | None) -> TrainLog:
        settings, log = self.settings, self.log
        began = time.monotonic() - log.seconds
        batches = training_batches(
            train,
            settings.batch_size,
            settings.steps,
            settings.seed,
            start=settings.steps if self._stops() else log.steps,  # a run that had stopped early stays stopped
            transform=transform,
            loader_workers=loader_workers(self.accelerator.device),
        )
        if self.objective.keep_start and validation is not None and not log.steps:
            self._validate(validation)
        self.root.train()
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
            if self._stops():
                break
        if not self.state.restore_best():
            self.state.check_finite(log.steps)  # the last loss was finite, but its step may have been too large
        log.seconds = time.monotonic() - began
        if log.steps < settings.steps:
            reason = "the validation loss is flat" if self._is_flat() else f"{log.rise:.1f} times the loss at the start"
            progress(self.label, settings.steps, settings.steps, f"stopped at step {log.steps}: {reason}")
        return log

    def collect(self, home: torch.device) -> None:
        """Give the trained module all its weights, if its twin was divided."""
        if self.shards:
            self.state.best = None
            self.optimizer.state.clear()
            self.root.zero_grad()
            sharding.collect(self.root.module, self.module, home)

    def _step(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step; the task losses and the total loss of the batch."""
        with _seeded((self.settings.seed, self.log.steps, distributed.rank()), self.accelerator.device):
            losses, total = self.wrapped(batch)
            weighting = self.objective.weighting
            if isinstance(weighting, GradientWeighting):
                values = torch.stack(list(losses.values()))
                weighting.look(_gradient_products(self.encoder, values, self.optimizer.zero_grad), values)
                total = weighting(values)
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
        value = validation_loss(self.root, validation, self.settings.batch_size)
        if self.shards:
            self.root.reshard()  # type: ignore[operator]
        log.validation.append((log.steps, value))
        self.accelerator.log({"validation/loss": value}, step=log.steps)
        if value <= min(loss for _, loss in log.validation):
            log.best_step = log.steps
            self.state.keep_best()
        self.state.save(log)

    def _stops(self) -> bool:
        """Whether training stops early."""
        return self._is_flat() or (self.objective.keep_start and self.log.rise > HIGHEST_RISE)

    def _is_flat(self) -> bool:
        """Whether the last ``patience`` validations brought no lower loss."""
        log, settings = self.log, self.settings
        patience = settings.patience or PATIENCE
        return bool(log.validation) and log.validation[-1][0] - log.best_step >= patience * settings.validate_every


@contextmanager
def _seeded(key: Sequence[int], device: torch.device) -> Iterator[None]:
    """Inside the block, torch's random numbers depend on the key alone; after it, they go on as before.

    With the step in the key, the dropout of a training depends on no other work, and a training resumes exactly.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than a step of a small head
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield


@torch.no_grad()
def validation_loss(root: _Losses, dataset: Any, batch_size: int = 32) -> float:
    """Mean over the dataset of the mean task loss, in evaluation mode."""
    sums = torch.zeros(2, dtype=torch.float64)
    with evaluating(root):
        # A divided model needs all processes in each forward pass, so some repeat a batch, which does not count.
        for batch, counts in ordered_batches_of_all(dataset, batch_size):
            value, size = torch.stack(list(root(batch)[0].values())).mean(), counts * _batch_size(batch)
            sums += torch.tensor([float(value) * size, size], dtype=torch.float64)
    distributed.add_up(sums)
    return float(sums[0] / sums[1])


def _of_full_batch(losses: Tensor, counts: Tensor) -> Tensor:
    """Losses (T,) of a batch that all processes share, from those of this process's share and their counts (T,).

    The gradients are those of the share, times the number of processes and the share's part of the count, so that their
    mean over the processes, which DistributedDataParallel and FSDP2 take, is the gradient of the full batch.
    """
    if distributed.processes() < 2:
        return losses
    sums, total = distributed.summed(torch.stack([losses * counts, counts.to(losses)]).double())
    return (sums / total.clamp(min=1)).to(losses)


def _gradient_products(encoder: Sequence[nn.Parameter], losses: Tensor, forget: Callable[[], None]) -> Tensor:
    """Inner products (T, T) of the gradients of the task losses (T,) on the encoder's parameters; float64.

    Args:
        forget: Removes the gradients of all parameters.
    """
    if not encoder:
        raise InputError("this weighting looks at the encoder's gradients, and the encoder is frozen; choose another.")
    rows = []
    for loss in losses:
        loss.backward(retain_graph=True)
        rows.append([None if p.grad is None else sharding.own(p.grad).flatten() for p in encoder])
        forget()
    place = next((each for row in rows for each in row if each is not None), losses)  # on the CPU with --offload
    products = torch.zeros(len(rows), len(rows), device=in_float64(place[:0]).device, dtype=torch.float64)
    for gradients in zip(*rows, strict=True):
        if present := [each for each in gradients if each is not None]:
            table = torch.stack([torch.zeros_like(present[0]) if each is None else each for each in gradients])
            table = in_float64(table)
            products += table @ table.T
    distributed.add_up(products)
    return products


def _batch_size(batch: Mapping[str, Any]) -> int:
    first = next(iter(batch.values()))
    return len(first[0]) if isinstance(first, list) else len(first)
