"""Dense labels from the renderer's buffers."""

from __future__ import annotations

from typing import Any

from simomerge.datasets.rooms.render import changes

MODALITIES = ("image", "segmentation", "depth", "normals", "edges", "texture", "keypoints")


def dense_labels(buffers: dict[str, Any], xp: Any) -> dict[str, Any]:
    """Quantise the renderer's buffers and derive the labels.

    Args:
        buffers: The result of ``render``, B images of H by W.
        xp: The array namespace of the buffers.

    Returns:
        One array per name in ``MODALITIES``:

        - image: (B, H, W, 3) uint8.
        - segmentation: (B, H, W) uint8, index into ``CLASS_NAMES``.
        - depth: (B, H, W) float16, metres along the optical axis, above 0.
        - normals: (B, H, W, 3) int8, unit vector times 127; x right, y up, z towards the camera.
        - edges: (B, H, W) uint8, 255 on both sides of every outline and crease. All things are convex and their faces
          are numbered, so a change of thing or face is exactly an occlusion, contact or crease.
        - texture: (B, H, W) uint8, Sobel magnitude of the luminance of the noise-free image.
        - keypoints: (B, H, W) uint8, corner strength (Shi and Tomasi) of the same luminance.

    Example:
        >>> dense_labels(render(sample_scenes(0, 0, [0]), 64, 80), np)["edges"].dtype
        dtype('uint8')
    """
    clean = buffers["clean"]
    luminance = 0.299 * clean[..., 0] + 0.587 * clean[..., 1] + 0.114 * clean[..., 2]
    gx, gy = _gradients(xp, luminance)
    kind = buffers["slot"] * 8 + buffers["face"]
    return {
        "image": _bytes(xp, buffers["image"]),
        "segmentation": buffers["category"],
        "depth": buffers["depth"].astype(xp.float16),
        "normals": xp.rint(buffers["normals"] * 127.0).astype(xp.int8),
        "edges": changes(xp, kind).astype(xp.uint8) * xp.uint8(255),
        # The magnitude reaches about 0.5 at strong outlines. The root keeps fine texture from being quantised to zero.
        "texture": _bytes(xp, xp.sqrt(xp.sqrt(gx * gx + gy * gy) * 2.2)),
        "keypoints": _bytes(xp, xp.sqrt(_corner_strength(xp, gx, gy)) * 2.8),
    }


def _bytes(xp: Any, unit: Any) -> Any:
    return xp.rint(xp.clip(unit, 0.0, 1.0) * 255.0).astype(xp.uint8)


def _padded(xp: Any, array: Any) -> Any:
    return xp.pad(array, ((0, 0), (1, 1), (1, 1)), mode="edge")


def _gradients(xp: Any, array: Any) -> tuple[Any, Any]:
    """Sobel derivatives per pixel of (B, H, W): across (to the right) and down."""
    p = _padded(xp, array)
    smooth = p[:, :-2] + 2.0 * p[:, 1:-1] + p[:, 2:]
    slope = p[:, 2:] - p[:, :-2]
    across = (smooth[:, :, 2:] - smooth[:, :, :-2]) * 0.125
    down = (slope[:, :, :-2] + 2.0 * slope[:, :, 1:-1] + slope[:, :, 2:]) * 0.125
    return across, down


def _blur(xp: Any, array: Any) -> Any:
    """A 3 by 3 binomial average."""
    p = _padded(xp, array)
    p = p[:, :-2] + 2.0 * p[:, 1:-1] + p[:, 2:]
    return (p[:, :, :-2] + 2.0 * p[:, :, 1:-1] + p[:, :, 2:]) * 0.0625


def _corner_strength(xp: Any, gx: Any, gy: Any) -> Any:
    """The root of the smaller eigenvalue of the structure tensor: the smallest slope over all directions."""
    xx, yy, xy = _blur(xp, gx * gx), _blur(xp, gy * gy), _blur(xp, gx * gy)
    half, difference = 0.5 * (xx + yy), 0.5 * (xx - yy)
    smaller = half - xp.sqrt(difference * difference + xy * xy)
    return xp.sqrt(xp.maximum(smaller, 0.0))
