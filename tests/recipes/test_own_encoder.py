"""Recipes with an encoder of one's own: what does not fit it is said before any work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import simomerge as sm
from simomerge.core.classes import trusting
from simomerge.core.errors import InputError
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.run import plan_of, run_recipe
from simomerge.training.settings import TrainSettings

STEPS = TrainSettings(steps=2, batch_size=2, lr=1e-3)
PART = {"steps": 2, "batch_size": 2}


@sm.register_encoder
class Plain(nn.Module):
    channels, strides = (6, 10), (4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 4, 4, groups=3), nn.Conv2d(6, 10, 2, 2, groups=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.stem(images).relu()
        return [fine, self.down(fine).relu()]


@sm.register_encoder
class Declared(Plain):
    blocks = ("stem", "down")


def base(kind: type[nn.Module], folder: Path) -> str:
    torch.manual_seed(0)
    return str(sm.SimoModel(kind(), {}, {}).save_pretrained(folder / "base"))


def recipe(base: str, *rows: str, **more: object) -> Recipe:
    given: dict = {
        "data_options": {"size": [16, 24]},
        "tasks": ("depth", "normals"),
        "train_images": 4,
        "val_images": 4,
        "test_images": 2,
        "probe": STEPS,
        "tune": STEPS,
        "joint": STEPS,
        "merges": ("average",),
        "realigned": rows,
        "realign": dict.fromkeys(("adapters", "distill-adapters", "prodistill", "distill-encoder"), PART),
        **more,
    }
    return Recipe(base=base, **given)


def test_all_that_does_not_fit_is_said_before_any_work(tmp_path: Path) -> None:
    decayed = TrainSettings(steps=2, batch_size=2, layer_decay=0.5)
    rows = ("average+adapters", "average+prodistill+fold", "average+distill-lora", "average+fold")
    wrong = recipe(base(Plain, tmp_path), *rows, head="dpt", tune=decayed)
    with pytest.raises(InputError) as caught:
        run_recipe(wrong, tmp_path / "run")
    message = str(caught.value)
    for part in (
        "base: heads: head 'dpt': a DPT head reads four taps, not 2",
        "; tune: layer_decay is 0.5, and the encoder's blocks are unknown",
        "; row 'average+adapters': Plain is a custom encoder, whose blocks are unknown",
        "; row 'average+prodistill+fold': Plain is a custom encoder",
        "; row 'average+distill-lora': Plain has no linear layers and no convolutions of one group",
    ):
        assert part in message, message
    assert "'average+fold'" not in message and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*images are few", "ignore:.*the fold stays close to the unfolded head")
def test_rows_that_need_blocks_run_on_an_encoder_that_declares_them(tmp_path: Path) -> None:
    rows = ("average+adapters", "average+distill-adapters", "average+prodistill+fold")
    decayed = TrainSettings(steps=2, batch_size=2, layer_decay=0.5)
    right = recipe(base(Declared, tmp_path), *rows, tune=decayed)
    assert len(plan_of(right, tmp_path / "run")) > 10
    results = run_recipe(right, tmp_path / "run", workers=1)
    assert [row["method"] for row in results["rows"]] == ["experts", "joint-mtl", "average", *rows]


def test_a_class_that_cannot_be_imported_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mycode.py").write_text(
        "from torch import nn\n\nclass Mine(nn.Conv2d):\n    channels, strides = (4,), (4,)\n\n"
        "    def __init__(self):\n        super().__init__(3, 4, 4, 4)\n\n"
        "    def forward(self, images):\n        return [super().forward(images)]\n"
    )
    code = "import simomerge as sm, mycode; sm.SimoModel(mycode.Mine(), {}, {}).save_pretrained('base')"
    there = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(tmp_path)])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=there, check=True)
    wanted = recipe(str(tmp_path / "base"), "average+fold")
    with pytest.raises(InputError, match=r"mycode:Mine is a class outside simomerge.*trust_code=True \(--trust-code\)"):
        plan_of(wanted, tmp_path / "run")
    with trusting(True), pytest.raises(InputError, match=r"module 'mycode' cannot be imported .*PYTHONPATH"):
        plan_of(wanted, tmp_path / "run")
