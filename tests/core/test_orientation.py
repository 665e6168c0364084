"""All eight EXIF orientations, in files and in Pillow's images."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simomerge.core.images import read_image, to_tensor
from simomerge.core.orientation import orientation, turned
from simomerge.core.pixels import read_pixels

from .pictures import GREY, RGB, upright, write_png

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def exif(tag: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = tag
    return found


@pytest.mark.parametrize("tag", range(1, 9))
def test_arrays_are_turned_as_the_standard_says(tag: int) -> None:
    assert np.array_equal(turned(PIXELS, tag), upright(PIXELS, tag))


@pytest.mark.parametrize("tag", [None, 0, 9, "6"])
def test_without_a_known_tag_nothing_is_turned(tag: object) -> None:
    assert turned(PIXELS, tag) is not None and np.array_equal(turned(PIXELS, tag), PIXELS)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_files_and_pillow_images_are_turned(tag: int, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(PIXELS).save(path, exif=exif(tag), **({"lossless": True} if suffix == "webp" else {}))
    wanted = upright(PIXELS, tag)
    assert orientation(path) == tag
    assert np.array_equal(read_image(path), wanted) and np.array_equal(read_pixels(path), wanted)
    with Image.open(path) as image:
        assert np.array_equal(to_tensor(image)[0].permute(1, 2, 0).numpy() * 255, wanted)


@pytest.mark.parametrize("tag", range(1, 9))
def test_jpeg_photos_are_turned_as_pillow_turns_them(tag: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, exif=exif(tag), quality=95)
    with Image.open(path) as image:
        stored = np.asarray(image)
    assert np.array_equal(read_image(path), upright(stored, tag)) and orientation(path) == tag


@pytest.mark.parametrize(("bits", "colour", "shape"), [(2, GREY, (5, 7)), (16, GREY, (5, 7)), (16, RGB, (5, 7, 3))])
@pytest.mark.parametrize("tag", range(1, 9))
def test_a_tag_behind_the_pixels_counts(
    tag: int, bits: int, colour: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = np.random.default_rng(1).integers(0, 2**bits, shape)
    entry = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, tag, 0, 0)
    path = write_png(tmp_path / "a.png", values, bits, colour, late=(b"eXIf", entry))
    assert orientation(path) == tag
    assert np.array_equal(read_pixels(path), upright(values, tag))
    assert read_image(path).shape[:2] == upright(values, tag).shape[:2]


def test_other_files_have_no_orientation(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    (tmp_path / "a.png").write_text("no picture")
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    for name in ("a.npy", "a.png", "b.png", "gone.png"):
        assert orientation(tmp_path / name) is None


def test_a_changed_file_is_looked_at_again(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.png"
    for date, tag in enumerate((6, 3)):
        Image.fromarray(PIXELS).save(path, exif=exif(tag))
        os.utime(path, (date, date))
        assert orientation(path) == tag
