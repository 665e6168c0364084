"""The checks on experts, on plain data: what models in memory and files on disk have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from simomerge.checkpoints import experts
from simomerge.checkpoints.experts import KIND_NAMES, own_task
from simomerge.core.errors import InputError

ENCODER = {"taps": [1, 2], "apply_layernorm": True, "mean": [0.5] * 3, "std": [0.2] * 3}


@dataclass
class Recorded:
    """A model that is nothing but its records; counts how often its weights are hashed."""

    fingerprint: str
    source: str = "runs"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    hashed: int = 0

    @property
    def place(self) -> str:
        return self.source or "the given model"

    def origin(self) -> dict[str, str]:
        self.hashed += 1
        return {"source": self.source, "fingerprint": self.fingerprint}


def fine_tuned_from(fingerprint: str | None) -> Recorded:
    base = {"source": "the-base"} if fingerprint is None else {"source": "the-base", "fingerprint": fingerprint}
    return Recorded("e" * 64, provenance={"base": base})


def test_the_task_of_an_expert() -> None:
    assert experts.own_task({"depth": 1}, "far") == "depth"
    assert experts.own_task(["depth", "normals"], "normals") == "normals"
    with pytest.raises(InputError, match="expert 'edges' has the tasks depth, normals; name one of them"):
        experts.own_task(["depth", "normals"], "edges")
    with pytest.raises(InputError, match="expert 'edges' has the tasks none"):
        experts.own_task([], "edges")
    with pytest.raises(InputError, match=r"'\.\./depth' cannot be the name of a task: use letters"):
        experts.own_task(["depth"], "../depth")
    for own in ("image", "depth"):
        with pytest.raises(InputError, match="no task can be called 'image', which is a column of every table: rename"):
            experts.own_task([own], "image")
    assert experts.own_task(["image"], "photo") == "image"  # the merge of a folder that has this name renames it


def test_a_description_of_one_task() -> None:
    described = {"tasks": {"depth": {"name": "depth"}, "edges": {}}, "heads": {"depth": 1, "edges": 2}, "format": 1}
    assert experts.only_task(described, "edges") == {"tasks": {"edges": {}}, "heads": {"edges": 2}, "format": 1}
    alone = experts.only_task(described, "depth")
    assert experts.only_task(alone, "far") == {
        "tasks": {"far": {"kind": "depth", "name": "far"}},
        "heads": {"far": 1},
        "format": 1,
    }


def test_experts_of_one_encoder() -> None:
    def described(adapters: Any = None, **changed: Any) -> dict[str, Any]:
        return {"encoder": {**ENCODER, **changed}, "adapters": adapters}

    experts.check_same_encoder({"depth": described(), "normals": described()})
    for changed, message in (
        ({"taps": [1]}, r"experts 'depth' and 'normals' differ in taps: \[1, 2\] and \[1\]\."),
        ({"apply_layernorm": False}, "differ in final layer norm: True and False"),
        ({"std": [1] * 3}, r"differ in image normalisation: \[\[0\.5, .* and \[\[.*\[1, 1, 1\]\]"),
        ({"patch_size": 14}, "differ in patch size: None and 14"),
        ({"architecture": "ViT"}, "differ in architecture: None and ViT"),
        ({"adapters": {"rank": 2}}, "expert 'normals' has adapters in addition to its blocks"),
    ):
        with pytest.raises(InputError, match=message):
            experts.check_same_encoder({"depth": described(), "normals": described(**changed)})
    with pytest.raises(InputError, match="the model and expert 'depth' differ in taps"):
        experts.check_same_encoder({"the model": described(), "depth": described(taps=[3])})


def test_the_base_of_experts() -> None:
    base, given = Recorded("b" * 64), {"depth": fine_tuned_from("b" * 64), "silent": fine_tuned_from(None)}
    assert experts.check_base(base, given) == ["silent"] and base.hashed == 1
    with pytest.raises(
        InputError,
        match=r"'depth' \(runs\) was fine-tuned from another base \(its base b{12}, the given one c{12}\); give the-",
    ):
        experts.check_base(Recorded("c" * 64), given)
    unasked = Recorded("b" * 64)
    assert experts.check_base(unasked, {"silent": fine_tuned_from(None)}) == ["silent"]
    assert not unasked.hashed  # hashing takes time, so it is done only if there is something to compare with
    for distance, verdict in ((0.2, "by 20% of their norm: plausible for"), (0.51, "by 51% .*looks like another base")):
        with pytest.warns(UserWarning, match=f"expert 'silent' does not record its base.*{verdict}") as log:
            experts.warn_of_unrecorded_base("silent", distance)
        assert log[0].filename == __file__


def test_what_a_model_was_merged_from() -> None:
    base, depth = Recorded("b" * 64, "base"), Recorded("d" * 64, "runs-depth")
    provenance = experts.merge_provenance(base.origin(), {"depth": depth.origin()}, {"method": "ties"})
    assert provenance == {
        "base": {"source": "base", "fingerprint": "b" * 64},
        "experts": {"depth": {"source": "runs-depth", "fingerprint": "d" * 64}},
        "merge": {"method": "ties"},
    }
    experts.check_merged_from(provenance, {"depth": depth, "unrecorded": Recorded("x" * 64)}, base)
    experts.check_merged_from({}, {"depth": depth}, base)
    with pytest.raises(
        InputError, match=r"other \(fingerprint o{12}\) is not .* as the base; give base \(fing.* b{12}"
    ):
        experts.check_merged_from(provenance, {}, Recorded("o" * 64, "other"))
    with pytest.raises(
        InputError, match=r"the given model \(.* as expert 'depth'; give runs-depth \(fingerprint d{12}"
    ):
        experts.check_merged_from(provenance, {"depth": Recorded("o" * 64, "")})


def test_re_alignments_that_changed_the_encoder() -> None:
    kept, changed = {"method": "fold", "changes_encoder": False}, {"method": "lora", "changes_encoder": True}
    assert experts.changed_by({}) is experts.changed_by({"realign": {**kept, "after": kept}}) is None
    for record in (changed, {**changed, "after": kept}, {**kept, "after": {**kept, "after": changed}}):
        assert experts.changed_by({"realign": record}) == "lora"


def test_sources_are_named_without_their_path(tmp_path: Any) -> None:
    (tmp_path / "depth").mkdir()
    assert experts.source_name(tmp_path / "depth") == "depth"
    assert experts.source_name("facebook/dinov2-small") == "facebook/dinov2-small" and experts.source_name("") == ""


def test_the_kinds_of_tasks_are_those_of_the_datasets() -> None:
    from simomerge.datasets.tasks import KINDS

    assert set(KINDS) == KIND_NAMES


def test_an_expert_of_another_kind_of_task_is_refused_unless_its_name_is_no_kind() -> None:
    with pytest.raises(InputError, match="expert 'depth' is a model of normals"):
        own_task(["normals"], "depth")
    assert own_task(["normals"], "surface") == "normals" and own_task(["parts"], "depth") == "parts"
