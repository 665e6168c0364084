"""What a browser may send: limits in bytes and pixels, and three formats only, whatever a file is called."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.playground import uploads
from simomerge.playground.uploads import MAX_PICTURES, read_photo, read_pictures


def saved(path: Path, height: int = 30, width: int = 40, kind: str = "PNG") -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)
    return path


def bomb(path: Path, side: int) -> Path:
    """A PNG file of a few bytes that says it has ``side`` times ``side`` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    return path


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_three_formats_are_read_whatever_their_name(tmp_path: Path, kind: str) -> None:
    assert read_photo(saved(tmp_path / "photo.bin", kind=kind)).shape == (30, 40, 3)


def test_a_small_png_is_read_exactly_and_a_large_one_reduced(tmp_path: Path) -> None:
    small = saved(tmp_path / "small.png")
    np.testing.assert_array_equal(read_photo(small), np.asarray(Image.open(small)))
    assert read_photo(saved(tmp_path / "large.png", 900, 1800)).shape == (320, 640, 3)


REFUSED = {
    "page.png": (b"<html><script>alert(1)</script></html>", "page.png is not a JPEG, PNG or WebP picture"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.svg is not a JPEG"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "program.eps is not a JPEG"),
    "empty.jpg": (b"", "empty.jpg is not a JPEG"),
    "cut.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "cut.png: cannot be read as an image"),
    "noise.jpg": (b"\xff\xd8\xff" + bytes(range(256)) * 9, "noise.jpg: cannot be read as an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_without_the_servers_path(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_photo(tmp_path / name)
    assert str(caught.value).startswith(message) and str(tmp_path) not in str(caught.value)


def test_a_file_that_was_removed_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^photo\.png is no longer on the server; give it again\.$"):
        read_photo(tmp_path / "photo.png")


@pytest.mark.parametrize(
    ("side", "message"), [(9_000, "images may have 1 to 64 million pixels"), (60_000, "exceeds limit")]
)
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, side: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_photo(bomb(tmp_path / "bomb.png", side))
    assert str(tmp_path) not in str(caught.value)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(1_000_000_000)  # a hole, which takes no space
    with pytest.raises(InputError, match=r"huge.png has 1000 MB; give a picture of at most 20 MB"):
        read_photo(path)


def test_a_picture_is_decoded_again_only_if_its_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, decoded = uploads.read_image, list[str]()
    monkeypatch.setattr(uploads, "read_image", lambda path, *most: decoded.append(path.name) or read(path, *most))
    paths = [saved(tmp_path / "a.png"), saved(tmp_path / "b.png", 20)]
    first = read_pictures(paths)
    for one, other in zip(read_pictures(paths), first, strict=True):
        np.testing.assert_array_equal(one, other)
    assert decoded == ["a.png", "b.png"]
    Image.fromarray(np.full((30, 40, 3), 7, np.uint8)).save(paths[0])
    assert np.all(read_photo(paths[0]) == 7) and decoded == ["a.png", "b.png", "a.png"]


def test_the_pictures_that_are_kept_are_limited() -> None:
    assert MAX_PICTURES < uploads._decoded.cache_info().maxsize <= 300


def test_names_in_messages_are_short_and_have_no_folders(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"^passwd is not a JPEG"):
        read_photo(tmp_path / "x", "..\\..\\etc/passwd")


def test_more_pictures_than_a_fold_uses_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png")
    assert len(read_pictures([path] * 3)) == 3
    monkeypatch.setattr(uploads, "MAX_PICTURES", 2)
    with pytest.raises(InputError, match="3 pictures; give at most 2"):
        read_pictures([path] * 3)
