"""Values of pictures as their files hold them: PNG of every depth and kind, TIFF, PFM and PPM."""

from __future__ import annotations

import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.core.images import check_image, read_image, to_tensor
from simomerge.core.pixels import largest_value, read_pfm, read_pixels

from .pictures import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, upright, write_png

H, W = 9, 13
KINDS = [
    *((bits, GREY) for bits in (1, 2, 4, 8, 16)),
    *((bits, PALETTE) for bits in (1, 2, 4, 8)),
    *((bits, kind) for bits in (8, 16) for kind in (RGB, GREY_ALPHA, RGBA)),
]
CHANNELS = {RGB: 3, GREY_ALPHA: 2, RGBA: 4}


def random(bits: int, colour: int, seed: int = 0) -> np.ndarray:
    shape = (H, W, CHANNELS[colour]) if colour in CHANNELS else (H, W)
    return np.random.default_rng(seed).integers(0, 2**bits, shape)


# PNG ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "colour"), KINDS)
def test_every_kind_of_png_gives_what_it_stores(bits: int, colour: int, interlaced: bool, tmp_path: Path) -> None:
    values = random(bits, colour)
    palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3)) if colour == PALETTE else None
    path = write_png(tmp_path / "a.png", values, bits, colour, palette, interlaced)
    found = read_pixels(path)
    wanted = values[..., 0] if colour == GREY_ALPHA else values
    assert found.dtype == (bool if (bits, colour) == (1, GREY) else np.uint16 if bits == 16 else np.uint8)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(("bits", "colour"), KINDS)
def test_every_kind_of_png_is_an_image(bits: int, colour: int, tmp_path: Path) -> None:
    values = random(bits, colour)
    palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3)) if colour == PALETTE else None
    path = write_png(tmp_path / "a.png", values, bits, colour, palette)
    if palette is not None:
        wanted = palette[values]
    else:
        grey = values if colour == GREY else values[..., 0]
        shown = values[..., :3] if colour in (RGB, RGBA) else np.stack([grey] * 3, -1)
        wanted = np.rint(shown * (255 / (2**bits - 1)))
    found = read_image(path)
    assert found.dtype == np.uint8 and np.array_equal(found, wanted)
    assert np.array_equal(to_tensor(path)[0].permute(1, 2, 0).numpy(), found.astype(np.float32) / 255)


@pytest.mark.parametrize(("bits", "largest"), [(1, 1), (2, 3), (4, 15), (8, 255), (16, 65535)])
def test_the_largest_value_is_that_of_the_bits(bits: int, largest: int, tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", random(bits, GREY), bits, GREY)
    found = read_pixels(path)
    assert found.dtype == bool or largest_value(path, found.dtype) == largest


def test_a_palette_of_greys_is_a_grey_picture(tmp_path: Path) -> None:
    indices, greys = random(2, PALETTE), np.array([0, 7, 3, 100])
    path = write_png(tmp_path / "a.png", indices, 2, PALETTE, np.repeat(greys[:, None], 3, 1))
    assert np.array_equal(read_pixels(path), greys[indices])
    same = write_png(tmp_path / "b.png", indices, 2, PALETTE, np.zeros((4, 3)))  # says nothing of the labels
    assert np.array_equal(read_pixels(same), indices)
    short = write_png(tmp_path / "c.png", indices, 8, PALETTE, np.zeros((1, 3)))  # as some programs leave it out
    assert np.array_equal(read_pixels(short), indices)


def test_colours_of_a_palette_are_given_if_asked_for(tmp_path: Path) -> None:
    indices, palette = random(4, PALETTE), np.random.default_rng(1).integers(0, 256, (16, 3))
    path = write_png(tmp_path / "a.png", indices, 4, PALETTE, palette)
    assert np.array_equal(read_pixels(path, colours=True), palette[indices])


# TIFF ---------------------------------------------------------------------------------------------------


def write_tiff(
    path: Path, values: np.ndarray, order: str = "<", tag: int = 1, deflated: bool = False, **tags: int
) -> Path:
    """A TIFF file of one strip: (H, W) or (H, W, C) of any type. Written from the TIFF 6.0 specification."""
    import zlib

    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if deflated else data
    channels = values.shape[2] if values.ndim == 3 else 1
    form = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries: dict[int, list[int]] = {
        256: [values.shape[1]],
        257: [values.shape[0]],
        258: [8 * values.itemsize] * channels,
        259: [8 if deflated else 1],
        262: [tags.get("photometric", 2 if channels == 3 else 1)],
        273: [8],
        274: [tag],
        277: [channels],
        278: [values.shape[0]],
        279: [len(data)],
        284: [tags.get("planar", 1)],
        339: [form] * channels,
    }
    directory, extra, at = b"", b"", 8 + len(data) + 2 + 12 * len(entries) + 4
    for key, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, extra = struct.pack(f"{order}I", at + len(extra)), extra + packed
        directory += struct.pack(f"{order}HHI", key, 4, len(numbers)) + packed
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(header + data + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + extra)
    return path


def any_values(dtype: str, shape: tuple[int, ...] = (H, W)) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype[0] == "f":
        return rng.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4"])
def test_tiff_of_every_type_gives_what_it_stores(dtype: str, order: str, deflated: bool, tmp_path: Path) -> None:
    values = any_values(dtype)
    path = write_tiff(tmp_path / "a.tif", values, order, deflated=deflated)
    if (dtype, order) == ("u4", ">") and _no_tifffile():
        with pytest.raises(ValueError, match="need the package tifffile"):  # Pillow does not know these
            read_pixels(path)
        return
    found = read_pixels(path)
    assert found.dtype.kind == values.dtype.kind and np.array_equal(found, values)


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_tiff_colours_of_16_bits_are_exact_and_upright(tag: int, order: str, deflated: bool, tmp_path: Path) -> None:
    values = any_values("u2", (H, W, 3))
    path = write_tiff(tmp_path / "a.tif", values, order, tag, deflated)
    assert np.array_equal(read_pixels(path), upright(values, tag))
    assert np.array_equal(read_image(path), np.rint(upright(values, tag) / 257))


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_tiff_is_upright(tag: int, dtype: str, tmp_path: Path) -> None:
    values = any_values(dtype)
    assert np.array_equal(read_pixels(write_tiff(tmp_path / "a.tif", values, tag=tag)), upright(values, tag))


def test_tiff_with_white_as_zero_gives_labels_as_stored_and_images_as_seen(tmp_path: Path) -> None:
    values = any_values("u1")
    path = write_tiff(tmp_path / "a.tif", values, photometric=0)
    assert np.array_equal(read_pixels(path), values)
    assert np.array_equal(read_image(path)[..., 0], 255 - values)


@pytest.mark.parametrize(("dtype", "shape"), [("f4", (H, W, 3)), ("f2", (H, W)), ("f8", (H, W))])
def test_tiff_that_pillow_does_not_know_needs_tifffile(
    dtype: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = any_values(dtype, shape)
    path = write_tiff(tmp_path / "a.tif", values, tag=6)
    if not _no_tifffile():
        assert np.array_equal(read_pixels(path), upright(values, 6))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"need the package tifffile: pip install .*\[pictures\]"):
        read_pixels(path)


def test_planes_of_16_bits_are_never_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, path = any_values("u2", (H, W, 3)), tmp_path / "a.tif"
    if not _no_tifffile():
        import tifffile

        tifffile.imwrite(path, np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")
        assert np.array_equal(read_pixels(path), values)
        assert np.array_equal(read_image(path), np.rint(values / 257))
    write_tiff(path, values, planar=2)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for read in (read_pixels, read_image):
        with pytest.raises(ValueError, match="need the package tifffile"):
            read(path)


def _no_tifffile() -> bool:
    try:
        import tifffile  # noqa: F401
    except ImportError:
        return True
    return False


# Float images ---------------------------------------------------------------------------------------------


def test_float_images_in_0_to_1_are_seen_as_they_are(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)
    wanted = np.stack([np.rint(ramp.astype(np.float64) * 255)] * 3, -1)
    assert np.array_equal(read_image(write_tiff(tmp_path / "a.tif", ramp)), wanted)
    assert np.array_equal(to_tensor(Image.fromarray(ramp))[0, 0].numpy() * 255, wanted[..., 0].astype(np.float32))


@pytest.mark.parametrize("values", [[[0, 255]], [[0.5, np.nan]], [[-1, 1]]])
def test_other_floats_are_no_image(values: list[list[float]], tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.array(values, np.float32))
    with pytest.raises(InputError, match=r"a\.tif: .*floats from .*; images have floats in \[0, 1\]"):
        read_image(path)
    with pytest.raises(InputError, match=r"floats from"):
        to_tensor(Image.fromarray(np.array(values, np.float32)))


def test_integers_of_32_bits_are_no_image_because_their_range_is_unknown(tmp_path: Path) -> None:
    for dtype in ("i4", "u4"):
        path = write_tiff(tmp_path / "a.tif", np.full((H, W), 255, dtype))
        with pytest.raises(InputError, match="whose range is unknown; save it with 8 or 16 bits"):
            read_image(path)
    with pytest.raises(InputError, match="whose range is unknown"):
        to_tensor(Image.fromarray(np.full((H, W), 255, np.int32)))


# PFM, PPM, EXR ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["\n", " ", "\r\n"])
@pytest.mark.parametrize(("order", "scale"), [("<", "-1.0"), (">", "1")])
@pytest.mark.parametrize("shape", [(H, W), (H, W, 3)])
def test_pfm(shape: tuple[int, ...], order: str, scale: str, space: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[0, 0] = np.inf
    kind = "PF" if len(shape) == 3 else "Pf"
    header = f"{kind}{space}{W} {H}{space}{scale}\n".encode()
    path = tmp_path / "a.pfm"
    path.write_bytes(header + values[::-1].astype(f"{order}f4").tobytes())
    assert np.array_equal(read_pfm(path), values) and np.array_equal(read_pixels(path), values)
    check_image(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        read_pfm(path)


@pytest.mark.parametrize("content", [b"PF", b"PF\n3", b"Pf\n" + b"9" * 300])
def test_a_header_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pfm").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.pfm: cannot be read as an image"):
        read_image(tmp_path / "a.pfm")


@pytest.mark.parametrize("largest", [15, 255, 1000, 65535])
def test_ppm_of_other_ranges(largest: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, largest, (H, W), endpoint=True)
    data = values.astype(">u2" if largest > 255 else "u1").tobytes()
    path = tmp_path / "a.pgm"
    path.write_bytes(f"P5\n{W} {H}\n{largest}\n".encode() + data)
    found = read_pixels(path)
    assert found.dtype.kind == "u" and np.array_equal(found, values)
    assert largest_value(path, found.dtype) == largest
    assert np.abs(read_image(path)[..., 0] - values * (255 / largest)).max() <= 0.5 + 1e-9


def test_ppm_colours_of_16_bits_are_refused_as_values(tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    path.write_bytes(f"P6\n{W} {H}\n65535\n".encode() + bytes(6 * H * W))
    with pytest.raises(ValueError, match="PPM colours of 16 bits; save them as PNG or TIFF"):
        read_pixels(path)
    assert read_image(path).shape == (H, W, 3)


class _Exr:
    """What `read_pixels` uses of the package OpenEXR."""

    def __init__(self, channels: dict[str, np.ndarray]) -> None:
        self.held = channels

    def __enter__(self) -> _Exr:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def channels(self) -> dict[str, types.SimpleNamespace]:
        return {name: types.SimpleNamespace(pixels=pixels) for name, pixels in self.held.items()}

    def header(self) -> dict[str, Any]:
        height, width = next(iter(self.held.values())).shape
        return {"dataWindow": (np.array([0, 0]), np.array([width - 1, height - 1]))}


def test_exr_is_read_where_a_package_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.exr"
    path.write_bytes(b"v/1\x01" + bytes(20))
    values = np.random.default_rng(0).random((H, W, 3)).astype(np.float32)

    def package(channels: dict[str, np.ndarray]) -> types.SimpleNamespace:
        return types.SimpleNamespace(File=lambda name, **options: _Exr(channels))

    monkeypatch.setitem(sys.modules, "OpenEXR", package({name: values[..., "RGB".index(name)] for name in "BGR"}))
    assert np.array_equal(read_pixels(path), values)
    monkeypatch.setitem(sys.modules, "OpenEXR", package({"Z": values[..., 0].astype(np.float16)}))
    assert read_pixels(path).dtype == np.float32 and read_pixels(path).shape == (H, W)
    monkeypatch.setitem(sys.modules, "OpenEXR", package({"Y": values[..., 0], "Z": values[..., 0]}))
    with pytest.raises(ValueError, match="its channels are Y, Z; give a file with R, G and B, or with one channel"):
        read_pixels(path)
    monkeypatch.setitem(sys.modules, "OpenEXR", package({"Y": np.broadcast_to(np.float32(0), (9000, 9000))}))
    with pytest.raises(ValueError, match="9000 x 9000 pixels; images may have 1 to 64 million"):
        read_pixels(path)
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(InputError, match=r"a\.exr: .*EXR files need the package OpenEXR: pip install"):
        read_image(path)
