"""`simomerge realign --work`: a command that was stopped goes on when it is repeated, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.models.model import load

from .conftest import Story, assert_mistake, simomerge

Interrupted = Callable[[int], AbstractContextManager[None]]
pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    coarse = np.random.default_rng(0).integers(0, 255, (24, 4, 5, 3), np.uint8)
    for index, array in enumerate(np.repeat(np.repeat(coarse, 8, 1), 8, 2)):
        Image.fromarray(array).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def scene(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge with noise on its encoder and no fold, so that training can bring it closer to the experts."""
    model, generator = load(story / "scene"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.encoder.backbone.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.provenance["realign"] = {"method": "fold"}  # so distillation does not fold it
    model.save_pretrained(folder := tmp_path_factory.mktemp("noisy") / "scene")
    return folder


def command(story: Story, scene: Path, photos: Path, output: Path, *more: object) -> list[object]:
    experts = [f"{task}={story / task}" for task in ("depth", "normals")]
    settings = ("--method", "distill-encoder", "--steps", 16, "--batch-size", 4, "--hold-out", 0.25)
    return ["realign", scene, *experts, "--images", photos, *settings, "-o", output, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder).state_dict())


@pytest.mark.parametrize(
    ("more", "best"),
    [
        ((), None),
        (("--predictions", "live"), None),
        (("--lr", 0.5, "--no-retry"), 0),  # every step does harm, so the weights at the start are kept
    ],
)
def test_a_stopped_training_goes_on(
    story: Story,
    scene: Path,
    photos: Path,
    tmp_path: Path,
    interrupted: Interrupted,
    more: tuple[object, ...],
    best: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("simomerge.training.loop.HIGHEST_RISE", float("inf"))  # else a high rate stops in step 2
    done = simomerge(*command(story, scene, photos, tmp_path / "expected", *more, "--json"))
    assert done.code == 0, done.err
    expected: dict[str, Any] = done.json["realign"]
    assert expected["validate_every"] == 2 and expected["held_out_images"] == 6
    assert expected["best_step"] > 8 if best is None else expected["best_step"] == best
    again = command(story, scene, photos, tmp_path / "resumed", *more, "--work", tmp_path / "work", "--json")
    with interrupted(10):
        stopped = simomerge(*again)
    assert stopped.code == 130 and "repeat the command to resume." in stopped.err
    assert not (tmp_path / "resumed").exists()
    assert (tmp_path / "work" / "predictions").exists() == ("live" not in more)
    with interrupted(9):  # the state is that of step 8, so 8 steps are left
        done = simomerge(*again)
    assert done.code == 0, done.err
    kept = ("best_step", "steps", "distance_ratio", "held_out_images", "trained_parameters")
    assert {key: done.json["realign"][key] for key in kept} == {key: expected[key] for key in kept}
    found, wanted = weights(tmp_path / "resumed"), weights(tmp_path / "expected")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_second_training_goes_on(
    story: Story,
    scene: Path,
    photos: Path,
    tmp_path: Path,
    interrupted: Interrupted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the first rate every step does harm, at the second one, 5e-4, training helps."""
    monkeypatch.setattr("simomerge.training.loop.HIGHEST_RISE", float("inf"))
    monkeypatch.setattr("simomerge.assembly.realign.held_out.RETRY_RATE", 1e-3)
    more = ("--lr", 0.5, "--json")
    done = simomerge(*command(story, scene, photos, tmp_path / "expected", *more))
    expected: dict[str, Any] = done.json["realign"]
    assert expected["best_step"] > 8 and expected["steps"] == 32 and expected["lr_factor"] == 1e-3
    again = command(story, scene, photos, tmp_path / "resumed", *more, "--work", tmp_path / "work")
    with interrupted(26):
        assert simomerge(*again).code == 130
    with interrupted(9):  # 16 steps are done, and the state of the second training is that of step 8
        done = simomerge(*again)
    assert done.code == 0, done.err
    assert {key: done.json["realign"][key] for key in ("best_step", "steps", "distance_ratio")} == {
        key: expected[key] for key in ("best_step", "steps", "distance_ratio")
    }
    found, wanted = weights(tmp_path / "resumed"), weights(tmp_path / "expected")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_folder_of_another_training_is_refused(
    story: Story, scene: Path, photos: Path, tmp_path: Path, interrupted: Interrupted
) -> None:
    given = command(story, scene, photos, tmp_path / "out", f"--work={tmp_path / 'work'}")
    with interrupted(4):
        assert "repeat the command to resume." in simomerge(*given).err
    message = r"work: this work was begun with other inputs: steps \(16, now 6\); give another work folder \(--work\)"
    assert_mistake(simomerge(*given, "--steps", 6), message)


def test_without_a_work_folder_nothing_is_promised(
    story: Story, scene: Path, photos: Path, tmp_path: Path, interrupted: Interrupted
) -> None:
    with interrupted(2):
        stopped = simomerge(*command(story, scene, photos, tmp_path / "out"))
    assert (stopped.code, stopped.err.strip().splitlines()[-1]) == (130, "Stopped. No file is half-written.")
