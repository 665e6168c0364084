"""NYUv2: both layouts, the paper's split, the 13 classes and the normals computed from depth."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from dataset_contract import FilePerTargetContract, FilesContract
from layouts import save, touch, unit
from scipy.io import savemat

from simomerge.core.errors import InputError
from simomerge.datasets import load_data
from simomerge.datasets.batches import ordered_batches
from simomerge.datasets.published.hdf5 import Frame
from simomerge.datasets.published.numbered import held_out
from simomerge.datasets.published.nyuv2 import CAMERA, CLASSES, FROM_40

H, W = 20, 28
IMAGES = {"train": 3, "val": 5}


def load(root: Path, split: str = "test", **options: Any) -> Any:
    return load_data(f"nyuv2:{root}", split, **options)


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    """The layout of MTAN and Auto-Lambda: labels as floats, a last axis of one for depth."""
    for part, count in IMAGES.items():
        for index in range(count):
            rng = np.random.default_rng(index)
            labels = rng.integers(-1, 13, (H, W)).astype(np.float32)
            depth = rng.uniform(1, 5, (H, W, 1)).astype(np.float32)
            normals = unit(rng.standard_normal((H, W, 3)))
            depth[0, 0], normals[0, 0] = 0, 0
            save(tmp_path / part / f"image/{index}.npy", rng.random((H, W, 3), np.float32))
            save(tmp_path / part / f"label/{index}.npy", labels)
            save(tmp_path / part / f"depth/{index}.npy", depth)
            save(tmp_path / part / f"normal/{index}.npy", normals)
    return tmp_path


def plane(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth of a plane as the dataset's camera sees it, and its normal: x right, y up, z towards the camera."""
    normal = unit(np.array([0.2 * index, 0.3, 1.0]))
    u, v = np.meshgrid((np.arange(640) - CAMERA.cx) / CAMERA.fx, (np.arange(480) - CAMERA.cy) / CAMERA.fy)
    return (2.5 / (-normal[0] * u + normal[1] * v + normal[2])).astype(np.float32), normal


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labelled file with five images at their true size, HDF5 with MATLAB's axes reversed."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        images = file.create_dataset("images", (5, 3, 640, 480), np.uint8, chunks=(1, 1, 640, 480))
        depths = file.create_dataset("depths", (5, 640, 480), np.float32, chunks=(1, 640, 480))
        labels = file.create_dataset("labels", (5, 640, 480), np.uint16, chunks=(1, 640, 480))
        for index in range(5):
            images[index] = rng.integers(0, 256, (3, 640, 480), np.uint8)
            depths[index] = plane(index)[0].T
            labels[index] = rng.integers(0, 895, (640, 480), np.uint16)
    # The dataset counts images from 1, and stores columns of doubles.
    savemat(root / "splits.mat", {"trainNdxs": [[2.0], [4.0], [5.0]], "testNdxs": [[1.0], [3.0]]})
    savemat(root / "classMapping40.mat", {"mapClass": np.arange(894)[None] % 40 + 1, "className": ["wall"]})
    return root


class TestNumberedFiles(FilePerTargetContract):
    name, size = "nyuv2", (H, W)
    files: Mapping[str, str] = {
        "image": "train/image/0.npy",
        "segmentation": "train/label/0.npy",
        "depth": "train/depth/0.npy",
        "normals": "train/normal/0.npy",
    }

    @pytest.fixture
    def root(self, npy: Path) -> Path:
        return npy


class TestLabelledFile(FilesContract):
    name, size, stored_size = "nyuv2", (24, 32), (480, 640)

    @pytest.fixture
    def root(self, labelled: Path) -> Path:
        return labelled


# The preprocessed layout --------------------------------------------------------------------------------


def test_samples_of_the_npy_layout_are_as_stored(npy: Path) -> None:
    sample = load(npy, "train", size=(H, W))[1]
    rng = np.random.default_rng(1)
    labels, depth = rng.integers(-1, 13, (H, W)), rng.uniform(1, 5, (H, W))
    assert (sample["segmentation"].numpy() == labels).all() and sample["segmentation"].dtype == torch.int64
    depth[0, 0] = 0
    np.testing.assert_allclose(sample["depth"][0].numpy(), depth, rtol=1e-6)
    assert sample["normals"].shape == (3, H, W) and not sample["normals"][:, 0, 0].any()
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), np.load(npy / "train" / "image" / "1.npy"))


def test_the_papers_size_and_tasks_are_the_defaults(npy: Path) -> None:
    data = load_data(f"nyuv2:{npy}", split="train", tasks=["normals", "depth"])
    sample = data[0]
    assert sample["image"].shape == (3, 280, 378) and sample["depth"].shape == (1, 280, 378)
    assert list(data.tasks) == ["normals", "depth"]
    full = load(npy, "train", size=(H, W))[0]
    assert set(sample["depth"].unique().tolist()) <= set(full["depth"].unique().tolist())  # the nearest, no mixture
    length = sample["normals"].square().sum(0)
    torch.testing.assert_close(length[length > 0], torch.ones(int((length > 0).sum())))
    assert load(npy, "train").tasks["segmentation"].classes == CLASSES and len(CLASSES) == 13
    assert load_data(f"nyuv2:{npy}", split="train", size=(10, 14))[0]["image"].shape == (3, 10, 14)


def test_the_papers_splits_have_their_sizes_and_share_no_image(tmp_path: Path) -> None:
    for part, count in (("train", 795), ("val", 654)):
        for index in range(count):
            touch(tmp_path / part / "image" / f"{index}.npy")
    splits = {split: load(tmp_path, split).rows for split in ("train", "val", "test")}
    assert [len(rows) for rows in splits.values()] == [795, 400, 254]
    held = [{row.image for row in splits[split]} for split in ("val", "test")]
    assert not held[0] & held[1] and len(held[0] | held[1]) == 654
    assert [row.image.stem for row in splits["train"]] == [str(index) for index in range(795)]
    # The rule that the documentation gives: of 32 or 33 images the first 20.
    assert np.flatnonzero(np.diff(held_out(654, 400, of=654).astype(int)))[:4].tolist() == [19, 31, 51, 64]


@pytest.mark.parametrize("total", [*range(1, 90), 500, 653, 2975])
def test_any_number_of_images_is_shared_out_in_proportion(total: int) -> None:
    assert held_out(total, 400, of=654).sum() == total - round(total * 400 / 654)


def test_wrong_contents_are_named(npy: Path) -> None:
    data = load(npy, "train")
    for folder, array, task, message in (
        ("label", np.full((H, W), 13.0), "segmentation", r"label.0\.npy: label 13 of segmentation, which has classes"),
        ("label", np.full((H, W), 0.5), "segmentation", r"label.0\.npy: labels that are not integers"),
        ("normal", np.zeros((H, W)), "normals", r"normal.0\.npy: normals of shape \(20, 28\); give"),
    ):
        save(npy / "train" / folder / "0.npy", array)
        with pytest.raises(InputError, match=message):
            data.targets(0, [task])
    for array, message in ((np.zeros((H, W)), "an image of shape"), (np.full((H, W, 3), 7.0), "image values from 7")):
        save(npy / "train/image/0.npy", array)
        with pytest.raises(InputError, match=rf"image.0\.npy: {message}"):
            data.image(0)


def test_a_modality_that_is_not_there_is_no_task(npy: Path) -> None:
    (npy / "train/normal").rename(npy / "elsewhere")
    assert list(load(npy, "train").tasks) == ["segmentation", "depth"]


# The labelled file --------------------------------------------------------------------------------------


def test_samples_of_the_labelled_file_are_upright_and_of_the_official_split(labelled: Path) -> None:
    data = load(labelled, "train", size=(480, 640))
    assert [row.image.index for row in data.rows] == [1, 3, 4]
    with h5py.File(labelled / "nyu_depth_v2_labeled.mat") as file:
        image, labels = file["images"][3], file["labels"][3].T.astype(int)
    sample = data[1]
    np.testing.assert_allclose(sample["image"].numpy(), image.transpose(0, 2, 1) / 255, rtol=1e-6)
    np.testing.assert_array_equal(sample["depth"][0].numpy(), plane(3)[0])
    expected = np.where(labels == 0, -1, np.array(FROM_40)[(labels - 1) % 40] - 1)
    np.testing.assert_array_equal(sample["segmentation"].numpy(), expected)
    assert load(labelled / "nyu_depth_v2_labeled.mat", "train")[0]["image"].shape == (3, 280, 378)


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ((2, 3, 20_000, 20_000), (1, 1, 10, 10), "an image takes 1,200,000,000 bytes, more than 512,000,000"),
        ((2**20, 3, 640, 480), (2000, 1, 640, 480), "an image takes 614,400,000 bytes"),
        ((2, 3, 0, 480), None, "no stack of images"),
    ],
    ids=["image", "chunk", "empty"],
)
def test_sizes_that_a_file_declares_are_limited_before_it_is_read(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...] | None, message: str
) -> None:
    with h5py.File(tmp_path / "x.mat", "w") as file:  # nothing is stored yet, so the file has few bytes
        file.create_dataset("images", shape, "u1", chunks=chunks)
        file.create_dataset("labels", (100, 640, 480), "u1", chunks=(100, 640, 480))
    with pytest.raises(InputError, match=rf"x\.mat, images 1: cannot be read.*{message}"):
        Frame(tmp_path / "x.mat", "images", 1).read()
    assert Frame(tmp_path / "x.mat", "labels", 1).read().shape == (480, 640)


def test_normals_of_the_labelled_file_are_those_of_its_surfaces(labelled: Path) -> None:
    data = load(labelled, "train")
    for position, index in enumerate((1, 3, 4)):
        found = data.targets(position, ["normals"])["normals"].numpy()
        cosine = np.einsum("chw,c->hw", found, plane(index)[1])
        assert cosine.min() > np.cos(np.deg2rad(0.1))


def test_the_40_classes_go_where_their_names_say() -> None:
    to = {40: len(FROM_40)} | {n: CLASSES[c - 1] for n, c in enumerate(FROM_40, start=1)}
    named = {1: "wall", 2: "floor", 3: "furniture", 4: "bed", 5: "chair", 6: "sofa", 7: "table", 9: "window"}
    named |= {11: "picture", 22: "ceiling", 23: "books", 25: "tv", 35: "objects", 39: "furniture", 40: "objects"}
    assert len(FROM_40) == 40 and set(FROM_40) == set(range(1, 14)) and named.items() <= to.items()


def test_a_slice_is_read_without_the_rest_and_in_every_process(labelled: Path) -> None:
    data = load(labelled, "train", size=(24, 32)).select(["depth"])
    alone = [batch["depth"] for batch in ordered_batches(data, 1)]
    workers = [batch["depth"] for batch in ordered_batches(data, 1, loader_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, workers, strict=True))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[2]["depth"], data[2]["depth"])
    with pytest.raises(InputError, match=r"labeled\.mat, depths 9: cannot be read"):
        Frame(labelled / "nyu_depth_v2_labeled.mat", "depths", 9).read()


def test_files_next_to_the_labelled_file_are_named(labelled: Path, tmp_path: Path) -> None:
    mat = tmp_path / "nyu_depth_v2_labeled.mat"
    mat.symlink_to(labelled / mat.name)
    for name, wrong in (("splits.mat", {"other": [1]}), ("classMapping40.mat", {"mapClass": [[41]]})):
        for content, message in ((None, "no such file"), (b"x" * 300, "not a MATLAB file"), (wrong, "no var|to 41")):
            if isinstance(content, dict):
                savemat(tmp_path / name, content)
            elif content:
                (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=rf"{name}: .*({message})"):
                load(tmp_path, "train")
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(labelled / name)
    savemat(tmp_path / "other.mat", {"trainNdxs": [1, 6], "testNdxs": [2]})
    (tmp_path / "splits.mat").unlink()
    (tmp_path / "other.mat").rename(tmp_path / "splits.mat")
    with pytest.raises(InputError, match=r"splits\.mat: its images are not from 1 to the 5"):
        load(tmp_path, "train")


def test_a_label_beyond_the_mapping_and_a_cut_file_are_named(labelled: Path, tmp_path: Path) -> None:
    for name in ("splits.mat", "nyu_depth_v2_labeled.mat"):
        (tmp_path / name).symlink_to(labelled / name)
    savemat(tmp_path / "classMapping40.mat", {"mapClass": np.ones((1, 800))})
    with pytest.raises(InputError, match=r"labels 1: label 894; classMapping40\.mat in the same folder has 800"):
        load(tmp_path, "train").targets(0, ["segmentation"])
    content = (labelled / "nyu_depth_v2_labeled.mat").read_bytes()
    (tmp_path / "nyu_depth_v2_labeled.mat").unlink()
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(content[:5000])
    with pytest.raises(InputError, match=r"labeled\.mat: not a complete HDF5 file"):
        load(tmp_path, "train")


# Asking for it ------------------------------------------------------------------------------------------


def test_a_wrong_folder_name_or_split_says_what_there_is(npy: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for spec, message in (
        (f"nyuv2:{empty}", r"neither the folder train/image nor the file nyu_depth_v2_labeled\.mat"),
        ("nyuv2:", "'nyuv2' needs its folder: nyuv2:FOLDER"),
        (f"nyu2:{npy}", r"unknown dataset .* did you mean 'nyuv2'\?.*cityscapes:FOLDER"),
        ("imagenet", r"give rooms, nyuv2:FOLDER"),
    ):
        with pytest.raises(InputError, match=message):
            load_data(spec)
    with pytest.raises(InputError, match="no split 'night'; it has train, val, test"):
        load_data(f"nyuv2:{npy}", split="night")
    (empty / "train/image").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train.image: no 0\.npy in it"):
        load_data(f"nyuv2:{empty}")
