"""Your own encoder and heads: merge them, repair the heads, save and load the result.

    python examples/own_modules.py -o runs/own

An encoder maps images to feature maps, a head maps Features to logits. `reads` says which layers of a head read which
feature maps; that is what the closed-form repair needs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import simomerge as sm


@sm.register_encoder  # model folders may name this class, and no other
class TwoStages(nn.Module):
    channels, strides = (16, 32), (4, 8)  # of the maps that it returns
    blocks = ("stem", "down")  # names of its modules, in the order in which they run

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 32, 2, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stem(images).relu()
        return fine, self.down(fine).relu()


@sm.register_head
class SumHead(sm.Foldable, nn.Module):
    reads = {"fine": (0,), "coarse": (1,)}  # noqa: RUF012 - layer: the feature maps that it reads

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.settings = {"channels": channels}  # the arguments that create the head again when a model is loaded
        self.fine, self.coarse, self.out = nn.Conv2d(16, 16, 1), nn.Conv2d(32, 16, 1), nn.Conv2d(16, channels, 1)

    def forward(self, features: sm.Features) -> Tensor:
        fine, coarse = self.fine(features.maps[0]), self.coarse(features.maps[1])
        hidden = fine + nn.functional.interpolate(coarse, fine.shape[-2:])
        return nn.functional.interpolate(self.out(hidden.relu()), features.padded_size, mode="bilinear")


def fake_training(base: sm.SimoModel, task: str, channels: int) -> sm.SimoModel:
    """An expert. A real one is trained; this one only moves the weights a little."""
    expert = sm.SimoModel(copy.deepcopy(base.encoder), {task: sm.Task(task)}, {task: SumHead(channels)}, {})
    with torch.no_grad():
        for weight in expert.encoder.parameters():
            weight += 0.05 * torch.randn_like(weight)
    expert.provenance = {"base": base.origin()}
    return expert


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/own"), help="folder of the merged model")
    parser.add_argument("--images", default="rooms", help="images without labels: a folder, or rooms")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    base = sm.SimoModel(TwoStages(), {}, {})
    experts = {task: fake_training(base, task, channels) for task, channels in (("depth", 1), ("normals", 3))}
    model = sm.realign(sm.merge(base, experts, scale=0.5), experts, images=given.images)
    folder = model.save_pretrained(given.output, overwrite=True)
    maps = sm.load(folder).predict(torch.rand(3, 64, 80))
    print(f"Saved: {folder}; it predicts {', '.join(f'{task} {map_.shape}' for task, map_ in maps.items())}")


if __name__ == "__main__":
    main()
