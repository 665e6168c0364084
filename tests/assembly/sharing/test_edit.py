"""An edited tree is the tree that a merge of the same experts gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from simomerge.assembly.merge import merge
from simomerge.assembly.sharing.edit import edit_tree
from simomerge.core.errors import InputError
from simomerge.datasets.pictures import Images
from simomerge.models.model import SimoModel, load

from .conftest import METHOD, equal, predicted

pytestmark = pytest.mark.filterwarnings("ignore:.*stays (close|near):UserWarning")
Experts = dict[str, SimoModel]


def some(experts: Experts, *tasks: str) -> Experts:
    return {task: experts[task] for task in tasks}


@pytest.fixture
def pair(base: SimoModel, experts: Experts, images: Images) -> SimoModel:
    return merge(base, some(experts, "depth", "normals"), METHOD, share="2: all | each", images=images)


def test_a_task_that_is_added_leaves_where_the_others_do(
    pair: SimoModel,
    base: SimoModel,
    experts: Experts,
    images: Images,
    picture: Tensor,
) -> None:
    found = edit_tree(pair, base, experts, images)
    wanted = merge(base, experts, METHOD, share="2: all | each", images=images)
    assert found.provenance["merge"] == wanted.provenance["merge"]
    assert equal(predicted(found, picture), predicted(wanted, picture))


def test_a_task_that_is_removed_leaves_the_merge_without_it(
    base: SimoModel,
    experts: Experts,
    images: Images,
    picture: Tensor,
    tmp_path: Path,
) -> None:
    tree = "2: all | 3: depth, normals+parts | each"
    merge(base, experts, METHOD, share=tree, images=images).save_pretrained(tmp_path / "all")
    left = some(experts, "normals", "parts")
    found = edit_tree(tmp_path / "all", base, left, images, remove=["depth"])
    wanted = merge(base, left, METHOD, share="3: all | each", images=images)
    found.save_pretrained(tmp_path / "less")
    assert list(found.tasks) == ["normals", "parts"] and found.encoder.tree == wanted.encoder.tree
    assert equal(predicted(found, picture), predicted(wanted, picture))
    assert equal(predicted(load(tmp_path / "less"), picture), predicted(wanted, picture))


def test_a_task_is_removed_whose_group_goes_on_behind_another(
    base: SimoModel, experts: Experts, images: Images, picture: Tensor, tmp_path: Path
) -> None:
    """Without depth, the group of parts comes after normals."""
    model = merge(base, experts, METHOD, share="2: all | 4: depth+parts, normals", images=images)
    less = edit_tree(model, base, some(experts, "normals", "parts"), images, remove=["depth"])
    less.save_pretrained(tmp_path / "less")
    assert str(less.encoder.tree) == "2: normals+parts | 4: normals, parts"  # type: ignore[union-attr]
    assert equal(predicted(load(tmp_path / "less"), picture), predicted(less, picture))


def test_groups_keep_their_own_scales(base: SimoModel, experts: Experts, images: Images) -> None:
    model = merge(base, experts, METHOD, share="2: all | 3: depth, normals+parts | each", images=images)
    model.provenance["merge"]["groups"]["normals+parts"]["scale"] = 0.7
    found = edit_tree(model, base, some(experts, "normals", "parts"), images, remove=["depth"])
    assert found.provenance["merge"]["groups"] == {"normals+parts": {"method": "task-arithmetic", "scale": 0.7}}


def test_another_tree_may_be_given(
    pair: SimoModel,
    base: SimoModel,
    experts: Experts,
    images: Images,
) -> None:
    found = edit_tree(pair, base, experts, images, share="1: all | 3: depth, normals+parts | each")
    assert str(found.encoder.tree) == "1: depth+normals+parts | 3: depth, normals+parts | 4: depth, normals, parts"


def test_a_task_is_replaced_and_groups_that_stay_keep_their_blocks(
    base: SimoModel, experts: Experts, images: Images
) -> None:
    pair = merge(base, some(experts, "depth", "normals"), METHOD, share="2: all | each", images=images)
    found = edit_tree(pair, base, some(experts, "normals", "parts"), images, remove=["depth"])
    assert str(found.encoder.tree) == "2: normals+parts | 4: normals, parts"


def test_scales_by_expert_say_nothing_about_a_new_one(base: SimoModel, experts: Experts, images: Images) -> None:
    two = some(experts, "depth", "normals")
    scales = {"depth": 0.3, "normals": 0.5}
    model = merge(base, two, "task-arithmetic", scale=scales, share="2: all | each", images=images)
    with pytest.raises(InputError, match="merge of depth, normals has parameters for each expert"):
        edit_tree(model, base, experts, images)


def test_what_cannot_be_edited_is_named(
    pair: SimoModel,
    base: SimoModel,
    experts: Experts,
    images: Images,
) -> None:
    def refused(message: str, model: SimoModel = pair, given: Experts = experts, **options: object) -> None:
        with pytest.raises(InputError, match=message):
            edit_tree(model, base, given, images, **options)

    two = some(experts, "depth", "normals")
    refused("nothing to do: .* merge their experts again: simomerge merge --share", given=two, share=1)
    refused("splits after block 5, but the encoder has 4 blocks", share=5)
    refused(r"give the experts that stay, too \(normals\)", given=some(experts, "depth", "parts"))
    refused("task 'edges' is not in the given model, which has depth, normals", given=two, remove=["edges"])
    refused("task 'depth' is removed, and its expert is given", remove=["depth"])
    refused("only depth stays, and its expert", given=some(experts, "depth"), remove=["normals"])
    refused("count is 0; give a whole number of 1 or more", count=0)
    refused("its tasks share one encoder", model=merge(base, two, METHOD))
    other = experts["parts"].select("parts")
    swapped = SimoModel(
        other.encoder, {"depth": experts["depth"].tasks["depth"]}, {"depth": experts["depth"].heads["depth"]}
    )
    refused("is not what the model was merged from", given={**experts, "depth": swapped})
    pair.provenance["realign"] = {"method": "distill", "changes_encoder": True}
    refused("changed its encoder.* Edit the merge from before the re-alignment, and re-align the result again")
    alone = merge(base, two, METHOD, share=0, images=images)
    refused("its tasks share no block, so that it records no merge", model=alone, remove=["normals"])
    pair.provenance = {}
    refused("records no merge of a group of tasks")
