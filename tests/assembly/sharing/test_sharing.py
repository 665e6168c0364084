"""Models with shared and own blocks: the merge and the experts are special cases; branches do not interfere."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

import simomerge
from simomerge.assembly.merge import merge
from simomerge.assembly.realign import Fold, Inputs, realign
from simomerge.assembly.realign.blocks import call_of
from simomerge.assembly.realign.encoder import tasks_to_distil
from simomerge.assembly.sharing.grow import Grower, fold_shared, share_blocks
from simomerge.assembly.sharing.search import TreeSearch
from simomerge.assembly.sharing.stitches import ExpertTokens, fit_stitches
from simomerge.cli.merge import tree_lines
from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset, load_data
from simomerge.datasets.pictures import Images
from simomerge.merging import MergeMethod
from simomerge.merging.tree import Tree
from simomerge.models.encoders import Encoder, TreeEncoder
from simomerge.models.heads import build_head
from simomerge.models.model import SimoModel, load
from simomerge.training.state import TrainingState

from .conftest import MANY, METHOD, TASKS, equal, predicted, random_stitches, tree

pytestmark = pytest.mark.filterwarnings("ignore:.*stays (close|near):UserWarning")


def test_kept_tokens_of_experts_are_used_again(grower: Grower, experts: dict[str, SimoModel], images: Images) -> None:
    kept, none = ExpertTokens(), ExpertTokens(limit=0)
    plain, first, second, other = (grower.grow(tree("2: all | each")) for _ in range(4))
    expected = fit_stitches(plain, experts, images)
    fit_stitches(first, experts, images, kept=kept)
    damaged = {task: copy.deepcopy(expert) for task, expert in experts.items()}
    for expert in damaged.values():
        for parameter in expert.encoder.backbone.parameters():
            parameter.requires_grad_(False).zero_()
    for name, fit in fit_stitches(second, damaged, images, kept=kept).items():
        assert torch.equal(fit.weight, expected[name].weight) and torch.equal(fit.bias, expected[name].bias)
    found = fit_stitches(other, damaged, images, kept=none)  # nothing is kept, so that the damage is seen
    assert not any(torch.equal(fit.weight, expected[name].weight) for name, fit in found.items())


def test_images_at_their_own_size_are_folded_at_it(
    base: SimoModel, experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts were trained at another size, to which nothing resizes the images."""
    trained = {task: copy.copy(expert) for task, expert in experts.items()}
    for expert in trained.values():
        expert.provenance = {**expert.provenance, "training": {"size": [16, 16]}}
    seen: list[tuple[int, ...]] = []

    def note(self: Fold, model: SimoModel, inputs: Inputs) -> dict[str, Any]:
        seen.append(tuple(inputs.images.image(0).shape[1:]))
        return {}

    monkeypatch.setattr(Fold, "change", note)
    pictures = Images(list(torch.rand((8, 3, 24, 32), generator=torch.Generator().manual_seed(0))))
    fold_shared(merge(base, trained), trained, pictures)
    assert seen == [(24, 32)]


# Special cases ------------------------------------------------------------------------------------------


def test_a_trivial_tree_is_the_merge(
    base: SimoModel, experts: dict[str, SimoModel], grower: Grower, images: Images, picture: Tensor
) -> None:
    merged = merge(base, experts, METHOD)
    shared = share_blocks(grower, tree(4))
    assert type(shared.encoder) is type(merged.encoder)
    assert shared.provenance["merge"] == merged.provenance["merge"]
    assert equal(predicted(shared, picture), predicted(merged, picture))
    folded = realign(merged, experts, images, variant="cross-tap")
    given = merge(base, experts, METHOD, share="all", images=images)
    assert equal(predicted(given, picture), predicted(folded, picture))


def test_the_finest_tree_is_the_experts_bit_for_bit(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor
) -> None:
    model = merge(base, experts, METHOD, share=0, images=images)
    found = predicted(model, picture)
    assert isinstance(model.encoder, TreeEncoder)
    for path, (task, expert) in enumerate(experts.items()):
        with model.encoder.plain(path) as backbone:
            assert equal(backbone.state_dict(), expert.encoder.backbone.state_dict())
        assert equal(model.heads[task].state_dict(), expert.heads[task].state_dict())
        assert torch.equal(found[task], predicted(expert, picture)[task])


def test_whole_groups_are_their_own_merges(
    base: SimoModel, experts: dict[str, SimoModel], grower: Grower, picture: Tensor
) -> None:
    """Tasks that leave at once do not disturb the others: these are the merge without them, exactly."""
    model = grower.grow(tree("depth, normals+parts"))
    others = merge(base, {task: experts[task] for task in ("normals", "parts")}, METHOD)
    found = predicted(model, picture)
    assert isinstance(model.encoder, TreeEncoder)
    with model.encoder.plain(1) as backbone:
        assert equal(backbone.state_dict(), others.encoder.backbone.state_dict())
    expected = predicted(others, picture)
    assert equal({task: found[task] for task in expected}, expected)


def test_blocks_after_a_split_are_merges_of_those_that_stay(
    base: SimoModel, experts: dict[str, SimoModel], grower: Grower
) -> None:
    encoder = grower.grow(tree("2: all | depth, normals+parts")).encoder
    assert isinstance(encoder, TreeEncoder)
    whole = merge(base, experts, METHOD).encoder.backbone.state_dict()
    others = merge(base, {task: experts[task] for task in ("normals", "parts")}, METHOD).encoder.backbone.state_dict()
    own = experts["depth"].encoder.backbone.state_dict()
    for path, last in enumerate((own, others)):
        with encoder.plain(path) as backbone:
            state = backbone.state_dict()
        for name, value in state.items():
            late = any(part in name for part in ("layer.2.", "layer.3.", "layernorm")) or name.startswith("norm")
            assert torch.equal(value, (last if late else whole)[name]), name


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(list(TASKS)), text=st.sampled_from(MANY))
def test_the_order_of_tasks_does_not_matter(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor, order: list[str], text: str
) -> None:
    one = merge(base, experts, METHOD, share=text, images=images)
    other = merge(base, {task: experts[task] for task in order}, METHOD, share=text, images=images)
    found, expected = predicted(other, picture), predicted(one, picture)
    for task in TASKS:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-3, atol=1e-4)


# Running ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", MANY)
def test_a_task_alone_gives_what_it_gives_together(grower: Grower, picture: Tensor, text: str) -> None:
    model = random_stitches(grower.grow(tree(text)))
    together = predicted(model, picture)
    for task in TASKS:
        assert equal(predicted(model, picture, [task]), {task: together[task]})


def test_a_branch_is_its_blocks_after_its_stitch(
    grower: Grower, experts: dict[str, SimoModel], picture: Tensor
) -> None:
    """The same path by hand: blocks 1 and 2 of the merge, the stitch, blocks 3 and 4 of the expert."""
    model = random_stitches(grower.grow(tree(2)))
    merged = grower.grow(tree(4)).encoder
    own = experts["normals"].encoder
    with torch.no_grad():
        call = call_of(merged.layout.units[2], lambda: merged(picture))
        hidden = model.encoder.stitches["3-normals"](call.hidden)  # type: ignore[union-attr, operator]
        for block in own.layout.units[2:]:
            hidden = call.replaced(hidden).run(block)
        expected = own.layout.norm(hidden)[:, 1:]  # type: ignore[misc]
        found = model.encode(picture, ["normals"]).of("normals").maps[-1]
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize(
    ("tasks", "runs"), [(None, [3, 2, 2, 4]), (["normals"], [1, 1, 1, 1]), (["depth", "parts"], [2, 2, 2, 2])]
)
def test_blocks_run_once_and_only_where_they_are_needed(
    grower: Grower, picture: Tensor, tasks: list[str] | None, runs: list[int]
) -> None:
    """Runs of each block over all its nodes, for a tree that splits at once and again before block 4."""
    model = grower.grow(tree("2: depth+normals, parts | each"))
    encoder = model.encoder
    assert isinstance(encoder, TreeEncoder)
    counts = [0] * 4
    for node, units in zip(encoder.tree.nodes, encoder.nodes, strict=True):
        for block, unit in enumerate(units, start=node.first - 1):

            def count(*_: Any, block: int = block) -> None:
                counts[block] += 1

            unit.inner.register_forward_hook(count)
    predicted(model, picture, tasks)
    expected = [sum(1 for _ in {encoder.tree.path(encoder.tree.leaf_of(t))[0] for t in tasks or TASKS})]
    assert counts[0] == expected[0] and counts[3] == len(tasks or TASKS)
    assert all(unit._result is None for units in encoder.nodes for unit in units)


def test_a_deep_copy_is_a_tree_of_its_own(grower: Grower, picture: Tensor) -> None:
    model = random_stitches(grower.grow(tree(2)))
    before = predicted(model, picture)
    twin = copy.deepcopy(model)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for parameter in twin.encoder.parameters():
            parameter.zero_()
    assert equal(predicted(model, picture), before)
    assert not equal(predicted(twin, picture), before)


def test_shared_blocks_are_counted_once(grower: Grower) -> None:
    one, tree_model = (sum(p.numel() for p in grower.grow(tree(k)).encoder.parameters()) for k in (4, 2))
    block = sum(p.numel() for p in grower.grow(tree(4)).encoder.layout.units[0].parameters())
    assert tree_model - one == 4 * block + 3 * (32 * 32 + 32) + 2 * 2 * 32  # two more tails, stitches, final norms


@pytest.mark.parametrize("text", ["9: all | each", "4: all | 8: a, b+c | each"])
def test_operations_and_parameters_follow_the_cost(text: str) -> None:
    """At the size of a ViT-S, with everything outside the blocks and the stitches, and for a task alone."""
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=98)
    one = Encoder(Dinov2Model(config)).eval()
    shape = Tree.of(text, ["a", "b", "c"], 12)
    shared = TreeEncoder(shape, one).eval()

    def operations(encoder: Encoder, tasks: list[str] | None = None) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.zeros(1, 3, 98, 98), tasks)
        return counter.get_total_flops()

    sizes = [sum(parameter.numel() for parameter in encoder.parameters()) for encoder in (one, shared)]
    assert operations(shared) / operations(one) == pytest.approx(shape.cost(), rel=0.03)
    assert operations(shared, ["b"]) / operations(one) == pytest.approx(1, rel=0.03)
    assert sizes[1] / sizes[0] == pytest.approx(shape.cost(), rel=0.03)


# Stitches -----------------------------------------------------------------------------------------------


def test_a_stitch_is_the_ridge_solution(grower: Grower, experts: dict[str, SimoModel], images: Images) -> None:
    """Least squares on stacked rows, with the ridge as further rows, gives the same map."""
    model = grower.grow(tree("2: all | depth, normals+parts"))
    merged = grower.grow(tree(4)).encoder
    fits = fit_stitches(model, experts, images)
    pixels = torch.stack([images.image(index) for index in range(len(images))])
    with torch.no_grad():
        x = call_of(merged.layout.units[2], lambda: merged(pixels)).hidden.double().flatten(0, 1)
        for name, tasks in (("3-depth", ["depth"]), ("3-normals", ["normals", "parts"])):
            encoders = [experts[task].encoder for task in tasks]
            z = torch.stack([call_of(e.layout.units[2], lambda e=e: e(pixels)).hidden for e in encoders]).mean(0)
            z = z.double().flatten(0, 1)
            fit = fits[name]
            centred, target = x - x.mean(0), (z - x) - (z - x).mean(0)
            penalty = (fit.ridge * float(centred.square().sum(0).mean())) ** 0.5
            rows = torch.cat([centred, penalty * torch.eye(32, dtype=torch.float64)])
            change = torch.linalg.lstsq(rows, torch.cat([target, torch.zeros(32, 32, dtype=torch.float64)])).solution.T
            torch.testing.assert_close(fit.weight, change + torch.eye(32, dtype=torch.float64), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fit.bias, (z - x @ fit.weight.T).mean(0), rtol=1e-4, atol=1e-4)
            assert fit.r2 >= fit.r2_before
            stitch = model.encoder.stitches[name]  # type: ignore[union-attr]
            torch.testing.assert_close(stitch.weight.double(), fit.weight, rtol=1e-6, atol=1e-6)


def test_stitches_bring_the_tokens_closer_to_the_experts(
    grower: Grower, experts: dict[str, SimoModel], images: Images, picture: Tensor
) -> None:
    model = grower.grow(tree(2))

    def distance() -> float:
        with torch.no_grad():
            given = model.encode(picture).of("depth").maps[-1]
            return float((given - experts["depth"].encode(picture).maps[-1]).square().mean())

    before = distance()
    fit_stitches(model, experts, images)
    assert distance() < 0.8 * before


def test_too_few_images_for_a_stitch_are_said(grower: Grower, experts: dict[str, SimoModel], images: Images) -> None:
    with pytest.warns(UserWarning, match="too few images .*stay near the identity"):
        fits = fit_stitches(grower.grow(tree(2)), experts, images._subset([0, 1]))
    weight = next(iter(fits.values())).weight
    assert float((weight - torch.eye(32)).abs().max()) < 0.7


# Folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(base: SimoModel, experts: dict[str, SimoModel], images: Images) -> SimoModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return merge(base, experts, METHOD, share=MANY[0], images=images)


@pytest.mark.parametrize("text", MANY)
def test_a_saved_tree_loads_to_equal_predictions(grower: Grower, picture: Tensor, tmp_path: Path, text: str) -> None:
    model = random_stitches(grower.grow(tree(text)))
    loaded = load(model.save_pretrained(tmp_path / "scene"))
    assert equal(predicted(loaded, picture), predicted(model, picture))
    assert str(loaded.encoder.tree) == str(tree(text))  # type: ignore[union-attr]
    assert loaded.encoder_fingerprint() == model.encoder_fingerprint()


def test_what_a_folder_holds(shared: SimoModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import Dinov2Model

    folder = shared.save_pretrained(tmp_path / "scene")
    description = json.loads((folder / "simo.json").read_text())
    assert description["format"] == 2
    assert (
        description["encoder"]["tree"] == "2: depth+normals+parts | 3: depth, normals+parts | 4: depth, normals, parts"
    )
    assert sorted(path.name for path in (folder / "branches").iterdir()) == ["normals.safetensors", "parts.safetensors"]
    blocks = {
        path.stem: {key.split(".")[2] for key in load_file(path) if "layer." in key}
        for path in (folder / "branches").iterdir()
    }
    assert blocks == {"normals": {"2", "3"}, "parts": {"3"}}
    assert set(load_file(folder / "stitches.safetensors")) == {
        f"{node}.{part}" for node in ("3-depth", "3-normals", "4-normals", "4-parts") for part in ("weight", "bias")
    }
    first = Dinov2Model.from_pretrained(folder / "encoder")  # the path of the first task is a plain encoder
    with shared.encoder.plain(0) as backbone:  # type: ignore[union-attr, operator]
        assert equal(first.state_dict(), backbone.state_dict())
    assert f"`{description['encoder']['tree']}`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["branches/normals.safetensors", "stitches.safetensors"])
def test_a_missing_or_foreign_file_is_named(shared: SimoModel, tmp_path: Path, name: str) -> None:
    folder = shared.save_pretrained(tmp_path / "scene")
    (folder / name).write_bytes((folder / "heads" / "depth.safetensors").read_bytes())
    with pytest.raises(InputError, match=rf"{name.rpartition('/')[2]}: does not fit simo\.json"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name.rpartition('/')[2]}: missing"):
        load(folder)


def test_a_damaged_tree_is_refused(shared: SimoModel, tmp_path: Path) -> None:
    folder = shared.save_pretrained(tmp_path / "scene")
    description = json.loads((folder / "simo.json").read_text())
    for wrong in ("2: depth | 1: depth", 7, "x"):
        description["encoder"]["tree"] = wrong
        (folder / "simo.json").write_text(json.dumps(description))
        with pytest.raises(InputError):
            load(folder)


# What else works on a tree, and what does not -----------------------------------------------------------


def test_heads_are_folded_on_what_reaches_them(
    shared: SimoModel, grower: Grower, experts: dict[str, SimoModel], images: Images, picture: Tensor
) -> None:
    """The fold of a tree is that of each path alone."""
    unfolded = grower.grow(tree(MANY[0]))
    fit_stitches(unfolded, experts, images)
    for task in TASKS:
        alone = realign(unfolded.select(task), {task: experts[task]}, images, variant="cross-tap")
        expected = predicted(alone, picture)[task]
        torch.testing.assert_close(predicted(shared, picture)[task], expected, rtol=1e-4, atol=1e-5)
    assert shared.provenance["realign"]["method"] == "fold"
    assert shared.provenance["merge"]["cost"] == 1.75


@pytest.mark.parametrize("name", ["distill", "distill-adapters", "distill-encoder"])
def test_a_tree_is_distilled(
    shared: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor, name: str
) -> None:
    distilled = realign(shared, experts, images, method=name, steps=3, batch_size=4, hold_out=0.0)
    assert not equal(predicted(distilled, picture), predicted(shared, picture))
    before, after = (dict(model.encoder.named_parameters()) for model in (shared, distilled))
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    if name == "distill-adapters":
        assert not moved and any(value.any() for key, value in after.items() if key.endswith("up.weight"))
    elif name == "distill":
        assert not moved
    else:
        assert any("stitch" in key for key in moved) and any(".layer.0." in key for key in moved)


@pytest.mark.parametrize("text", MANY)
def test_shared_blocks_share_their_adapters(grower: Grower, picture: Tensor, tmp_path: Path, text: str) -> None:
    """Every path of a tree is the plain encoder with its weights and the adapters of its blocks."""
    model = grower.grow(tree(text))
    encoder, before = model.encoder, predicted(model, picture)
    adapters = encoder.add_adapters(rank=3, activation="relu", last=2)
    assert equal(predicted(model, picture), before)  # a fresh adapter adds nothing
    with torch.no_grad():
        for seed, adapter in enumerate(adapters):
            adapter.up.weight.normal_(generator=torch.Generator().manual_seed(seed))
    given, found, known = iter(adapters), predicted(model, picture), dict[Any, torch.nn.Module]()
    for path, leaf in enumerate(encoder.tree.leaves):
        task = encoder.tree.nodes[leaf].tasks[0]
        alone = copy.deepcopy(grower.experts[task])
        with encoder.plain(path) as backbone:
            alone.encoder.backbone.load_state_dict(backbone.state_dict())
        for block, adapter in enumerate(alone.encoder.add_adapters(rank=3, activation="relu", last=2), start=2):
            group = next(group for group in encoder.tree.partitions[block] if task in group)
            if (block, group) not in known:
                known[block, group] = next(given)
            adapter.load_state_dict(known[block, group].state_dict())
        torch.testing.assert_close(predicted(alone, picture)[task], found[task])
    assert next(given, None) is None and len(known) == len(adapters)
    model.save_pretrained(tmp_path / "model")
    assert equal(predicted(load(tmp_path / "model"), picture), found)
    assert equal(predicted(copy.deepcopy(model), picture), found)


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_a_task_that_shares_nothing_is_its_expert_in_every_storage(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, tmp_path: Path, dtype: str | None
) -> None:
    model = merge(base, experts, METHOD, share="depth, normals+parts", images=images)
    loaded = load(model.save_pretrained(tmp_path / "scene", dtype=dtype))
    assert tasks_to_distil(loaded, experts) == ["normals", "parts"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["distill", "distill-encoder", "distill-adapters"])
def test_distillation_keeps_a_task_that_shares_nothing(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor, method: str
) -> None:
    """It is its expert already; the others learn. Once it differs from its expert, it learns too."""
    model = merge(base, experts, METHOD, share="depth, normals+parts", images=images)
    given = {"method": method, "steps": 3, "batch_size": 4, "hold_out": 0.0}
    made = realign(model, experts, images, **given)
    found, before = predicted(made, picture), predicted(model, picture)
    assert torch.equal(found["depth"], before["depth"])
    assert not torch.equal(found["normals"], before["normals"]) and not torch.equal(found["parts"], before["parts"])
    assert made.provenance["realign"]["left_out"] == ["depth"]
    learnt = [tensor.any() for name, tensor in made.encoder.named_parameters() if name.endswith("up.weight")]
    assert any(learnt) == (method == "distill-adapters")  # adapters start with up.weight = 0
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.heads["depth"].parameters():
            parameter.mul_(1.5)
    found, before = (predicted(each, picture) for each in (realign(changed, experts, images, **given), changed))
    assert not torch.equal(found["depth"], before["depth"])
    finest = merge(base, experts, METHOD, share=0, images=images)
    with pytest.raises(InputError, match=r"no task shares a block.*nothing to distil"):
        realign(finest, experts, images, **given)


def test_the_state_of_a_training_holds_shared_blocks_once(shared: SimoModel) -> None:
    model = copy.deepcopy(shared).requires_grad_(True)
    state, everything = TrainingState(model, None, None, None), model.state_dict()
    buffers = {name for name, _ in model.named_buffers()} & set(everything)
    assert set(state._weights()) == {name for name, _ in model.named_parameters()} | buffers < set(everything)
    model.encoder.requires_grad_(False)
    assert set(state._weights()) == {name for name, _ in model.heads.named_parameters("heads")} | buffers


@pytest.mark.parametrize("share", [2, "2: all | each"])
def test_fresh_adapters_are_where_the_encoder_is(grower: Grower, base: SimoModel, share: Any) -> None:
    for encoder in (copy.deepcopy(base).encoder, grower.grow(tree(share)).encoder):
        added = encoder.to("meta").add_adapters(rank=2)
        assert {parameter.device.type for parameter in added.parameters()} == {"meta"}


def test_a_tree_is_finetuned_on_labels(shared: SimoModel) -> None:
    some = shared.select(["depth", "normals"])
    rooms = load_data("rooms", split="val", count=4, size=(24, 32), tasks=["depth", "normals"])
    tuned = realign(some, data=rooms, method="finetune", steps=3, batch_size=4, hold_out=0.0)
    before, after = (dict(model.encoder.named_parameters()) for model in (some, tuned))
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert any("stitch" in key for key in moved) and any(".layer.0." in key for key in moved)
    assert isinstance(tuned.encoder, TreeEncoder) and tuned.encoder.tree == some.encoder.tree  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["lora", "distill-lora", "react", "surgery", "symerge", "prodistill", "calibrate"])
def test_other_realignments_refuse_a_tree(
    shared: SimoModel, base: SimoModel, experts: dict[str, SimoModel], images: Images, name: str
) -> None:
    fit = "use adapters, distill, finetune, heads, distill-adapters or distill-encoder"
    with pytest.raises(InputError, match=f"tree of shared blocks; {fit}"):
        realign(shared, experts, images, data=images, method=name, base=base)


@pytest.mark.parametrize("name", ["fold", "fold-cross"])
def test_the_heads_of_a_tree_are_folded_already(
    shared: SimoModel, experts: dict[str, SimoModel], images: Images, name: str
) -> None:
    with pytest.raises(InputError, match="before any re-alignment"):
        realign(shared, experts, images, method=name)


def test_a_tree_is_no_expert(shared: SimoModel, base: SimoModel, experts: dict[str, SimoModel]) -> None:
    with pytest.raises(InputError, match="expert 'depth' is a tree of shared blocks"):
        merge(base, {**experts, "depth": shared}, METHOD)


def wrong_calls() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"share": 2}, "fitted on images without labels: give images="
    yield {"share": 5, "images": "IMAGES"}, "splits after block 5, but the encoder has 4 blocks"
    yield {"share": 2, "budget": 2.0, "images": "IMAGES"}, "give one of the two"
    yield {"budget": 3.5, "images": "IMAGES"}, r"from 1 .* to 3"
    yield {"share": 2, "images": "IMAGES", "method": "auto"}, "needs a merge method"
    yield {"share": 2, "images": "IMAGES", "scale": "learned"}, "a number or 'auto' as scale"
    yield {"share": 2, "images": "IMAGES", "minutes": 3}, "needs a merge method"
    yield {"share": 2, "images": "IMAGES", "method": "fisher"}, "fisher needs labels, and a tree .* uses none"


@pytest.mark.parametrize(("given", "message"), list(wrong_calls()))
def test_wrong_calls(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, given: dict[str, Any], message: str
) -> None:
    filled = {key: images if value == "IMAGES" else value for key, value in given.items()}
    with pytest.raises(InputError, match=message):
        merge(base, experts, **{"method": METHOD, **filled})


class Own(torch.nn.Module):
    channels, strides = (4,), (4,)

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 4, 4)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.stem(images)]


def test_a_custom_encoder_has_no_known_blocks(base: SimoModel, images: Images) -> None:
    own, experts = SimoModel(Own(), {}, {}), {}
    for task in ("depth", "normals"):
        head = build_head("linear", (4,), TASKS[task].channels, {"cls": False})
        experts[task] = SimoModel(copy.deepcopy(own.encoder), {task: TASKS[task]}, {task: head})
    with pytest.warns(UserWarning, match="does not record"), pytest.raises(InputError, match="blocks are unknown"):
        merge(own, experts, METHOD, share=1, images=images)


class Declared(torch.nn.Module):
    """Maps at two strides, with something before and after its blocks."""

    channels, strides, blocks = (6, 8), (4, 8), ("fine", "coarse")

    def __init__(self) -> None:
        super().__init__()
        self.colours, self.fine = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 6, 4, 4)
        self.coarse, self.out = torch.nn.Conv2d(6, 8, 2, 2), torch.nn.Conv2d(8, 8, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(self.colours(images).relu()).relu()
        return [fine, self.out(self.coarse(fine).relu())]


@torch.no_grad()
def test_an_encoder_that_declares_its_blocks(images: Images, picture: Tensor, tmp_path: Path) -> None:
    base, experts = SimoModel(Declared(), {}, {}), {}
    for seed, task in enumerate(("depth", "normals")):
        torch.manual_seed(seed)
        head = build_head("linear", (6, 8), TASKS[task].channels, {"cls": False})
        experts[task] = SimoModel(Declared(), {task: TASKS[task]}, {task: head})
    model = Grower(base, experts, METHOD).grow(Tree.of(1, list(experts), 2))
    random_stitches(model)
    merged = simomerge.merge(base, experts, METHOD).encoder.backbone
    for task, expert in experts.items():
        own, stitch = expert.encoder.backbone, model.encoder.stitches[f"2-{task}"]  # type: ignore[union-attr]
        fine = merged.fine(merged.colours(picture).relu()).relu()
        coarse = own.out(own.coarse(stitch(fine)).relu())
        found = model.encode(picture, [task]).of(task).maps
        torch.testing.assert_close(found, (fine, coarse))
    loaded = load(model.save_pretrained(tmp_path / "scene"), trust_code=True)
    assert equal(predicted(loaded, picture), predicted(model, picture))
    shared = simomerge.merge(base, experts, METHOD, share=1, images=images)
    assert shared.provenance["merge"]["tree"] == "1: depth+normals | 2: depth, normals"


# Choosing -----------------------------------------------------------------------------------------------


@pytest.fixture
def method() -> MergeMethod:
    return METHOD


def test_a_budget_of_one_encoder_is_the_merge_and_of_all_is_the_experts(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor, method: MergeMethod
) -> None:
    one = merge(base, experts, method, budget=1, images=images)
    assert not isinstance(one.encoder, TreeEncoder)
    some = {task: experts[task] for task in ("depth", "normals")}
    two = merge(base, some, method, budget=2, images=images)
    found = predicted(two, picture)
    for task, expert in some.items():
        assert torch.equal(found[task], predicted(expert, picture)[task])


class Labelled(DenseDataset):
    """Random images with random labels."""

    def __init__(self, images: Images) -> None:
        super().__init__({task: TASKS[task] for task in ("depth", "normals")}, 8)
        self.images = images

    def image(self, index: int) -> Tensor:
        return self.images.image(index)

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        made = torch.rand(3, 24, 32, generator=generator) + 0.1
        return {task: made[:1] if task == "depth" else torch.nn.functional.normalize(made, dim=0) for task in tasks}


def test_labels_rank_the_trees_if_given(base: SimoModel, experts: dict[str, SimoModel], images: Images) -> None:
    some = {task: experts[task] for task in ("depth", "normals")}
    search = TreeSearch(Grower(base, some, METHOD), images, Labelled(images))
    one = search.tried[0]
    assert one.loss == pytest.approx(sum(one.losses.values()) / 2)  # minus Delta_MTL
    best = search.best(2)
    assert best.loss == min(each.loss for each in search.tried) <= one.loss
    assert search.try_out(Tree.of(0, list(some), 4)).losses == {"depth": 0, "normals": 0}
    with pytest.raises(InputError, match="labels choose a tree for a budget only"):
        merge(base, some, METHOD, share=2, images=images, validation=Labelled(images))


def test_the_chosen_tree_keeps_to_the_budget_and_beats_one_encoder(
    base: SimoModel, experts: dict[str, SimoModel], images: Images
) -> None:
    model = merge(base, experts, METHOD, budget=1.75, images=images)
    record = model.provenance["merge"]
    assert record["budget"] == 1.75 and 1 < record["cost"] <= 1.75
    assert max(record["disagreement"].values()) < 1.5 and min(record["disagreement"].values()) < 1


def test_a_task_that_cannot_be_judged_has_no_disagreement(
    base: SimoModel, experts: dict[str, SimoModel], images: Images
) -> None:
    """Its expert predicts the same everywhere; the choice is that without it."""
    given = {**experts, "depth": copy.deepcopy(experts["depth"])}
    torch.nn.init.zeros_(given["depth"].heads["depth"].output.weight)
    with pytest.warns(UserWarning, match="depth does not count in the choice"):
        search = TreeSearch(Grower(base, given, METHOD), images)
    one, best = search.tried[0], search.best(2)
    assert one.losses == {"depth": None, "normals": 1, "parts": 1} and one.loss == 1
    assert all(each.losses["depth"] is None for each in search.tried) and best.loss < 1
    assert search.try_out(tree("each")).loss == 0
    with pytest.warns(UserWarning, match="depth does not count in the choice"):
        model = merge(base, given, METHOD, budget=2, images=images)
    record = model.provenance["merge"]["disagreement"]
    assert record["depth"] is None and 0 <= record["normals"] < 1
    (line,) = (line for line in tree_lines(model.provenance["merge"]) if "disagreement" in line)
    assert "depth not judged" in line and f"normals {record['normals']:.2f}" in line


def test_a_tree_that_its_files_cannot_hold_is_refused_before_it_is_built(
    base: SimoModel, experts: dict[str, SimoModel], images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(base, experts, METHOD, share=2, images=images).save_pretrained(tmp_path / "scene")
    for file in (tmp_path / "scene" / "branches").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    monkeypatch.setattr("simomerge.models.storage.TreeEncoder", lambda *_: pytest.fail("built"))
    with pytest.raises(InputError, match=r"branches hold \d+ bytes, but the tree .* needs [\d,]+ parameters"):
        load(tmp_path / "scene")
