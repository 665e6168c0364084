"""Rooms: determinism, exact ground truth against scalar geometry, and a cache that survives accidents."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.datasets import rooms
from simomerge.datasets.rooms import cache
from simomerge.datasets.rooms.render import render
from simomerge.datasets.rooms.scenes import sample_scenes
from simomerge.datasets.rooms.slots import BALL, BOX, CONE, CYLINDER, PANEL, PANELS, RUG, SLOTS

H, W = 24, 30
FIRST_COUNTS = [607, 220, 65, 132, 61, 4, 8, 96, 41, 11, 35]
FIRST_MEAN = 118.72


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in rooms.MODALITIES)


# What is returned ---------------------------------------------------------------------------------------


def test_arrays_have_the_documented_shapes_and_types() -> None:
    out = rooms.render_rooms(0, "train", 0, 3, H, W)
    assert tuple(out) == rooms.MODALITIES
    for name, (dtype, channels) in cache._LAYOUT.items():
        assert out[name].shape == (3, H, W, *channels) and out[name].dtype == dtype
    assert out["depth"].min() > 0
    assert set(np.unique(out["edges"])) <= {0, 255}
    assert len(rooms.CLASS_COLOURS) == len(rooms.CLASS_NAMES) == len(set(map(tuple, rooms.CLASS_COLOURS)))


def test_same_numbers_whatever_is_rendered_with_them() -> None:
    batch = rooms.render_rooms(5, "val", 0, 40, H, W)
    assert same(batch, rooms.render_rooms(5, "val", 0, 40, H, W))
    for index in (0, 17, 39):
        alone = rooms.render_rooms(5, "val", index, index + 1, H, W)
        assert same({k: v[index : index + 1] for k, v in batch.items()}, alone)


def test_seed_split_and_index_all_matter() -> None:
    images = [
        rooms.render_rooms(*key, H, W)["image"].tobytes()
        for key in ((0, "train", 0, 1), (1, "train", 0, 1), (0, "test", 0, 1), (0, "train", 1, 2))
    ]
    assert len(set(images)) == 4


def test_the_layout_does_not_depend_on_the_size() -> None:
    # Pixel centres of the small picture are those of every third pixel of the large one.
    small = rooms.render_rooms(0, "test", 0, 6, 16, 20)
    large = rooms.render_rooms(0, "test", 0, 6, 48, 60)
    agree = small["segmentation"] == large["segmentation"][:, 1::3, 1::3]
    assert agree.mean() > 0.999


def test_first_room_is_the_one_it_always_was() -> None:
    """Caches carry RENDER_VERSION: raise it, and renew these numbers, when the rooms change."""
    out = rooms.render_rooms(0, "train", 0, 4, 16, 20)
    assert cache.RENDER_VERSION == 1
    assert np.bincount(out["segmentation"].ravel(), minlength=11).tolist() == FIRST_COUNTS
    assert abs(float(out["image"].mean()) - FIRST_MEAN) < 0.5


def test_every_class_is_common_enough_and_no_class_rules() -> None:
    segmentation = rooms.render_rooms(0, "train", 0, 150, H, W)["segmentation"]
    share = np.bincount(segmentation.ravel(), minlength=len(rooms.CLASS_NAMES)) / segmentation.size
    frequency = [(segmentation == number).any((1, 2)).mean() for number in range(len(rooms.CLASS_NAMES))]
    assert share.min() > 0.008 and share.max() < 0.55
    assert min(frequency) > 0.3


def test_no_class_has_a_colour_of_its_own() -> None:
    out = rooms.render_rooms(0, "train", 0, 100, H, W)
    for number in range(len(rooms.CLASS_NAMES)):
        means = [
            image[labels == number].mean(0)
            for image, labels in zip(out["image"], out["segmentation"], strict=True)
            if (labels == number).sum() > 5
        ]
        assert np.std(means, axis=0).min() > 20, rooms.CLASS_NAMES[number]


# Ground truth -------------------------------------------------------------------------------------------


def roots(a: float, b: float, c: float) -> list[float]:
    """Real solutions of a t^2 + 2 b t + c = 0."""
    inner = b * b - a * c
    if inner < 0 or a == 0:
        return []
    return [(-b - math.sqrt(inner)) / a, (-b + math.sqrt(inner)) / a]


def hits(slot: int, shape: list[float], o: np.ndarray, d: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """All (distance, world normal) where a ray meets the surface of one thing, by school geometry."""
    cos, sin = shape[6:8]
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    o, d = turn @ (o - np.array(shape[:3])), turn @ d
    half, found = shape[3:6], []
    if slot < BALL:
        for axis in range(3):
            for sign in (-1, 1):
                t = (sign * half[axis] - o[axis]) / d[axis]
                point = o + t * d
                if all(abs(point[k]) <= half[k] for k in range(3) if k != axis):
                    found.append((t, sign * np.eye(3)[axis]))
    elif slot < CYLINDER:
        found = [(t, (o + t * d) / half[0]) for t in roots(d @ d, o @ d, o @ o - half[0] ** 2)]
    elif slot < CONE:
        for t in roots(d[:2] @ d[:2], o[:2] @ d[:2], o[:2] @ o[:2] - half[0] ** 2):
            if abs(o[2] + t * d[2]) <= half[2]:
                found.append((t, np.array([*(o + t * d)[:2], 0.0]) / half[0]))
    else:
        k = (half[0] / (2 * half[2])) ** 2
        tip = half[2] - o[2]
        for t in roots(d[:2] @ d[:2] - k * d[2] ** 2, o[:2] @ d[:2] + k * tip * d[2], o[:2] @ o[:2] - k * tip**2):
            point = o + t * d
            if abs(point[2]) <= half[2]:
                normal = np.array([point[0], point[1], k * (half[2] - point[2])])
                found.append((t, normal / np.linalg.norm(normal)))
    if slot >= CYLINDER:
        for sign in (-1, 1) if slot < CONE else (-1,):
            t = (sign * half[2] - o[2]) / d[2]
            if np.hypot(*(o + t * d)[:2]) <= half[0]:
                found.append((t, np.array([0.0, 0.0, sign])))
    return [(t, turn.T @ normal) for t, normal in found if t > 0.02]


def trace(scenes: Any, b: int, row: int, column: int) -> tuple[float, int, np.ndarray]:
    """Depth, slot and camera-space normal of one pixel of an H by W picture, in scalar float64."""
    rotation, o = scenes.rotation[b].astype(float), scenes.position[b].astype(float)
    zoom = 2.0 * float(scenes.tangent[b]) / W
    d = rotation.T @ np.array([(column + 0.5 - W / 2) * zoom, (H / 2 - row - 0.5) * zoom, 1.0])
    room, shapes = scenes.room[b].astype(float), scenes.shape[b].astype(float).tolist()
    walls = [((room[axis] if side else 0.0) - o[axis]) / d[axis] for axis in range(3) for side in (0, 1)]
    depth, slot = min((t, number) for number, t in enumerate(walls) if t > 0)
    normal = np.eye(3)[slot // 2] * (1 if slot % 2 == 0 else -1)
    x, y, z = o + depth * d
    along = y if slot < 2 else x
    for number in range(PANEL, PANEL + PANELS):
        cu, cv, wall, hu, hv = shapes[number][:5]
        if cv > 0 and wall == slot and abs(along - cu) < hu and abs(z - cv) < hv:
            slot = number
            break
    cx, cy, level, hx, hy, form, cos, sin = shapes[RUG]
    if slot == 4 and level > -1:
        rx, ry = (cos * (x - cx) + sin * (y - cy)) / hx, (cos * (y - cy) - sin * (x - cx)) / hy
        if (rx * rx + ry * ry if form == 2 else max(abs(rx), abs(ry))) < 1:
            slot = RUG
    for number in range(BOX, SLOTS):
        for t, outward in hits(number, shapes[number], o, d):
            if t < depth:
                depth, slot, normal = t, number, outward
    return depth, slot, np.array([rotation[0] @ normal, rotation[1] @ normal, -rotation[2] @ normal])


def test_depth_slots_and_normals_agree_with_scalar_geometry() -> None:
    scenes = sample_scenes(11, 2, range(16))
    out = render(scenes, H, W)
    rng = np.random.default_rng(0)
    kinds, wrong, checked = set(), 0, 0
    for b in range(len(scenes)):
        for row, column in rng.integers((H, W), size=(60, 2)):
            depth, slot, normal = trace(scenes, b, row, column)
            checked += 1
            agrees = (
                abs(out["depth"][b, row, column] - depth) < 2e-3
                and out["slot"][b, row, column] == slot
                and np.abs(out["normals"][b, row, column] - normal).max() < 5e-3
            )
            wrong += not agrees
            kinds.add(sum(slot >= first for first in (4, PANEL, BOX, BALL, CYLINDER, CONE)))
    assert kinds == set(range(7)), "every kind of thing is to be met"
    assert wrong <= 0.003 * checked  # rays that graze an edge may fall to either side in float32


def test_normals_are_unit_and_face_the_camera() -> None:
    scenes = sample_scenes(0, 0, range(8))
    out = render(scenes, H, W)
    assert np.allclose(np.linalg.norm(out["normals"], axis=-1), 1, atol=1e-4)
    zoom = 2 * scenes.tangent[:, None, None] / W
    x, y = (np.arange(W) + 0.5 - W / 2) * zoom, ((H / 2 - np.arange(H) - 0.5)[:, None]) * zoom
    towards = -(x * out["normals"][..., 0] + y * out["normals"][..., 1] - out["normals"][..., 2])
    assert towards.min() > -1e-3


def test_depth_lies_on_the_plane_its_normal_describes() -> None:
    """On one flat face, the plane through a pixel must pass through the next pixel."""
    scenes = sample_scenes(0, 0, range(8))
    out = render(scenes, H, W)
    zoom = 2 * scenes.tangent[:, None, None] / W
    x = np.broadcast_to((np.arange(W) + 0.5 - W / 2) * zoom, out["depth"].shape)
    y = np.broadcast_to((H / 2 - np.arange(H) - 0.5)[:, None] * zoom, out["depth"].shape)
    point = np.stack([x, y, np.full_like(x, -1)], -1) * out["depth"][..., None]
    step = ((point[:, :, 1:] - point[:, :, :-1]) * out["normals"][:, :, 1:]).sum(-1)
    kind = out["slot"] * 8 + out["face"]
    flat = (kind[:, :, 1:] == kind[:, :, :-1]) & (out["face"][:, :, 1:] != 6)
    assert flat.mean() > 0.5 and np.abs(step[flat]).max() < 1e-3


def test_edges_mark_exactly_where_things_or_faces_end() -> None:
    out = rooms.render_rooms(0, "train", 0, 6, H, W)
    changed = out["segmentation"][:, :, 1:] != out["segmentation"][:, :, :-1]
    assert (out["edges"][:, :, 1:][changed] == 255).all() and (out["edges"][:, :, :-1][changed] == 255).all()
    assert 0.05 < (out["edges"] > 0).mean() < 0.6


def test_supersampling_changes_the_image_at_edges_only() -> None:
    scenes = sample_scenes(0, 0, range(3))
    plain, smooth = render(scenes, H, W, supersample=0), render(scenes, H, W)
    moved = (plain["clean"] != smooth["clean"]).any(-1)
    assert 0.02 < moved.mean() < 0.7
    assert all(np.array_equal(plain[name], smooth[name]) for name in ("depth", "normals", "slot", "face"))


class Recorder:
    """NumPy under another name, offering only what CuPy offers too."""

    missing = frozenset({"vectorize", "frompyfunc", "apply_along_axis", "nditer", "errstate", "fromiter"})

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        assert name not in self.missing
        self.names.add(name)
        return getattr(np, name)


def test_the_array_namespace_is_the_one_given() -> None:
    xp = Recorder()
    assert same(rooms.render_rooms(0, "val", 0, 2, H, W, xp=xp), rooms.render_rooms(0, "val", 0, 2, H, W))
    assert {"where", "take", "sqrt", "floor", "pad", "stack", "concatenate", "argsort"} <= xp.names
    source = Path(rooms.__file__).parent
    for module in ("render.py", "view.py", "tracing.py", "shading.py", "labels.py", "textures.py"):
        assert "np." not in source.joinpath(module).read_text(encoding="utf-8").replace("xp.", "")


# Mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dev", 4), "choose one of train"),
        (("val", 0), "ask for 1 or more"),
        (("val", 4, 2, 30), "height"),
        (("val", 4, 24, 90_000), "width"),
        (("val", 4, 24, 30, -1), "seed"),
    ],
)
def test_mistakes_are_named_with_their_remedy(tmp_path: Path, arguments: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        rooms.load_rooms(*arguments, cache_dir=tmp_path)


def test_an_empty_range_is_a_mistake() -> None:
    with pytest.raises(InputError, match="0 <= start < stop"):
        rooms.render_rooms(0, "val", 3, 3)


# The cache ----------------------------------------------------------------------------------------------


def load(folder: Path, count: int = 6, **more: Any) -> dict[str, np.ndarray]:
    return rooms.load_rooms("val", count, 16, 20, cache_dir=folder, **{"workers": 1, **more})


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob("rooms/*/.*"))


def test_cached_rooms_are_those_rendered_and_read_only(tmp_path: Path) -> None:
    reports: list[Any] = []
    with show_progress(lambda *report: reports.append(report)):
        out = load(tmp_path)
    assert reports[-1] == ("render val", 6, 6, "") and same(out, rooms.render_rooms(0, "val", 0, 6, 16, 20))
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in out.values())
    assert leftovers(tmp_path) == []


def test_a_second_request_and_a_smaller_one_render_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = load(tmp_path)
    monkeypatch.setattr(cache, "render_rooms", lambda *a, **k: pytest.fail("rendered again"))
    assert same(load(tmp_path), complete)
    assert same(load(tmp_path, 4), {name: array[:4] for name, array in complete.items()})


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "elsewhere"))
    rooms.load_rooms("val", 2, 16, 20, workers=1)
    assert (tmp_path / "elsewhere" / "rooms").is_dir()


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "other shape"])
def test_a_damaged_set_is_made_again(tmp_path: Path, damage: str) -> None:
    complete = {name: array.copy() for name, array in load(tmp_path).items()}
    file = next(tmp_path.glob("rooms/*/6/normals.npy"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "gone":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        np.save(file, np.zeros((6, 16, 19, 3), np.int8))
    assert same(load(tmp_path), complete) and leftovers(tmp_path) == []


def test_remains_of_killed_processes_are_ignored_then_removed(tmp_path: Path) -> None:
    load(tmp_path)
    parent = next(tmp_path.glob("rooms/*"))
    young, old = parent / ".9-young", parent / ".9-old"
    for folder in (young, old):
        folder.mkdir()
        (folder / "image.npy").write_bytes(b"half")
    os.utime(old, (time.time() - 30 * 24 * 3600,) * 2)
    assert len(load(tmp_path, 9)["image"]) == 9
    assert young.exists() and not old.exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), show_progress(stop):
        load(tmp_path)
    assert list(tmp_path.glob("rooms/*/*")) == [] and leftovers(tmp_path) == []


def test_two_processes_at_once_and_worker_processes_agree(tmp_path: Path) -> None:
    script = (
        "import sys; from simomerge.datasets.rooms import load_rooms\n"
        "if __name__ == '__main__': print(int(load_rooms('val', 100, 16, 20, 0, sys.argv[1], 2)"
        "['image'].sum(dtype='int64')))"
    )
    file = tmp_path / "script.py"
    file.write_text(script, encoding="utf-8")
    command = [sys.executable, str(file), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [process.communicate(timeout=60)[0].strip() for process in running]
    expected = rooms.render_rooms(0, "val", 0, 100, 16, 20)["image"].sum(dtype="int64")
    assert sums == [str(expected)] * 2 and leftovers(tmp_path / "cache") == []


def test_a_script_without_a_main_guard_still_gets_its_rooms(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(
        "import sys; from simomerge.datasets.rooms import load_rooms\n"
        "print('got', len(load_rooms('val', 70, 16, 20, cache_dir=sys.argv[1], workers=2)['image']))",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(file), str(tmp_path / "cache")], capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "got 70"


def test_importing_loads_no_torch_and_no_pillow() -> None:
    code = "import sys, simomerge.datasets.rooms; print([m for m in ('torch', 'PIL') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
