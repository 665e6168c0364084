"""Normals from depth, and augmentation, against scenes whose every pixel is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from simomerge.datasets import random_flip
from simomerge.datasets.augment import SCALES, augment, random_scale_crop, scale_crop
from simomerge.datasets.batches import training_batches
from simomerge.datasets.published.geometry import Camera, normals_from_depth
from simomerge.datasets.tasks import KINDS, LOG_DEPTH_RANGE, Task

H, W = 60, 80
CAMERA = Camera(70.0, 65.0, 37.0, 31.0)
BASELINE = 0.22
TASKS = {
    "depth": Task("depth"),
    "log": Task("log", "log_depth"),
    "disparity": Task("disparity"),
    "surface": Task("surface", "normals"),
    "seg": Task("seg", "segmentation", ("left", "right")),
    "autoencoder": Task("autoencoder"),
}

Scene = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Rays (u, v, 1), v down -> depth, 0 where nothing is, and normals (..., 3): x right, y up, z to the camera."""


def tilted(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A plane at a distance of 3."""
    normal = np.array([0.35, -0.2, 1.0]) / np.linalg.norm([0.35, -0.2, 1.0])
    depth = 3 / (-normal[0] * u + normal[1] * v + normal[2])
    return depth, np.broadcast_to(normal, (*depth.shape, 3))


def ball(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sphere of radius 1.5 around (0.2, -0.1, 4), y down, before nothing."""
    centre, rays = np.array([0.2, -0.1, 4.0]), np.stack([u, v, np.ones_like(u)], -1)
    along, square = rays @ centre, (rays**2).sum(-1)
    inside = along**2 - square * (centre @ centre - 1.5**2)
    depth = np.where(inside > 0, (along - np.sqrt(np.maximum(inside, 0))) / square, 0)
    outwards = (depth[..., None] * rays - centre) / 1.5 * [1, -1, -1]
    return depth, np.where(inside[..., None] > 0, outwards, 0)


def photographed(scene: Scene, camera: Camera, height: int = H, width: int = W) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.meshgrid((np.arange(width) - camera.cx) / camera.fx, (np.arange(height) - camera.cy) / camera.fy)
    return scene(u, v)


def sample_of(scene: Scene, camera: Camera = CAMERA) -> dict[str, Tensor]:
    """A scene with a target of every kind that knows geometry; depth in units of 1/1000 for the logarithm."""
    depth, normals = photographed(scene, camera)
    disparity = np.divide(camera.fx * BASELINE, depth, out=np.zeros_like(depth), where=depth > 0)
    image = torch.from_numpy(np.nan_to_num(normals * 0.5 + 0.5)).permute(2, 0, 1).float()
    log = np.where(depth > 0, np.log1p(depth * 1000) / LOG_DEPTH_RANGE, np.nan)
    return {
        "image": image,
        "depth": torch.from_numpy(depth).float()[None],
        "log": torch.from_numpy(log).float()[None],
        "disparity": torch.from_numpy(disparity).float()[None],
        "surface": torch.from_numpy(normals.copy()).permute(2, 0, 1).float(),
        "seg": torch.from_numpy((normals[..., 0] > 0).astype(np.int64)),
        "autoencoder": image.clone(),
    }


def zoomed(scale: float, top: int, left: int) -> Camera:
    """The camera whose picture a scaled and cropped one is; pixel centres are at halves when a picture is resized."""
    return Camera(
        CAMERA.fx * scale,
        CAMERA.fy * scale,
        (CAMERA.cx + 0.5) * scale - 0.5 - left,
        (CAMERA.cy + 0.5) * scale - 0.5 - top,
    )


# Normals ------------------------------------------------------------------------------------------------


def degrees(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.rad2deg(np.arccos(np.clip((found * expected).sum(-1), -1, 1)))


def test_normals_of_a_plane_are_exact_up_to_its_border() -> None:
    depth, expected = photographed(tilted, CAMERA)
    found = normals_from_depth(depth.astype(np.float32), CAMERA)
    assert found.dtype == np.float32 and degrees(found, expected).max() < 0.1
    assert degrees(normals_from_depth(depth.astype(np.float32), CAMERA, radius=1), expected).max() < 0.2


def test_normals_of_a_sphere() -> None:
    camera = Camera(350.0, 325.0, 185.0, 155.0)
    depth, expected = photographed(ball, camera, 300, 400)
    found = normals_from_depth(depth.astype(np.float32), camera)
    facing = expected[..., 2] > 0.7  # towards its outline the sphere curves away within a few pixels
    assert degrees(found, expected)[facing].max() < 0.25
    assert not found[depth == 0].any()


def test_the_wrong_camera_gives_other_normals() -> None:
    depth, expected = photographed(tilted, CAMERA)
    other = Camera(CAMERA.fx * 2, CAMERA.fy * 2, CAMERA.cx, CAMERA.cy)
    assert degrees(normals_from_depth(depth.astype(np.float32), other), expected).min() > 5


def test_two_surfaces_do_not_mix_and_holes_stay_holes() -> None:
    depth, expected = (value.copy() for value in photographed(tilted, CAMERA))
    depth[:, 40:], expected[:, 40:] = 9.0, [0, 0, 1]  # a wall behind the plane
    depth[10:13, 10:13] = 0
    depth[20, 20] = np.nan
    found = normals_from_depth(depth.astype(np.float32), CAMERA)
    holes = ~(depth > 0)
    assert not found[holes].any() and degrees(found, expected)[~holes].max() < 0.1
    alone = np.zeros((9, 9), np.float32)
    alone[4, 2:7] = 2  # a line is no plane
    assert not normals_from_depth(alone, CAMERA).any()


def test_noise_is_averaged() -> None:
    depth, expected = photographed(tilted, CAMERA)
    noisy = (depth * (1 + 0.002 * np.random.default_rng(0).standard_normal(depth.shape))).astype(np.float32)
    means = [degrees(normals_from_depth(noisy, CAMERA, radius=r), expected).mean() for r in (1, 3)]
    assert means[1] < 2 and means[1] < means[0] / 4


# Scale and crop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", [tilted, ball])
@pytest.mark.parametrize(("scale", "top", "left"), [(1.2, 5, 3), (1.5, 30, 40), (1.5, 0, 11), (1.0, 0, 0)])
def test_a_scaled_sample_is_what_the_zoomed_camera_sees(scene: Scene, scale: float, top: int, left: int) -> None:
    size = (round(H * scale), round(W * scale))
    found = scale_crop(TASKS, sample_of(scene), size, (top, left))
    expected = sample_of(scene, zoomed(scale, top, left))
    # Targets are those of the nearest pixel: half a pixel of the original away at most, a pixel at an outline.
    solid = (found["depth"] > 0) & (expected["depth"] > 0)
    facing = solid & (expected["surface"][2:] > 0.7)
    assert ((found["depth"] > 0) == (expected["depth"] > 0)).float().mean() > 0.97
    relative = (found["depth"] * scale / expected["depth"] - 1).abs()[facing]
    assert relative.max() < 0.02 and relative.mean() < 0.006
    assert (found["disparity"] / expected["disparity"] - 1).abs()[facing].max() < 0.02
    metres = torch.expm1(found["log"] * LOG_DEPTH_RANGE) / 1000
    torch.testing.assert_close(metres[solid], found["depth"][solid], rtol=1e-4, atol=0)
    assert torch.equal(found["log"].isnan(), found["depth"] == 0)
    angle = degrees(found["surface"].permute(1, 2, 0).numpy(), expected["surface"].permute(1, 2, 0).numpy())
    assert angle[facing[0].numpy()].max() < 3
    assert (found["image"] - expected["image"]).abs()[facing.expand(3, -1, -1)].max() < 0.15
    assert torch.equal(found["image"], found["autoencoder"])
    assert (found["seg"] == expected["seg"]).float().mean() > 0.98


def test_depth_and_disparity_of_one_pixel_keep_their_relation() -> None:
    """Disparity is focal length times baseline over depth; in the frame of the first camera depth has shrunk too."""
    found = scale_crop(TASKS, sample_of(tilted), (90, 120), (10, 20))
    torch.testing.assert_close(found["depth"] * found["disparity"], torch.full((1, H, W), CAMERA.fx * BASELINE))


def test_normals_computed_after_scaling_are_those_that_were_scaled() -> None:
    found = scale_crop(TASKS, sample_of(tilted), (120, 160), (30, 50))
    # Twice the size by the nearest pixel makes steps, which a wide window levels out.
    depth = (found["depth"][0] * 2).numpy()
    computed = normals_from_depth(depth, zoomed(2, 30, 50), radius=6)
    assert degrees(computed, found["surface"].permute(1, 2, 0).numpy())[8:-8, 8:-8].max() < 1.5


def test_pixels_that_do_not_count_stay_so() -> None:
    tasks = {kind: Task(kind, kind, ("a", "b")) for kind in KINDS}
    none = {"depth": 0.0, "disparity": 0.0, "normals": 0.0, "edges": -1.0}
    sample = {kind: torch.full((task.channels, 10, 10), none.get(kind, np.nan)) for kind, task in tasks.items()}
    sample |= {"image": torch.zeros(3, 10, 10), "segmentation": torch.full((10, 10), -1)}
    changed = augment(tasks, sample, np.random.default_rng(3), scales=(1.5,))
    for name, value in sample.items():
        torch.testing.assert_close(changed[name], value, equal_nan=True, msg=name)


# Mirroring ----------------------------------------------------------------------------------------------


class Mirrors:
    """A generator that always mirrors."""

    def random(self) -> float:
        return 0.9


@pytest.mark.parametrize("scene", [tilted, ball])
def test_a_mirrored_sample_is_the_mirrored_scene(scene: Scene) -> None:
    def mirrored(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        depth, normals = scene(-u, v)
        return depth, normals * [-1, 1, 1]

    found = random_flip(TASKS, sample_of(scene), Mirrors())  # type: ignore[arg-type]
    expected = sample_of(mirrored, Camera(CAMERA.fx, CAMERA.fy, W - 1 - CAMERA.cx, CAMERA.cy))
    for name in ("depth", "log", "disparity", "surface"):
        torch.testing.assert_close(found[name], expected[name], equal_nan=True, msg=name)


# As a transform -----------------------------------------------------------------------------------------


def test_scales_windows_and_mirrors_are_drawn_from_the_generator() -> None:
    sample = {"image": torch.zeros(3, H, W), "depth": torch.ones(1, H, W)}
    column = torch.arange(W, dtype=torch.float32).expand(1, H, W)
    tasks = {"depth": TASKS["depth"], "where": Task("where", "texture")}
    drawn = [augment(tasks, {**sample, "where": column}, np.random.default_rng(seed)) for seed in range(150)]
    scales = {round(1 / float(one["depth"].mean()), 3) for one in drawn}
    assert scales == set(SCALES)
    mirrored = [float(one["where"][0, 0, 0]) > float(one["where"][0, 0, -1]) for one in drawn]
    assert 45 < sum(mirrored) < 105
    assert len({(one["where"].min().item(), one["where"].max().item()) for one in drawn}) > 20
    again = augment(tasks, {**sample, "where": column}, np.random.default_rng(7))
    assert all(torch.equal(again[name], drawn[7][name]) for name in again)


def test_a_scale_of_one_changes_nothing() -> None:
    sample = sample_of(ball)
    before = {name: value.clone() for name, value in sample.items()}
    found = random_scale_crop(TASKS, sample, np.random.default_rng(0), scales=(1.0,))
    for name, value in before.items():
        torch.testing.assert_close(found[name], value, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert found[name].data_ptr() != sample[name].data_ptr()


def test_it_augments_training_batches() -> None:
    data = [sample_of(tilted) for _ in range(4)]
    batches = list(training_batches(data, 2, 3, seed=0, transform=partial(augment, TASKS)))
    assert len(batches) == 3 and batches[0]["image"].shape == (2, 3, H, W)
    assert not torch.equal(batches[0]["depth"][0], batches[0]["depth"][1])
