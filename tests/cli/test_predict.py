"""simomerge predict reads images one at a time, in the order given, after a check of all files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simomerge.core import images
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel

from .conftest import simomerge


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    for index in range(4):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (20, 24, 3), np.uint8)).save(
            tmp_path / f"{3 - index}.png"
        )
    return [tmp_path / f"{3 - index}.png" for index in range(4)]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of images as they are read, and "predicted"."""
    found: list[str] = []
    read, predict = images.read_image, SimoModel.predict

    def noted(path: str | Path) -> np.ndarray:
        found.append(Path(path).name)
        return read(path)

    def after(self: SimoModel, *given: object) -> dict[str, np.ndarray]:
        made = predict(self, *given)
        found.append("predicted")
        return made

    monkeypatch.setattr(images, "read_image", noted)
    monkeypatch.setattr(SimoModel, "predict", after)
    return found


def test_each_image_is_read_when_its_turn_comes(
    photos: list[Path], events: list[str], make_model, tmp_path: Path
) -> None:
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    done = simomerge("predict", tmp_path / "m", *photos, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert events == [word for photo in photos for word in (photo.name, "predicted")]
    assert [Path(name).name for name in done.json["written"]] == [f"{photo.stem}-depth.png" for photo in photos]


@pytest.mark.parametrize("damage", ["cut", "text", "gone", "huge"])
def test_nothing_is_predicted_if_a_file_cannot_be_read(
    damage: str,
    photos: list[Path],
    events: list[str],
    make_model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    last = photos[-1]
    if damage == "cut":
        last.write_bytes(last.read_bytes()[:200])
    elif damage == "text":
        last.write_text("no picture")
    elif damage == "gone":
        last.unlink()
    else:
        Image.new("RGB", (30, 30)).save(last)
        monkeypatch.setattr(images, "MAX_PIXELS", 20 * 24)
    done = simomerge("predict", tmp_path / "m", *photos, "-o", tmp_path / "out")
    assert done.code == 2 and str(last) in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists() and "predicted" not in events
    assert events in ([], [last.name])  # only what may be damaged is read before
