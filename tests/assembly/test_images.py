"""Images for merging and re-alignment: at the experts' training size, with a warning where they do not suit them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simomerge.assembly.images import check_images, prepare
from simomerge.assembly.realign.teacher import observe
from simomerge.checkpoints.experts import is_other_size, trained_size
from simomerge.core.errors import InputError
from simomerge.core.images import cropped
from simomerge.core.progress import show_progress
from simomerge.datasets.base import DenseDataset
from simomerge.datasets.load import load_data, load_images
from simomerge.datasets.pictures import as_images
from simomerge.datasets.tasks import Task
from simomerge.models.model import SimoModel
from simomerge.training.familiarity import training_images


def picture(seed: int, height: int = 24, width: int = 32, mean: float = 128, spread: float = 50) -> np.ndarray:
    coarse = np.random.default_rng(seed).normal(mean, spread, (3, 4, 3)).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


@pytest.fixture
def experts(make_model: Callable[..., SimoModel]) -> dict[str, SimoModel]:
    """An expert that records what it was trained on: 40 pictures of 24 x 32 pixels."""
    expert = make_model([Task("depth")])
    trained = training_images(expert, as_images([picture(seed) for seed in range(40)]))
    expert.provenance = {"training": trained}
    return {"depth": expert}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (height, width) in enumerate([(48, 64), (48, 64), (90, 60)] * 6):
        Image.fromarray(picture(seed, height, width)).save(tmp_path / f"{seed:02}.png")
    return tmp_path


def test_pictures_get_the_training_size_undistorted_and_a_line_says_so(
    experts: dict[str, SimoModel], folder: Path
) -> None:
    lines: list[str] = []
    with show_progress(lambda label, done, total, note: lines.append(f"{label} {done}/{total} {note}")):
        images = prepare(folder, experts, count=9)
    assert len(images) == 9 and {tuple(images.image(index).shape) for index in range(9)} == {(3, 24, 32)}
    assert lines == ["images 9/9 cut and resized to 32 x 24 pixels, the experts' training size; size own keeps theirs"]
    tall = torch.from_numpy(picture(2, 90, 60).copy()).permute(2, 0, 1)[None]
    middle = torch.nn.functional.interpolate(tall[:, :, 22:67], (24, 32), mode="bilinear", antialias=True)
    every = prepare(folder, experts)
    torch.testing.assert_close(every.image(2), middle[0].float() / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "shapes"),
    [("own", {(48, 64), (90, 60)}), ("12x20", {(12, 20)}), ((12, 20), {(12, 20)})],
)
def test_another_size_can_be_asked_for(
    experts: dict[str, SimoModel], folder: Path, size: Any, shapes: set[tuple[int, int]]
) -> None:
    images = prepare(folder, experts, size=size)
    assert {tuple(images.image(index).shape[1:]) for index in range(3)} == shapes


def test_without_a_recorded_size_pictures_keep_theirs(experts: dict[str, SimoModel], folder: Path) -> None:
    assert prepare(folder, {"depth": SimoModel(experts["depth"].encoder, {}, {})}).image(0).shape == (3, 48, 64)


class Labelled(DenseDataset):
    def image(self, index: int) -> Tensor:
        return torch.zeros(3, 48, 64)

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        return {}


def of_two_sizes(experts: dict[str, SimoModel]) -> dict[str, SimoModel]:
    small = SimoModel(experts["depth"].encoder, {}, {}, {"training": {"size": [10, 12]}})
    return {**experts, "normals": small, "edges": small}


def test_pictures_keep_their_size_if_the_experts_have_several(experts: dict[str, SimoModel], folder: Path) -> None:
    several = of_two_sizes(experts)
    for source in (folder, Labelled({}, 4)):
        assert prepare(source, several).image(0).shape == (3, 48, 64)
    assert prepare(folder, several, size="12x20").image(0).shape == (3, 12, 20)
    assert prepare(folder, {task: several[task] for task in ("normals", "edges")}).image(0).shape == (3, 10, 12)


def test_every_expert_of_another_size_than_the_images_is_named(experts: dict[str, SimoModel]) -> None:
    several = of_two_sizes(experts)
    sketches = {"depth": torch.randn(32, 5, generator=torch.Generator().manual_seed(0))}
    for size, named in (((24, 32), "12 x 10 (normals, edges)"), ((48, 64), "32 x 24 (depth) and 12 x 10")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_images({**several, "depth": without_features(experts)}, sketches, size, 32)
        (said,) = [str(each.message) for each in caught]
        assert f"the images have {size[1]} x {size[0]} pixels, those that the experts were trained on {named}" in said


def without_features(experts: dict[str, SimoModel]) -> SimoModel:
    """The expert as an import records it: with its size alone."""
    return SimoModel(experts["depth"].encoder, {}, {}, {"training": {"size": [24, 32]}})


@pytest.mark.parametrize("recorded", [None, [24], [24, "32"], [24, -1], "24x32", [24, True]])
def test_a_size_that_is_none_is_not_used(make_model: Callable[..., SimoModel], recorded: Any) -> None:
    assert trained_size({"training": {"size": recorded}}) is None


def test_a_merged_model_has_the_size_of_its_experts(make_model: Callable[..., SimoModel]) -> None:
    small, large, unknown = (
        SimoModel(make_model({}).encoder, {}, {}, {"training": {"size": size}} if size else {})
        for size in ([24, 32], [48, 64], None)
    )
    assert small.origin()["size"] == [24, 32] and "size" not in unknown.origin()

    def merged(*experts: SimoModel) -> tuple[int, int] | None:
        return trained_size({"experts": {str(index): expert.origin() for index, expert in enumerate(experts)}})

    assert merged(small, small) == (24, 32) and merged(small, large) is None and merged(small, unknown) is None


def test_twice_the_pixels_is_another_size() -> None:
    assert not is_other_size((24, 64), (24, 32)) and not is_other_size((12, 32), (24, 32))
    assert is_other_size((25, 64), (24, 32)) and is_other_size((11, 32), (24, 32))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 1), (7, 5)])
def test_a_crop_is_the_largest_part_at_the_centre(shape: tuple[int, int]) -> None:
    image = torch.arange(40 * 60).reshape(1, 1, 40, 60)
    found = cropped(image, shape)
    height, width = found.shape[2:]
    assert abs(height / width - shape[0] / shape[1]) < 0.05 and (height == 40 or width == 60)
    top, left = divmod(int(found[0, 0, 0, 0]), 60)
    assert abs(top - (40 - height) / 2) <= 0.5 and abs(left - (60 - width) / 2) <= 0.5


# Warnings -----------------------------------------------------------------------------------------------


def messages(experts: dict[str, SimoModel], pictures: list[np.ndarray]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(observe(experts, as_images(pictures)))
    return [str(each.message) for each in caught]


def test_images_like_those_of_the_training_are_no_reason_to_warn(experts: dict[str, SimoModel]) -> None:
    assert messages(experts, [picture(seed) for seed in range(100, 132)]) == []


def test_unsuitable_images_are_a_warning_with_the_evidence(experts: dict[str, SimoModel]) -> None:
    (few,) = messages(experts, [picture(seed) for seed in range(100, 108)])
    assert few.startswith("8 images are few")
    unlike = messages(experts, [picture(seed, mean=20, spread=10) for seed in range(32)])
    assert any("standard deviations away (expert depth)" in text for text in unlike)
    alike = messages(experts, [picture(0) + np.uint8(seed % 2) for seed in range(32)])
    assert any(text.startswith("the images are alike") for text in alike)
    large = messages(experts, [picture(seed, 48, 64) for seed in range(32)])
    assert any("have 64 x 48 pixels, those that the experts were trained on 32 x 24" in text for text in large)


def test_frames_of_one_video_are_a_warning_and_the_same_frames_in_another_order_are_not(
    experts: dict[str, SimoModel],
) -> None:
    scenes = [picture(seed).astype(float) for seed in range(5)]
    places = np.linspace(0, 3.999, 24)
    frames = [
        ((1 - place % 1) * scenes[int(place)] + place % 1 * scenes[int(place) + 1]).astype(np.uint8) for place in places
    ]
    (said,) = [text for text in messages(experts, frames) if "video" in text]
    assert said.startswith("the 24 images seem to be frames of one video")
    shuffled = [frames[place] for place in np.random.default_rng(0).permutation(24)]
    assert not any("video" in text for text in messages(experts, shuffled))


def test_the_distance_from_the_training_images_is_shown(experts: dict[str, SimoModel]) -> None:
    lines: list[str] = []
    with show_progress(lambda label, done, total, note: lines.append(note)):
        list(observe(experts, as_images([picture(seed) for seed in range(100, 132)])))
    (near,) = [line for line in lines if "standard deviations" in line]
    lines.clear()
    with show_progress(lambda label, done, total, note: lines.append(note)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(observe(experts, as_images([picture(seed, mean=20, spread=10) for seed in range(32)])))
    (far,) = [line for line in lines if "standard deviations" in line]
    shown = [float(line.split()[2]) for line in (near, far)]
    assert shown[0] < 0.6 and shown[1] > 1.1


# What may be given --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [3, 4])
def test_copies_are_counted(experts: dict[str, SimoModel], copies: int) -> None:
    pictures = [picture(seed) for seed in range(20 - copies)]
    said = [text for text in messages(experts, pictures + pictures[:copies]) if "copies" in text]
    assert said == (
        ["4 of 20 images are copies of others, and add nothing; give different ones."] if copies > 3 else []
    )


def test_images_may_be_a_dataset_by_name_with_all_splits_but_the_test_split() -> None:
    joined = load_data("rooms", {"train": 6, "val": 4}, tasks=["depth"])
    assert len(joined) == 10 and list(joined.tasks) == ["depth"]
    train, val = load_data("rooms", "train", 6), load_data("rooms", "val", 4)
    assert torch.equal(joined[5]["image"], train[5]["image"]) and torch.equal(joined[6]["image"], val[0]["image"])
    assert torch.equal(joined[9]["depth"], val[3]["depth"])
    some = joined.take(4)
    assert len(some) == 4 and len({float(some[index]["image"].sum()) for index in range(4)}) == 4
    assert len(load_images("rooms", "val")) == 256


def test_a_folder_with_a_manifest_is_a_dataset_and_its_labels_are_no_pictures(folder: Path) -> None:
    rows = "".join(f"{index:02}.png,{'test' if index > 11 else 'train'},{index:02}.png\n" for index in range(18))
    (folder / "images.csv").write_text("image,split,texture\n" + rows)
    (folder / "data.yaml").write_text("images: images.csv\ntasks: {texture: {}}\nsize: [24, 32]\n")
    found = load_images(folder)
    assert len(found) == 12 and not found.tasks
    assert len(load_images(folder, "train+test")) == 18
    (folder / "data.yaml").unlink()
    assert load_images(folder) == folder
    with pytest.raises(InputError, match="is a folder of pictures and has no splits"):
        load_images(folder, "train")
