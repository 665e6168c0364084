"""A pinhole camera, and the surface normals that a depth map implies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: pixel (column x, row y), counted from 0, sees along ((x - cx) / fx, (y - cy) / fy, 1).

    Args:
        fx, fy: focal lengths in pixels.
        cx, cy: principal point in pixels.
    """

    fx: float
    fy: float
    cx: float
    cy: float

    def rays(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The first two coordinates of every pixel's ray, float32 (1, W) and (H, 1); x right, y down."""
        across = (np.arange(width, dtype=np.float32)[None] - self.cx) / self.fx
        down = (np.arange(height, dtype=np.float32)[:, None] - self.cy) / self.fy
        return across.astype(np.float32), down.astype(np.float32)


def normals_from_depth(depth: np.ndarray, camera: Camera, radius: int = 3, tolerance: float = 0.05) -> np.ndarray:
    """Normals of the planes that fit a depth map best around each pixel.

    In the image, the plane a X + b Y + c Z = 1 has the inverse depth a u + b v + c, a linear function of the pixel. So
    least squares over a window needs no point cloud and is exact on planes. Neighbours whose inverse depth differs by
    more than ``tolerance`` are on another surface and are left out.

    Args:
        depth: along the optical axis, in any unit, (H, W); 0 or NaN where unknown.
        camera: the camera that saw it.
        radius: the window is 2 radius + 1 pixels wide: 7 by default, against the noise of depth cameras.
        tolerance: relative difference of inverse depth.

    Returns:
        Unit vectors, float32 (H, W, 3), x right, y up, z towards the camera; (0, 0, 0) where the depth is unknown or
        too few neighbours are known.
    """
    known = np.isfinite(depth) & (depth > 0)
    inverse = np.divide(1, depth, out=np.zeros(depth.shape, np.float32), where=known)
    level, slope_x, slope_y, fitted = _fit_in_bands(inverse, radius, tolerance)
    across, down = camera.rays(*depth.shape)
    a, b = slope_x * np.float32(camera.fx), slope_y * np.float32(camera.fy)
    normals = np.stack([-a, b, level - a * across - b * down], axis=-1)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    fitted &= known & (length[..., 0] > 0)
    return np.where(fitted[..., None], normals / np.maximum(length, 1e-20), 0).astype(np.float32)


def _fit_in_bands(inverse: np.ndarray, radius: int, tolerance: float, rows: int = 32) -> list[np.ndarray]:
    """`_fit` on bands of ``rows`` rows, whose arrays stay in a core's cache."""
    padded = np.pad(inverse, ((radius, radius), (0, 0)))  # zero means unknown depth
    bands = [
        [
            found[radius : len(found) - radius]
            for found in _fit(padded[top : top + rows + 2 * radius], radius, tolerance)
        ]
        for top in range(0, len(inverse), rows)
    ]
    return [np.concatenate(found) for found in zip(*bands, strict=True)]


def _fit(inverse: np.ndarray, radius: int, tolerance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Level and slopes of the best linear function around every pixel, and where there are enough neighbours for it."""
    height, width = inverse.shape
    padded = np.pad(inverse, radius)
    near = np.float32(tolerance) * inverse
    # Sums over the neighbours of 1, x, y, xx, xy, yy, q, xq and yq, where q is the difference of inverse depth.
    sums = np.zeros((9, height, width), np.float32)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            shifted = padded[radius + dy : radius + dy + height, radius + dx : radius + dx + width]
            difference = shifted - inverse
            weight = (np.abs(difference) <= near).astype(np.float32)
            difference *= weight
            for total, factor in zip(sums[:6], (1, dx, dy, dx * dx, dx * dy, dy * dy), strict=True):
                if factor:
                    total += weight if factor == 1 else np.float32(factor) * weight
            for total, factor in zip(sums[6:], (1, dx, dy), strict=True):
                if factor:
                    total += np.float32(factor) * difference
    count, x, y, xx, xy, yy, q, xq, yq = sums
    divisor = np.maximum(count, 1)
    var_x, cov_xy, var_y = xx - x * x / divisor, xy - x * y / divisor, yy - y * y / divisor
    cov_xq, cov_yq = xq - x * q / divisor, yq - y * q / divisor
    determinant = var_x * var_y - cov_xy * cov_xy
    fitted = (count >= 4) & (determinant > 0.5)  # fewer points, or points on one line, define no plane
    safe = np.where(fitted, determinant, 1)
    slope_x = (cov_xq * var_y - cov_yq * cov_xy) / safe
    slope_y = (cov_yq * var_x - cov_xq * cov_xy) / safe
    return inverse + (q - slope_x * x - slope_y * y) / divisor, slope_x, slope_y, fitted
