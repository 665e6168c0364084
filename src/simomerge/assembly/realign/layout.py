"""The linear systems that the fold of a model's heads solves.

Each head declares the linear maps it starts with (its input projections). Per tap, a projection is split into one part
for each tap; cross tap, it is one part that reads all taps. Parts that read the same inputs share one system of
normal equations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from simomerge.assembly.realign.systems import Part, System, tokens
from simomerge.models.encoders import Features
from simomerge.models.heads.projections import Projection, input_projections
from simomerge.models.model import SimoModel


class FoldLayout:
    """The parts of all heads of a model, and the systems that they share.

    Args:
        model: A merged model with the experts' heads.
        variant: "per-tap" (each tap is mapped from itself) or "cross-tap" (from all taps).

    Attributes:
        projections: By task, the head's input projections.
        parts: One regression target each, in the order of `targets`.
        outputs: System -> number of its outputs.

    Raises:
        InputError: A head without declared projections.
    """

    def __init__(self, model: SimoModel, variant: str = "per-tap") -> None:
        self.model = model
        self.variant = variant
        self.projections = {name: input_projections(head, name) for name, head in model.heads.items()}
        self.parts: list[Part] = []
        self.outputs: dict[System, int] = {}
        for task, projections in self.projections.items():
            for index, projection in enumerate(projections):
                for piece in projection.split() if variant == "per-tap" else [projection]:
                    system = self._system(task, piece)
                    first = self.outputs.get(system, 0)
                    self.outputs[system] = first + len(piece.bias)
                    self.parts.append(Part(task, index, piece, system, slice(first, self.outputs[system])))

    def _system(self, task: str, piece: Projection) -> System:
        source = self.model.encoder.source(task)
        if self.variant == "per-tap":
            return System(tuple(sorted(piece.maps)), tuple(sorted(piece.cls)), piece.grid, source)
        head: Any = self.model.heads[task]
        taps = tuple(range(len(self.model.encoder.channels))) if getattr(head, "widens", False) else piece.taps
        # Taps of equal stride have the same grid, so that their projections share one system.
        strides = self.model.encoder.strides
        return System(taps, taps if piece.cls else (), strides.index(strides[piece.grid]), source)

    def targets(self, experts: Mapping[str, Features]) -> list[Tensor]:
        """The target of each part from the experts' features by task: (B, n, O) per part."""
        return [tokens(part.projection(experts[part.task])) for part in self.parts]

    def residuals(self, features: Features, targets: Sequence[Tensor]) -> dict[System, tuple[Tensor, Tensor]]:
        """The target of each system, and its residual with the merged features: the target minus the current output."""
        members: dict[System, list[tuple[Part, Tensor]]] = {}
        for part, target in zip(self.parts, targets, strict=True):
            members.setdefault(part.system, []).append((part, target))
        found = {}
        for system, pairs in members.items():
            target = torch.cat([value for _, value in pairs], 2)
            outputs = [tokens(part.projection(features.of(part.task))) for part, _ in pairs]
            found[system] = target, target - torch.cat(outputs, 2)
        return found
