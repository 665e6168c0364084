"""Models and images that the tests of trees share, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from simomerge.assembly.experts import check_experts
from simomerge.assembly.sharing.grow import Grower
from simomerge.core import machine
from simomerge.datasets.pictures import Images, as_images
from simomerge.datasets.tasks import Task
from simomerge.merging import get_method
from simomerge.merging.tree import Tree
from simomerge.models.encoders import TreeEncoder
from simomerge.models.model import SimoModel

TASKS = {"depth": Task("depth"), "normals": Task("normals"), "parts": Task("parts", "segmentation", classes=("x", "y"))}
METHOD = get_method("task-arithmetic", scale=0.4)
MANY = ("2: all | 3: depth, normals+parts | each", "1: depth+parts, normals | each", "3: all | depth+normals, parts")


@pytest.fixture(scope="module", autouse=True)
def always_float32() -> Iterator[None]:
    """Like the fixture `float32`, for the models that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(machine.PRECISION, "fp32")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def images() -> Images:
    generator = torch.Generator().manual_seed(0)
    return as_images(torch.rand(12, 3, 3, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3))


@pytest.fixture(scope="module")
def base(make_model: Callable[..., SimoModel]) -> SimoModel:
    return make_model({})


@pytest.fixture(scope="module")
def experts(experts_by_dice: Callable[..., dict[str, SimoModel]], base: SimoModel) -> dict[str, SimoModel]:
    return experts_by_dice(TASKS, base, 0.05)


@pytest.fixture(scope="module")
def grower(base: SimoModel, experts: dict[str, SimoModel]) -> Grower:
    return Grower(base, check_experts(base, experts), METHOD)


@pytest.fixture(scope="module")
def picture(images: Images) -> Tensor:
    return torch.stack([images.image(0), images.image(5)])


@torch.no_grad()
def predicted(model: SimoModel, picture: Tensor, tasks: list[str] | None = None) -> dict[str, Tensor]:
    return model.eval()(picture, tasks)


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def tree(text: Any) -> Tree:
    return Tree.of(text, list(TASKS), 4)


def random_stitches(model: SimoModel) -> SimoModel:
    assert isinstance(model.encoder, TreeEncoder)
    with torch.no_grad():
        for seed, stitch in enumerate(model.encoder.stitches.values()):
            generator = torch.Generator().manual_seed(seed)
            stitch.weight.add_(0.3 * torch.randn(stitch.weight.shape, generator=generator))
            stitch.bias.add_(0.3 * torch.randn(stitch.bias.shape, generator=generator))
    return model
