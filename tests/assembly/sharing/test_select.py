"""A selection of tasks leaves out the branches that they do not need, and predicts the same."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simomerge.assembly.merge import merge
from simomerge.assembly.sharing.edit import edit_tree
from simomerge.assembly.sharing.grow import Grower
from simomerge.core.errors import InputError
from simomerge.datasets.pictures import Images
from simomerge.models.encoders import Encoder, TreeEncoder
from simomerge.models.model import SimoModel, load

from .conftest import MANY, METHOD, TASKS, equal, predicted, random_stitches, tree

pytestmark = pytest.mark.filterwarnings("ignore:.*stays (close|near):UserWarning")
SOME = [list(tasks) for count in (1, 2) for tasks in combinations(TASKS, count)]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors") if file.parent.name != "heads")


def with_adapters(model: SimoModel) -> SimoModel:
    for seed, adapter in enumerate(model.encoder.add_adapters(rank=3)):
        torch.nn.init.normal_(adapter.up.weight, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize(
    ("text", "form"), [(MANY[0], "plain"), (MANY[1], "plain"), (MANY[1], "low rank"), (MANY[2], "adapters")]
)
def test_kept_tasks_predict_the_same_and_take_less(
    grower: Grower, picture: Tensor, tmp_path: Path, text: str, form: str
) -> None:
    model = random_stitches(grower.grow(tree(text), rank=3 if form == "low rank" else None))
    model = with_adapters(model) if form == "adapters" else model
    together, whole = predicted(model, picture), size(model.save_pretrained(tmp_path / "whole"))
    assert isinstance(model.encoder, TreeEncoder)
    parameters = set(model.parameters())
    for tasks in SOME:
        expected = {task: together[task] for task in tasks}
        some = model.select(tasks)
        assert equal(predicted(some, picture), expected) and set(some.parameters()) < parameters
        folder = some.save_pretrained(tmp_path / "+".join(tasks))
        assert equal(predicted(load(folder), picture), expected)
        assert equal(predicted(copy.deepcopy(some).select(tasks[0]), picture), {tasks[0]: together[tasks[0]]})
        leaves = model.encoder.tree.leaves_of(tasks)
        assert (size(folder) < whole) == (len(leaves) < len(model.encoder.leaves)), tasks
        owners = {
            id(owner)
            for module in some.encoder.modules()
            for hook in module._forward_hooks.values()
            if isinstance(owner := getattr(getattr(hook, "func", None), "__self__", None), Encoder)
        }
        kept = some.encoder.paths if isinstance(some.encoder, TreeEncoder) else [some.encoder]
        assert owners == {id(path) for path in kept}  # nothing holds a branch that is left out
    assert equal(predicted(model, picture), together)


def test_what_a_selection_is(grower: Grower, tmp_path: Path) -> None:
    model = grower.grow(tree("1: depth+parts, normals | each"))
    one = model.select("parts").encoder
    assert isinstance(one, TreeEncoder) and one.tasks == ["parts"] and list(one.stitches) == ["2-parts"]
    assert one.describe()["kept"] == ["parts"] and "kept" not in model.encoder.describe()
    assert type(model.select("normals").encoder) is Encoder  # no stitch on its path
    folder = model.select(["normals", "parts"]).save_pretrained(tmp_path / "two")
    assert [file.name for file in (folder / "branches").iterdir()] == ["normals.safetensors"]
    two = load(folder)
    assert isinstance(two.encoder, TreeEncoder) and two.encoder.tasks == ["parts", "normals"]
    assert two.encoder.tree == model.encoder.tree  # type: ignore[union-attr]
    with pytest.raises(InputError, match="the encoder has no branch for task 'depth'; it has parts, normals"):
        SimoModel(two.encoder, model.tasks, model.heads)
    with pytest.raises(InputError, match="depth"):
        two.select("depth")


def test_tasks_of_one_leaf_share_the_encoder(grower: Grower) -> None:
    model = grower.grow(tree("2: all | depth, normals+parts"))
    assert model.select(["depth", "parts"]).encoder is model.encoder
    assert model.select(["parts"]).encoder.describe()["kept"] == ["normals", "parts"]


def test_a_group_of_its_own_records_its_own_merge(
    base: SimoModel, experts: dict[str, SimoModel], images: Images
) -> None:
    model = merge(base, experts, METHOD, share="depth, normals+parts", images=images)
    pair, alone = model.select(["normals", "parts"]), model.select("depth")
    assert pair.provenance["merge"] == {"method": "task-arithmetic", "scale": 0.4}
    assert list(pair.provenance["experts"]) == ["normals", "parts"]
    assert "merge" not in alone.provenance and list(alone.provenance["experts"]) == ["depth"]
    assert "tree" in model.provenance["merge"] and model.provenance["realign"]["method"] == "fold"


def test_a_selection_is_edited(base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor) -> None:
    """A task that was left out can be added again, where it was."""
    text = "2: all | 3: depth, normals+parts | each"
    model = merge(base, experts, METHOD, share=text, images=images)
    found = edit_tree(model.select(["depth", "normals"]), base, experts, images)
    assert found.encoder.tree == model.encoder.tree  # type: ignore[union-attr]
    assert equal(predicted(found, picture), predicted(model, picture))
    two = {task: experts[task] for task in ("normals", "parts")}
    less = edit_tree(model.select(["depth", "normals"]), base, two, images, remove=["depth"])
    assert str(less.encoder.tree) == "3: normals+parts | 4: normals, parts"  # type: ignore[union-attr]


def test_a_task_that_shares_its_path_and_was_left_out_does_not_stay(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor
) -> None:
    """The path to normals leads to parts too, but the model has no head for parts."""
    model = merge(base, experts, METHOD, share="2: all | depth, normals+parts", images=images)
    two = {task: experts[task] for task in ("depth", "normals")}
    selected = model.select(["depth", "normals"])
    with pytest.raises(InputError, match="nothing to do: name a task to add or to remove"):
        edit_tree(selected, base, two, images)
    again = edit_tree(selected, base, experts, images)
    assert again.encoder.tree == model.encoder.tree  # type: ignore[union-attr]
    assert equal(predicted(again, picture), predicted(model, picture))
