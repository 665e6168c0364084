"""Cityscapes: both layouts, the paper's split, and how labels, parts and disparities are decoded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_contract import FilePerTargetContract
from layouts import nothing_to_fix, save, touch

from simomerge.core.errors import InputError
from simomerge.datasets import load_data
from simomerge.datasets.published.cityscapes import (
    COLOURS,
    LABEL_IDS,
    PARTS,
    decode_uids,
    read_disparity,
    read_parts,
)

H, W = 16, 32


def load(root: Path, split: str = "test", **options: Any) -> Any:
    return load_data(f"cityscapes:{root}", split, **options)


CITIES = {"train": ("aachen", "zurich"), "val": ("frankfurt",)}
UIDS = (3, 23, 26, 26002, 2401002, 2401000, 2500405, 2800105, 2600103, 32, 24001)
"""Unlabelled, sky, a car without and with an instance, a head, no part, the artefact, chassis, lights, a motorcycle."""
IN_PARTS = (0, 0, 0, 0, 2, 0, 0, 9, 7, 0, 0)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The official tree with three images in each city."""
    for part, cities in CITIES.items():
        for city in cities:
            for index in range(3):
                rng, stem = np.random.default_rng(index), f"{city}/{city}_{index:06d}_000019"
                image = rng.integers(0, 256, (H, W, 3), np.uint8)
                save(tmp_path / "leftImg8bit" / part / f"{stem}_leftImg8bit.png", image)
                ids = rng.integers(0, 34, (H, W)).astype(np.uint8)
                save(tmp_path / "gtFine" / part / f"{stem}_gtFine_labelIds.png", ids)
                uids = rng.choice(np.array(UIDS, np.int32), (H, W))
                save(tmp_path / "gtFinePanopticParts" / part / f"{stem}_gtFinePanopticParts.tif", uids)
                disparity = rng.integers(0, 20_000, (H, W)).astype(np.uint16)
                save(tmp_path / "disparity" / part / f"{stem}_disparity.png", disparity)
    return tmp_path


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    """The preprocessed layout."""
    for part, count in (("train", 5), ("val", 2)):
        for index in range(count):
            rng = np.random.default_rng(index)
            save(tmp_path / part / f"image/{index}.npy", rng.random((H, W, 3)))
            save(tmp_path / part / f"label_19/{index}.npy", rng.integers(-1, 19, (H, W)).astype(np.float64))
            save(tmp_path / part / f"part_seg/{index}.npy", rng.integers(0, 10, (H, W)))
            save(tmp_path / part / f"depth/{index}.npy", rng.uniform(0, 0.4, (H, W, 1)).astype(np.float32))
    return tmp_path


class TestOfficialTree(FilePerTargetContract):
    name, split, size = "cityscapes", "test", (H, W)
    files: Mapping[str, str] = {
        "image": "leftImg8bit/val/frankfurt/frankfurt_000000_000019_leftImg8bit.png",
        "segmentation": "gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png",
        "parts": "gtFinePanopticParts/val/frankfurt/frankfurt_000000_000019_gtFinePanopticParts.tif",
        "disparity": "disparity/val/frankfurt/frankfurt_000000_000019_disparity.png",
    }

    @pytest.fixture
    def root(self, official: Path) -> Path:
        return official


class TestNumberedFiles(FilePerTargetContract):
    name, size = "cityscapes", (H, W)
    files: Mapping[str, str] = {
        "image": "train/image/0.npy",
        "segmentation": "train/label_19/0.npy",
        "parts": "train/part_seg/0.npy",
        "disparity": "train/depth/0.npy",
    }

    @pytest.fixture
    def root(self, npy: Path) -> Path:
        return npy


def test_samples_of_the_official_tree(official: Path) -> None:
    sample = load_data(f"cityscapes:{official}", split="test", size=(H, W))[1]
    rng = np.random.default_rng(1)
    image, ids = rng.integers(0, 256, (H, W, 3), np.uint8), rng.integers(0, 34, (H, W))
    uids, disparity = rng.choice(np.array(UIDS, np.int32), (H, W)), rng.integers(0, 20_000, (H, W))
    np.testing.assert_allclose(sample["image"].permute(1, 2, 0).numpy() * 255, image, atol=1e-4)
    classes = {label: number for number, label in enumerate(LABEL_IDS)}
    np.testing.assert_array_equal(sample["segmentation"].numpy(), [[classes.get(i, -1) for i in row] for row in ids])
    expected = np.array(IN_PARTS)[[[UIDS.index(uid) for uid in row] for row in uids]]
    np.testing.assert_array_equal(sample["parts"].numpy(), expected)
    pixels = np.where(disparity > 0, (disparity - 1) / 256, 0) * W / 2048  # the camera's images are 2048 wide
    np.testing.assert_allclose(sample["disparity"][0].numpy(), pixels, rtol=1e-5)
    assert sample["segmentation"].dtype == sample["parts"].dtype == torch.int64


def test_samples_of_the_npy_layout(npy: Path) -> None:
    data = load(npy, "test", size=(H, W))
    sample = data[1]
    rng = np.random.default_rng(1)
    rng.random((H, W, 3))
    np.testing.assert_array_equal(sample["segmentation"].numpy(), rng.integers(-1, 19, (H, W)))
    np.testing.assert_array_equal(sample["parts"].numpy(), rng.integers(0, 10, (H, W)))
    np.testing.assert_allclose(sample["disparity"][0].numpy(), rng.uniform(0, 0.4, (H, W)), rtol=1e-6)
    assert list(data.tasks) == ["segmentation", "parts", "disparity"] and data.tasks["parts"].classes == PARTS
    assert load(npy, "train")[0]["image"].shape == (3, 128, 256)


def test_auto_lambdas_pictures_are_the_official_ones_by_number(official: Path, tmp_path: Path) -> None:
    folders = {"leftImg8bit": "image", "gtFine": "seg", "gtFinePanopticParts": "part_seg", "disparity": "depth"}
    for folder, name in folders.items():
        for part in ("train", "val"):
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            for number, file in enumerate(sorted((official / folder / part).glob("*/*"))):
                shutil.copy(file, tmp_path / "mine" / part / name / f"{number}{file.suffix}")
    for split in ("train", "val", "test"):
        ours = load_data(f"cityscapes:{official}", split, size=(H, 2 * W))
        theirs = load_data(f"cityscapes:{tmp_path / 'mine'}", split, size=(H, 2 * W))
        assert len(ours) == len(theirs) and list(ours.tasks) == list(theirs.tasks)
        for one, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
    nothing_to_fix(f"cityscapes:{tmp_path / 'mine'}")


def test_the_papers_splits_have_their_sizes(tmp_path: Path) -> None:
    for part, count in (("train", 2975), ("val", 500)):
        for index in range(count):
            touch(tmp_path / "npy" / part / "image" / f"{index}.npy")
            touch(tmp_path / "tree" / "leftImg8bit" / part / "bonn" / f"bonn_{index:06d}_000019_leftImg8bit.png")
    for layout in ("npy", "tree"):
        splits = [{row.image for row in load(tmp_path / layout, s).rows} for s in ("train", "val", "test")]
        assert [len(images) for images in splits] == [2380, 595, 500]
        assert len(set.union(*splits)) == 3475


def test_labels_are_those_of_the_official_scripts() -> None:
    names = dict(zip(LABEL_IDS, COLOURS, strict=True))
    assert len(names) == 19 and names[7] == "road" and names[11] == "building" and names[24] == "person"
    assert names[26] == "car" and names[31] == "train" and names[33] == "bicycle"


def test_universal_ids_come_apart() -> None:
    sids, iids, pids = decode_uids(np.array([0, 23, 26002, 2401002, 2401000, 99_999], np.int32))
    assert sids.tolist() == [0, 23, 26, 24, 24, 99]
    assert iids.tolist() == [-1, -1, 2, 10, 10, 999] and pids.tolist() == [-1, -1, -1, 2, 0, -1]


def test_32_bits_are_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", np.array([[2401002, 26002], [33, 2700304]], np.int32))
    assert read_parts(path).tolist() == [[2, 0], [0, 8]]


def test_disparity_shrinks_with_the_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 1, 257, 257 + 128]], np.uint16))
    assert read_disparity(2048, path).tolist() == [[0, 0, 1, 1.5]]
    assert read_disparity(512, path).tolist() == [[0, 0, 0.25, 0.375]]  # as Auto-Lambda divides by 256 * 4


@pytest.mark.parametrize(
    ("task", "name", "array", "message"),
    [
        ("segmentation", "gtFine_labelIds.png", np.full((H, W), 34, np.uint8), "not label ids from 0 to 33"),
        ("segmentation", "gtFine_labelIds.png", np.zeros((H, W, 3), np.uint8), "not label ids from 0 to 33"),
        ("parts", "gtFinePanopticParts.tif", np.full((H, W), 3400101, np.int32), "not all sid_iid_pid"),
        ("parts", "gtFinePanopticParts.tif", np.full((H, W), 34, np.int32), "not all sid_iid_pid"),
        ("parts", "gtFinePanopticParts.tif", np.full((H, W), -1, np.int32), "not all sid_iid_pid"),
        ("disparity", "disparity.png", np.zeros((H, W), np.uint8), "pictures of 16 bits"),
    ],
)
def test_wrong_contents_are_named(task: str, name: str, array: np.ndarray, message: str, official: Path) -> None:
    folder = official / name.split("_")[0].removesuffix(".png").removesuffix(".tif")
    save(folder / f"val/frankfurt/frankfurt_000001_000019_{name}", array)
    with pytest.raises(InputError, match=rf"frankfurt_000001_000019_{name}: .*{message}"):
        load(official, "test").targets(1, [task])


def test_folders_that_are_not_there(official: Path, tmp_path: Path) -> None:
    (official / "disparity").rename(official / "elsewhere")
    assert list(load(official, "val").tasks) == ["segmentation", "parts"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="neither train/image nor leftImg8bit is a folder"):
        load(empty)
    (empty / "leftImg8bit").mkdir()
    with pytest.raises(InputError, match="no image leftImg8bit/train/CITY"):
        load(empty)
    with pytest.raises(InputError, match="no split 'trainval'; it has train, val, test"):
        load(official, "trainval")
