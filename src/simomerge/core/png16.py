"""PNG files of 16 bits, grey and colour. Pillow writes only the grey ones."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

import numpy as np


def write_png16(file: BinaryIO, values: np.ndarray) -> None:
    """Write uint16 values (H, W) or (H, W, 3) as a PNG file.

    Source: the PNG specification (ISO/IEC 15948), sections 5 and 11: samples of 16 bits have the most significant byte
    first, and every row starts with the number of its filter (0: none).

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> write_png16(file, np.array([[1, 65535]], np.uint16))
        >>> np.asarray(Image.open(file)).tolist()
        [[1, 65535]]
    """
    height, width = values.shape[:2]
    rows = np.ascontiguousarray(values.astype(">u2")).view(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    file.write(b"\x89PNG\r\n\x1a\n")
    for kind, content in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes(), 6)),
        (b"IEND", b""),
    ):
        file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
