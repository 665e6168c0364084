"""The values in picture files as they are stored: PNG and TIFF of every depth, PFM and EXR.

Pillow reduces colours of 16 bits to 8 bits and spreads grey of 2 and 4 bits over 8 bits. The functions here return what
the file holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.environment import install_command
from simomerge.core.errors import InputError
from simomerge.core.orientation import orientation, turned

OWN_SIZE = "own"
"""The word for keeping the size of every picture."""

MAX_PIXELS = 64_000_000
"""Larger images are refused: the maps of a few tasks at that size would not fit in memory."""
_PFM, _EXR, TIFF_STARTS = (b"PF", b"Pf"), b"v/1\x01", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FLO = b"PIEH"
OTHER_STARTS = (*_PFM, _EXR, _FLO, *TIFF_STARTS)
"""The first bytes of files that Pillow may not know, but `read_pixels` does."""
_SWAPPED = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}
"""Raw modes of compressed TIFF files with the most significant byte first: libtiff has swapped the bytes already."""


def read_pixels(path: Path, colours: bool = False) -> np.ndarray:
    """The values of a picture (H, W) or (H, W, C), in the file's dtype and turned upright by its EXIF tag.

    Grey of 1 bit is bool. Grey of 2 or 4 bits is uint8 with values up to 3 or 15. The transparency of grey is left out.
    Palettes give their indices. A palette of different greys gives the greys, because programs that compress PNG files
    write grey pictures so.

    Args:
        path: the file.
        colours: give the colours (H, W, 3) of a palette, not its indices.

    Raises:
        Exception: the file cannot be read. Pillow raises many kinds of errors for damaged files.
    """
    from PIL import UnidentifiedImageError

    start = _start(path)
    if start.startswith(_PFM):
        return read_pfm(path)
    if start == _FLO:
        return read_flo(path)
    if start == _EXR:
        return _read_exr(path)
    try:
        with opened(path) as image:
            if not (is_misread(image) or _raw_mode(image).startswith("RGBa;16")):
                values = _deep_colours(image, path) if is_deep(image) else _values(image, colours)
                return upright(values, image, path)
    except UnidentifiedImageError:
        if start not in TIFF_STARTS:
            raise
    return _read_tiff(path)


def upright(values: np.ndarray, image: Any, path: Path) -> np.ndarray:
    """Values that Pillow decoded, turned by the EXIF orientation of the file. Pillow turns TIFF files itself."""
    return values if image.format == "TIFF" else turned(values, orientation(path))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A picture as `PIL.Image.open` gives it. Pillow maps some TIFF files into memory, but not if it gets a handle.

    Pillow 13 mixes up the pixels of a mapped file that has to be turned by a quarter.
    """
    from PIL import Image

    if _start(path) not in TIFF_STARTS:
        with Image.open(path) as image:
            yield _of_bearable_size(image)
    else:
        with path.open("rb") as handle, Image.open(handle) as image:
            yield _of_bearable_size(image)


def _of_bearable_size(image: Any) -> Any:
    check_pixels(image.height, image.width)
    return image


def height_width(size: Any) -> tuple[int, int]:
    """The size of an image from a pair or from text.

    Raises:
        InputError: It is neither of the form HEIGHTxWIDTH nor a pair, or a number is not above 0.

    Example:
        >>> height_width("480x640")
        (480, 640)
    """
    pair = size.lower().split("x") if isinstance(size, str) else size
    parts = [str(value) for value in pair] if isinstance(pair, Iterable) else []
    if len(parts) != 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"size {size}: give HEIGHTxWIDTH in pixels, such as 480x640.")
    return int(parts[0]), int(parts[1])


def resize_to(size: Any) -> tuple[int, int] | None:
    """The size that a user asks for, as `height_width` takes it; None for `OWN_SIZE` and by default. Raises InputError.

    Example:
        >>> resize_to("480x640"), resize_to("own")
        ((480, 640), None)
    """
    return None if size is None or (isinstance(size, str) and size == OWN_SIZE) else height_width(size)


def check_pixels(height: int, width: int) -> None:
    """Raise ValueError for the size of a picture that is too large to decode."""
    if height * width > MAX_PIXELS or height < 1 or width < 1:
        raise ValueError(
            f"{width} x {height} pixels; images may have 1 to {MAX_PIXELS // 1_000_000} million pixels: resize it first"
        )


def _start(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(4)


def largest_value(path: Path, dtype: np.dtype[Any]) -> float:
    """The largest value that unsigned integers of a file can have: that of their type, or less for 2, 4 or 12 bits."""
    from PIL import Image, UnidentifiedImageError

    stored = None
    if path.suffix.lower() != ".npy":
        try:
            with Image.open(path) as image:
                stored = _spread(image)
        except UnidentifiedImageError:
            pass
    return float(stored[0] if stored else np.iinfo(dtype).max)


def grey_palette_indices(path: Path) -> np.ndarray | None:
    """The indices (H, W) of a picture whose palette has only greys; None for every other file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode != "P":
                return None
            image.load()
            grey = _is_grey(np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3))
            return np.asarray(image) if grey else None
    except UnidentifiedImageError:
        return None


def is_deep(image: Any) -> bool:
    """Whether a PIL image, opened but not yet decoded, has colours of 16 bits, which Pillow reduces to 8 bits."""
    raw = _raw_mode(image)
    kind, _, depth = raw.partition(";")
    return kind in ("RGB", "RGBA", "RGBX", "LA") and depth in ("16B", "16L", "16N")


def is_misread(image: Any) -> bool:
    """Whether Pillow opens a file, but would decode other values: TIFF with planes of 16 bits for each colour."""
    return image.format == "TIFF" and image.tag_v2.get(284, 1) == 2 and 16 in image.tag_v2.get(258, ())


def read_pfm(path: Path) -> np.ndarray:
    """The floats of a portable float map, (H, W) or (H, W, 3). Raises ValueError.

    The header is three lines: PF (colours) or Pf (grey), width and height, and a scale that is negative if the least
    significant byte comes first. Rows are stored from the bottom to the top.
    """
    content, start = path.read_bytes(), 0
    words: list[bytes] = []
    while len(words) < 4:  # words of the header, which end in one white space each
        end = min((at for at in (content.find(space, start) for space in (b" ", b"\n", b"\t")) if at >= 0), default=-1)
        if end < 0 or end > 200:
            raise ValueError("the header is not that of a PFM file")
        words += content[start:end].split()
        start = end + 1
    kind, width, height, scale = words[0], int(words[1]), int(words[2]), float(words[3])
    shape = (height, width, 3) if kind == b"PF" else (height, width)
    dtype, count = ("<f4" if scale < 0 else ">f4"), int(np.prod(shape))
    check_pixels(height, width)
    if len(content) - start < 4 * count:
        raise ValueError("the file is truncated")
    return np.frombuffer(content, dtype, count, start).reshape(shape)[::-1].astype(np.float32)


def read_flo(path: Path) -> np.ndarray:
    """The optical flow (H, W, 2) of a Middlebury file: floats, x before y, values above 1e9 where unknown (then NaN).

    Raises ValueError.
    """
    content = path.read_bytes()
    width, height = np.frombuffer(content, "<i4", 2, 4).tolist() if len(content) >= 12 else (0, 0)
    if min(width, height) < 1 or len(content) < 12 + 8 * width * height:
        raise ValueError("the file is truncated")
    flow = np.frombuffer(content, "<f4", 2 * width * height, 12).reshape(height, width, 2).astype(np.float32)
    return np.where((np.abs(flow) > 1e9).any(-1, keepdims=True), np.float32(np.nan), flow)


def _values(image: Any, colours: bool) -> np.ndarray:
    """The values of a PIL image that Pillow decodes without loss."""
    spread, signed = _spread(image), _signed(image)
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0 and image.mode in ("1", "L")
    if image.format == "TIFF" and image.tile[0][0] == "libtiff" and sys.byteorder == "little":
        _set_raw_mode(image, _SWAPPED.get(raw := _raw_mode(image), raw))
    image.load()
    if image.mode in ("P", "PA"):
        return _of_palette(image, colours)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 2:
        array = array[..., 0]
    if array.dtype == np.int32 and image.format in ("PNG", "PPM"):  # Pillow's type for their 16 bits
        array = array.astype(np.uint16)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if white_is_zero:  # Pillow inverts these, as is right for photographs
        array = ~array
    if signed is not None and array.dtype in (np.uint8, np.int32):  # Pillow does not distinguish signs in TIFF files
        array = array.view(f"{'i' if signed else 'u'}{array.itemsize}")
    if spread is not None and spread[0] != spread[1]:
        array = np.rint(array * (spread[0] / spread[1])).astype(array.dtype)
    return array


def _of_palette(image: Any, colours: bool) -> np.ndarray:
    indices = np.asarray(image)
    indices = indices[..., 0] if indices.ndim == 3 else indices
    table = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    used = np.unique(indices)
    missing = max(0, int(used.max(initial=0)) + 1 - len(table))  # some programs leave palettes out
    if colours:
        return np.pad(table, ((0, missing), (0, 0)))[indices]
    grey = not missing and _is_grey(table) and len(np.unique(table[used, 0])) == len(used)
    return table[indices, 0] if grey else indices


def _is_grey(colours: np.ndarray) -> bool:
    return bool((colours == colours[:, :1]).all())


def _deep_colours(image: Any, path: Path) -> np.ndarray:
    """Colours of 16 bits. Pillow keeps one of the two bytes of a value, so each of them is decoded in turn."""
    raw = _raw_mode(image)
    if raw.startswith("LA"):  # Pillow has a mode for all four bytes of these pixels
        return _decoded_as(image, "RGBA").view(">u2")[..., 0].astype(np.uint16)
    bytes_of = []
    for order in ("16B", "16L"):
        with opened(path) as again:
            bytes_of.append(_decoded_as(again, f"{raw.partition(';')[0]};{order}").astype(np.uint16))
    little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
    low, high = bytes_of if little else bytes_of[::-1]
    return high << 8 | low


def _decoded_as(image: Any, raw: str) -> np.ndarray:
    """The pixels of an opened PIL image, decoded as if they were stored in another of Pillow's raw modes."""
    _set_raw_mode(image, raw)
    image.load()
    return np.ascontiguousarray(np.asarray(image))


def _set_raw_mode(image: Any, raw: str) -> None:
    for number, tile in enumerate(image.tile):
        how = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
        image.tile[number] = tile._replace(args=how) if hasattr(tile, "_replace") else (*tile[:3], how)


def _raw_mode(image: Any) -> str:
    """Pillow's word for how the pixels of an opened picture are stored; "" if it is not known."""
    how = image.tile[0][3] if getattr(image, "tile", None) else ""
    how = how[0] if isinstance(how, tuple) and how else how
    return how if isinstance(how, str) else ""


def _spread(image: Any) -> tuple[float, float] | None:
    """The largest value of a picture with an unusual depth, as it is stored and as Pillow returns it; else None."""
    raw = _raw_mode(image)
    kind, _, _, how = image.tile[0] if image.tile else ("", None, None, "")
    if kind in ("ppm", "ppm_plain") and isinstance(how, tuple):
        largest = how[-1]
        if largest > 255 and image.mode == "RGB":
            raise ValueError("PPM colours of 16 bits; save them as PNG or TIFF")
        return largest, 65535 if largest > 255 else 255
    known = {"L;2": (3, 255), "L;4": (15, 255), "I;12": (4095, 4095)}
    return next((found for start, found in known.items() if raw.startswith(start)), None)


def _signed(image: Any) -> bool | None:
    """Whether the integers of a TIFF file have signs; None for floats, other files, and 16 bits, which Pillow knows."""
    if image.format != "TIFF" or image.mode not in ("L", "I") or set(image.tag_v2.get(258, ())) not in ({8}, {32}):
        return None
    return bool(image.tag_v2.get(339, (1,))[0] == 2)


def _read_tiff(path: Path) -> np.ndarray:
    """A TIFF file that Pillow does not know: float colours, 16 and 64-bit floats, colours in planes of their own."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"TIFF files of this kind need the package tifffile: {install_command('pictures')}") from error
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        check_pixels(page.imagelength, page.imagewidth)
        array = page.asarray()
        if page.axes.startswith("S"):  # planes first
            array = np.moveaxis(array, 0, -1)
        tag = page.tags.get(0x0112)
        return turned(array, int(tag.value) if tag is not None else None)


def _read_exr(path: Path) -> np.ndarray:
    """The floats of an EXR file with one channel, (H, W), or with R, G and B, (H, W, 3)."""
    try:
        import OpenEXR
    except ImportError as error:
        raise ValueError(f"EXR files need the package OpenEXR: {install_command('pictures')}") from error
    with OpenEXR.File(str(path), header_only=True) as file:
        low, high = file.header()["dataWindow"]
        check_pixels(int(high[1]) - int(low[1]) + 1, int(high[0]) - int(low[0]) + 1)
    with OpenEXR.File(str(path), separate_channels=True) as file:
        channels = {name: channel.pixels for name, channel in file.channels().items()}
    if {"R", "G", "B"} <= channels.keys():
        return np.stack([channels[name] for name in "RGB"], -1).astype(np.float32)
    if len(channels) != 1:
        raise ValueError(f"its channels are {', '.join(channels)}; give a file with R, G and B, or with one channel")
    return np.asarray(next(iter(channels.values()))).astype(np.float32)
