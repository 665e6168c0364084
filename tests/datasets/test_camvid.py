"""examples/camvid.py on three synthetic images, against distances and deviations that are computed one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt

import camvid
from camvid import boundaries, contrast, distances, make_dataset
from simomerge.core.errors import InputError
from simomerge.datasets import load_data
from simomerge.datasets.check import check
from simomerge.datasets.load import find_manifest

H, W = 40, 60
TASKS = ("segmentation", "edges", "distance", "texture")


def labels_of(split: str) -> np.ndarray:
    """Two halves; a square in a corner; and random blocks, some of them void."""
    labels = np.zeros((H, W), np.uint8)
    if split == "train":
        labels[:, 20:] = 3
    elif split == "val":
        labels[:10, :12] = 8
    else:
        labels = np.random.default_rng(0).integers(6, 12, (H // 5, W // 5), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    return labels


def image_of(split: str) -> np.ndarray:
    return np.random.default_rng(len(split)).integers(0, 256, (H, W, 3), dtype=np.uint8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of CamVid as in the SegNet tutorial, one image per split."""
    for split in camvid.SPLITS:
        for folder, array in ((split, image_of(split)), (f"{split}annot", labels_of(split))):
            (tmp_path / "source" / folder).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / "source" / folder / "0001.png")
    return tmp_path / "source"


def edges_one_by_one(labels: np.ndarray) -> np.ndarray:
    padded = np.pad(labels, 1, mode="edge")
    found = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(labels.shape):
        neighbours = padded[y, x + 1], padded[y + 2, x + 1], padded[y + 1, x], padded[y + 1, x + 2]
        found[y, x] = any(other != labels[y, x] for other in neighbours)
    return found


def distances_one_by_one(edges: np.ndarray) -> np.ndarray:
    places = np.argwhere(edges)
    found = np.zeros(edges.shape)
    for y, x in np.ndindex(edges.shape):
        found[y, x] = np.sqrt(((places - (y, x)) ** 2).sum(1).min())
    return found


@pytest.mark.parametrize("split", camvid.SPLITS)
def test_targets_are_the_definitions(source: Path, tmp_path: Path, split: str) -> None:
    data = load_data(make_dataset(source, tmp_path / "out", (H, W)), split)
    labels, sample = labels_of(split), data[0]
    void, edges = labels == 11, edges_one_by_one(labels)
    assert sample["segmentation"].tolist() == np.where(void, -1, labels.astype(int)).tolist()
    assert sample["edges"][0].tolist() == np.where(void, -1, edges).tolist()
    wanted = distances_one_by_one(edges)
    np.testing.assert_allclose(wanted, distance_transform_edt(~edges))
    share = np.where(void, np.nan, np.rint(np.minimum(wanted / 32, 1) * 64) / 64)
    np.testing.assert_array_equal(sample["distance"][0].numpy(), share.astype(np.float32))
    grey = np.asarray(Image.open(next((tmp_path / f"out/images/{split}").iterdir())).convert("L")) / 255
    padded = np.pad(grey, 4, mode="edge")
    deviation = np.array([[padded[y : y + 9, x : x + 9].std() for x in range(W)] for y in range(H)])
    stored = sample["texture"][0].numpy()
    np.testing.assert_allclose(stored, np.sqrt(2 * deviation), atol=0.5 / 64 + 1e-6)


def test_halves_have_distances_in_closed_form() -> None:
    labels = labels_of("train")
    edges = boundaries(labels)
    assert np.flatnonzero(edges.all(0)).tolist() == np.flatnonzero(edges.any(0)).tolist() == [19, 20]
    columns = np.arange(W)
    wanted = np.minimum(np.where(columns < 20, 19 - columns, columns - 20) / 32, 1)
    np.testing.assert_array_equal(distances(edges), np.tile(wanted, (H, 1)))
    assert (distances(boundaries(np.zeros((4, 5)))) == 1).all()  # no boundary is near


def test_texture_is_in_range_whatever_the_image() -> None:
    assert contrast(np.full((20, 20), 0.3)).max() == pytest.approx(0, abs=1e-3)
    halves = np.zeros((20, 20))
    halves[:, 10:] = 1
    assert 0.99 < contrast(halves).max() <= 1  # no window has a larger deviation


def test_the_dataset_moves_and_passes_the_check(source: Path, tmp_path: Path) -> None:
    make_dataset(source, tmp_path / "out", (H, W))
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    report = check(find_manifest(moved))
    assert all("no pixel of" in problem for problem in report.problems)  # three images do not show all classes
    data = load_data(moved, "test")
    assert tuple(data.tasks) == TASKS and data.tasks["segmentation"].channels == 11


def test_other_sizes_are_resized_and_jpegs_of_the_size_are_copied(source: Path, tmp_path: Path) -> None:
    small = make_dataset(source, tmp_path / "small", (20, 30)).parent
    assert load_data(small, "train")[0]["edges"][0].sum() == 2 * 20
    for split in camvid.SPLITS:
        for kind, folder, name in (
            ("images", small / f"images/{split}", "jpg"),
            ("labels", source / f"{split}annot", "png"),
        ):
            target = tmp_path / "again" / kind / split
            target.mkdir(parents=True)
            (target / f"0001.{name}").write_bytes((folder / f"0001.{name}").read_bytes())
    again = make_dataset(tmp_path / "again", tmp_path / "copied", (20, 30)).parent
    for file in small.rglob("*.*"):
        assert (again / file.relative_to(small)).read_bytes() == file.read_bytes()


def test_mistakes_are_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken: already exists"):
        make_dataset(source, tmp_path / "taken")
    (source / "testannot/0001.png").unlink()
    with pytest.raises(InputError, match="no labels"):
        make_dataset(source, tmp_path / "out")
    Image.fromarray(np.full((H, W), 12, np.uint8)).save(source / "testannot/0001.png")
    with pytest.raises(InputError, match="no labels 0 to 11"):
        make_dataset(source, tmp_path / "out")
    with pytest.raises(InputError, match="no folder train or images/train"):
        make_dataset(tmp_path, tmp_path / "new")
