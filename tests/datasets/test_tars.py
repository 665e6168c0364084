"""Pictures in tar files are those of a folder; damaged files are named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.datasets.groups import held_out
from simomerge.datasets.pictures import as_images, image_batches


def write(folder: Path, tars: Path, count: int = 12, per_tar: int = 4) -> None:
    """Pictures in a folder, and the same in tar files next to what WebDataset adds to them."""
    folder.mkdir()
    tars.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))
        picture.save(folder / f"{index:04}.png")
        with tarfile.open(tars / f"{index // per_tar:03}.tar", "a") as opened:
            for name, content in (
                (f"{index:04}.png", (folder / f"{index:04}.png").read_bytes()),
                (f"{index:04}.json", b"{}"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))


def test_a_tar_file_has_the_pictures_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "folder", tmp_path / "tars")
    expected, found = (as_images(tmp_path / name) for name in ("folder", "tars"))
    assert len(found) == len(expected) == 12
    for index in range(12):
        assert torch.equal(found.image(index), expected.image(index))
    some = as_images(tmp_path / "tars", count=3, size=(8, 8))
    assert some.image(1).shape == (3, 8, 8) and some.name(2).endswith("002.tar, picture 4")
    assert found.group(3) != found.group(4) == found.group(7)
    assert len(as_images(tmp_path / "tars" / "001.tar")) == 4
    assert (
        found.fingerprint() != some.fingerprint() and found.fingerprint() == as_images(tmp_path / "tars").fingerprint()
    )


def test_whole_tar_files_are_held_out(tmp_path: Path) -> None:
    write(tmp_path / "folder", tmp_path / "tars", 32)
    images = as_images(tmp_path / "tars")
    out = held_out(images)
    assert out and len({images.group(index) for index in out}) == len(out) / 4


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "folder", tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "003.tar", "w") as opened:
        member = tarfile.TarInfo("broken.jpg")
        member.size = 9
        opened.addfile(member, io.BytesIO(b"no image."))
    with pytest.warns(UserWarning, match=r"1 of 13 images cannot be read .*003.tar, picture 1"):
        assert sum(len(indices) for indices, _ in image_batches(as_images(tmp_path / "tars"))) == 12


def test_a_truncated_picture_is_left_out_and_named(tmp_path: Path) -> None:
    """Its first bytes look right: only decoding finds it."""
    write(tmp_path / "folder", tmp_path / "tars")
    content = (tmp_path / "folder" / "0000.png").read_bytes()
    with tarfile.open(tmp_path / "tars" / "003.tar", "w") as opened:
        member = tarfile.TarInfo("half.png")
        member.size = len(content) // 2
        opened.addfile(member, io.BytesIO(content[: member.size]))
    images = as_images(tmp_path / "tars")
    with pytest.raises(InputError, match=r"003\.tar, picture 1: cannot be read as an image \(.*truncated"):
        images.image(12)
    with pytest.warns(UserWarning, match=r"1 of 13 images cannot be read .*003.tar, picture 1"):
        assert sum(len(indices) for indices, _ in image_batches(images)) == 12
    with pytest.warns(UserWarning, match=r"1 of 13 images cannot be read .*003.tar, picture 1"):
        assert len(images.readable()) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 2000, "cannot be read as an uncompressed tar file"),
        (None, "truncated|cannot be read"),
        (b"", "no picture"),
    ],
)
def test_a_damaged_tar_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    write(tmp_path / "folder", tmp_path / "tars", 4)
    file = tmp_path / "tars" / "000.tar"
    if content == b"":
        tarfile.open(file, "w").close()
    else:
        file.write_bytes(file.read_bytes()[:900] if content is None else content)
    with pytest.raises(InputError, match=message):
        as_images(tmp_path / "tars")
