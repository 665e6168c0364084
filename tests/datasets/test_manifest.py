"""A dataset of your own: every way to store a target, and every mistake in a manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from dataset_contract import FilePerTargetContract
from layouts import save
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.datasets import load_data
from simomerge.datasets.batches import ordered_batches
from simomerge.datasets.check import check
from simomerge.datasets.manifest import read_manifest
from simomerge.datasets.sheet import GAP, contact_sheet
from simomerge.datasets.stored import Stored, may_be_truncated, read_array
from simomerge.datasets.tasks import Task
from simomerge.training.evaluate import evaluate

H, W = 6, 8
CLASSES = ("wall", "floor", "chair")
RNG = np.random.default_rng(0)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Writes six images with three targets in two splits, and their manifest with some of its keys changed."""

    def write(name: str = "data.yaml", **changes: Any) -> Path:
        rows = []
        for index in range(6):
            rng = np.random.default_rng(index)
            normals = rng.standard_normal((3, H, W))
            save(tmp_path / f"images/{index}.png", rng.integers(0, 256, (H, W, 3), np.uint8))
            save(tmp_path / f"parts/{index}.png", rng.integers(0, 3, (H, W)).astype(np.uint8))
            save(tmp_path / f"depth/{index}.png", rng.integers(500, 4000, (H, W)).astype(np.uint16))
            save(tmp_path / f"normals/{index}.npy", (normals / np.linalg.norm(normals, axis=0)).astype(np.float32))
            rows.append(
                {
                    "image": f"images/{index}.png",
                    "split": "train" if index < 4 else "val",
                    "parts": f"parts/{index}.png",
                    "depth": f"depth/{index}.png",
                    "normals": f"normals/{index}.npy",
                }
            )
        tasks: dict[str, Any] = {
            "parts": {"kind": "segmentation", "classes": list(CLASSES)},
            "depth": {"scale": 0.001},
            "normals": {},
        }
        content = {"tasks": tasks, "images": rows} | changes
        (tmp_path / name).write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not None})
        )
        return tmp_path / name

    return write


class TestManifest(FilePerTargetContract):
    size = (H, W)
    files: Mapping[str, str] = {
        "image": "images/0.png",
        "parts": "parts/0.png",
        "depth": "depth/0.png",
        "normals": "normals/0.npy",
    }

    @pytest.fixture
    def root(self, make: Callable[..., Path]) -> Path:
        return make().parent


def test_a_count_is_spread_over_the_split_and_the_rest_is_the_rest(tmp_path: Path) -> None:
    save(tmp_path / "a.npy", np.ones((2, 2), np.float32))
    rows = [{"image": f"{index}.png", "split": "val", "depth": "a.npy"} for index in range(100)]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"tasks": {"depth": {}}, "images": rows}))

    def images(data: Any) -> list[int]:
        return [int(row.image.stem) for row in data.rows]

    def load(count: int | None = None, skip: int = 0) -> list[int]:
        return images(load_data(tmp_path / "data.yaml", "val", count, skip=skip))

    some, more = load(10), load(40)
    assert some == sorted(some) and set(some) < set(more) and len(more) == 40
    assert max(np.diff([-1, *some, 100])) <= 2 * 10  # evenly: no gap of more than two tenths
    held = load(20, skip=40)
    assert len(held) == 20 and not set(held) & set(more) and sorted(load(skip=40) + more) == list(range(100))
    assert load(200) == load() == list(range(100))
    full = load_data(tmp_path / "data.yaml", "val")
    assert images(full.take(10)) == some and len(set(images(full.take(10))) & set(images(full.skip(10)))) == 0
    parts = full.take(16)
    assert sorted(images(parts.take(8)) + images(parts.skip(8))) == images(parts)


# Reading ------------------------------------------------------------------------------------------------


def test_a_manifest_gives_samples_as_every_dataset_does(make: Callable[..., Path]) -> None:
    data = load_data(str(make()), split="train", tasks=["depth", "parts"])
    assert len(data) == 4 and list(data.tasks) == ["depth", "parts"] and data.tasks["parts"].classes == CLASSES
    sample = data[1]
    rng = np.random.default_rng(1)
    rng.standard_normal((3, H, W))
    image, parts = rng.integers(0, 256, (H, W, 3), np.uint8), rng.integers(0, 3, (H, W))
    depth = rng.integers(500, 4000, (H, W))
    torch.testing.assert_close(sample["image"], torch.from_numpy(image).permute(2, 0, 1) / 255)
    assert sample["parts"].dtype == torch.int64 and (sample["parts"].numpy() == parts).all()
    np.testing.assert_allclose(sample["depth"].numpy(), depth[None] / 1000, rtol=1e-6)
    batch = next(iter(ordered_batches(data, 3)))
    assert batch["image"].shape == (3, 3, H, W) and batch["parts"].shape == (3, H, W)


def test_a_csv_alone_or_named_by_the_yaml_or_its_folder(make: Callable[..., Path], tmp_path: Path) -> None:
    make("other.yaml")
    (tmp_path / "table.csv").write_text(
        "image,split,depth\nimages/0.png,train,depth/0.png\nimages/1.png,,depth/1.png\n"
    )
    (tmp_path / "data.yaml").write_text("images: table.csv\ntasks: {depth: {scale: 0.001}}\n")
    named, alone = load_data(str(tmp_path), split="train"), load_data(tmp_path / "table.csv", "train")
    assert len(named) == len(alone) == 1
    torch.testing.assert_close(1000 * named[0]["depth"], alone[0]["depth"])  # no scale: as stored
    assert len(load_data(str(tmp_path / "data.yaml"), split="test")) == 1  # without a split it is the test split


def test_images_without_labels_need_no_target(make: Callable[..., Path], tmp_path: Path) -> None:
    make()
    (tmp_path / "bare.csv").write_text("image\nimages/0.png\nimages/1.png\n")
    bare = load_data(tmp_path / "bare.csv", "test")
    assert list(bare.tasks) == [] and list(bare[0]) == ["image"] and len(bare) == 2
    (tmp_path / "part.csv").write_text("image,depth\nimages/0.png,depth/0.png\nimages/1.png,\n")
    assert list(load_data(tmp_path / "part.csv", "test").tasks) == []  # the second image has no depth
    assert list(load_data(tmp_path / "part.csv", "test", count=1).tasks) == ["depth"]


def test_size_makes_images_and_targets_alike(make: Callable[..., Path], tmp_path: Path) -> None:
    path = make(size=[3, 4])
    save(tmp_path / "images/1.png", np.zeros((30, 20, 3), np.uint8))
    data = load_data(path, "train")
    assert data[1]["image"].shape == (3, 3, 4)
    sample, full = data[0], load_data(make(), "train")[0]
    assert sample["normals"].shape == (3, 3, 4) and sample["parts"].shape == (3, 4)
    for name in ("parts", "depth"):  # the nearest pixel, no mixture
        assert set(sample[name].flatten().tolist()) <= set(full[name].flatten().tolist())
    assert sample["parts"].dtype == torch.int64 and sample["depth"].dtype == torch.float32
    torch.testing.assert_close(sample["normals"].square().sum(0), torch.ones(3, 4))


STORED: dict[str, tuple[Task, dict[str, Any], str, np.ndarray, np.ndarray]] = {
    "labels to ignore": (
        Task("parts", "segmentation", CLASSES),
        {"ignore": (255.0,)},
        "a.png",
        np.array([[0, 2], [255, 1]], np.uint8),
        np.array([[0, 2], [-1, 1]]),
    ),
    "labels in an array, -1 ignored": (
        Task("parts", "segmentation", CLASSES),
        {},
        "a.npy",
        np.array([[0, -1], [2, 1]], np.int16),
        np.array([[0, -1], [2, 1]]),
    ),
    "depth in metres with holes": (
        Task("depth"),
        {"ignore": (99.0,)},
        "a.npy",
        np.array([[1.5, np.nan], [99.0, -1.0]], np.float32),
        np.array([[[1.5, 0], [0, 0]]]),
    ),
    "16-bit depth": (
        Task("depth"),
        {"scale": 0.001},
        "a.png",
        np.array([[40_000, 0], [1, 65_535]], np.uint16),
        np.array([[[40.0, 0], [0.001, 65.535]]]),
    ),
    "disparity with ignored value": (
        Task("disparity"),
        {"scale": 0.5, "ignore": (4.0,)},
        "a.npy",
        np.array([[2, 4]], np.uint8),
        np.array([[[1.0, 0.0]]]),
    ),
    "8-bit normals, black is none": (
        Task("normals"),
        {},
        "a.png",
        np.array([[[255, 127, 127], [0, 0, 0]]], np.uint8),
        np.array([[[1.0, 0]], [[-0.0039, 0]], [[-0.0039, 0]]]),
    ),
    "normals to be made unit, channels last": (
        Task("normals"),
        {},
        "a.npy",
        np.array([[[0, 3, 4], [0, 0, 0]]], np.float64),
        np.array([[[0, 0]], [[0.6, 0]], [[0.8, 0]]]),
    ),
    "edges with unknown pixels": (
        Task("edges"),
        {"ignore": (128.0,)},
        "a.png",
        np.array([[0, 255, 128]], np.uint8),
        np.array([[[0.0, 1.0, -1.0]]]),
    ),
    "texture in 16 bits": (
        Task("texture"),
        {},
        "a.png",
        np.array([[0, 65_535]], np.uint16),
        np.array([[[0.0, 1.0]]]),
    ),
    "key points as floats with holes": (
        Task("keypoints"),
        {},
        "a.npy",
        np.array([[0.25, np.nan]], np.float32),
        np.array([[[0.25, np.nan]]]),
    ),
    "the image itself": (
        Task("autoencoder"),
        {},
        "a.png",
        np.array([[[255, 0, 51]]], np.uint8),
        np.array([[[1.0]], [[0.0]], [[0.2]]]),
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_targets_are_decoded(case: str, tmp_path: Path) -> None:
    task, how, name, stored, expected = STORED[case]
    found = Stored(task, **how).read(save(tmp_path / name, stored))
    assert found.dtype == (torch.int64 if task.kind == "segmentation" else torch.float32)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_a_palette_holds_labels_not_colours(tmp_path: Path) -> None:
    labels = np.array([[0, 1], [2, 1]], np.uint8)
    picture = Image.fromarray(labels, "P")
    picture.putpalette([200, 30, 30] * 3)
    picture.save(tmp_path / "a.png")
    assert (Stored(Task("parts", "segmentation", CLASSES)).read(tmp_path / "a.png").numpy() == labels).all()


def test_a_model_is_evaluated_on_it(make: Callable[..., Path], make_model: Callable[..., Any]) -> None:
    data = load_data(str(make(size=[16, 24])), split="val", tasks=["depth", "normals"])
    scores = evaluate(make_model([Task("depth"), Task("normals")]), data)
    assert np.isfinite([scores["depth"]["abs_err"], scores["normals"]["mean_angle"]]).all()


# Mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {}}, r"unknown key 'task'; did you mean 'tasks'\?"),
        ({"tasks": {"depth": {"scal": 1}}}, r"task 'depth': unknown key 'scal'; did you mean 'scale'\?"),
        ({"tasks": {"deph": {}}}, r"task 'deph' is of unknown kind 'deph'; did you mean 'depth'\?"),
        ({"tasks": {"parts": {"kind": "segmentation"}}}, "needs the names of at least two classes"),
        ({"tasks": {"image": {"kind": "depth"}}}, r"data\.yaml: no task can be called 'image'"),
        ({"tasks": {"depth": {"scale": 0}}}, "scale 0; give a number above 0"),
        ({"tasks": {"depth": {}, "normals": {}}}, "column 'parts' is not one of its tasks"),
        ({"tasks": [1]}, "'tasks' is a list; give a mapping"),
        ({"tasks": {"depth": 3}}, "task 'depth' is a int; give kind"),
        ({"images": []}, "neither a CSV file nor a list"),
        ({"images": "no.csv"}, r"no\.csv: no such file; 'images' names a CSV"),
        ({"images": [{"imgae": "x.png"}], "tasks": None}, "unknown kind 'imgae'"),
        ({"images": [{"imgae": "x.png", "depth": "y.png"}]}, "column 'imgae' is not one of its tasks"),
        ({"size": [480]}, r"size \[480\]; give \[height, width\]"),
    ],
)
def test_a_wrong_manifest_is_refused(changes: dict[str, Any], message: str, make: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=message):
        read_manifest(make(**changes))


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    for name, text, message in (
        ("a.yaml", "a: [", "not YAML"),
        ("b.yaml", "- 1", "holds no mapping"),
        ("c.csv", "image,depth\nx.png\n", "line 2 has more or fewer values"),
        ("d.csv", "image,parts\nx.png,y.png\n", "unknown kind 'parts'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            read_manifest(tmp_path / name)
    for path, message in ((tmp_path, "no data.yaml or data.csv in it"), (tmp_path / "no.yaml", "no such file")):
        with pytest.raises(InputError, match=message):
            read_manifest(path)


def test_wrong_files_name_themselves(make: Callable[..., Path], tmp_path: Path) -> None:
    data = load_data(make(), "train")
    save(tmp_path / "parts/0.png", np.full((H, W), 7, np.uint8))
    with pytest.raises(
        InputError, match=r"parts.0\.png: label 7 of parts, which has classes 0 to 2; name it under ignore"
    ):
        data[0]
    save(tmp_path / "parts/0.png", np.full((H, W, 3), (0, 1, 2), np.uint8))
    with pytest.raises(InputError, match=r"parts of shape \(6, 8, 3\); give \(H, W\)"):
        data[0]
    (tmp_path / "depth/1.png").write_text("no picture")
    with pytest.raises(InputError, match=r"depth.1\.png: cannot be read"):
        data[1]
    (tmp_path / "depth/2.png").unlink()
    with pytest.raises(InputError, match=r"depth.2\.png: no such file"):
        data[2]
    save(tmp_path / "images/3.png", np.zeros((9, 5, 3), np.uint8))
    with pytest.raises(InputError, match=r"is 5 x 9 pixels, the first image 8 x 6: add `size: \[6, 8\]`"):
        data[3]
    with pytest.raises(InputError, match="no split 'test'; it has train, val"):
        load_data(str(make()), split="test")


# The check ----------------------------------------------------------------------------------------------


def test_a_good_dataset_has_nothing_to_fix(make: Callable[..., Path]) -> None:
    manifest = read_manifest(make())
    found = check(manifest)
    assert found.problems == [] and found.images == {"train": 4, "val": 2}
    described = found.to_dict()["splits"]["train"]
    assert described["sizes"] == {"8x6": 4} and described["tasks"]["depth"]["images"] == 4
    labels = np.concatenate([load_data(manifest.path, "train")[i]["parts"].numpy().ravel() for i in range(4)])
    assert described["tasks"]["parts"]["classes"] == {
        name: pytest.approx(float((labels == i).mean()), abs=1e-4) for i, name in enumerate(CLASSES)
    }
    depths = torch.stack([load_data(manifest.path, "train")[i]["depth"] for i in range(4)])
    assert described["tasks"]["depth"]["mean"] == pytest.approx(float(depths.mean()))
    json.dumps(found.to_dict())
    sheet = contact_sheet(manifest, images=3, height=30)
    assert sheet.width == 4 * 40 + 3 * GAP and (sheet.height - 3 * (30 + GAP + 16)) % 16 == 0
    assert sheet.getpixel((3, 19)) != (255, 255, 255)


def test_the_usual_mistakes_are_found(make: Callable[..., Path], tmp_path: Path) -> None:
    tasks = {"parts": {"kind": "segmentation", "classes": [*CLASSES, "lamp"]}, "depth": {}, "normals": {}}
    rows = yaml.safe_load(make().read_text())["images"]
    rows.append({**rows[0], "split": "val"})
    rows.append({"image": "images/gone.png", "split": "val"})
    manifest = read_manifest(make(tasks=tasks, images=rows))
    save(tmp_path / "images/1.png", np.zeros((10, 4, 3), np.uint8))
    save(tmp_path / "parts/2.png", np.full((H, W), 200, np.uint8))
    save(tmp_path / "normals/3.npy", np.full((3, H, W), 0.2, np.float32))
    (tmp_path / "images/4.png").write_text("broken")
    problems = "\n".join(check(manifest).problems)
    for expected in (
        "1 of 29 files are not there",
        "1 images are in two splits, first",
        "depth (train): median depth 2,",
        "add `scale: 0.001`",
        "normals of length 0.35, not 1",
        "label 200 of parts",
        "is 8 x 6 pixels, its image 4 x 10",
        "images of 2 sizes (8 x 6, 4 x 10)",
        "4.png: cannot be read",
        "no pixel of lamp",
    ):
        assert expected in problems, (expected, problems)


# After a review ------------------------------------------------------------------------------------------


def manifest_of(folder: Path, tasks: str, rows: list[str], columns: str = "image,split,depth", size: str = "") -> Path:
    (folder / "images.csv").write_text("\n".join([columns, *rows]) + "\n")
    (folder / "data.yaml").write_text(f"images: images.csv\n{size}tasks:\n{tasks}")
    return folder / "data.yaml"


def picture(path: Path, height: int, width: int) -> None:
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)


def test_portraits_among_landscapes_and_targets_of_another_size_are_reported(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 6, 8)
    picture(tmp_path / "b.png", 8, 6)
    np.save(tmp_path / "a.npy", np.ones((6, 8), np.float32))
    np.save(tmp_path / "b.npy", np.ones((8, 6), np.float32))
    np.save(tmp_path / "c.npy", np.ones((3, 4), np.float32))
    path = manifest_of(tmp_path, "  depth: {}\n", ["a.png,train,a.npy", "b.png,train,b.npy", "a.png,val,c.npy"])
    with pytest.raises(InputError, match=r"b\.png is 6 x 8 pixels, the first image 8 x 6: add `size: \[6, 8\]`"):
        load_data(path, "train")[1]
    with pytest.raises(InputError, match=r"c\.npy is 4 x 3 pixels, its image 8 x 6: add `size:"):
        load_data(path, "val")[0]
    assert load_data(path, "val", size=(6, 8))[0]["depth"].shape == (1, 6, 8)


def test_a_hole_is_reported_by_the_check_and_to_who_asks_for_the_task(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 6, 8)
    picture(tmp_path / "b.png", 6, 8)
    np.save(tmp_path / "a.npy", np.ones((6, 8), np.float32))
    path = manifest_of(tmp_path, "  depth: {}\n", ["a.png,train,a.npy", "b.png,train,"])
    with pytest.raises(InputError, match=r"1 of 2 images have no target of 'depth', first .*b\.png"):
        load_data(path, "train").select(["depth"])
    problems = check(read_manifest(path)).problems
    assert any("1 of 2 images of train have no target of depth, first" in problem for problem in problems)


def test_a_fingerprint_changes_with_the_files_and_with_what_is_said_of_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 6, 8)
    np.save(tmp_path / "a.npy", np.ones((6, 8), np.float32))
    rows = ["a.png,train,a.npy"]
    path = manifest_of(tmp_path, "  depth: {}\n", rows)
    first = load_data(path, "train").fingerprint()
    assert load_data(path, "train").fingerprint() == first
    manifest_of(tmp_path, "  depth: {scale: 0.001}\n", rows)
    scaled = load_data(path, "train").fingerprint()
    np.save(tmp_path / "a.npy", np.ones((7, 9), np.float32))
    assert (
        len(
            {first, scaled, load_data(path, "train").fingerprint(), load_data(path, "train", size=(3, 4)).fingerprint()}
        )
        == 4
    )


def test_ignoring_a_value_of_vectors_means_all_three(tmp_path: Path) -> None:
    normals = np.array([[[0, 0, 1], [0, 0, 0]]], np.float32)
    np.save(tmp_path / "n.npy", normals)
    read = Stored(Task("normals"), ignore=(0.0,)).read(tmp_path / "n.npy")
    assert read[:, 0, 0].tolist() == [0, 0, 1] and read[:, 0, 1].tolist() == [0, 0, 0]
    np.save(tmp_path / "d.npy", np.array([[65.535, 2]], np.float32))
    assert Stored(Task("depth"), ignore=(65.535,)).read(tmp_path / "d.npy").flatten().tolist() == [0, 2]


def test_an_ignored_value_that_the_files_cannot_hold_ignores_nothing(tmp_path: Path) -> None:
    parts = Task("parts", "segmentation", ("a", "b"))
    stored = Stored(parts, ignore=(255.0, -1.0, 0.5))
    for dtype, values, expected in ((np.uint8, [255, 1], [-1, 1]), (np.int8, [-1, 1], [-1, 1])):
        path = save(tmp_path / "a.npy", np.array([values], dtype))
        assert stored.read(path).flatten().tolist() == expected
    path = save(tmp_path / "a.npy", np.array([[-1, 1]], np.int8))
    assert Stored(Task("depth"), ignore=(255.0,)).array(path).tolist() == [[-1, 1]]
    assert not np.isin([-1, 1], Stored(parts, ignore=(255.0,))._ignored(np.dtype(np.int8))).any()
    path = save(tmp_path / "a.npy", np.array([[True, False]]))
    assert Stored(parts, ignore=(255.0, float("nan"))).read(path).tolist() == [[1, 0]]


def test_complete_files_that_seem_truncated_pass(tmp_path: Path) -> None:
    """A JPEG that is called a PNG, and a PNG with much behind its end, as some cameras' software writes."""
    noise = RNG.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    longer = save(tmp_path / "b.png", noise)
    longer.write_bytes(longer.read_bytes() + bytes(500))
    assert not may_be_truncated(tmp_path / "a.png") and may_be_truncated(longer)
    half = tmp_path / "half.jpg"
    half.write_bytes((tmp_path / "a.png").read_bytes()[:200])
    assert may_be_truncated(half)
    for kind in ("npy", "tif", "bmp", "webp", "ppm", "gif"):
        assert not may_be_truncated(save(tmp_path / f"c.{kind}", noise)), kind
    rows = [{"image": name, "split": "val", "autoencoder": name} for name in ("a.png", "b.png")]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"tasks": {"autoencoder": {}}, "images": rows}))
    load_data(tmp_path / "data.yaml", "val").check_files(deeply=True)
    longer.write_bytes(longer.read_bytes()[:300])
    with pytest.raises(InputError, match=r"b\.png: cannot be read"):
        load_data(tmp_path / "data.yaml", "val").check_files(deeply=True)


def test_a_tiff_of_32_bits_with_small_numbers_stays_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", np.array([[3, 700]], np.int32))
    assert read_array(path).dtype == np.int32
    assert read_array(save(tmp_path / "a.png", np.array([[3, 700]], np.uint16))).dtype == np.uint16


def test_an_autoencoder_is_to_give_images_as_encoders_see_them(tmp_path: Path) -> None:
    grey, turned = Image.new("L", (4, 2), 100), Image.new("RGB", (4, 2), (9, 8, 7))
    turned.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter
    grey.save(tmp_path / "a.png")
    turned.save(tmp_path / "b.png", exif=exif)
    (tmp_path / "data.csv").write_text("image,split,autoencoder\na.png,val,b.png\n")
    target = load_data(tmp_path / "data.csv", "val").targets(0, ["autoencoder"])["autoencoder"]
    assert target.shape == (3, 4, 2) and target[0, 0, 1] == 1
    (tmp_path / "data.csv").write_text("image,split,autoencoder\nb.png,val,a.png\n")
    target = load_data(tmp_path / "data.csv", "val").targets(0, ["autoencoder"])["autoencoder"]
    assert target.shape == (3, 4, 2) and torch.allclose(target, torch.tensor(100 / 255))  # turned as its image is


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("  depth: {ignore: '21'}\n", r"ignore '21'; give numbers"),
        ("  depth: {kind: segmentation, classes: wall, floor: 1}\n", "unknown key 'floor'"),
        ("  depth: {kind: segmentation, classes: wall}\n", "classes 'wall'; give a list of names, each once"),
        ("  depth: {kind: segmentation, classes: [a, a]}\n", r"classes \['a', 'a'\]; give a list of names, each once"),
        ("  depth: {scale: small}\n", "scale 'small'; give a number above 0"),
    ],
)
def test_strings_are_not_taken_apart(tmp_path: Path, tasks: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_manifest(manifest_of(tmp_path, tasks, ["a.png,train,a.npy"]))


def test_what_is_left_empty_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    path = manifest_of(
        tmp_path, "  depth: {scale: 1e-3, ignore: , classes: }\n", ["a.png,0,a.npy"], size="root:\nsize:\n"
    )
    read = read_manifest(path)
    assert read.stored["depth"].scale == 1e-3 and read.rows["0"][0].image == tmp_path / "a.png"
    assert list(read.rows) == ["0"]
    with pytest.raises(InputError, match="count is 0; give a whole number of 1 or more"):
        load_data(path, "0", 0)


def test_a_root_may_be_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = manifest_of(tmp_path, "  depth: {}\n", ["a.png,train,a.npy"], size="root: ~/scenes\n")
    assert read_manifest(path).rows["train"][0].image == tmp_path / "home" / "scenes" / "a.png"


def test_several_arrays_are_no_target(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as handle:
        np.savez(handle, a=np.ones(3))
    with pytest.raises(InputError, match=r"a\.npy: cannot be read \("):
        Stored(Task("depth")).read(tmp_path / "a.npy")


def test_transparency_and_scaled_integers_are_no_long_normals(tmp_path: Path) -> None:
    up = np.zeros((4, 5, 4), np.uint8)
    up[...] = (128, 128, 255, 255)
    Image.fromarray(up, "RGBA").save(tmp_path / "n.png")
    np.save(tmp_path / "n.npy", np.broadcast_to(np.array([0, 0, 32767], np.int16), (4, 5, 3)))
    picture(tmp_path / "a.png", 4, 5)
    for target, of in (("n.png", "{}"), ("n.npy", "{scale: 3.0518509e-5}")):
        path = manifest_of(tmp_path, f"  normals: {of}\n", [f"a.png,train,{target}"], "image,split,normals")
        assert check(read_manifest(path)).problems == []
        read = load_data(path, "train")[0]["normals"]
        assert torch.allclose(read[:, 0, 0], torch.tensor([0.0, 0, 1]), atol=0.02)


def test_one_bad_target_takes_nothing_else_from_the_contact_sheet(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 6, 8)
    np.save(tmp_path / "d.npy", np.arange(1, 49, dtype=np.float32).reshape(6, 8))
    (tmp_path / "n.npy").write_bytes(b"no array")
    tasks = "  normals: {}\n  depth: {}\n"
    path = manifest_of(tmp_path, tasks, ["a.png,train,n.npy,d.npy"], "image,split,normals,depth")
    sheet = contact_sheet(read_manifest(path), images=1, height=12)
    assert sheet.width == 2 * 16 + GAP  # the image and its depth


def test_values_out_of_range_and_nothing_valid_are_reported(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 2, 2)
    for name, values in (("low", [[-0.7, 0.5], [1, -1]]), ("high", [[0.5, 3], [1, 1]]), ("none", [[-1, -1], [-1, -1]])):
        np.save(tmp_path / f"{name}.npy", np.array(values, np.float32))
    for target, message in (
        ("low", r"edges \(train\): values from -0\.7 to 1, not in \[0, 1\]"),
        ("high", r"edges \(train\): values from 0\.5 to 3, not in"),
        ("none", r"edges \(train\): no valid pixel in 1 images"),
    ):
        path = manifest_of(tmp_path, "  edges: {}\n", [f"a.png,train,{target}.npy"], "image,split,edges")
        (problem,) = check(read_manifest(path)).problems
        assert re.match(message, problem)
