"""simomerge data check, and training on data of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simomerge.datasets import load_data

from .conftest import TINY, simomerge


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rooms, written to files as somebody would have them."""
    folder = tmp_path_factory.mktemp("mine")
    lines = ["image,split,depth,parts"]
    for split in ("train", "val", "test"):
        rooms = load_data("rooms", split=split, count=8, tasks=["depth", "segmentation"])
        for index in range(len(rooms)):
            sample, name = rooms[index], f"{split}{index}"
            image = (sample["image"].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            Image.fromarray(image).save(folder / f"{name}.png")
            depth = (sample["depth"][0].numpy() * 1000).round().astype(np.uint16)
            Image.fromarray(depth).save(folder / f"{name}-depth.png")
            Image.fromarray(sample["segmentation"].numpy().astype(np.uint8)).save(folder / f"{name}-parts.png")
            lines.append(f"{name}.png,{split},{name}-depth.png,{name}-parts.png")
    classes = load_data("rooms", count=1).tasks["segmentation"].classes
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    (folder / "data.yaml").write_text(
        "images: images.csv\ntasks:\n  depth: {scale: 0.001}\n"
        f"  parts: {{kind: segmentation, classes: [{', '.join(classes)}], ignore: [255]}}\n"
    )
    return folder


def test_what_is_there_is_counted_and_shown(mine: Path, tmp_path: Path) -> None:
    done = simomerge("data", "check", mine, "-o", tmp_path / "sheet.png")
    assert done.code in (0, 1)  # eight images need not show every class
    assert "train: 8 images; width x height of those read: 80x64 (8)" in done.out
    assert "depth: 8 images, 100.0% of the pixels valid;" in done.out and "parts: 8 images" in done.out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 3 * (150 + 4) and sheet.height > 6 * (120 + 4 + 16)  # titles, and a legend of the classes
    again = ("data", "check", mine / "data.yaml", "--count", 2, "-o", tmp_path / "sheet.png", "--json")
    refused = simomerge(*again)
    assert refused.code == 2 and "sheet.png exists; choose another path, or give --overwrite" in refused.err
    found = simomerge(*again, "--overwrite")
    assert found.json["splits"]["val"]["tasks"]["depth"]["images"] == 2
    assert found.code == bool(found.json["problems"])


def test_mistakes_are_listed_with_exit_code_1_and_a_wrong_manifest_with_2(mine: Path, tmp_path: Path) -> None:
    text = (mine / "data.yaml").read_text()
    for name, changed in (
        ("mm.yaml", text.replace("{scale: 0.001}", "{}")),
        ("key.yaml", text.replace("scale", "scal")),
    ):
        (mine / name).write_text(changed)
    wrong = simomerge("data", "check", mine / "mm.yaml", "-o", tmp_path / "sheet.png")
    assert wrong.code == 1 and "To fix" in wrong.out and "`scale: 0.001`" in wrong.out
    refused = simomerge("data", "check", mine / "key.yaml", "-o", tmp_path / "other.png")
    assert refused.code == 2 and "did you mean 'scale'?" in refused.err and "Traceback" not in refused.err
    assert not (tmp_path / "other.png").exists()


def test_a_published_dataset_is_checked_by_its_name(tmp_path: Path) -> None:
    for part, modality, shape in (
        (part, *of)
        for part in ("train", "val")
        for of in (("image", (6, 8, 3)), ("label", (6, 8)), ("depth", (6, 8, 1)), ("normal", (6, 8, 3)))
    ):
        (tmp_path / part / modality).mkdir(parents=True)
        for index in range(4):
            array = np.zeros(shape, np.int64) if modality == "label" else np.full(shape, 3**-0.5, np.float32)
            np.save(tmp_path / part / modality / f"{index}.npy", array)
    done = simomerge("data", "check", f"nyuv2:{tmp_path}", "-o", tmp_path / "sheet.png", "--json")
    assert done.code == 1 and all("no pixel of books" in problem for problem in done.json["problems"])
    assert {split: of["images"] for split, of in done.json["splits"].items()} == {"train": 4, "val": 2, "test": 2}
    (tmp_path / "val/depth/1.npy").unlink()
    done = simomerge("data", "check", f"nyuv2:{tmp_path}", "-o", tmp_path / "sheet.png", "--overwrite")
    assert done.code == 1 and "1 of 32 files are not there" in done.out and "1.npy" in done.out
    refused = simomerge("data", "check", f"nyuv3:{tmp_path}", "-o", tmp_path / "other.png")
    assert refused.code == 2 and "did you mean 'nyuv2'?" in refused.err and "Traceback" not in refused.err


def test_an_expert_is_trained_and_measured_on_it(mine: Path, tiny_base: Path, tmp_path: Path) -> None:
    data = ("--data", mine / "data.yaml")
    made = simomerge("train", "--base", tiny_base, "--task", "parts", *data, *TINY, "-o", tmp_path / "parts")
    assert made.code == 0, made.err
    measured = simomerge("evaluate", tmp_path / "parts", *data, "--json")
    assert measured.code == 0 and 0 <= measured.json["scores"]["parts"]["miou"] <= 100
