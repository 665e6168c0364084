"""The interface of all datasets, on rooms: samples, subsets, mirroring, crossing processes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from dataset_contract import DatasetContract
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset, load_data, random_flip
from simomerge.datasets.tasks import KINDS, Task

SIZE = (24, 32)


@pytest.fixture(scope="module")
def rooms() -> DenseDataset:
    return load_data("rooms", split="train", count=8, size=SIZE)


class Decides:
    """A generator that mirrors, or does not."""

    def __init__(self, mirrors: bool) -> None:
        self.value = 0.75 if mirrors else 0.25

    def random(self) -> float:
        return self.value


def sample_of_every_kind() -> tuple[dict[str, Task], dict[str, Tensor]]:
    tasks = {kind: Task(kind, kind, classes=("a", "b", "c")) for kind in KINDS}
    generator = torch.Generator().manual_seed(0)
    sample: dict[str, Tensor] = {"image": torch.rand(3, 4, 6, generator=generator)}
    for name, task in tasks.items():
        if task.kind == "segmentation":
            sample[name] = torch.randint(-1, 3, (4, 6), generator=generator)
        else:
            sample[name] = torch.randn(task.channels, 4, 6, generator=generator)
    return tasks, sample


# Mirroring ----------------------------------------------------------------------------------------------


def test_mirroring_reverses_the_columns_of_everything_and_negates_the_x_of_normals() -> None:
    tasks, sample = sample_of_every_kind()
    flipped = random_flip(tasks, sample, Decides(True))
    assert flipped.keys() == sample.keys()
    for name, value in sample.items():
        expected = torch.from_numpy(np.ascontiguousarray(value.numpy()[..., ::-1]))
        if name in ("normals", "flow"):
            expected = torch.cat([-expected[:1], expected[1:]])
        assert torch.equal(flipped[name], expected), name


@pytest.mark.parametrize("mirrors", [True, False])
def test_the_same_decision_twice_is_no_change(mirrors: bool) -> None:
    tasks, sample = sample_of_every_kind()
    before = {name: value.clone() for name, value in sample.items()}
    twice = random_flip(tasks, random_flip(tasks, sample, Decides(mirrors)), Decides(mirrors))
    assert all(torch.equal(twice[name], before[name]) for name in before)
    assert all(torch.equal(sample[name], before[name]) for name in before)  # and the sample given is as it was


def test_normals_of_any_name_are_mirrored_and_half_of_the_samples_are() -> None:
    tasks = {"surface": Task("surface", "normals")}
    sample = {"surface": torch.ones(3, 2, 2)}
    signs = [float(random_flip(tasks, sample, np.random.default_rng(seed))["surface"][0, 0, 0]) for seed in range(400)]
    assert 150 < signs.count(-1.0) < 250 and set(signs) == {1.0, -1.0}


def test_a_mirrored_room_is_the_room_in_a_mirror(rooms: DenseDataset) -> None:
    """A point to the left of the camera with a normal to the left has, mirrored, one to the right."""
    sample = rooms[0]
    flipped = random_flip(rooms.tasks, sample, Decides(True))
    left, right = sample["normals"][:, :, 3], flipped["normals"][:, :, SIZE[1] - 1 - 3]
    assert torch.equal(left[0], -right[0]) and torch.equal(left[1:], right[1:])
    assert float(left[0].abs().max()) > 0


# Samples ------------------------------------------------------------------------------------------------


class TestRooms(DatasetContract):
    @pytest.fixture
    def data(self, rooms: DenseDataset) -> DenseDataset:
        return rooms

    def test_every_pixel_of_every_task_is_valid(self, rooms: DenseDataset) -> None:
        assert len(rooms.tasks) == 7 and rooms[0]["image"].shape == (3, *SIZE)
        for index in range(len(rooms)):
            sample = rooms[index]
            assert all(task.valid(sample[name][None]).all() for name, task in rooms.tasks.items())
            assert set(sample["edges"].unique().tolist()) <= {0.0, 1.0}
            assert torch.equal(sample["autoencoder"], sample["image"])


# Subsets ------------------------------------------------------------------------------------------------


def test_take_gives_the_first_images(rooms: DenseDataset) -> None:
    few = rooms.take(3)
    assert len(few) == 3 and len(rooms) == 8
    assert torch.equal(few[2]["image"], rooms[2]["image"])
    with pytest.raises(IndexError):
        few[3]


def test_skip_is_what_take_leaves(rooms: DenseDataset) -> None:
    rest = rooms.skip(3).select(["depth", "normals"])
    assert (
        len(rest) == 5 and rest.fingerprint() == rooms.fingerprint() and list(rest[0]) == ["image", "depth", "normals"]
    )
    assert all(torch.equal(rest[4][name], rooms[7][name]) for name in rest[4])
    assert torch.equal(rest.take(2).targets(1, ["depth"])["depth"], rooms[4]["depth"])
    with pytest.raises(IndexError):
        rest[5]
    assert rooms.skip(0) is rooms
    again = load_data("rooms", "val", 5, ("depth",), skip=3)
    assert torch.equal(again[4]["image"], load_data("rooms", "val", 8)[7]["image"]) and len(again) == 5


# Crossing processes -------------------------------------------------------------------------------------


def test_a_pickle_maps_the_same_files_instead_of_copying_them(rooms: DenseDataset) -> None:
    view = rooms.take(5).select(["depth", "segmentation"])
    data = pickle.dumps(view)
    assert len(data) < 4000  # one image alone is more
    again: Any = pickle.loads(data)
    assert len(again) == 5 and list(again.tasks) == ["depth", "segmentation"]
    assert all(torch.equal(again[4][name], value) for name, value in view[4].items())

    def file_of(dataset: Any) -> str:
        array = dataset.arrays["depth"]
        while not hasattr(array, "filename"):
            array = array.base
        return str(array.filename)

    assert file_of(again.source) == file_of(rooms)


# Finding ------------------------------------------------------------------------------------------------


def test_load_data_selects_tasks_and_counts() -> None:
    data = load_data("rooms", split="val", count=3, tasks="depth,edges", size=SIZE)
    assert len(data) == 3 and list(data.tasks) == ["depth", "edges"]


def test_splits_have_other_images(rooms: DenseDataset) -> None:
    other = load_data("rooms", split="val", count=3, size=SIZE)
    assert not torch.equal(other[0]["image"], rooms[0]["image"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "room"}, "unknown dataset 'room'; did you mean 'rooms'"),
        ({"spec": "nyuv2:/data"}, "NYUv2 is not here: neither the folder"),
        ({"spec": "rooms", "split": "tets", "count": 2}, "split"),
        ({"spec": "rooms", "count": -2}, "count is -2; give a whole number of 1 or more"),
        ({"spec": "rooms", "count": 0}, "count is 0; give a whole number of 1 or more"),
        ({"spec": "rooms", "count": 1.5}, r"count is 1\.5; give a whole number of 1 or more"),
        ({"spec": "rooms", "split": "train+val", "count": 0}, "count is 0"),
        ({"spec": "rooms", "split": {"train": 0}}, "count is 0"),
        ({"spec": "rooms", "skip": 1.5}, r"skip is 1\.5; give a whole number of 0 or more"),
        ({"spec": "rooms", "sise": (32, 40)}, r"rooms has no option 'sise': did you mean 'size'\?"),
        ({"spec": "nyuv2:/data", "seed": 1}, r"nyuv2 has no option 'seed': choose from size\."),
        ({"spec": "cityscapes:/data", "sise": 1}, r"cityscapes has no option 'sise': did you mean 'size'\?"),
        ({"spec": "taskonomy:/data", "building": "a"}, r"taskonomy has no option 'building': did you mean 'buildings'"),
        ({"spec": "mine/data.yaml", "sise": 1}, r"mine/data\.yaml has no option 'sise': did you mean 'size'\?"),
    ],
)
def test_load_data_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(**arguments)
