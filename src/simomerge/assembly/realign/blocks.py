"""The distillation of an encoder's blocks, one after the other; see `simomerge.assembly.realign.prodistill`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import Dataset

from simomerge.assembly.realign.blend import ElementBlend, task_vectors
from simomerge.core import distributed
from simomerge.core.files import atomic_write_bytes
from simomerge.core.machine import autocast
from simomerge.core.modes import evaluating
from simomerge.datasets.pictures import image_batches
from simomerge.models.model import SimoModel
from simomerge.training.loop import fit
from simomerge.training.lpft import trainable_parameters
from simomerge.training.settings import TrainSettings
from simomerge.training.state import TrainLog


class Call(NamedTuple):
    """The arguments of a block's forward pass. The hidden states are the first one, or ``hidden_states``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def replaced(self, hidden: Tensor) -> Call:
        """The call with other hidden states, and its other tensors on their device."""
        if self.args:
            args, kwargs = send_to_device((self.args[1:], self.kwargs), hidden.device)
            return Call((hidden, *args), kwargs)
        return Call((), {**send_to_device(self.kwargs, hidden.device), "hidden_states": hidden})

    def run(self, block: nn.Module) -> Tensor:
        """The hidden states that a block returns."""
        output = block(*self.args, **self.kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


@dataclass(frozen=True)
class BlockSamples(Dataset[dict[str, Tensor]]):
    """What one block learns.

    Attributes:
        inputs: Hidden states that reach the block in the merged encoder, float32 (images, ...).
        targets: Mean of what the experts' blocks return, of the same shape.
        call: A call of the block in the merged encoder, for its arguments other than the hidden states.
        distance: Mean squared difference of the block's outputs from the targets before training.
    """

    inputs: Tensor
    targets: Tensor
    call: Call
    distance: float

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.inputs[index], "target": self.targets[index]}


class BlockDistillation:
    """Trains the blocks of a merged model's encoder to match the experts' blocks, in place.

    Args:
        model: A merged model without adapters.
        base: The foundation encoder.
        experts: By task.

    Raises:
        InputError: The encoder's blocks are unknown, or the base does not fit the experts.
    """

    def __init__(self, model: SimoModel, base: SimoModel, experts: Mapping[str, SimoModel]) -> None:
        self.model, self.base, self.experts = model, base, experts
        named = {module: name for name, module in model.encoder.backbone.named_modules()}
        trained = [block for block in model.encoder.layout.blocks if list(block.parameters())]
        self.blocks, self.names = trained, [named[block] for block in trained]
        task_vectors(base, experts, self.names[0])  # fails before any work if the base does not fit

    def run(self, images: Any, settings: TrainSettings, work: Path) -> dict[str, Any]:
        """Train every block and return the cost; its seconds include the encoding of the images.

        Args:
            images: As `simomerge.datasets.pictures.as_images` gives them, all of one size. They are encoded again for
                every block.
            settings: How each block is trained.
            work: Folder for the state of the current block and for the weights of finished blocks.
        """
        cost = {"steps": 0, "seconds": 0.0, "trained_parameters": 0}
        for index, block in enumerate(self.blocks):
            finished, state_file = work / f"block-{index}.safetensors", work / f"block-{index}-state.safetensors"
            blend = ElementBlend(block, task_vectors(self.base, self.experts, self.names[index]))
            cost["trained_parameters"] += trainable_parameters(blend)
            cost["steps"] += settings.steps
            if finished.exists():
                block.load_state_dict(load_file(finished))
                continue
            began = time.monotonic()
            samples = self.samples(index, images)
            encoding = time.monotonic() - began
            cost["seconds"] += encoding + self._train(index, blend, samples, settings, state_file).seconds
            blend.settle()
            if distributed.is_first():
                work.mkdir(parents=True, exist_ok=True)
                weights = {name: value.contiguous() for name, value in block.state_dict().items()}
                atomic_write_bytes(finished, save(weights))
                state_file.unlink(missing_ok=True)
        return cost

    @torch.no_grad()
    def samples(self, index: int, images: Any, batch_size: int = 32) -> BlockSamples:
        """What a block learns, given that all blocks before it are trained."""
        device = next(self.model.parameters()).device
        inputs, targets, distances = [], [], []
        with evaluating(self.model, *self.experts.values()):
            for _indices, pixels in image_batches(images, batch_size):
                pixels = self.model.fit(pixels.to(device))
                with autocast(device):
                    call, output = self._call(self.model, index, pixels)
                    outputs = [self._call(expert, index, pixels)[1].float() for expert in self.experts.values()]
                targets.append(torch.stack(outputs).mean(0))
                distances.append((output.float() - targets[-1]).square().flatten(1).mean(1).cpu())
                inputs.append(call.hidden.float().cpu())
                targets[-1] = targets[-1].cpu()
        return BlockSamples(torch.cat(inputs), torch.cat(targets), call, float(torch.cat(distances).mean()))

    def _call(self, model: SimoModel, index: int, pixels: Tensor) -> tuple[Call, Tensor]:
        """The call of a model's block for some images, and what the block returns."""
        block = model.encoder.backbone.get_submodule(self.names[index])
        call = call_of(block, partial(model.encode, pixels))
        return call, call.run(block)

    def _train(
        self, index: int, blend: ElementBlend, samples: BlockSamples, settings: TrainSettings, state_file: Path
    ) -> TrainLog:
        """Train the coefficients of one block. Distances are divided by their value at the start."""
        unit = max(samples.distance, 1e-6 * float(samples.targets.square().mean()))

        def losses(blend: ElementBlend, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self.model.encoder.restore_windows()
            output = samples.call.replaced(batch["input"]).run(blend)
            return {"block": (output.float() - batch["target"]).square().mean() / unit}

        label = f"prodistill {index + 1}/{len(self.blocks)}"
        return fit(blend, losses, samples, settings, state_file=state_file, label=label)


class _Reached(Exception):
    def __init__(self, call: Call) -> None:
        self.call = call


def call_of(module: nn.Module, run: Callable[[], object]) -> Call:
    """The arguments of a module's first forward pass in ``run``, which stops there."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(Call(args, kwargs))

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached as reached:
        return reached.call
    finally:
        hook.remove()
    raise AssertionError(f"{type(module).__name__} is not a part of the forward pass")
