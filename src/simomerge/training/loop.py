"""The one training loop: one-cycle AdamW, clipping, early stop, resume; accelerate does the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simomerge.core import distributed
from simomerge.core.errors import DivergedError, InputError
from simomerge.core.files import atomic_write_bytes
from simomerge.core.machine import loader_workers, mixed_precision
from simomerge.core.progress import progress
from simomerge.datasets.batches import Transform, ordered_batches, training_batches
from simomerge.training.settings import TrainSettings
from simomerge.training.tracking import tracked_accelerator, tracked_run
from simomerge.training.weighting import Weighting, combined

Losses = Callable[[Mapping[str, Any]], dict[str, Tensor]]
"""batch -> loss of each task; the total is their unweighted mean (the paper's joint loss)."""

Counts = Callable[[Mapping[str, Any]], dict[str, Tensor]]
"""batch -> of how many values each task's loss is the mean."""


@dataclass
class TrainLog:
    """What a training run did."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_step: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)


def fit(
    module: nn.Module,
    losses: Losses,
    train: Any,
    settings: TrainSettings,
    validation: Any = None,
    transform: Transform | None = None,
    state_file: Path | None = None,
    label: str = "training",
    weighting: Weighting | None = None,
    counts: Counts | None = None,
) -> TrainLog:
    """Train the parameters of ``module`` that require a gradient, in place.

    Under torchrun the processes share every batch, and the result is that of one process, but for rounding.

    Args:
        module: what is trained; its buffers and trainable parameters make the saved state.
        losses: batch -> loss per task.
        train, validation: map-style datasets.
        transform: augmentation of training samples.
        state_file: where to keep the state; a run that finds it goes on from there with the same batches.
        weighting: makes one loss of the tasks'; by default their unweighted mean. Validation always looks at the mean.
        counts: by which processes weigh their shares of a batch; by default by their numbers of images.

    Returns:
        Steps, samples, seconds (of all attempts together) and validation losses.

    Raises:
        DivergedError: the loss is not finite (lower the learning rate).
    """
    if weighting is not None:
        module.add_module(_WEIGHTING, weighting)  # so that it is trained, and saved with the state
    try:
        accelerator = tracked_accelerator(label, mixed_precision=mixed_precision())
        with tracked_run(accelerator, label, vars(settings)):
            return _fit(
                *(accelerator, module, losses, counts, train, settings, validation, transform, state_file),
                label,
            )
    finally:
        module._modules.pop(_WEIGHTING, None)


_WEIGHTING = "loss_weighting"


def _fit(
    accelerator: Any,
    module: nn.Module,
    losses: Losses,
    counts: Counts | None,
    train: Any,
    settings: TrainSettings,
    validation: Any,
    transform: Transform | None,
    state_file: Path | None,
    label: str,
) -> TrainLog:
    if min(settings.batch_size, len(train)) < distributed.processes():
        raise InputError(f"{label}: {distributed.processes()} processes cannot share batches of {settings.batch_size}.")
    home = next(module.parameters()).device
    weighting: Any = module._modules.get(_WEIGHTING)
    module.to(accelerator.device)
    distributed.start_alike(module)
    optimizer = _optimizer(module, settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=settings.steps + 1,
        pct_start=max(settings.warmup, 1e-3),
    )
    prepared_optimizer = accelerator.prepare(optimizer)
    state = _State(module, optimizer, schedule, state_file)
    log = state.resume()
    began = time.monotonic() - log.seconds
    start = settings.steps if _is_flat(settings, log) else log.steps  # a run that had stopped stays stopped
    batches = training_batches(
        train,
        settings.batch_size,
        settings.steps,
        settings.seed,
        start=start,
        transform=transform,
        loader_workers=loader_workers(accelerator.device),
    )
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # What weighs the losses sees all of every loss in each process, and has the whole gradient already.
    apart = [each for name, each in module.named_parameters() if each.requires_grad and not name.startswith(_WEIGHTING)]
    module.train()
    for batch in batches:
        with accelerator.autocast():
            parts = _over_processes(losses, counts, _to_device(batch, accelerator.device))
        if weighting is not None and weighting.looks_at_gradients:
            weighting.look(_gradient_products(module, parts), torch.stack(list(parts.values())))
        total = combined(parts, weighting)
        accelerator.backward(total)
        distributed.add_up_gradients(apart)
        accelerator.clip_grad_norm_(trainable, settings.clip)
        prepared_optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        log.steps += 1
        log.samples += min(settings.batch_size, len(train))
        log.seconds = time.monotonic() - began
        if log.steps % 10 == 0 or log.steps == settings.steps:
            log.losses = {name: float(value.detach()) for name, value in parts.items()}
            _check_finite(log, label)
            accelerator.log(_tracked(log, total, optimizer), step=log.steps)
            progress(label, log.steps, settings.steps, _note(log))
        if _is_time_to_validate(settings, validation, log.steps):
            value = validation_loss(module, losses, validation, settings.batch_size, accelerator)
            log.validation.append((log.steps, value))
            accelerator.log({"validation/loss": value}, step=log.steps)
            if value <= min(loss for _, loss in log.validation):
                log.best_step = log.steps
                state.keep_best()
            state.save(log)
            if _is_flat(settings, log):
                break
        else:
            state.save_once_in_a_while(log)
    state.restore_best()
    module.to(home).eval()
    log.seconds = time.monotonic() - began
    if log.steps < settings.steps:
        progress(label, settings.steps, settings.steps, f"stopped at step {log.steps}: the validation loss is flat")
    return log


def _gradient_products(module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
    """Inner products (T, T) of the tasks' gradients on the encoder."""
    encoder = [p for name, p in module.named_parameters() if p.requires_grad and name.startswith("encoder.")]
    if not encoder:
        raise InputError("this weighting looks at the encoder's gradients, and the encoder is frozen; choose another.")
    rows = []
    for part in parts.values():
        found = torch.autograd.grad(part, encoder, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([each.flatten() for each in found]).float())
    distributed.add_up(*rows)
    return torch.stack([torch.stack([one @ other for other in rows]) for one in rows])


@torch.no_grad()
def validation_loss(
    module: nn.Module, losses: Losses, dataset: Any, batch_size: int = 32, accelerator: Any = None
) -> float:
    """Mean over the dataset of the mean task loss, in evaluation mode."""
    accelerator = accelerator or tracked_accelerator("", mixed_precision=mixed_precision())
    training = module.training
    module.eval()
    found = torch.zeros(2, dtype=torch.float64)
    for batch in ordered_batches(dataset, batch_size, shared=True):
        with accelerator.autocast():
            parts = losses(_to_device(batch, accelerator.device))
        size = _batch_size(batch)
        found += torch.tensor([float(torch.stack(list(parts.values())).mean()) * size, size], dtype=torch.float64)
    distributed.add_up(found)
    module.train(training)
    return float(found[0] / found[1])


def _over_processes(losses: Losses, counts: Counts | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The losses of a batch of which this process has a share: their values are the whole batch's, their gradients this
    share's part of it."""
    parts = losses(batch)
    if distributed.processes() < 2:
        return parts
    own = torch.tensor([float(_batch_size(batch))] * len(parts), dtype=torch.float64)
    if counts is not None:
        found = counts(batch)
        own = torch.stack([found[name].double().cpu() for name in parts])
    total = own.clone()
    distributed.add_up(total)
    weighed = {name: part * float(w) for (name, part), w in zip(parts.items(), own / total.clamp(min=1), strict=True)}
    values = torch.stack([part.detach().double().cpu() for part in weighed.values()])
    distributed.add_up(values)
    # A part minus itself is exactly zero: so all processes have the very same values, and decide alike.
    return {
        name: value.to(part) + (part - part.detach())
        for (name, part), value in zip(weighed.items(), values, strict=True)
    }


class _State:
    """Everything a killed run needs to go on: weights, optimiser, schedule, log and the best weights so far."""

    def __init__(self, module: nn.Module, optimizer: Any, schedule: Any, path: Path | None) -> None:
        self.module = module
        self.optimizer = optimizer
        self.schedule = schedule
        self.path = path
        self.best: dict[str, Tensor] | None = None
        self.saved_at = time.monotonic()

    def _weights(self) -> dict[str, Tensor]:
        frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        return {name: value for name, value in self.module.state_dict().items() if name not in frozen}

    def resume(self) -> TrainLog:
        if self.path is None or not self.path.exists():
            return TrainLog()
        data = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(data["module"], strict=False)
        self.optimizer.load_state_dict(data["optimizer"])
        self.schedule.load_state_dict(data["schedule"])
        self.best = data["best"]
        return TrainLog(**{**data["log"], "validation": [tuple(pair) for pair in data["log"]["validation"]]})

    def save_once_in_a_while(self, log: TrainLog, seconds: float = 20.0) -> None:
        if time.monotonic() - self.saved_at >= seconds:
            self.save(log)

    def save(self, log: TrainLog) -> None:
        if self.path is None or not distributed.is_first():
            return
        import io

        buffer = io.BytesIO()
        torch.save(
            {
                "module": self._weights(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "best": self.best,
                "log": vars(log) | {"validation": [list(pair) for pair in log.validation]},
            },
            buffer,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self.path, buffer.getvalue())
        self.saved_at = time.monotonic()

    def keep_best(self) -> None:
        self.best = {name: value.detach().clone() for name, value in self._weights().items()}

    def restore_best(self) -> None:
        if self.best is not None:
            self.module.load_state_dict(self.best, strict=False)


def _tracked(log: TrainLog, total: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What a tracker is told."""
    rates = {f"lr/{group['part']}": float(group["lr"]) for group in optimizer.param_groups}
    losses = {f"loss/{name}": value for name, value in log.losses.items()}
    return {"loss": float(total.detach()), **losses, **rates, "images_per_second": log.samples / max(log.seconds, 1e-9)}


def _optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW: no decay on biases and norms; the encoder may have its own learning rate."""
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            encoder = name.startswith("encoder.backbone") and settings.encoder_lr is not None
            lr = settings.encoder_lr if encoder and settings.encoder_lr is not None else settings.lr
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault(("encoder" if encoder else "heads", lr, decay), []).append(parameter)
    if not groups:
        raise InputError("nothing to train: no parameter requires a gradient.")
    parameters = [
        {"params": group, "part": part, "lr": lr, "weight_decay": decay} for (part, lr, decay), group in groups.items()
    ]
    return torch.optim.AdamW(parameters, fused=True)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_to_device(value, device) for value in batch]
    return batch


def _batch_size(batch: Mapping[str, Any]) -> int:
    first = next(iter(batch.values()))
    return len(first[0]) if isinstance(first, list) else len(first)


def _is_time_to_validate(settings: TrainSettings, validation: Any, step: int) -> bool:
    if validation is None or not settings.validate_every:
        return False
    return step % settings.validate_every == 0 or step == settings.steps


def _is_flat(settings: TrainSettings, log: TrainLog) -> bool:
    """Whether the last ``patience`` looks at the validation loss brought nothing better."""
    return bool(log.validation) and log.validation[-1][0] - log.best_step >= settings.patience * settings.validate_every


def _check_finite(log: TrainLog, label: str) -> None:
    for name, value in log.losses.items():
        if value != value or abs(value) == float("inf"):
            raise DivergedError(
                f"{label}: the loss of {name!r} is {value} at step {log.steps}; lower the learning rate."
            )


def _note(log: TrainLog) -> str:
    shown = " ".join(f"{name} {value:.4f}" for name, value in log.losses.items())
    return f"{shown}  {log.samples / max(log.seconds, 1e-9):.0f} img/s"
