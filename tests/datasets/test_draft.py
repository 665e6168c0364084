"""Manifests drafted from folders, and labels that are stored as colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.datasets import load_data
from simomerge.datasets.check import check
from simomerge.datasets.draft import draft_manifest, write_draft
from simomerge.datasets.manifest import read_manifest
from simomerge.datasets.sheet import GAP, contact_sheet
from simomerge.datasets.stored import Stored, may_be_truncated
from simomerge.datasets.tasks import Task

RNG = np.random.default_rng(0)
COLOURS = ((0, 0, 255), (255, 0, 0), (9, 9, 9))
ROOM = Task("room", "segmentation", classes=("sky", "wall", "floor"), colours=COLOURS)


def save(path: Path, values: np.ndarray, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path, **more)
    return path


def photos(folder: Path, count: int = 20) -> Path:
    for index in range(count):
        save(folder / f"{index:03d}.jpg", RNG.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return folder


def fill(folder: Path, make: Callable[[], np.ndarray], name: str = "{:03d}.png", count: int = 20) -> Path:
    for index in range(count):
        save(folder / name.format(index), make())
    return folder


def metres() -> np.ndarray:
    return np.full((6, 8), 3000, np.uint16)


def drafted(folder: Path, **targets: Path) -> dict[str, Any]:
    """The manifest of a folder ``photos`` with some folders of targets, as written."""
    draft = draft_manifest(folder / "photos", targets, folder)
    write_draft(draft, folder / "data.yaml")
    assert check(read_manifest(folder / "data.yaml")).problems == []
    read: dict[str, Any] = yaml.safe_load((folder / "data.yaml").read_text())
    return read["tasks"]


# Drafts -------------------------------------------------------------------------------------------------


def test_a_draft_is_a_manifest_that_the_check_confirms(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    masks = fill(tmp_path / "masks", lambda: RNG.choice([0, 1, 2, 255], (6, 8)).astype(np.uint8), "{:03d}_mask.png")
    depth = fill(tmp_path / "depth", lambda: RNG.integers(500, 9000, (6, 8)).astype(np.uint16))
    tasks = drafted(tmp_path, masks=masks, depth=depth)
    assert tasks["masks"] == {
        "kind": "segmentation",
        "classes": ["class_0", "class_1", "class_2"],
        "ignore": [255],
    }
    assert tasks["depth"] == {"scale": 0.001}
    train, val, test = (load_data(tmp_path, split) for split in ("train", "val", "test"))
    assert [len(each) for each in (train, val, test)] == [14, 3, 3]
    assert set(train.tasks) == {"masks", "depth"}
    manifest = read_manifest(tmp_path / "data.yaml")
    assert [row.image.name for row in manifest.rows["val"]] == ["014.jpg", "015.jpg", "016.jpg"]  # neighbours
    assert manifest.rows["val"][0].targets["masks"].name == "014_mask.png"
    with pytest.raises(InputError, match="exists"):
        write_draft(draft_manifest(tmp_path / "photos", {"depth": depth}, tmp_path), tmp_path / "data.yaml")


GUESSES: dict[str, tuple[str, Callable[[], np.ndarray], dict[str, Any]]] = {
    "a mask of 0 and 255": ("roads", lambda: RNG.choice([0, 255], (6, 8)).astype(np.uint8), {"kind": "binary"}),
    "a mask of 0 and 1": ("roads", lambda: RNG.choice([0, 1], (6, 8)).astype(np.uint8), {"kind": "binary"}),
    "colours": (
        "room",
        lambda: np.array(COLOURS, np.uint8)[RNG.choice(3, (6, 8), p=[0.6, 0.3, 0.1])],
        {
            "kind": "segmentation",
            "classes": ["colour_0000ff", "colour_ff0000", "colour_090909"],
            "colours": [list(colour) for colour in COLOURS],
        },
    ),
    "normals": ("shape", lambda: np.full((6, 8, 3), (128, 128, 255), np.uint8), {"kind": "normals"}),
    "metres": ("depth", lambda: RNG.uniform(1, 9, (6, 8)).astype(np.float32), {}),
    "flow": ("motion", lambda: RNG.normal(size=(6, 8, 2)).astype(np.float32), {"kind": "flow"}),
    "edges of 0 and 1": ("edges", lambda: RNG.choice([0, 1], (6, 8)).astype(np.uint8), {"scale": 1}),
    "no value": (
        "depth",
        lambda: RNG.choice([65535, 2000, 3000], (6, 8)).astype(np.uint16),
        {"ignore": [65535], "scale": 0.001},
    ),
}


@pytest.mark.parametrize("case", GUESSES)
def test_kinds_units_and_ignored_values_are_guessed(tmp_path: Path, case: str) -> None:
    task, make, expected = GUESSES[case]
    photos(tmp_path / "photos")
    name = "{:03d}.npy" if make().dtype == np.float32 else "{:03d}.png"
    assert drafted(tmp_path, **{task: fill(tmp_path / task, make, name)})[task] == expected


def test_a_kind_that_was_given_is_kept(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    roads = fill(tmp_path / "roads", lambda: RNG.choice([0, 1], (6, 8)).astype(np.uint8))
    draft = draft_manifest(tmp_path / "photos", {"roads": roads}, tmp_path, {"roads": "segmentation"})
    assert draft.tasks["roads"] == {"kind": "segmentation", "classes": ["class_0", "class_1"]}
    write_draft(draft, tmp_path / "data.yaml")
    assert sorted(torch.unique(load_data(tmp_path, "train")[0]["roads"]).tolist()) == [0, 1]
    empty = fill(tmp_path / "empty", lambda: np.zeros((6, 8), np.uint8))
    draft = draft_manifest(tmp_path / "photos", {"empty": empty}, tmp_path, {"empty": "segmentation"})
    assert draft.tasks["empty"]["classes"] == ["class_0", "class_1"]
    white = fill(tmp_path / "white", lambda: RNG.choice([0, 255], (6, 8)).astype(np.uint8))
    with pytest.raises(InputError, match=r"white: the masks hold only 0 and 255, .*kind binary, or save 255 as 1"):
        draft_manifest(tmp_path / "photos", {"white": white}, tmp_path, {"white": "segmentation"})


def test_splits_of_folders_are_kept_and_whole_folders_stay_together(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        photos(tmp_path / "photos" / split, 2)
        fill(tmp_path / "depth" / split, metres, count=2)
    draft = draft_manifest(tmp_path / "photos", {"depth": tmp_path / "depth"}, tmp_path)
    assert [row["split"] for row in draft.rows] == ["test", "test", "train", "train", "val", "val"]
    other = tmp_path / "other"
    for scene in "abcdefgh":
        photos(other / "photos" / scene, 3)
        fill(other / "depth" / scene, metres, count=3)
    draft = draft_manifest(other / "photos", {"depth": other / "depth"}, other)
    split_of = {Path(row["image"]).parent.name: row["split"] for row in draft.rows}
    assert [split_of[scene] for scene in "abcdefgh"] == ["train"] * 6 + ["val"] + ["test"]
    assert all(split_of[Path(row["image"]).parent.name] == row["split"] for row in draft.rows)


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    photos(tmp_path / "disk" / "a")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "disk" / "a")
    fill(tmp_path / "depth" / "linked", metres)
    draft = draft_manifest(tmp_path / "photos", {"depth": tmp_path / "depth"}, tmp_path)
    assert len(draft.rows) == 20 and draft.rows[0]["image"] == "photos/linked/000.jpg"


def test_what_cannot_be_drafted_is_named(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    others = fill(tmp_path / "depth", metres, "x{:03d}y.png", count=1)
    with pytest.raises(InputError, match=r"none of its 1 files is named like an image \(first x000y\.png, and 000"):
        draft_manifest(tmp_path / "photos", {"depth": others}, tmp_path)
    noise = fill(tmp_path / "noise", lambda: RNG.integers(0, 255, (16, 18, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"cannot guess what 'noise' is .*--kind noise=KIND"):
        draft_manifest(tmp_path / "photos", {"noise": noise}, tmp_path)
    with pytest.raises(InputError, match="kind of 'dpth': there is no folder"):
        draft_manifest(tmp_path / "photos", {"noise": noise}, tmp_path, {"dpth": "depth"})
    with pytest.raises(InputError, match="no such folder"):
        draft_manifest(tmp_path / "photos", {"depth": tmp_path / "nothing"}, tmp_path)


# Labels as colours --------------------------------------------------------------------------------------


def test_colours_of_the_classes_are_labels(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [2, 2, 1]])
    colours = np.array(COLOURS, np.uint8)[labels]
    transparent = np.concatenate([colours, np.full((2, 3, 1), 7, np.uint8)], -1)
    indices = Image.fromarray(np.array([[2, 0, 1], [1, 1, 0]], np.uint8), "P")
    indices.putpalette([255, 0, 0, 9, 9, 9, 0, 0, 255])
    indices.save(tmp_path / "palette.png")
    for file in (save(tmp_path / "a.png", colours), save(tmp_path / "b.png", transparent)):
        assert Stored(ROOM).read(file).tolist() == labels.tolist()
    with pytest.raises(InputError, match="the indices of its palette are labels of room, and its colours are those of"):
        Stored(ROOM).read(tmp_path / "palette.png")
    moved = Image.fromarray(np.array([[5, 3, 4], [4, 4, 3]], np.uint8), "P")
    moved.putpalette([0] * 9 + [255, 0, 0, 9, 9, 9, 0, 0, 255])
    moved.save(tmp_path / "moved.png")
    assert Stored(ROOM).read(tmp_path / "moved.png").tolist() == labels.tolist()


def test_a_colour_of_no_class_is_named_or_ignored(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", np.array([[COLOURS[0], (0, 128, 0)]], np.uint8))
    with pytest.raises(InputError, match=r"1 colours of room belong to no class, first \[0, 128, 0\]; add them"):
        Stored(ROOM).read(file)
    assert Stored(ROOM, ignored_colours=((0, 128, 0),)).read(file).tolist() == [[0, -1]]
    manifest = tmp_path / "data.yaml"
    text = "images: [{image: a.png, room: a.png}]\ntasks:\n  room: {kind: segmentation, classes: [sky, wall], %s}\n"
    manifest.write_text(text % "colours: [[0, 0, 255], [1, 1, 1]], ignore: [255, [0, 128, 0]]")
    (stored,) = read_manifest(manifest).tasks
    assert stored.ignore == (255.0,) and stored.read(file).tolist() == [[0, -1]]
    manifest.write_text(text % "ignore: [[0, 128]]")
    with pytest.raises(InputError, match=r"give numbers, such as \[255\], or colours"):
        read_manifest(manifest)


def test_grey_pictures_stored_in_colour_are_read_as_grey(tmp_path: Path) -> None:
    grey = np.array([[0, 1, 2]], np.uint8)
    file = save(tmp_path / "a.png", np.repeat(grey[..., None], 3, -1))
    assert Stored(ROOM).read(file).tolist() == [[0, 1, 2]]
    assert Stored(Task("depth")).read(file).tolist() == [[[0, 1, 2]]]


def test_black_next_to_a_single_colour_is_a_class(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    red = np.zeros((6, 8, 3), np.uint8)
    red[:2] = 255, 0, 0
    tasks = drafted(tmp_path, masks=fill(tmp_path / "masks", lambda: red))
    assert tasks["masks"]["colours"] == [[0, 0, 0], [255, 0, 0]] and "ignore" not in tasks["masks"]
    only = fill(tmp_path / "only", lambda: red[:2])
    with pytest.raises(InputError, match=r"one colour \[255, 0, 0\], but a segmentation has two classes"):
        draft_manifest(tmp_path / "photos", {"only": only}, tmp_path, {"only": "segmentation"})


@pytest.mark.parametrize(
    ("name", "message"), [("one two", "letters, digits"), ("split", "split: no task can be called 'split'.*TASK=")]
)
def test_a_name_that_no_task_can_have_is_refused_before_files_are_read(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        draft_manifest(tmp_path / "missing", {name: tmp_path / name}, tmp_path)


# What a manifest must not merge -------------------------------------------------------------------------


def test_columns_and_splits_with_two_names_are_refused(tmp_path: Path) -> None:
    manifest = tmp_path / "data.csv"
    manifest.write_text("Image,image,depth\na.png,b.png,d.png\n")
    with pytest.raises(InputError, match="the columns 'Image' and 'image' are the same; remove one"):
        read_manifest(manifest)
    manifest.write_text("image,Depth,depth\na.png,b.png,d.png\n")
    with pytest.raises(InputError, match="the columns 'Depth' and 'depth' are the same"):
        read_manifest(manifest)
    manifest.write_text("image,split,depth\na.png,val,d.png\nb.png,dev,e.png\n")
    with pytest.raises(InputError, match="in the splits 'val' and 'dev', which both mean 'val'"):
        read_manifest(manifest)
    manifest.write_text("image,split,depth\na.png,Val,d.png\nb.png, val,e.png\n")
    assert len(read_manifest(manifest).rows["val"]) == 2


# The check and its sheet --------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_truncated_tiff_is_found_among_files_that_are_not_read(tmp_path: Path, compression: str | None) -> None:
    lines = ["image,split,depth"]
    for index in range(3):
        values = RNG.integers(1, 9, (60, 80)).astype(np.uint16)
        file = save(tmp_path / f"{index}.tif", values, **({"compression": compression} if compression else {}))
        assert not may_be_truncated(file)
        save(tmp_path / f"{index}.png", RNG.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        lines.append(f"{index}.png,train,{index}.tif")
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    file = tmp_path / "1.tif"
    whole = file.read_bytes()
    assert check(read_manifest(tmp_path / "data.csv"), count=1).problems == []
    file.write_bytes(whole[: len(whole) // 2])
    (problem,) = check(read_manifest(tmp_path / "data.csv"), count=1).problems
    assert "1.tif: cannot be read" in problem


def test_the_sheet_has_titles_and_a_legend(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    masks = fill(tmp_path / "room", lambda: np.array(COLOURS, np.uint8)[RNG.integers(0, 3, (6, 8))])
    draft = draft_manifest(tmp_path / "photos", {"room": masks}, tmp_path)
    write_draft(draft, tmp_path / "data.yaml")
    sheet = contact_sheet(read_manifest(tmp_path / "data.yaml"), images=2, height=120)
    legend = np.asarray(sheet)[2 * (120 + GAP + 16) :]
    assert len(legend) % 16 == 0 and len(legend) > 0
    for colour in COLOURS:
        assert (legend == colour).all(-1).sum() >= 50  # a square of the class's colour
    titles = np.asarray(sheet)[:16]
    assert (titles < 100).all(-1).sum() > 20 and (titles == 255).all(-1).any()


def test_labels_keep_their_colours_in_the_sheet(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    masks = fill(tmp_path / "room", lambda: np.array(COLOURS, np.uint8)[RNG.integers(0, 3, (6, 8))])
    write_draft(draft_manifest(tmp_path / "photos", {"room": masks}, tmp_path), tmp_path / "data.yaml")
    sheet = np.asarray(contact_sheet(read_manifest(tmp_path / "data.yaml"), images=1, height=120))
    enlarged = sheet[16 : 16 + 120, -160:].reshape(-1, 3)
    assert {tuple(colour) for colour in enlarged.tolist()} == {tuple(colour) for colour in COLOURS}
