"""Targets of masks, optical flow, albedo and regressions: how files store them, and what turns with the image."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.datasets.augment import scale_crop
from simomerge.datasets.base import random_flip
from simomerge.datasets.manifest import read_manifest
from simomerge.datasets.stored import Stored, may_be_truncated
from simomerge.datasets.tasks import Task

FLOW, MASK = Stored(Task("flow")), Stored(Task("mask", "binary"))
VECTORS = np.array([[[1.5, -2.0], [0.0, 0.25]], [[-8.0, 4.0], [3.0, 3.0]], [[0.5, 1.0], [2.0, -0.5]]], np.float32)


def saved(path: Path, values: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


# Masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0, 1, 1], [0, 255, 255], [0, 65535, 0], [0, 0, 0], [1, 1, 1]])
def test_masks_are_zero_and_one_or_zero_and_the_largest_value(tmp_path: Path, values: list[int]) -> None:
    array = np.array([values], np.uint16 if 65535 in values else np.uint8)
    for file in (saved(tmp_path / "mask.npy", array), saved(tmp_path / "mask.png", array)):
        assert MASK.read(file).tolist() == [[[float(value > 0) for value in values]]]


def test_masks_of_one_bit_are_read(tmp_path: Path) -> None:
    array = np.array([[True, False, True]])
    for file in (saved(tmp_path / "mask.npy", array), saved(tmp_path / "mask.png", array)):
        assert MASK.read(file).tolist() == [[[1, 0, 1]]]


def test_masks_with_other_values_are_refused_unless_they_are_named(tmp_path: Path) -> None:
    file = saved(tmp_path / "mask.png", np.array([[0, 128, 255]], np.uint8))
    with pytest.raises(InputError, match=r"binary mask with the values 0, 128, 255; .* Name others under ignore"):
        MASK.read(file)
    assert Stored(MASK.task, ignore=(128,)).read(file).tolist() == [[[0, -1, 1]]]
    assert Stored(MASK.task, scale=1 / 255).read(file).flatten().tolist() == pytest.approx([0, 128 / 255, 1])
    with pytest.raises(InputError, match="binary mask with the values 1, 255"):  # 255 may mark unknown pixels
        MASK.read(saved(tmp_path / "void.png", np.array([[1, 255]], np.uint8)))
    with pytest.raises(InputError, match="binary mask with the values 0, 7"):
        MASK.read(saved(tmp_path / "seven.png", np.array([[0, 7]], np.uint8)))
    floats = saved(tmp_path / "mask.npy", np.array([[0.0, 1.0, np.nan, 0.5]], np.float32))
    assert MASK.read(floats).tolist() == [[[0, 1, -1, 0.5]]]


# Flow ---------------------------------------------------------------------------------------------------


def flo(path: Path, vectors: np.ndarray) -> Path:
    """Middlebury's format, written from its description: the tag, width, height, then x and y by rows."""
    height, width = vectors.shape[:2]
    path.write_bytes(b"PIEH" + np.array([width, height], "<i4").tobytes() + vectors.astype("<f4").tobytes())
    return path


def kitti(path: Path, vectors: np.ndarray, known: np.ndarray) -> Path:
    """KITTI's format: a PNG of 16 bits with 64 x + 2^15, 64 y + 2^15, and whether the vector is known."""
    values = np.concatenate([vectors * 64 + 2**15, known[..., None]], -1).astype(">u2")
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    chunks = [(b"IHDR", header), (b"IDAT", lines), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_flow_files_of_all_formats_hold_the_same_vectors(tmp_path: Path) -> None:
    files = [
        flo(tmp_path / "a.flo", VECTORS),
        saved(tmp_path / "a.npy", VECTORS),
        kitti(tmp_path / "kitti.png", VECTORS, np.ones((3, 2))),
    ]
    wide = np.concatenate([VECTORS, VECTORS, VECTORS], 1)
    files.append(saved(tmp_path / "planes.npy", wide.transpose(2, 0, 1)))
    for file in files:
        read = FLOW.read(file)[..., :2]
        torch.testing.assert_close(read, torch.from_numpy(VECTORS).permute(2, 0, 1), rtol=0, atol=0)
        assert not may_be_truncated(file)


def test_unknown_vectors_do_not_count(tmp_path: Path) -> None:
    vectors = VECTORS.copy()
    vectors[0, 1, 0], vectors[2, 0] = 1e10, np.nan
    assert torch.isnan(FLOW.read(flo(tmp_path / "a.flo", vectors))).sum((1, 2)).tolist() == [2, 2]
    read = FLOW.read(kitti(tmp_path / "kitti.png", VECTORS, np.array([[0, 1]] * 3)))
    assert torch.isnan(read).tolist() == [[[True, False]] * 3] * 2


def test_flow_is_in_pixels_of_the_image_as_it_is_read(tmp_path: Path) -> None:
    read = FLOW.read(flo(tmp_path / "a.flo", VECTORS), size=(6, 6))  # twice as high, three times as wide
    assert read[:, 0, 0].tolist() == [3 * 1.5, 2 * -2.0] and read[:, 5, 5].tolist() == [3 * 2.0, 2 * -0.5]


def test_a_mirror_image_and_a_longer_lens_change_vectors() -> None:
    sample = {"image": torch.rand(3, 4, 6), "flow": torch.rand(2, 4, 6), "albedo": torch.rand(3, 4, 6)}
    tasks = {"flow": Task("flow"), "albedo": Task("albedo")}

    class Always:
        def random(self) -> float:
            return 0.9

    flipped = random_flip(tasks, sample, Always())  # type: ignore[arg-type]
    assert torch.equal(flipped["flow"][0], -sample["flow"][0].flip(-1))
    assert torch.equal(flipped["flow"][1], sample["flow"][1].flip(-1))
    assert torch.equal(flipped["albedo"], sample["albedo"].flip(-1))
    larger = scale_crop(tasks, sample, (8, 12), (0, 0))
    assert torch.equal(larger["flow"][:, 0, 0], 2 * sample["flow"][:, 0, 0])
    assert torch.equal(larger["albedo"][:, 0, 0], sample["albedo"][:, 0, 0])


@pytest.mark.parametrize("shape", [(2, 3), (4, 3, 3), (5, 3, 4)])
def test_flow_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"flow of shape .*; give \(H, W, 2\)"):
        FLOW.read(saved(tmp_path / "a.npy", np.zeros(shape, np.float32)))


def test_a_truncated_flow_file_is_named(tmp_path: Path) -> None:
    file = flo(tmp_path / "a.flo", VECTORS)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"a\.flo: cannot be read \(the file is truncated\)"):
        FLOW.read(file)


# Albedo and regressions ---------------------------------------------------------------------------------


def test_albedo_is_a_colour_from_zero_to_one(tmp_path: Path) -> None:
    colours = np.array([[[0, 51, 255], [255, 0, 0]]], np.uint8)
    read = Stored(Task("albedo"), ignore=(0,)).read(saved(tmp_path / "a.png", colours))
    assert read[:, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert not torch.isnan(read).any()
    black = Stored(Task("albedo"), ignore=(0,)).read(saved(tmp_path / "b.png", np.zeros_like(colours)))
    assert torch.isnan(black).all()


def test_a_regression_is_read_as_stored_times_scale(tmp_path: Path) -> None:
    heights = saved(tmp_path / "h.png", np.array([[0, 300, 65535]], np.uint16))
    task = Task("height", "regression", unit="m")
    assert Stored(task, 0.01, (65535,)).read(heights)[0, 0, :2].tolist() == pytest.approx([0, 3])
    assert torch.isnan(Stored(task, 0.01, (65535,)).read(heights)[0, 0, 2])
    five = np.arange(30, dtype=np.float32).reshape(2, 3, 5)
    five[1, 1, 4] = np.inf
    read = Stored(Task("spectrum", "regression", channels=5)).read(saved(tmp_path / "five.npy", five))
    assert read.shape == (5, 2, 3) and read[:, 0, 1].tolist() == [5, 6, 7, 8, 9]
    assert torch.isnan(read[:, 1, 1]).all() and torch.isfinite(read).sum() == 25


def test_a_manifest_describes_a_regression(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    text = "images: [{image: a.png, wind: a.npy}]\ntasks:\n  wind: {%s}\n"
    file.write_text(text % "kind: regression, channels: 2, unit: m/s, range: [-30, 30], norm: l2")
    (stored,) = read_manifest(file).tasks
    assert stored.task == Task("wind", "regression", channels=2, unit="m/s", range=(-30, 30), norm="l2")
    for wrong, message in (
        ("kind: regression, norm: l5", "norm 'l5'; use l1 or l2"),
        ("kind: regression, range: [3]", r"range .*3.*; give \[lowest, highest\]"),
        ("kind: depth, unit: km", "unit is a setting of the kind regression, not of depth"),
        ("kind: regression, chanels: 2", "unknown key 'chanels'; did you mean 'channels'"),
    ):
        file.write_text(text % wrong)
        with pytest.raises(InputError, match=message):
            read_manifest(file)
