"""Two experts become one model: train, merge, repair, compare, save. Takes a minute on two cores.

    python examples/merge_and_repair.py -o runs/example

The experts are trained here on rooms, the dataset that simomerge renders. With experts of your own, begin at `merge`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import simomerge as sm
from simomerge.training.lpft import fresh_head, lpft
from simomerge.training.settings import TrainSettings


def train(task: str, images: int, steps: int) -> sm.SimoModel:
    """An expert: the base encoder and a linear head, trained for one task."""
    data = sm.data("rooms", split="train", count=images, tasks=[task])
    base = sm.load("rooms-base")
    head = fresh_head(base.encoder, data.tasks[task], data, "linear", seed=0, subpixels=4)
    expert = sm.SimoModel(base.encoder, data.tasks, {task: head}, {"base": base.origin()})
    settings = TrainSettings(steps=steps, lr=2e-3, encoder_lr=4e-4, batch_size=16)
    lpft(expert, data, settings, settings)
    return expert


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/example"), help="folder of the merged model")
    parser.add_argument("--images", type=int, default=200, help="training images")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each phase")
    given = parser.parse_args(arguments)

    experts = {task: train(task, given.images, given.steps) for task in ("depth", "normals")}
    base = sm.load("rooms-base")
    merged = sm.merge(base, experts, "task-arithmetic", scale=0.5)
    images = sm.data("rooms", split="train", count=given.images, tasks=[])  # without labels: or a folder of photos
    repaired = sm.realign(merged, experts, images=images)  # compares the features with those of the experts

    test = sm.data("rooms", split="test", count=32, tasks=list(experts))
    baseline = {task: sm.evaluate(expert, test)[task] for task, expert in experts.items()}
    for name, model in (("merged", merged), ("merged and repaired", repaired)):
        delta = sm.delta_mtl(sm.evaluate(model, test), baseline, repaired.tasks)
        print(f"{name}: Delta_MTL {delta:+.1f} % (0 equals the two experts)")
    print(f"Saved: {repaired.save_pretrained(given.output, overwrite=True)}")


if __name__ == "__main__":
    main()
