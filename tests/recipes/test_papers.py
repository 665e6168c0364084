"""The recipes of the paper's datasets, carried out on a few tiny images in the layouts that those have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simomerge.cli import cli
from simomerge.datasets.published.taskonomy import BUILDINGS

RECIPES = Path(__file__).parent.parent.parent / "recipes"
H, W = 16, 24
SHORT = [
    f"{name}={{steps: 2, batch_size: 2}}"
    for name in ("probe", "tune", "joint", "realign.heads", "realign.adapters", "refine.heads", "realign.distill")
]


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)


def nyuv2(root: Path, rng: np.random.Generator) -> None:
    for part, count in (("train", 8), ("val", 60)):  # of each twenty of val, twelve or so are the split val
        for i in range(count):
            normals = rng.standard_normal((H, W, 3)).astype(np.float32)
            write(root / part / f"image/{i}.npy", rng.random((H, W, 3), np.float32))
            write(root / part / f"label/{i}.npy", rng.integers(-1, 13, (H, W)).astype(np.float32))
            write(root / part / f"depth/{i}.npy", rng.uniform(1, 5, (H, W, 1)).astype(np.float32))
            write(root / part / f"normal/{i}.npy", normals / np.linalg.norm(normals, axis=-1, keepdims=True))


def cityscapes(root: Path, rng: np.random.Generator) -> None:
    for part, count in (("train", 60), ("val", 4)):
        for i in range(count):
            write(root / part / f"image/{i}.npy", rng.random((H, W, 3), np.float32))
            write(root / part / f"label_19/{i}.npy", rng.integers(-1, 19, (H, W)).astype(np.float32))
            write(root / part / f"part_seg/{i}.npy", rng.integers(0, 10, (H, W)).astype(np.float32))
            write(root / part / f"depth/{i}.npy", rng.uniform(0.1, 0.4, (H, W, 1)).astype(np.float32))


def taskonomy(root: Path, rng: np.random.Generator) -> None:
    for building in (name for names in BUILDINGS.values() for name in names):
        for domain, kind in (
            *(("rgb", np.uint8), ("normal", np.uint8), ("depth_zbuffer", np.uint16)),
            *(("edge_texture", np.uint16), ("keypoints2d", np.uint16), ("mask_valid", None)),
        ):
            shape = (H, W, 3) if kind == np.uint8 else (H, W)
            array = np.full(shape, 255, np.uint8) if kind is None else rng.integers(1, 250, shape).astype(kind)
            end = "depth_zbuffer" if domain == "mask_valid" else domain
            write(root / domain / building / f"point_0_view_0_domain_{end}.png", array)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("nyuv2", nyuv2),
        pytest.param("cityscapes", cityscapes, marks=pytest.mark.slow),
        pytest.param("taskonomy", taskonomy, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_of_the_paper_goes_from_its_data_to_its_report(
    name: str, make: Callable[[Path, np.random.Generator], None], tiny_base: Path, tmp_path: Path
) -> None:
    make(tmp_path / "data", np.random.default_rng(0))
    changes = [
        *(f"base={tiny_base}", f"data={name}:{tmp_path / 'data'}", f"data_options={{size: [{H}, {W}]}}"),
        *("train_images=8", "val_images=8", "test_images=2", "scale_images=2", "align_split=train+val"),
        *(SHORT if name == "nyuv2" else [*SHORT, "head_settings={fusion_channels: 8}"]),
        "realign.adapters.rank=2",
        "realigned=[task-arithmetic+heads, ties+adapters, task-arithmetic+fold-cross]",
    ]
    sets = [part for change in changes for part in ("--set", change)]
    run = ["run", str(RECIPES / f"{name}.yaml"), *sets, "-o", str(tmp_path / "run"), "--workers", "1"]
    cli.main(run, standalone_mode=False)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == [
        *("experts", "joint-mtl", "joint-mtl-uncertainty", "zero-shot", "average", "task-arithmetic", "ties"),
        *("task-arithmetic+heads", "ties+adapters", "task-arithmetic+fold-cross"),
    ]
    assert results["recipe"]["augmentation"] == "scale-crop-flip" and (tmp_path / "run" / "report.html").is_file()
    assert set(results["rows"][0]["metrics"]) == set(results["recipe"]["tasks"])
