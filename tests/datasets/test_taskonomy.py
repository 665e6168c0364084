"""Taskonomy: the official tree, the paper's buildings and limits, masks, and how each domain is decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_contract import FilePerTargetContract
from layouts import save, touch

from simomerge.core.errors import InputError
from simomerge.datasets import load_data
from simomerge.datasets.check import check
from simomerge.datasets.load import find_manifest
from simomerge.datasets.published.taskonomy import BUILDINGS, LIMITS
from simomerge.training.evaluate import evaluate

H, W = 16, 16


def load(root: Path, split: str = "test", **options: Any) -> Any:
    return load_data(f"taskonomy:{root}", split, **options)


VIEWS = ((0, 1), (0, 3), (2, 0), (10, 0))


def pictures(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One view in every domain as it is stored."""
    depth = rng.integers(1, 8000, (H, W)).astype(np.uint16)
    mask = np.full((H, W), 255, np.uint8)
    depth[0, :2], mask[0, 2] = (0, 65535), 0
    towards = rng.standard_normal((H, W, 3)) + np.array([0, 0, 4])
    normal = np.round(127.5 * (1 + towards / np.linalg.norm(towards, axis=-1, keepdims=True))).astype(np.uint8)
    return {
        "rgb": rng.integers(0, 256, (H, W, 3), np.uint8),
        "depth_zbuffer": depth,
        "normal": normal,
        "edge_texture": rng.integers(0, 13_000, (H, W)).astype(np.uint16),
        "keypoints2d": rng.integers(0, 4_000, (H, W)).astype(np.uint16),
        "mask_valid": mask,
    }


def place(root: Path, domain: str, building: str, view: tuple[int, int]) -> Path:
    end = "depth_zbuffer" if domain == "mask_valid" else domain
    return root / domain / building / f"point_{view[0]}_view_{view[1]}_domain_{end}.png"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number, building in enumerate(name for names in BUILDINGS.values() for name in names):
        for index, view in enumerate(VIEWS):
            for domain, picture in pictures(np.random.default_rng([number, index])).items():
                save(place(tmp_path, domain, building, view), picture)
    return tmp_path


class TestOfficialTree(FilePerTargetContract):
    name, split, size = "taskonomy", "val", (H, W)
    files: Mapping[str, str] = {
        "image": str(place(Path(), "rgb", "beechwood", VIEWS[0])),
        "depth": str(place(Path(), "mask_valid", "beechwood", VIEWS[0])),
        "normals": str(place(Path(), "normal", "beechwood", VIEWS[0])),
        "keypoints": str(place(Path(), "keypoints2d", "beechwood", VIEWS[0])),
    }

    @pytest.fixture
    def root(self, tree: Path) -> Path:
        return tree


def test_samples_of_the_official_tree(tree: Path) -> None:
    data = load_data(f"taskonomy:{tree}", split="train", size=(H, W))
    sample, stored = data[2], pictures(np.random.default_rng([0, 2]))
    assert len(data) == 8 * 4 and list(data.tasks) == ["autoencoder", "depth", "normals", "texture", "keypoints"]
    invalid = torch.zeros(H, W, dtype=torch.bool)
    invalid[0, :3] = True  # no depth stored, no surface met, masked
    depth = np.log(1 + stored["depth_zbuffer"].astype(float)) / np.log(2**16)
    assert torch.equal(sample["depth"][0].isnan(), invalid) and data.tasks["depth"].kind == "log_depth"
    np.testing.assert_allclose(sample["depth"][0][~invalid], depth[~invalid.numpy()], rtol=1e-5)
    normals = stored["normal"].astype(float) / 127.5 - 1
    cosine = (sample["normals"].permute(1, 2, 0).numpy() * normals).sum(-1) / np.linalg.norm(normals, axis=-1)
    assert (cosine[0, 3:] > 0.9999).all() and (cosine[1:] > 0.9999).all()
    assert not sample["normals"][:, 0, 2].any() and sample["normals"][:, 0, 0].any()
    for name, domain, largest in (("texture", "edge_texture", 11041), ("keypoints", "keypoints2d", 3129)):
        np.testing.assert_allclose(sample[name][0].numpy(), np.minimum(stored[domain] / largest, 1), rtol=1e-6)
    torch.testing.assert_close(sample["autoencoder"], sample["image"])


def test_masks_are_part_of_the_data(tree: Path) -> None:
    def prints() -> list[str]:
        return [load(tree, "val").select(tasks).fingerprint() for tasks in (["depth"], [])]

    before = prints()
    mask = place(tree, "mask_valid", "beechwood", VIEWS[0])
    os.utime(mask, (1, 1))
    after = prints()
    assert before[0] != after[0] and before[1] == after[1]  # images alone need no mask
    mask.unlink()
    with pytest.raises(InputError, match=r"1 of .* files are not there: .*mask_valid.*"):
        load(tree, "val").check_files()
    assert any("mask_valid" in problem for problem in check(find_manifest(f"taskonomy:{tree}")).problems)


def test_buildings_may_be_those_of_several_splits(tree: Path) -> None:
    mine = ["merom", "onaga", "allensville"]
    rows = {split: load_data(f"taskonomy:{tree}", split, buildings=mine).rows for split in ("train", "test")}
    assert {row.image.parent.name for row in rows["train"]} == {"merom", "allensville"}
    assert {row.image.parent.name for row in rows["test"]} == {"onaga"}


def test_the_autoencoder_sees_what_the_encoder_sees_at_any_size(tree: Path) -> None:
    for size in ((256, 256), (10, 12)):
        sample = load(tree, "val", size=size)[0]
        assert sample["image"].shape == (3, *size) and sample["depth"].shape == (1, *size)
        torch.testing.assert_close(sample["autoencoder"], sample["image"])
    assert load(tree)[0]["image"].shape == (3, 256, 256)


def test_splits_are_the_papers_buildings_in_the_order_of_points_and_views(tree: Path) -> None:
    for split, buildings in BUILDINGS.items():
        rows = load(tree, split).rows
        assert list(dict.fromkeys(row.image.parent.name for row in rows)) == list(buildings)
        names = [f"point_{p}_view_{v}_domain_rgb.png" for p, v in VIEWS]
        assert [row.image.name for row in rows[:4]] == names
    assert [len(names) * LIMITS[split] for split, names in BUILDINGS.items()] == [16_000, 4_000, 4_000]


def test_of_a_large_building_as_many_views_as_allowed_are_spread_over_it(tmp_path: Path) -> None:
    for point in range(2500):
        touch(place(tmp_path, "rgb", "merom", (point, 0)))
    rows = load(tmp_path, "train", buildings=["merom"]).rows
    points = [int(row.image.name.split("_")[1]) for row in rows]
    assert len(set(points)) == 2000 and points == sorted(points) and points[0] == 0 and points[-1] >= 2498
    assert max(np.diff(points)) == 2


def test_without_masks_every_depth_counts(tree: Path) -> None:
    (tree / "mask_valid").rename(tree / "elsewhere")
    sample = load(tree, "test", size=(H, W))[0]
    assert sample["depth"][0].isnan().sum() == 2 and sample["normals"].square().sum(0).gt(0).all()


def test_a_model_is_evaluated_on_it(tree: Path, make_model: Callable[..., Any]) -> None:
    data = load(tree, "val", count=2, size=(14, 14))
    scores = evaluate(make_model(list(data.tasks.values())), data)
    assert list(scores) == list(data.tasks) and np.isfinite([scores[n][t.metric] for n, t in data.tasks.items()]).all()


@pytest.mark.parametrize(
    ("task", "domain", "array", "message"),
    [
        ("depth", "depth_zbuffer", np.zeros((H, W), np.uint8), "grey picture of 16 bits"),
        ("texture", "edge_texture", np.zeros((H, W, 3), np.uint8), "grey picture of 16 bits"),
        ("normals", "normal", np.zeros((H, W), np.uint8), "RGB pictures of 8 bits"),
        ("depth", "mask_valid", np.zeros((H, 3), np.uint8), r"of shape \(16, 3\), its target of \(16, 16\)"),
    ],
)
def test_wrong_contents_are_named(task: str, domain: str, array: np.ndarray, message: str, tree: Path) -> None:
    path = save(place(tree, domain, "beechwood", VIEWS[0]), array)
    with pytest.raises(InputError, match=f"{path.name}: .*{message}"):
        load(tree, "val").targets(0, [task])


def test_what_is_missing_is_reported(tree: Path, tmp_path: Path) -> None:
    (tree / "rgb/corozal").rename(tree / "elsewhere")
    with pytest.raises(InputError, match=r"rgb: no images of corozal of the split val\. .* buildings=\[\.\.\.\]"):
        load(tree, "val")
    assert len(load(tree, "val", buildings=["klickitat", "beechwood"])) == 8
    assert any("corozal" in problem for problem in check(find_manifest(f"taskonomy:{tree}")).problems)
    with pytest.raises(InputError, match="none of the chosen buildings is in split 'val'; it has beechwood"):
        load(tree, "val", buildings=["merom"])
    with pytest.raises(InputError, match="no split 'night'; it has train, val, test"):
        load(tree, "night")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no folder rgb"):
        load(empty)
    (empty / "rgb").mkdir()
    with pytest.raises(InputError, match="none of the paper's buildings"):
        load(empty)
