"""The short scripts in examples/ run as their headers say, only smaller."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import merge_and_repair
import merge_weights
import own_modules
from simomerge.models.model import load


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    from PIL import Image

    for number in range(3):
        pixels = torch.randint(0, 255, (32, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    return tmp_path


def test_two_experts_become_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_and_repair.main(["-o", str(tmp_path / "out"), "--images", "16", "--steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["merged", "merged and repaired", "Saved"]
    model = load(tmp_path / "out")
    assert list(model.tasks) == ["depth", "normals"] and model.provenance["realign"]["method"] == "fold"


def test_weights_alone_are_merged(capsys: pytest.CaptureFixture[str]) -> None:
    merge_weights.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["average", "ties", "iso-c", "There"]


def test_own_modules_are_merged_saved_and_loaded(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_modules.main(["-o", str(tmp_path / "out"), "--images", str(photos)])
    assert "depth (64, 80), normals (3, 64, 80)" in capsys.readouterr().out
    assert type(load(tmp_path / "out").heads["depth"]).__name__ == "SumHead"
