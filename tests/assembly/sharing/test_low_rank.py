"""Own blocks as low-rank differences to shared weights: what is nearest, what is stored, and what still works."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from simomerge.assembly.experts import check_experts
from simomerge.assembly.merge import merge
from simomerge.assembly.realign import realign
from simomerge.assembly.sharing.edit import edit_tree
from simomerge.assembly.sharing.grow import Grower
from simomerge.assembly.sharing.stitches import fit_stitches
from simomerge.core.errors import InputError
from simomerge.datasets.pictures import Images
from simomerge.merging.tree import Tree
from simomerge.models.encoders import CustomEncoder, TreeEncoder
from simomerge.models.encoders.low_rank import shared_and_factors, truncated
from simomerge.models.model import SimoModel, load

from .conftest import MANY, METHOD, TASKS, equal, predicted, random_stitches, tree
from .test_sharing import Declared

pytestmark = pytest.mark.filterwarnings("ignore:.*stays (close|near):UserWarning")
SIDES = [(32, 32)] * 4 + [(64, 32), (32, 64)]
"""(out, in) of the linear layers of a block of the tiny encoder."""


def matrices(seed: int, count: int, shape: tuple[int, int] = (9, 7)) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def encoder_of(model: SimoModel) -> TreeEncoder:
    assert isinstance(model.encoder, TreeEncoder)
    return model.encoder


# Arithmetic ---------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([(9, 7), (7, 9), (8, 8)]), st.integers(0, 8))
def test_a_truncation_is_that_of_the_singular_values(seed: int, shape: tuple[int, int], rank: int) -> None:
    (matrix,) = matrices(seed, 1, shape)
    up, down = truncated(matrix, rank)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(up @ down, left[:, :rank] * values[:rank] @ right[:rank])
    torch.testing.assert_close(up.square().sum(), down.square().sum())  # both have half of the singular values


def error(weights: list[Tensor], shared: Tensor, factors: list[tuple[Tensor, Tensor]]) -> float:
    pairs = zip(weights, factors, strict=True)
    return sum(float((weight - shared - up @ down).square().sum()) for weight, (up, down) in pairs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(0, 4))
def test_two_groups_have_the_best_shared_weights(seed: int, rank: int) -> None:
    """Their two differences of rank r are one of rank 2r between them; each group has half of what that leaves."""
    one, other = matrices(seed, 2)
    values = torch.linalg.svdvals(one - other)[2 * rank :]
    found = error([one, other], *shared_and_factors([one, other], rank))
    assert found == pytest.approx(float(values.square().sum()) / 2, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(0, 4), st.integers(2, 5))
def test_shared_weights_are_nearer_than_a_mean_or_a_first_path(seed: int, rank: int, count: int) -> None:
    weights = matrices(seed, count)
    found = error(weights, *shared_and_factors(weights, rank))
    for reference in (torch.stack(weights).mean(0), weights[0]):
        assert found <= error(weights, reference, [truncated(w - reference, rank) for w in weights]) + 1e-9


def test_rank_zero_shares_the_mean() -> None:
    weights = matrices(0, 3)
    shared, factors = shared_and_factors(weights, 0)
    torch.testing.assert_close(shared, torch.stack(weights).mean(0))
    assert [(up.shape, down.shape) for up, down in factors] == [((9, 0), (0, 7))] * 3


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="weights that are not finite; an expert is damaged"):
        shared_and_factors([torch.ones(2, 2), torch.full((2, 2), math.nan)], 1)


# Models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", MANY)
def test_a_rank_that_saves_nothing_is_the_plain_tree(grower: Grower, picture: Tensor, text: str) -> None:
    full = random_stitches(grower.grow(tree(text), rank=1000))
    assert equal(predicted(full, picture), predicted(random_stitches(grower.grow(tree(text))), picture))


def test_experts_of_low_rank_are_the_plain_tree_up_to_rounding(
    base: SimoModel, experts: dict[str, SimoModel], picture: Tensor
) -> None:
    """Task vectors of rank 2 differ by a rank of 4 at most, which two branches of rank 2 have together."""
    thin = {}
    for seed, task in enumerate(("depth", "normals")):
        thin[task] = copy.deepcopy(experts[task])
        generator = torch.Generator().manual_seed(seed)
        pairs = zip(base.encoder.backbone.named_parameters(), thin[task].encoder.backbone.parameters(), strict=True)
        with torch.no_grad():
            for (name, start), weight in pairs:
                if weight.ndim == 2 and ".layer." in f".{name}":
                    left, right = (torch.randn(side, 2, generator=generator) for side in weight.shape)
                    weight.copy_(start + 0.05 * left @ right.T)
    grown = Grower(base, check_experts(base, thin), METHOD)
    shape = Tree.of(2, list(thin), 4)
    found, wanted = (predicted(random_stitches(grown.grow(shape, rank)), picture) for rank in (2, None))
    far = predicted(random_stitches(grown.grow(shape, 1)), picture)
    for task in thin:
        torch.testing.assert_close(found[task], wanted[task], rtol=1e-3, atol=1e-4)
        assert float((far[task] - wanted[task]).abs().max()) > 100 * float((found[task] - wanted[task]).abs().max())


@pytest.mark.parametrize("text", MANY)
def test_rank_zero_is_a_tree_of_shared_weights(grower: Grower, picture: Tensor, text: str) -> None:
    """The plain tree whose groups have the means of the linear weights at each block, and all else of their own."""
    shape = tree(text)
    states = {group: grower.weights(group) for groups in shape.partitions for group in groups}

    def means(group: tuple[str, ...]) -> Mapping[str, Tensor]:
        found = dict(states[group])
        for name, value in found.items():
            block = next((n for n in range(4) if f"layer.{n}." in name and value.ndim == 2), None)
            if block is not None:
                rows = torch.stack([states[other][name] for other in shape.partitions[block]]).double()
                found[name] = rows.mean(0).float() if len(rows) > 1 else value
        return found

    expected = TreeEncoder(shape, next(iter(grower.experts.values())).encoder)
    expected.load_groups(means)
    model = grower.grow(shape, rank=0)
    wanted = SimoModel(expected, model.tasks, model.heads)
    assert equal(predicted(random_stitches(model), picture), predicted(random_stitches(wanted), picture))
    assert not any("factors" in name for name in model.encoder.state_dict())


@pytest.mark.parametrize("rank", [0, 3])
def test_memory_follows_the_closed_form(grower: Grower, tmp_path: Path, rank: int) -> None:
    """Two shared blocks, and three branches of two blocks each: in parameters, in memory and on the disk."""
    model = grower.grow(tree(2), rank=rank)
    one = grower.grow(tree(4)).encoder
    whole = sum(p.numel() for p in one.parameters())
    block = sum(p.numel() for p in one.layout.units[0].parameters())
    small = block - sum(out * width for out, width in SIDES)  # norms, biases and scales
    factors = rank * sum(out + width for out, width in SIDES)
    stitches, norms = 3 * (32 * 32 + 32), 2 * 2 * 32
    expected = whole + 2 * (2 * small + 3 * factors) + stitches + norms
    assert sum(p.numel() for p in model.encoder.parameters()) == expected
    places = {p.data_ptr(): p.numel() for p in model.encoder.state_dict(keep_vars=True).values() if p.numel()}
    buffers = sum(b.numel() for b in model.encoder.buffers()) - 2 * 3 * (len(encoder_of(model).paths) + 1)
    assert sum(places.values()) == expected + buffers
    assert sum(p.numel() for p in copy.deepcopy(model).encoder.parameters()) == expected
    model.save_pretrained(tmp_path / "scene")
    stored = 0
    for part in ("encoder/model", "branches/depth", "branches/normals", "branches/parts", "stitches"):
        path = tmp_path / "scene" / f"{part}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                stored += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == expected
    assert (tmp_path / "scene" / "branches" / "depth.safetensors").exists() == (rank > 0)


@pytest.mark.parametrize(("text", "rank"), [(MANY[0], 3), (MANY[1], 3), (MANY[1], 0), (MANY[2], 1000)])
def test_a_saved_tree_loads_to_equal_predictions(
    grower: Grower, picture: Tensor, tmp_path: Path, text: str, rank: int
) -> None:
    model = random_stitches(grower.grow(tree(text), rank))
    loaded = load(model.save_pretrained(tmp_path / "scene"))
    description = json.loads((tmp_path / "scene" / "simo.json").read_text())
    assert description["format"] == 3 and description["encoder"]["branch_rank"] == rank
    assert equal(predicted(loaded, picture), predicted(model, picture))
    assert encoder_of(loaded).rank == rank and loaded.encoder_fingerprint() == model.encoder_fingerprint()


def damages() -> dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]]:
    def truncate(folder: Path, description: dict[str, Any]) -> None:
        for file in (folder / "branches").iterdir():
            file.write_bytes(file.read_bytes()[:100])

    return {
        "no factors": (lambda folder, _: (folder / "branches" / "depth.safetensors").unlink(), "depth.*missing"),
        "short": (truncate, r"branches hold \d+ bytes, but the tree .* needs [\d,]+ parameters"),
        "other rank": (lambda _, about: about["encoder"].update(branch_rank=2), "does not fit simo.json"),
        "text": (lambda _, about: about["encoder"].update(branch_rank="3"), "encoder.branch_rank is '3'"),
        "negative": (lambda _, about: about["encoder"].update(branch_rank=-1), "the branch rank is -1"),
        "kept": (lambda _, about: about["encoder"].update(kept=["edges"]), "kept is .*'edges'.*, but the tasks of the"),
        "empty": (lambda _, about: about["encoder"].update(kept=[]), r"kept is \[\], but the tasks of the tree"),
    }


@pytest.mark.parametrize("name", damages())
def test_a_damaged_folder_is_refused(grower: Grower, tmp_path: Path, name: str) -> None:
    folder = grower.grow(tree(2), 3).save_pretrained(tmp_path / "scene")
    damage, message = damages()[name]
    description = json.loads((folder / "simo.json").read_text())
    damage(folder, description)
    (folder / "simo.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_newer_format_is_refused(grower: Grower, tmp_path: Path) -> None:
    folder = grower.grow(tree(2), 3).save_pretrained(tmp_path / "scene")
    text = (folder / "simo.json").read_text()
    (folder / "simo.json").write_text(text.replace('"format": 3', '"format": 4'))
    with pytest.raises(InputError, match="format 4 is newer than this simomerge reads; upgrade it"):
        load(folder)


# Merging and what works on the result -------------------------------------------------------------------


@pytest.fixture(scope="module")
def low(base: SimoModel, experts: dict[str, SimoModel], images: Images) -> SimoModel:
    return merge(base, experts, METHOD, share=2, images=images, branch_rank=3)


def test_a_merge_fits_what_it_keeps(
    low: SimoModel, grower: Grower, experts: dict[str, SimoModel], images: Images, picture: Tensor
) -> None:
    """Stitches and heads are fitted after the truncation; the record says what it keeps."""
    by_hand = grower.grow(tree(2), 3)
    fit_stitches(by_hand, experts, images)
    for name, stitch in encoder_of(low).stitches.items():
        assert equal(stitch.state_dict(), encoder_of(by_hand).stitches[name].state_dict())
    alone = realign(by_hand.select("depth"), {"depth": experts["depth"]}, images, variant="cross-tap")
    found, expected = (predicted(model, picture)["depth"] for model in (low, alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    record = low.provenance["merge"]
    assert record["branch_rank"] == 3 and list(record["difference_kept"]) == ["3-depth", "3-normals", "3-parts"]
    left = total = 0.0
    names = [name for name in grower.weights(("depth",)) if any(f"layer.{n}." in name for n in (2, 3))]
    for name in names:
        weights = [grower.weights((task,))[name].double() for task in TASKS]
        if weights[0].ndim == 2:
            shared, factors = shared_and_factors(weights, 3)
            total += float((weights[0] - shared).square().sum())
            left += error(weights[:1], shared, factors[:1])
    assert record["difference_kept"]["3-depth"] == pytest.approx(1 - left / total, abs=1e-3)


@pytest.mark.parametrize("name", ["distill-encoder", "distill-adapters"])
def test_realignments_keep_the_form(
    low: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor, tmp_path: Path, name: str
) -> None:
    found = realign(low, experts, images, method=name, steps=3, batch_size=4, hold_out=0.0)
    before, after = low.encoder.backbone.state_dict(), found.encoder.backbone.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert any("factors" in key for key in moved) == (name == "distill-encoder")
    adapters = found.encoder.adapters
    more = 0 if adapters is None else sum(p.numel() for p in adapters.parameters())
    sizes = [sum(p.numel() for p in model.encoder.parameters()) for model in (low, found)]
    assert sizes[1] == sizes[0] + more
    loaded = load(found.save_pretrained(tmp_path / "scene"))
    assert equal(predicted(loaded, picture), predicted(found, picture))


def test_an_edit_keeps_the_rank(low: SimoModel, base: SimoModel, experts: dict[str, SimoModel], images: Images) -> None:
    two = {task: experts[task] for task in ("depth", "parts")}
    found = edit_tree(low, base, two, images, remove=["normals"])
    assert encoder_of(found).rank == 3 and found.provenance["merge"]["branch_rank"] == 3


def test_a_task_that_shares_no_block_is_fitted_too(
    base: SimoModel, experts: dict[str, SimoModel], images: Images, picture: Tensor
) -> None:
    """Its weights are not quite its expert's, so that its head is folded, unlike in a plain tree."""
    far = Grower(base, check_experts(base, experts), METHOD).grow(tree("each"), 4)
    found = merge(base, experts, METHOD, share=0, images=images, branch_rank=4)
    assert found.provenance["realign"]["method"] == "fold" and not encoder_of(found).stitches
    for task, expert in experts.items():
        wanted = predicted(expert, picture)[task]
        distances = [float((predicted(model, picture)[task] - wanted).square().mean()) for model in (found, far)]
        assert 0 < distances[0] < distances[1]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no tree": ({"share": None, "branch_rank": 3}, "branch_rank is the rank of own blocks: give share or budget too"),
    "negative": ({"branch_rank": -1}, "the branch rank is -1: give a whole number of at least 0"),
    "no number": ({"branch_rank": 2.5}, "the branch rank is 2.5: give a whole number"),
    "nothing own": ({"share": "all", "branch_rank": 3}, "all tasks share all blocks, so that no own block"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(base: SimoModel, experts: dict[str, SimoModel], images: Images, name: str) -> None:
    given, message = MISTAKES[name]
    with pytest.raises(InputError, match=message):
        merge(base, experts, METHOD, **{"share": 2, "images": images, **given})


def test_blocks_without_linear_layers_are_refused() -> None:
    with pytest.raises(InputError, match="linear layers, and fine is a convolution: leave the rank out"):
        TreeEncoder(Tree.of(1, ["a", "b"], 2), CustomEncoder(Declared()), rank=2)
