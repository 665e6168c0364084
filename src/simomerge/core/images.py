"""Conversion of images in all common forms to float tensors (1, 3, H, W), RGB in [0, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.pixels import (
    MAX_PIXELS,
    OTHER_STARTS,
    is_deep,
    is_misread,
    largest_value,
    opened,
    read_pixels,
    upright,
)
from simomerge.core.regular import check_regular


def read_image(path: str | Path, least: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as uint8 RGB (H, W, 3), turned upright by its EXIF tag.

    Values of 16 bits and floats in [0, 1] are rounded to 8 bits.

    Args:
        path: the file.
        least: (height, width) to which the image will be resized. A JPEG file of at least four times that size is
            decoded at a smaller size, which is several times as fast.

    Raises:
        InputError: the file is missing, not an image, truncated, has more than `MAX_PIXELS` pixels, floats outside
            [0, 1] or integers of 32 bits, whose range is unknown.
    """
    from PIL import UnidentifiedImageError

    path = Path(path)
    check_image(path)
    try:
        try:
            with opened(path) as image:
                if least is not None and image.format == "JPEG":
                    image.draft(None, (2 * max(least), 2 * max(least)))  # it may be turned by its tag later
                if not (is_deep(image) or is_misread(image) or image.mode.startswith(("I", "F"))):
                    return upright(np.asarray(image.convert("RGB")), image, path)
        except UnidentifiedImageError:
            pass  # read_pixels knows more formats
        values = read_pixels(path)
        _check_size(str(path), *values.shape[:2])
        return _as_bytes(values, largest_value(path, values.dtype) if values.dtype.kind == "u" else 1.0)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise _unreadable(path, error) from error


def check_image(path: str | Path) -> None:
    """Check that a file is an image of at most `MAX_PIXELS` pixels, from its first bytes. Raises InputError."""
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    check_regular(path, "give an image.")
    if not path.is_file():
        raise InputError(f"{path}: no such image file.")
    try:
        with Image.open(path) as image:
            _check_size(str(path), image.height, image.width)
    except UnidentifiedImageError as error:
        with path.open("rb") as handle:
            if not handle.read(4).startswith(OTHER_STARTS):
                raise _unreadable(path, error) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    return InputError(f"{path}: cannot be read as an image ({error}); give a PNG or JPEG file.")


def to_tensor(image: Any, size: tuple[int, int] | None = None, crop: bool = False) -> Tensor:
    """A path, PIL image, array or tensor as float32 (1, 3, H, W) in [0, 1].

    Args:
        image: a path; a PIL image; a uint8 (0..255) or float (0..1) array of (H, W), (H, W, 3) or (H, W, 4);
            or a tensor of (3, H, W) or (1, 3, H, W), uint8 or float in [0, 1]. A PIL image is turned upright by its
            EXIF tag, as files are.
        size: (height, width) to resize it to; its own size by default.
        crop: cut the image at its centre to the shape of ``size`` before it is resized, so that nothing is distorted.

    Raises:
        InputError: the image cannot be decoded, has another shape, dtype or range, or more than `MAX_PIXELS` pixels.
    """
    if isinstance(image, (str, Path)):
        image = read_image(image, size)
    elif not isinstance(image, (np.ndarray, Tensor)):
        if not hasattr(image, "convert"):
            raise InputError(f"{type(image).__name__} is not an image; give a path, a PIL image, an array or a tensor.")
        try:  # an opened file is decoded only now
            image = _as_rgb(image)
        except Exception as error:  # Pillow raises many kinds of errors for damaged files
            raise _unreadable(getattr(image, "filename", "") or "image", error) from error
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] not in (3, 4):
            raise InputError(f"image array of shape {image.shape}; give (H, W), (H, W, 3) or (H, W, 4).")
        if image.dtype != np.uint8 and image.dtype.kind != "f":
            raise InputError(f"image of dtype {image.dtype}; give uint8 in 0..255 or floats in [0, 1].")
        # A copy, because torch accepts neither read-only arrays nor negative strides nor another byte order.
        native = image[..., :3].astype(image.dtype.newbyteorder("="), order="C")
        tensor = torch.from_numpy(native).permute(2, 0, 1)[None]
    else:
        tensor = image[None] if image.ndim == 3 else image
        if tensor.ndim != 4 or tensor.shape[:2] != (1, 3):
            raise InputError(f"image tensor of shape {tuple(image.shape)}; give (3, H, W) or (1, 3, H, W).")
    _check_size("image", *tensor.shape[-2:])
    if crop and size is not None:
        tensor = cropped(tensor, size)
    if tensor.dtype == torch.uint8:
        return resized(tensor, size).float() / 255  # resizing bytes is thirty times faster than floats
    if not tensor.is_floating_point():
        raise InputError(f"image of dtype {tensor.dtype}; give uint8 in 0..255 or floats in [0, 1].")
    tensor = tensor.float()
    low, high = tensor.aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise InputError(f"image values from {low:.3g} to {high:.3g}; give floats in [0, 1] or uint8 in 0..255.")
    return resized(tensor, size)


def resized(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images (B, 3, H, W) resized to (height, width), bilinearly with antialiasing; the dtype stays."""
    if size is None or images.shape[-2:] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def cropped(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """The largest part of images (B, C, H, W), at their centre, with the ratio of height to width of ``shape``."""
    height, width = images.shape[-2:]
    high = min(height, max(1, round(width * shape[0] / shape[1])))
    wide = min(width, max(1, round(height * shape[1] / shape[0])))
    top, left = (height - high) // 2, (width - wide) // 2
    return images[..., top : top + high, left : left + wide]


def _as_rgb(image: Any) -> np.ndarray:
    """A PIL image as uint8 RGB, turned upright. 16-bit grey is scaled, because Pillow would clip it at 255."""
    from PIL import ImageOps

    deep = image.mode.startswith("I;16") or (image.mode == "I" and getattr(image, "format", None) in ("PNG", "PPM"))
    if getattr(image, "format", None) != "TIFF":  # Pillow has turned these
        image = ImageOps.exif_transpose(image)
    if not deep and image.mode not in ("I", "F"):
        return np.asarray(image.convert("RGB"))
    try:
        return _as_bytes(np.asarray(image).astype(np.uint16) if deep else np.asarray(image), 65535)
    except ValueError as error:
        raise InputError(f"image of {error}.") from error


def _as_bytes(values: np.ndarray, largest: float) -> np.ndarray:
    """Stored values (H, W) or (H, W, C) as uint8 RGB (H, W, 3); ``largest`` is that of unsigned integers.

    Raises ValueError if they are not values of an image.
    """
    if values.ndim == 2 or values.shape[2] < 3:
        values = np.repeat(values.reshape(*values.shape[:2], -1)[..., :1], 3, axis=2)
    values = values[..., :3]
    if values.dtype.kind not in "buf" or (values.dtype.kind == "u" and values.itemsize > 2):
        raise ValueError(f"integers of type {values.dtype}, whose range is unknown; save it with 8 or 16 bits")
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(f"floats from {low:.3g} to {high:.3g}; images have floats in [0, 1]")
        largest = 1.0
    elif values.dtype.kind == "b":
        largest = 1.0
    return np.rint(values.astype(np.float64) * (255 / largest)).clip(0, 255).astype(np.uint8)


def _check_size(name: str, height: int, width: int) -> None:
    if height * width > MAX_PIXELS or height < 1 or width < 1:
        raise InputError(
            f"{name}: {width} x {height} pixels; images may have 1 to {MAX_PIXELS // 1_000_000} million pixels:"
            " resize it first."
        )
