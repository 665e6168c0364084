"""Datasets at URLs are those of the same files on a disk."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.core.remote import RemoteError, local_copy
from simomerge.datasets.load import data_name, find_manifest, load_data, load_images
from simomerge.datasets.pictures import as_images

COUNT = 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A manifest, its images and tar files of them on the disk, and the same at memory://bucket."""
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "cache"))
    local_copy.cache_clear()
    made, rng = tmp_path / "mine", np.random.default_rng(0)
    for name in ("robot/images", "robot/depth", "tars"):
        (made / name).mkdir(parents=True)
    for index in range(COUNT):
        image = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))
        image.save(made / f"robot/images/{index}.png")
        np.save(made / f"robot/depth/{index}.npy", rng.uniform(1, 9, (16, 24)).astype(np.float32))
        with tarfile.open(made / f"tars/{index // 4}.tar", "a") as opened:
            member, content = tarfile.TarInfo(f"{index}.png"), (made / f"robot/images/{index}.png").read_bytes()
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    rows = (f"images/{index}.png,{'test' if index < 4 else 'val'},depth/{index}.npy" for index in range(COUNT))
    (made / "robot" / "data.csv").write_text("\n".join(["image,split,depth", *rows]))
    memory = fsspec.filesystem("memory")
    memory.put(str(made), "/bucket", recursive=True)
    yield made
    memory.rm("/bucket", recursive=True)
    local_copy.cache_clear()


@pytest.mark.parametrize("name", ["robot", "robot/data.csv"])
def test_a_manifest(folder: Path, name: str) -> None:
    found, expected = (load_data(f"{place}/{name}", "test") for place in ("memory://bucket", folder))
    assert len(found) == len(expected) == 4
    for index in range(4):
        for key, value in expected[index].items():
            assert torch.equal(found[index][key], value)
    assert len(find_manifest(f"memory://bucket/{name}").rows["val"]) == 2
    assert data_name("memory://bucket/robot") == data_name("memory://bucket/robot/data.csv") == "robot"


def test_the_content_is_the_same_on_all_machines(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prints() -> list[str]:
        local_copy.cache_clear()
        images = [as_images(load_images(f"memory://bucket/{name}")) for name in ("robot/images", "tars")]
        return [load_data("memory://bucket/robot", "test").fingerprint(), *(each.fingerprint() for each in images)]

    first = prints()
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "another" / "machine"))
    assert prints() == first
    memory = fsspec.filesystem("memory")
    for name in ("robot/depth/0.npy", "robot/images/0.png", "tars/0.tar"):
        memory.pipe_file(f"/bucket/{name}", memory.cat_file(f"/bucket/{name}"))  # written again
    assert not set(prints()) & set(first)


def test_pictures_in_a_folder(folder: Path) -> None:
    found, expected = as_images(load_images("memory://bucket/robot/images")), as_images(folder / "robot" / "images")
    assert len(found) == COUNT and all(torch.equal(found.image(i), expected.image(i)) for i in range(COUNT))
    assert found.group(0) == found.group(5)


@pytest.mark.parametrize(("name", "count"), [("tars", COUNT), ("tars/1.tar", 2)])
def test_tar_files_are_read_where_they_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    found, expected = as_images(load_images(f"memory://bucket/{name}")), as_images(folder / name)
    assert len(found) == len(expected) == count
    assert all(torch.equal(found.image(i), expected.image(i)) for i in range(count))
    assert found.name(count - 1) == f"memory://bucket/{'tars/1.tar' if count == 6 else name}, picture 2"
    assert not (tmp_path / "cache" / "urls").exists()

    def unread(*_: Any, **__: Any) -> None:
        raise AssertionError("a tar file is looked through once")

    monkeypatch.setattr(MemoryFileSystem, "open", unread)
    assert len(as_images(load_images(f"memory://bucket/{name}"))) == count


def test_damaged_places_of_pictures_are_found_again(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert len(as_images(load_images("memory://bucket/tars"))) == COUNT
        kept = list((tmp_path / "cache" / "tars").iterdir())
        assert len(kept) == 2
        for number, file in enumerate(kept):
            os.truncate(file, 100 * (number == 0))


def test_a_picture_that_the_network_does_not_give_is_no_broken_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = as_images(load_images("memory://bucket/tars"))

    def expired(*_: Any, **__: Any) -> None:
        raise PermissionError("the token has expired")

    assert images.try_image(0) is not None  # so that not all pictures fail
    monkeypatch.setattr(MemoryFileSystem, "cat_file", expired)
    with pytest.raises(RemoteError, match=r"^memory://bucket/tars/0\.tar: access is denied \(the token has expired\)"):
        images.readable()


def test_errors_name_the_url(folder: Path) -> None:
    with pytest.raises(InputError, match=r"memory://bucket/tars is a folder of pictures and has no splits"):
        load_images("memory://bucket/tars", "val")
    with pytest.raises(InputError, match=r"memory://bucket/nowhere: there is no such"):
        load_data("memory://bucket/nowhere")
    with pytest.raises(InputError, match=r"memory://bucket/nyuv2: there is no such"):
        load_data("nyuv2:memory://bucket/nyuv2")
    fsspec.filesystem("memory").pipe_file("/bucket/broken/0.tar", b"x" * 2000)
    with pytest.raises(InputError, match=r"memory://bucket/broken/0\.tar: cannot be read as an uncompressed tar file"):
        load_images("memory://bucket/broken")
