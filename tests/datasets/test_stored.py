"""Targets in files of every depth, values that are not finite, and findings of the check that repeat themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.datasets.check import check
from simomerge.datasets.manifest import read_manifest
from simomerge.datasets.stored import Stored
from simomerge.datasets.tasks import Task

PARTS = Task("parts", "segmentation", classes=("a", "b", "c", "d"))
H, W = 6, 8


def write_grey(path: Path, values: np.ndarray, bits: int) -> Path:
    """A PNG of grey, which Pillow writes with few bits only for palettes, so the pixels are packed here."""
    import struct
    import zlib

    rows = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :].reshape(values.shape[0], -1)
    lines = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_is_labels_maps_and_depth(bits: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, min(2**bits, 4), (H, W))
    path = write_grey(tmp_path / "a.png", values, bits)
    assert np.array_equal(Stored(PARTS, ignore=(255.0,)).read(path).numpy(), values)
    largest = 2**bits - 1
    np.testing.assert_allclose(Stored(Task("texture")).read(path).numpy()[0], values / largest, rtol=1e-6)
    np.testing.assert_allclose(Stored(Task("texture"), 0.25).read(path).numpy()[0], values / 4, rtol=1e-6)
    np.testing.assert_allclose(Stored(Task("depth"), 0.5).read(path).numpy()[0], values / 2, rtol=1e-6)


def test_transparency_of_grey_and_colours_is_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    both = np.stack([rng.integers(0, 4, (H, W)), rng.integers(0, 256, (H, W))], -1).astype(np.uint8)
    Image.fromarray(both, "LA").save(tmp_path / "a.png")
    assert np.array_equal(Stored(PARTS).read(tmp_path / "a.png").numpy(), both[..., 0])
    np.save(tmp_path / "a.npy", both)
    with pytest.raises(InputError, match=r"parts of shape \(6, 8, 2\); give \(H, W\)"):
        Stored(PARTS).read(tmp_path / "a.npy")


def test_normals_that_were_packed_into_a_palette_are_colours(tmp_path: Path) -> None:
    colours = np.array([[255, 128, 128], [128, 255, 128], [128, 128, 255]], np.uint8)
    stored = colours[np.random.default_rng(0).integers(0, 3, (H, W))]
    Image.fromarray(stored).save(tmp_path / "a.png")
    Image.fromarray(stored).quantize(3).save(tmp_path / "b.png")
    plain, packed = (Stored(Task("normals")).read(tmp_path / name) for name in ("a.png", "b.png"))
    assert torch.equal(plain, packed)
    (tmp_path / "data.yaml").write_text("images: [{image: a.png, normals: b.png}]\ntasks: {normals: {}}\n")
    assert check(read_manifest(tmp_path / "data.yaml")).problems == []


def in_palette(path: Path, indices: list[int], greys: list[int]) -> Path:
    image = Image.fromarray(np.array([indices], np.uint8), "P")
    image.putpalette([value for grey in greys for value in (grey,) * 3])
    image.save(path)
    return path


def test_labels_in_a_palette_of_greys_are_greys_or_indices_whichever_are_labels(tmp_path: Path) -> None:
    indices = in_palette(tmp_path / "indices.png", [0, 1, 1], [0, 255])
    greys = in_palette(tmp_path / "greys.png", [0, 1, 1], [0, 2])
    assert Stored(PARTS).read(indices).tolist() == [[0, 1, 1]]
    with pytest.raises(InputError, match="greys of its palette are labels of parts, and so are its indices"):
        Stored(PARTS).read(greys)
    with pytest.raises(InputError, match="greys of its palette are labels"):
        Stored(PARTS, ignore=(255.0,)).read(indices)
    unordered = in_palette(tmp_path / "unordered.png", [0, 1, 2], [0, 2, 1])
    assert Stored(PARTS).read(unordered).tolist() == [[0, 2, 1]]
    only_greys = in_palette(tmp_path / "only.png", [3, 4, 5], [9, 9, 9, 0, 2, 1])
    assert Stored(PARTS).read(only_greys).tolist() == [[0, 2, 1]]


# Not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_vector_with_a_part_that_is_not_finite_does_not_count(bad: float, part: int, tmp_path: Path) -> None:
    normals = np.full((2, 2, 3), 3**-0.5, np.float32)
    normals[0, 1, part] = bad
    np.save(tmp_path / "n.npy", normals)
    task = Task("normals")
    found = Stored(task).read(tmp_path / "n.npy")
    assert found[:, 0, 1].tolist() == [0, 0, 0]
    assert task.valid(found[None])[0].tolist() == [[True, False], [True, True]]
    np.save(tmp_path / "n.npy", np.abs(normals))
    image = Task("autoencoder")
    found = Stored(image).read(tmp_path / "n.npy")
    assert found[:, 0, 1].isnan().all() and found.isnan().sum() == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["depth", "disparity", "log_depth", "edges", "texture", "keypoints"])
def test_a_value_that_is_not_finite_does_not_count(kind: str, bad: float, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0.5, bad]], np.float32))
    task = Task(kind)
    assert task.valid(Stored(task).read(tmp_path / "a.npy")[None]).flatten().tolist() == [True, False]


# The check ----------------------------------------------------------------------------------------------


def test_findings_that_repeat_themselves_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (H, W, 3), np.uint8)).save(tmp_path / f"{index}.png")
        labels = np.full((H, W), 200 + index if index < 9 else 3, np.uint8)
        Image.fromarray(labels).save(tmp_path / f"parts{index}.png")
        np.save(tmp_path / f"d{index}.npy", np.ones((H, W) if index else (H, W + 1), np.float32))
        rows.append(f"{index}.png,parts{index}.png,d{index}.npy")
    (tmp_path / "x.csv").write_text("image,parts,depth\n" + "\n".join(rows) + "\n")
    (tmp_path / "data.yaml").write_text(
        "images: x.csv\ntasks: {parts: {kind: segmentation, classes: [a, b, c, d]}, depth: {}}\n"
    )
    problems = check(read_manifest(tmp_path / "data.yaml")).problems
    assert len(problems) == 3, problems
    (many,) = (problem for problem in problems if "label" in problem)
    assert "parts0.png: label 200 of parts" in many and many.endswith(" This is the first of 9 such files.")
    (one,) = (problem for problem in problems if "d0.npy" in problem)
    assert one.endswith("d0.npy is 9 x 6 pixels, its image 8 x 6.")


@pytest.mark.parametrize(("kind", "shape"), [("normals", (2, 2, 3)), ("edges", (2, 2))])
def test_signed_integers_that_encode_values_are_refused(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Their range is unknown: 255 could be 1 or 255. Those within the values of the task are read as they are."""
    values = np.full(shape, 255, np.int64)
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(InputError, match=rf"a\.npy: {kind} holds signed integers \(int64\) above 1\. Save it as uint8"):
        Stored(Task(kind)).read(tmp_path / "a.npy")
    assert Stored(Task(kind), scale=1 / 255).read(tmp_path / "a.npy").max() <= 1
    np.save(tmp_path / "a.npy", np.minimum(values, 1))
    assert Stored(Task(kind)).read(tmp_path / "a.npy").max() == pytest.approx(1 if kind == "edges" else 3**-0.5)
