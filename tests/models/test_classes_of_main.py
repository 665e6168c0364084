"""Classes that a notebook or script defines: a warning when a model is saved, the true cause when it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simomerge as sm
from simomerge.checkpoints import read_description
from simomerge.core import classes
from simomerge.core.errors import InputError
from simomerge.models.heads.surgery import SurgeryHead

CODE = """
import simomerge as sm
import torch
from torch import nn


@sm.register_encoder
class Stem(nn.Module):
    channels, strides = (4,), (4,)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)

    def forward(self, images):
        return [self.stem(images)]


@sm.register_head
class Plain(nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        self.settings, self.out = {"channels": channels}, nn.Conv2d(4, channels, 1)

    def forward(self, features):
        return nn.functional.interpolate(self.out(features.maps[0]), features.padded_size)
"""
SAVE = """
torch.manual_seed(0)
model = sm.SimoModel(Stem(), {"depth": sm.Task("depth")}, {"depth": Plain()})
model.save_pretrained("model")
"""
CAUSE = (
    r"model.simo\.json: __main__:Stem was defined in a notebook or script \(__main__\), where no other program finds"
)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a model that a script has saved, and what the script printed."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "train.py").write_text(CODE + SAVE)
    done = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, check=True)
    return folder / "model", done.stderr


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registered classes: none at the start of a test."""
    empty: dict[str, Any] = {}
    monkeypatch.setattr(classes, "_registered", empty)
    return empty


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The classes of the script, moved to a module."""
    (tmp_path / "moved_classes.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    import moved_classes  # type: ignore[import-not-found]

    yield moved_classes
    del sys.modules["moved_classes"]


def test_saving_warns_and_names_the_line_of_the_script(script: tuple[Path, str]) -> None:
    said = script[1]
    line = (CODE + SAVE).splitlines().index('model.save_pretrained("model")') + 1
    wanted = f"train.py:{line}: Caution: Plain and Stem are defined in a notebook or script (__main__): only a program"
    assert wanted in said
    assert "Move them to a module, and import them from there." in said and said.count("Caution") == 1
    description = read_description(script[0])
    assert (description["encoder"]["class"], description["heads"]["depth"]["kind"]) == (
        "__main__:Stem",
        "__main__:Plain",
    )


@pytest.mark.parametrize("trust_code", [False, True])
def test_another_program_is_told_the_cause(script: tuple[Path, str], trust_code: bool) -> None:
    with pytest.raises(InputError, match=CAUSE + ".*register it.*before loading"):
        sm.load(script[0], trust_code=trust_code)


def test_a_class_that_was_moved_to_a_module_is_found_and_named_from_then_on(
    script: tuple[Path, str], module: Any, tmp_path: Path, registered: dict[str, Any]
) -> None:
    model = sm.load(script[0])
    assert type(model.encoder.backbone) is module.Stem and type(model.heads["depth"]) is module.Plain
    torch.manual_seed(0)
    made = sm.SimoModel(module.Stem(), {"depth": sm.Task("depth")}, {"depth": module.Plain()}).eval()
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model.predict(image)["depth"], made.predict(image)["depth"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = model.save_pretrained(tmp_path / "again")
    assert read_description(again)["encoder"]["class"] == "moved_classes:Stem"
    registered.clear()
    np.testing.assert_array_equal(
        sm.load(again, trust_code=True).predict(image)["depth"], model.predict(image)["depth"]
    )


def test_two_classes_of_one_name_are_not_guessed_from(
    script: tuple[Path, str], module: Any, registered: dict[str, Any]
) -> None:
    registered["other:Stem"] = module.Stem
    wanted = r"__main__:Stem was defined in .*, and moved_classes:Stem and other:Stem are registered under its name"
    with pytest.raises(InputError, match=wanted):
        sm.load(script[0])


def test_a_class_that_was_registered_in_the_process_that_started_this_one_is_imported(
    module: Any, registered: dict[str, Any]
) -> None:
    registered.clear()
    classes.allow(False, ["moved_classes:Stem"])
    assert type(classes.make("__main__:Stem", {}, torch.nn.Module)) is module.Stem


def test_one_class_inside_another_head_is_named_once(module: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module.Plain, "__module__", "__main__")
    tasks = {"depth": sm.Task("depth"), "distance": sm.Task("distance", "depth")}
    heads = {name: SurgeryHead([4], 1, inner=module.Plain(), cls=False) for name in tasks}
    with pytest.warns(
        UserWarning, match=r"^Plain is defined in .* registers this class can .* Move it to a module, and"
    ):
        saved = sm.SimoModel(module.Stem(), tasks, heads).save_pretrained(tmp_path / "model")
    assert json.loads((saved / "simo.json").read_text())["heads"]["depth"]["settings"]["inner"] == "__main__:Plain"
