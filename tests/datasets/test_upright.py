"""Targets of photos with an EXIF orientation: turned with their image, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.datasets import load_data
from simomerge.datasets.check import check
from simomerge.datasets.manifest import read_manifest
from simomerge.datasets.sheet import contact_sheet
from simomerge.datasets.stored import Stored
from simomerge.datasets.tasks import Task

H, W = 6, 8
LABELS = np.random.default_rng(0).integers(0, 2, (H, W)).astype(np.uint8)
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif(tag: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = tag
    return found


def upright(values: np.ndarray, tag: int) -> np.ndarray:
    image = Image.fromarray(values)
    return np.asarray(image.transpose(TRANSPOSED[tag]) if tag in TRANSPOSED else image)


def dataset(
    folder: Path, tag: int, target: np.ndarray, name: str = "t.png", kind: str = "segmentation", **given: int
) -> Path:
    """A photo that is bright where `LABELS` is 1, stored with an orientation, and a target with the tag ``own``."""
    Image.fromarray(LABELS * 255).convert("RGB").save(folder / "a.png", exif=exif(tag))
    if name.endswith(".npy"):
        np.save(folder / name, target)
    else:
        Image.fromarray(target).save(folder / name, **({"exif": exif(given["own"])} if "own" in given else {}))
    task = "{classes: [a, b]}" if kind == "segmentation" else "{}"
    size = "size: [12, 12]\n" if given.get("resized") else ""
    path = folder / "data.yaml"
    path.write_text(f"images: [{{image: a.png, split: val, {kind}: {name}}}]\n{size}tasks: {{{kind}: {task}}}\n")
    return path


def agree(path: Path) -> bool:
    sample = load_data(path, "val")[0]
    return bool(((sample["image"][0] > 0.5) == sample["segmentation"].bool()).all())


@pytest.mark.parametrize("tag", [5, 6, 7, 8])
def test_a_target_of_the_stored_size_is_turned(tag: int, tmp_path: Path) -> None:
    assert agree(dataset(tmp_path, tag, LABELS))
    assert agree(dataset(tmp_path, tag, LABELS, "t.npy"))
    found = load_data(tmp_path / "data.yaml", "val")[0]["segmentation"]
    assert np.array_equal(found.numpy(), upright(LABELS, tag))
    resized = load_data(dataset(tmp_path, tag, LABELS, resized=1), "val")[0]["segmentation"].numpy()
    rows, columns = ((np.arange(12) + 0.5) * W / 12).astype(int), ((np.arange(12) + 0.5) * H / 12).astype(int)
    assert np.array_equal(resized, upright(LABELS, tag)[np.ix_(rows, columns)])
    manifest = read_manifest(tmp_path / "data.yaml")
    assert check(manifest).problems == [] and contact_sheet(manifest, images=1).width > 0


@pytest.mark.parametrize("tag", [5, 6, 7, 8])
def test_a_target_of_the_upright_size_stays(tag: int, tmp_path: Path) -> None:
    assert agree(dataset(tmp_path, tag, upright(LABELS, tag)))


@pytest.mark.parametrize("tag", [5, 6, 7, 8])
def test_a_target_of_half_the_size_is_turned_by_its_proportions(tag: int, tmp_path: Path) -> None:
    half = np.ascontiguousarray(LABELS[::2, ::2])
    for made in (half, upright(half, tag)):
        found = load_data(dataset(tmp_path, tag, made), "val", size=(W // 2, H // 2))[0]["segmentation"]
        assert np.array_equal(found.numpy(), upright(half, tag))


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_target_with_a_tag_of_its_own_is_turned_by_it(tag: int, tmp_path: Path) -> None:
    assert agree(dataset(tmp_path, tag, LABELS, own=tag))
    assert agree(dataset(tmp_path, tag, np.ascontiguousarray(upright(LABELS, tag)), own=1))


@pytest.mark.parametrize("resized", [0, 1])
@pytest.mark.parametrize("tag", [2, 3, 4])
def test_where_the_size_does_not_tell_the_target_is_refused(tag: int, resized: int, tmp_path: Path) -> None:
    path = dataset(tmp_path, tag, LABELS, resized=resized)
    with pytest.raises(InputError, match=rf"t\.png has no EXIF orientation, but its image .*\(orientation {tag}\)"):
        load_data(path, "val")[0]
    (problem,) = (p for p in check(read_manifest(path)).problems if "EXIF" in p)
    assert "Save the image upright without the tag" in problem


@pytest.mark.parametrize("shape", [(7, 7), (3, 8)])
def test_squares_and_other_proportions_are_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    path = dataset(tmp_path, 6, np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match="their sizes do not show"):
        load_data(path, "val", size=(8, 6))[0]


def test_an_image_without_a_tag_changes_nothing(tmp_path: Path) -> None:
    assert agree(dataset(tmp_path, 1, LABELS))


@pytest.mark.parametrize(("tag", "signs"), [(1, (1, 1, 1)), (2, (-1, 1, 1)), (3, (-1, -1, 1)), (4, (1, -1, 1))])
def test_normals_are_mirrored_with_their_map(tag: int, signs: tuple[int, ...], tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
    Image.fromarray(stored).save(tmp_path / "plain.png")
    Image.fromarray(stored).save(tmp_path / "n.png", exif=exif(tag))
    plain = Stored(Task("normals")).read(tmp_path / "plain.png").numpy()
    found = Stored(Task("normals")).read(tmp_path / "n.png").numpy()
    wanted = np.stack([sign * upright(plane, tag) for sign, plane in zip(signs, plain, strict=True)])
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("tag", [5, 6, 7, 8])
def test_normals_are_not_turned_by_a_quarter(tag: int, tmp_path: Path) -> None:
    normals = np.zeros((H, W, 3), np.float32)
    normals[..., 2] = 1
    with pytest.raises(InputError, match=rf"normals and flow cannot be turned by a quarter \(EXIF orientation {tag}\)"):
        load_data(dataset(tmp_path, tag, normals, "n.npy", "normals"), "val")[0]
    upright_ones = np.ascontiguousarray(normals.swapaxes(0, 1))
    found = load_data(dataset(tmp_path, tag, upright_ones, "n.npy", "normals"), "val")[0]["normals"]
    assert torch.equal(found[2], torch.ones(W, H))
