"""Geometry and CKA against slow, independent implementations, and their invariances."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.assembly.experts import with_merged_encoder
from simomerge.core.errors import InputError
from simomerge.datasets.groups import held_out
from simomerge.merging import TaskArithmetic
from simomerge.models.model import SimoModel
from simomerge.relations import alignment, geometry, similarity
from simomerge.relations.features import TokenSums, cka

from .conftest import RandomDataset

NAMES = ("embeddings.w", "encoder.layer.0.w", "encoder.layer.1.w", "layernorm.w")
VALUES = st.floats(-2, 2, width=32).map(lambda value: float(np.float32(round(value, 2))))


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    def one() -> dict[str, np.ndarray]:
        return {name: np.array(draw(st.lists(VALUES, min_size=4, max_size=4)), np.float32) for name in NAMES}

    return one(), {task: one() for task in ("a", "b", "c")}


def slow(base: list[float], first: list[float], second: list[float]) -> dict[str, float]:
    """One entry after the other, in Python floats."""
    dot = norm = other = weight = apart = 0.0
    unlike = both = 0
    for x, y, z in zip(base, first, second, strict=True):
        a, b = float(np.float32(y) - np.float32(x)), float(np.float32(z) - np.float32(x))
        dot, norm, other, weight = dot + a * b, norm + a * a, other + b * b, weight + abs(a * b)
        if a and b:
            both += 1
            if (a > 0) != (b > 0):
                unlike, apart = unlike + 1, apart + abs(a * b)
    return {
        "norm": math.sqrt(norm),
        "cosine": dot / math.sqrt(norm * other) if norm and other else math.nan,
        "conflict": unlike / both if both else math.nan,
        "weighted": apart / weight if weight else math.nan,
    }


def same(found: float, wanted: float) -> bool:
    return (math.isnan(found) and math.isnan(wanted)) or math.isclose(found, wanted, rel_tol=1e-5, abs_tol=1e-6)


@settings(max_examples=40, deadline=None)
@given(models())
def test_geometry_equals_a_loop_over_the_entries(given_: tuple) -> None:
    base, experts = given_
    if all((expert[n] == base[n]).all() for expert in experts.values() for n in NAMES):
        return
    parts = {part.name: part for part in geometry(base, experts).parts}
    members = {"all": NAMES, "outside": (NAMES[0], NAMES[3]), "1": (NAMES[1],), "2": (NAMES[2],)}
    assert list(parts) == list(members)
    for name, tensors in members.items():
        flat = {key: [float(v) for t in tensors for v in model[t]] for key, model in {"base": base, **experts}.items()}
        for (i, a), (j, b) in combinations(enumerate(experts), 2):
            wanted, part = slow(flat["base"], flat[a], flat[b]), parts[name]
            assert same(part.norms[i], wanted["norm"])
            assert same(part.cosine[i][j], wanted["cosine"]) and same(part.cosine[j][i], wanted["cosine"])
            assert same(part.conflict[i][j], wanted["conflict"])
            assert same(part.weighted_conflict[i][j], wanted["weighted"])


@settings(max_examples=20, deadline=None)
@given(models(), st.permutations(["a", "b", "c"]))
def test_the_order_of_the_experts_does_not_matter(given_: tuple, order: list[str]) -> None:
    base, experts = given_
    one, other = geometry(base, experts), geometry(base, {task: experts[task] for task in order})
    for i, a in enumerate(one.tasks):
        for j, b in enumerate(one.tasks):
            x, y = other.tasks.index(a), other.tasks.index(b)
            assert same(one.all.cosine[i][j], other.all.cosine[x][y])
            assert same(one.all.conflict[i][j], other.all.conflict[x][y])


def test_a_longer_task_vector_keeps_its_direction() -> None:
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=50).astype(np.float32)}
    tau = {task: rng.normal(size=50).astype(np.float32) for task in "ab"}
    short, long = (geometry(base, {t: {"w": base["w"] + f * v} for t, v in tau.items()}).all for f in (0.5, 4.0))
    assert long.norms == pytest.approx([8 * norm for norm in short.norms], rel=1e-4)
    assert long.cosine[0][1] == pytest.approx(short.cosine[0][1], abs=1e-5)
    assert long.weighted_conflict[0][1] == pytest.approx(short.weighted_conflict[0][1], abs=1e-5)
    opposed = geometry(base, {"a": {"w": base["w"] + tau["a"]}, "b": {"w": base["w"] - tau["a"]}}).all
    assert opposed.cosine[0][1] == pytest.approx(-1) and opposed.conflict[0][1] == 1


def test_geometry_of_models_and_of_mappings_that_do_not_fit(base: SimoModel, experts: dict[str, SimoModel]) -> None:
    found = geometry(base, experts)
    assert [part.name for part in found.blocks] == ["1", "2", "3", "4"] and found.tasks == list(experts)
    squares = [sum(part.norms[i] ** 2 for part in found.parts[1:]) for i in range(3)]
    assert squares == pytest.approx([norm**2 for norm in found.all.norms])
    with pytest.raises(InputError, match="is missing 1 tensor"):
        geometry({"w": np.zeros(1)}, {"a": {}})


# CKA ----------------------------------------------------------------------------------------------------


def slow_cka(x: np.ndarray, z: np.ndarray) -> float:
    """From the Gram matrices of the samples, centred by hand: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, ell = centre @ x @ x.T @ centre, centre @ z @ z.T @ centre
    return float(np.trace(k @ ell) / np.sqrt(np.trace(k @ k) * np.trace(ell @ ell)))


def test_cka_from_sums_equals_cka_from_gram_matrices() -> None:
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, width, 2, 5, generator=rng) + 1 for width in (4, 6)]
    sums = TokenSums.empty(4, 6)
    for part in (slice(0, 1), slice(1, 3)):  # in two batches
        sums.add([found[part] for found in maps])
    (xx, _), (zx, zz) = sums.covariance()
    rows = [found.permute(0, 2, 3, 1).reshape(-1, found.shape[1]).double().numpy() for found in maps]
    assert cka(xx, zx, zz) == pytest.approx(slow_cka(*rows), abs=1e-9)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=rng).double())[0] * 3
    assert cka(turn @ xx @ turn.T, zx @ turn.T, zz) == pytest.approx(cka(xx, zx, zz), abs=1e-9)
    assert math.isnan(cka(torch.zeros(2, 2), torch.zeros(2, 2), torch.eye(2)))


@pytest.mark.usefixtures("float32")
def test_similarity_of_every_two_encoders(
    base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset
) -> None:
    found = similarity(base, experts, dataset, 6)
    assert found.names == ["base", *experts] and found.taps == [1, 2, 3, 4] and found.images == 6
    images = torch.stack([dataset.image(i) for i in range(6)])
    with torch.no_grad():
        maps = [experts[t].encode(images).maps[2].permute(0, 2, 3, 1).flatten(0, 2).double() for t in found.names[1:3]]
    table = np.array(found.cka[2])
    assert table[1, 2] == pytest.approx(slow_cka(*(m.numpy() for m in maps)), abs=1e-6)
    assert (table == table.T).all() and (table.diagonal() == 1).all() and (table <= 1 + 1e-9).all()
    with pytest.raises(InputError, match="called 'base'"):
        similarity(base, {"base": experts["depth"]}, dataset)


@pytest.mark.usefixtures("float32")
def test_alignment_on_held_out_images(base: SimoModel, experts: dict[str, SimoModel], dataset: RandomDataset) -> None:
    """Before the map R^2 and CKA are those of the tokens of the held-out images; an expert is aligned with itself."""
    merged = with_merged_encoder(base, experts, TaskArithmetic(scale=0.4))
    rows = {(row.task, row.tap): row for row in alignment(merged, experts, dataset, None)}
    assert list(rows) == [(task, tap) for task in experts for tap in (1, 2, 3, 4)]
    images = torch.stack([dataset.image(index) for index in held_out(dataset)])
    with torch.no_grad():
        x, z = (
            model.encode(images).maps[2].permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
            for model in (merged, experts["normals"])
        )
    found = rows["normals", 3]
    assert found.r2_before == pytest.approx(1 - ((z - x) ** 2).sum() / ((z - z.mean(0)) ** 2).sum(), abs=1e-6)
    assert found.cka_before == pytest.approx(slow_cka(x, z), abs=1e-6)
    assert all(row.r2_after >= row.r2_before for row in rows.values())
    alone = alignment(experts["depth"], {"depth": experts["depth"]}, dataset, None)
    assert all(row.r2_before == row.r2_after == 1 and row.cka_before == pytest.approx(1) for row in alone)
