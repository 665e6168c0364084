"""Tasks added to a merged model and removed from it, compared with merging again."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.checkpoints import fingerprint, open_checkpoint, write_safetensors
from simomerge.core.errors import InputError
from simomerge.merging.disk.compress import compress
from simomerge.merging.disk.edit import edit_on_disk
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.merging.disk.output import Output

from .conftest import TASKS, assert_equal, content, tensors_of

Models = dict[str, Path]


def some(models: Models, *tasks: str) -> Models:
    return {task: models[task] for task in tasks}


def description_of(model: Path) -> dict[str, Any]:
    return json.loads((model / "simo.json").read_text())


def record(model: Path, **provenance: Any) -> None:
    described = description_of(model)
    described["provenance"].update(provenance)
    (model / "simo.json").write_text(json.dumps(described))


# Weighted sums of task vectors --------------------------------------------------------------------------

LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("task-arithmetic", {}),
    ("task-arithmetic", {"scale": 0.7}),
    ("average", {}),
    ("weighted-average", {"weight": 2.0}),
]
EDITS = [
    (("depth",), ("normals",), ()),
    (("normals", "depth"), ("edges",), ()),
    (("depth", "normals", "edges"), (), ("normals",)),
    (("depth", "normals"), ("edges",), ("depth",)),
]


@pytest.mark.parametrize(("method", "parameters"), LINEAR)
@pytest.mark.parametrize(("present", "add", "remove"), EDITS)
def test_editing_equals_merging_again(
    method: str,
    parameters: dict[str, Any],
    present: tuple[str, ...],
    add: tuple[str, ...],
    remove: tuple[str, ...],
    shared_models: Models,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    merge_on_disk(tiny_base, some(shared_models, *present), tmp_path / "old", method, **parameters)
    # The experts that stay are not given, and need not be there.
    edit = edit_on_disk(
        tmp_path / "old", tiny_base, tmp_path / "new", some(shared_models, *add), some(shared_models, *remove)
    )
    after = tuple(task for task in present if task not in remove) + add
    merged_again = merge_on_disk(
        tiny_base, some(shared_models, *after), tmp_path / "merged_again", method, **parameters
    )
    assert edit.output == tmp_path / "new" and edit.tasks == after and edit.merge == merged_again.merge
    assert_equal(tensors_of(tmp_path / "new"), tensors_of(tmp_path / "merged_again"), 1e-6)
    new, complete = content(tmp_path / "new"), content(tmp_path / "merged_again")
    weights = "encoder/model.safetensors"
    assert {name: new[name] for name in new if name != weights} == {
        name: complete[name] for name in complete if name != weights
    }
    assert set(content(tmp_path)) == {
        f"{folder}/{name}" for folder in ("old", "new", "merged_again") for name in content(tmp_path / folder)
    }


def test_the_edited_model_loads_and_can_be_edited_again(shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    import simomerge

    merge_on_disk(tiny_base, some(shared_models, "depth"), tmp_path / "1", scale=0.3)
    edit_on_disk(tmp_path / "1", tiny_base, tmp_path / "2", add=some(shared_models, "edges"))
    edit_on_disk(tmp_path / "2", tiny_base, tmp_path / "3", add=some(shared_models, "normals"))
    edit_on_disk(tmp_path / "3", tiny_base, tmp_path / "4", remove=some(shared_models, "edges", "depth"))
    model = simomerge.load(tmp_path / "3")
    assert list(model.tasks) == ["depth", "edges", "normals"]
    loaded = {task: simomerge.load(shared_models[task]) for task in ("depth", "edges", "normals")}
    in_memory = simomerge.merge(simomerge.load(tiny_base), loaded, scale=0.3)
    assert model.provenance == in_memory.provenance
    ours, theirs = (m.encoder.backbone.state_dict() for m in (model, in_memory))
    assert all(torch.allclose(value, theirs[name], rtol=0, atol=1e-6) for name, value in ours.items())
    picture = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        for task, value in model(picture).items():
            assert torch.allclose(value, in_memory(picture)[task], atol=1e-4)
    merged_again = merge_on_disk(tiny_base, some(shared_models, "normals"), tmp_path / "merged_again", scale=0.3).output
    assert_equal(tensors_of(tmp_path / "4"), tensors_of(merged_again), 1e-6)


def test_scales_of_each_expert(shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    for scale in ({"edges": 0.9, "depth": 0.1, "normals": 0.4}, [0.9, 0.1, 0.4]):
        order = ("edges", "depth", "normals")
        merge_on_disk(tiny_base, some(shared_models, *order), Output(tmp_path / "old", overwrite=True), scale=scale)
        edit = edit_on_disk(
            tmp_path / "old", tiny_base, tmp_path / "new", remove=some(shared_models, "depth"), overwrite=True
        )
        assert edit.merge == {"method": "task-arithmetic", "scale": {"edges": 0.9, "normals": 0.4}}
        assert description_of(tmp_path / "new")["provenance"]["merge"] == edit.merge
        merged_again = merge_on_disk(
            tiny_base,
            some(shared_models, "edges", "normals"),
            tmp_path / "merged_again.safetensors",
            scale={"edges": 0.9, "normals": 0.4},
        ).output
        assert_equal(tensors_of(tmp_path / "new"), tensors_of(merged_again), 1e-6)
        merged_again.unlink()
        again = edit_on_disk(
            tmp_path / "new", tiny_base, tmp_path / "again", remove=some(shared_models, "edges"), overwrite=True
        )
        assert again.merge["scale"] == {"normals": 0.4}
    with pytest.raises(
        InputError,
        match=r"has a scale for each expert \(edges, normals\), and none is recorded for depth: merge all the experts",
    ):
        edit_on_disk(tmp_path / "new", tiny_base, tmp_path / "no", add=some(shared_models, "depth"))


def test_heads_are_the_model_s_and_the_newcomer_s(shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth", "normals"), tmp_path / "old")
    trained = tmp_path / "old" / "heads" / "depth.safetensors"
    write_safetensors(trained, {name: array + 1 for name, array in tensors_of(trained).items()})  # re-aligned, say
    edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", add=some(shared_models, "edges"))
    heads = {path.stem: path.read_bytes() for path in (tmp_path / "new" / "heads").iterdir()}
    assert set(heads) == set(TASKS) and heads["depth"] == trained.read_bytes()
    assert heads["edges"] == (shared_models["edges"] / "heads" / "edges.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_storage_stays(dtype: str, shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth"), Output(tmp_path / "old", dtype=dtype))
    edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", add=some(shared_models, "edges"))
    new, old = (open_checkpoint(tmp_path / name) for name in ("new", "old"))
    assert {name: new.info(name) for name in new} == {name: old.info(name) for name in old}
    merged_again = merge_on_disk(tiny_base, some(shared_models, "depth", "edges"), tmp_path / "merged_again").output
    assert_equal(
        tensors_of(tmp_path / "new"), tensors_of(merged_again), {"float16": 2e-3, "bfloat16": 2e-2}.get(dtype, 1e-6)
    )


def test_a_newcomer_under_another_name(shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    import simomerge

    merge_on_disk(tiny_base, some(shared_models, "depth"), tmp_path / "old")
    edit = edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", add={"far": shared_models["edges"]})
    assert edit.tasks == ("depth", "far") and simomerge.load(tmp_path / "new").tasks["far"].kind == "edges"


# Other methods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.4}),
        ("dare-linear", {"scale": {"depth": 0.2, "normals": 0.9}}),
        ("task-arithmetic", {"schedule": "lines:beta=0.3"}),
        ("average", {"schedule": [0.5, 1.0]}),
    ],
)
def test_other_methods_merge_again_and_need_those_that_stay(
    method: str, parameters: dict[str, Any], shared_models: Models, tiny_base: Path, tmp_path: Path
) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth", "normals"), tmp_path / "old", method, **parameters)
    before = content(tmp_path)
    edit: dict[str, Any] = {"remove": some(shared_models, "normals")}
    with pytest.raises(InputError, match=f"'{method}' weighs every entry by all the experts: give .* too \\(depth\\)"):
        edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", **edit)
    assert content(tmp_path) == before
    done = edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", **edit, others=some(shared_models, "depth"))
    assert done.tasks == ("depth",)
    left = {k: {"depth": v["depth"]} if isinstance(v, dict) else v for k, v in parameters.items()}
    merged_again = merge_on_disk(tiny_base, some(shared_models, "depth"), tmp_path / "merged_again", method, **left)
    assert content(tmp_path / "new") == content(tmp_path / "merged_again") and done.merge == merged_again.merge


@pytest.mark.parametrize("method", ["ties", "average"])
def test_the_expert_that_leaves_is_needed_where_it_is_subtracted(
    method: str, shared_models: Models, tiny_base: Path, tmp_path: Path
) -> None:
    merge_on_disk(tiny_base, shared_models, tmp_path / "old", method)
    given = {"remove": {"normals": None}, "others": some(shared_models, "depth", "edges")}
    if method == "average":
        before = content(tmp_path)
        with pytest.raises(InputError, match=r"'average' subtracts the expert that leaves, .* remove normals=EXPERT"):
            edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", **given)
        assert content(tmp_path) == before
        return
    assert edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", **given).tasks == ("depth", "edges")
    merge_on_disk(tiny_base, some(shared_models, "depth", "edges"), tmp_path / "merged_again", method)
    assert content(tmp_path / "new") == content(tmp_path / "merged_again")
    with pytest.raises(InputError, match="expert 'far' is not in the merged model"):
        edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "newer", **{**given, "remove": {"far": None}})


def test_ties_with_one_more(shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth", "normals"), tmp_path / "old", "ties", scale=0.5)
    with pytest.raises(InputError, match=r"give those that stay too \(normals\)"):
        edit_on_disk(
            tmp_path / "old",
            tiny_base,
            tmp_path / "new",
            add=some(shared_models, "edges"),
            others=some(shared_models, "depth"),
        )
    edit_on_disk(
        tmp_path / "old",
        tiny_base,
        tmp_path / "new",
        add=some(shared_models, "edges"),
        others=some(shared_models, "depth", "normals"),
    )
    merge_on_disk(tiny_base, shared_models, tmp_path / "merged_again", "ties", scale=0.5)
    assert content(tmp_path / "new") == content(tmp_path / "merged_again")


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_methods_that_need_images_are_merged_again(
    method: str, shared_models: Models, tiny_base: Path, tmp_path: Path
) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth"), tmp_path / "old")
    record(tmp_path / "old", merge={"method": method})
    with pytest.raises(InputError, match=f"'{method}' computed with images, which the model does not record"):
        edit_on_disk(
            tmp_path / "old",
            tiny_base,
            tmp_path / "new",
            some(shared_models, "edges"),
            {},
            some(shared_models, "depth"),
        )
    assert not (tmp_path / "new").exists()


# Re-aligned heads ---------------------------------------------------------------------------------------


def test_re_aligned_heads_are_reported(shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth"), tmp_path / "old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "quiet", add=some(shared_models, "edges"))
    record(tmp_path / "old", realign={"method": "heads", "changes_encoder": False})
    with pytest.warns(UserWarning, match="re-aligned with the old encoder: re-align the new model"):
        edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", add=some(shared_models, "edges"))
    recorded = description_of(tmp_path / "new")["provenance"]
    assert set(recorded) == {"base", "experts", "merge", "edited"}
    repaired = {"tasks": ["depth"], "by": ["heads"]}
    assert recorded["edited"] == {"added": ["edges"], "removed": [], "realigned": repaired}
    card = (tmp_path / "new" / "README.md").read_text()
    assert "The heads of depth were repaired for its encoder before a task was added or removed (heads)." in card
    edit_on_disk(tmp_path / "new", tiny_base, tmp_path / "again", add=some(shared_models, "normals"))
    assert description_of(tmp_path / "again")["provenance"]["edited"]["realigned"] == repaired
    edit_on_disk(tmp_path / "again", tiny_base, tmp_path / "last", remove=some(shared_models, "depth"))
    assert "edited" not in description_of(tmp_path / "last")["provenance"]  # the heads that stay are their experts'
    assert "Its heads were not repaired." in (tmp_path / "last" / "README.md").read_text()


def test_a_note_of_the_merge_stays(shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth"), tmp_path / "old")
    how = {"method": "task-arithmetic", "scale": 0.4, "scale_chosen_on": "8 labelled images"}
    record(tmp_path / "old", merge=how)
    assert edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", some(shared_models, "edges")).merge == how
    assert description_of(tmp_path / "new")["provenance"]["edited"] == {"added": ["edges"], "removed": []}


def test_a_model_without_the_head_of_an_expert(scene: Path, shared_models: Models, tiny_base: Path) -> None:
    """As `SimoModel.select` leaves it: the encoder is the merge of both experts."""
    described = description_of(scene)
    for key in ("tasks", "heads"):
        described[key].pop("depth")
    (scene / "simo.json").write_text(json.dumps(described))
    (scene / "heads" / "depth.safetensors").unlink()
    before = content(scene.parent)
    message = r"scene: it was merged from depth, normals, but has no head for depth\. Edit .*, or remove 'depth' too"
    with pytest.raises(InputError, match=message):
        edit_on_disk(scene, tiny_base, scene.parent / "new", add=some(shared_models, "edges"))
    assert content(scene.parent) == before
    new = scene.parent / "new"
    edit_on_disk(scene, tiny_base, new, some(shared_models, "edges"), some(shared_models, "depth"))
    again = merge_on_disk(tiny_base, some(shared_models, "normals", "edges"), scene.parent / "again").output
    assert_equal(tensors_of(new), tensors_of(again), 1e-6)
    assert list(description_of(new)["tasks"]) == ["normals", "edges"]


def test_storage_stays_with_other_names(shared_models: Models, tiny_base: Path, tmp_path: Path) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth"), Output(tmp_path / "old", dtype="float16"))
    weights = tensors_of(tmp_path / "old")
    other = {f"backbone.{name}": value for name, value in weights.items()}
    write_safetensors(tmp_path / "old" / "encoder" / "model.safetensors", other, "F16")
    edit_on_disk(tmp_path / "old", tiny_base, tmp_path / "new", add=some(shared_models, "edges"))
    new = open_checkpoint(tmp_path / "new")
    assert {new.info(name).dtype for name in new} == {"F16"} and len(new) == len(weights)


def test_newcomers_are_checked_as_in_a_merge(
    scene: Path, shared_models: Models, tiny_base: Path, tmp_path: Path
) -> None:
    stranger = Path(shutil.copytree(shared_models["edges"], tmp_path / "stranger"))
    described = description_of(stranger)
    del described["provenance"]["base"]
    (stranger / "simo.json").write_text(json.dumps(described))
    weights = stranger / "encoder" / "model.safetensors"
    far = {name: value + 3 for name, value in tensors_of(stranger).items()}
    write_safetensors(weights, far)
    with pytest.warns(UserWarning, match=r"expert 'edges' does not record its base\. .*: this looks like another base"):
        edit_on_disk(scene, tiny_base, tmp_path / "new", add={"edges": stranger})
    write_safetensors(weights, {name: value for name, value in open_checkpoint(tiny_base).items() if name in far})
    with pytest.warns(UserWarning, match="The task vector of edges is zero: the weights equal the base's"):
        edit_on_disk(scene, tiny_base, tmp_path / "still", add={"edges": stranger})


# Mistakes -----------------------------------------------------------------------------------------------


@pytest.fixture
def scene(shared_models: Models, tiny_base: Path, tmp_path: Path) -> Path:
    return merge_on_disk(tiny_base, some(shared_models, "depth", "normals"), tmp_path / "scene").output


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "nothing to do: name a task to add or to remove"),
    "there already": ({"add": ["depth"]}, "the expert 'depth' is in the merged model already: remove it first"),
    "both": ({"add": ["depth"], "remove": ["depth"]}, "the expert 'depth' is in the merged model already"),
    "not in it": ({"remove": ["edges"]}, "expert 'edges' is not in the merged model, which has depth, normals"),
    "wrong expert": (
        {"remove": {"depth": "edges"}},
        r"edges \(.* \w{12}\) is not what the model was merged from as expert 'depth'; give depth \(fing.* \w{12}\)",
    ),
    "wrong other": (
        {"add": ["edges"], "others": {"depth": "normals"}},
        "normals .* is not what the .* as expert 'depth'",
    ),
    "unknown other": ({"add": ["edges"], "others": {"far": "normals"}}, "expert 'far' is not in the merged model"),
    "none left": ({"remove": ["depth", "normals"]}, "no expert would be left: use the base"),
    "no such expert": ({"add": {"edges": "nowhere"}}, "nowhere does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_a_mistake_is_reported_and_leaves_nothing(
    mistake: str, method: str, shared_models: Models, tiny_base: Path, tmp_path: Path
) -> None:
    merge_on_disk(tiny_base, some(shared_models, "depth", "normals"), tmp_path / "scene", method)
    given, message = MISTAKES[mistake]
    if method == "ties" and mistake == "none left":
        message = r"'ties' needs at least 1 expert\(s\), got 0"
    elif method == "ties" and "others" not in given:
        given = {**given, "others": [task for task in ("depth", "normals") if task not in given.get("remove", ())]}
    places = {
        what: {task: shared_models.get(path, tmp_path / path) for task, path in as_mapping(tasks).items()}
        for what, tasks in given.items()
    }
    if mistake == "nothing":
        places = {}
    before = content(tmp_path)
    with pytest.raises(InputError, match=message):
        edit_on_disk(tmp_path / "scene", tiny_base, tmp_path / "new", **places)
    assert content(tmp_path) == before and not (tmp_path / "new").exists()


def as_mapping(tasks: Any) -> dict[str, str]:
    return dict(tasks) if isinstance(tasks, dict) else {task: task for task in tasks}


def test_another_base_and_an_output_that_exists(
    scene: Path, shared_models: Models, tiny_base: Path, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    other = folder_of("another", 4)
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"another .* is not what the model was merged from as the base; give"):
        edit_on_disk(scene, other, tmp_path / "new", add=some(shared_models, "edges"))
    with pytest.raises(InputError, match="scene already exists: choose another path"):
        edit_on_disk(scene, tiny_base, scene, add=some(shared_models, "edges"))
    added = some(shared_models, "edges")
    with pytest.raises(InputError, match=r"edges is the input .* and would be replaced: choose another path"):
        edit_on_disk(scene, tiny_base, added["edges"], add=added, overwrite=True)
    assert content(tmp_path) == before
    edit_on_disk(scene, tiny_base, scene, add=added, overwrite=True)  # the model itself may be replaced
    assert list(description_of(scene)["tasks"]) == ["depth", "normals", "edges"]


def test_newcomers_of_another_base_and_without_a_head(
    scene: Path,
    shared_models: Models,
    tiny_base: Path,
    folder_of: Callable[..., Path],
    adapter_of: Callable[..., tuple[Path, np.ndarray]],
    tmp_path: Path,
) -> None:
    stranger = Path(shutil.copytree(shared_models["edges"], tmp_path / "stranger"))
    record(stranger, base={"source": "elsewhere", "fingerprint": "0" * 64})
    folder = folder_of("plain", 2)
    adapter, _ = adapter_of("adapter", "encoder.layer.0.mlp.fc1", (64, 32))
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"expert 'edges' .* was fine-tuned from another base .*; give elsewhere"):
        edit_on_disk(scene, tiny_base, tmp_path / "new", add={"edges": stranger})
    for path in (folder, folder / "model.safetensors", adapter):
        with pytest.raises(InputError, match=f"{path.name}: not a model folder .*has no head; give one"):
            edit_on_disk(scene, tiny_base, tmp_path / "new", add={"edges": path})
    assert content(tmp_path) == before
    # A removed expert lends no head: its weights are enough.
    bare = shared_models["depth"] / "encoder" / "model.safetensors"
    assert edit_on_disk(scene, tiny_base, tmp_path / "new", remove={"depth": bare}).tasks == ("normals",)


def test_models_that_no_merge_made(
    scene: Path, shared_models: Models, tiny_base: Path, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    def edit(model: Path) -> None:
        edit_on_disk(model, tiny_base, tmp_path / "new", add=some(shared_models, "edges"))

    with pytest.raises(InputError, match=r"plain: not a model folder \(no simo\.json in it\); give one that a merge"):
        edit(folder_of("plain", 1))
    with pytest.raises(InputError, match=r"depth: its simo\.json does not record what it was merged from"):
        edit(shared_models["depth"])
    described = description_of(scene)
    for key in ("merge", "base", "experts"):
        less = {k: v for k, v in described["provenance"].items() if k != key}
        (scene / "simo.json").write_text(json.dumps({**described, "provenance": less}))
        with pytest.raises(InputError, match="does not record what it was merged from; merge the experts"):
            edit(scene)
    (scene / "simo.json").write_text(json.dumps({**described, "adapters": {"rank": 2}}))
    with pytest.raises(InputError, match=r"has adapters in addition to its blocks, which fit only its weights\. Edit"):
        edit(scene)
    (scene / "simo.json").write_text(json.dumps(described))
    changed = {"method": "lora", "changes_encoder": True}
    before_the_flag = ({"method": "lora"}, {"method": "distill", "adapters": "lora"})
    for realign in (changed, {"method": "heads", "changes_encoder": False, "after": changed}, *before_the_flag):
        record(scene, realign=realign)
        with pytest.raises(
            InputError,
            match=r"scene: the re-alignment '(lora|distill)' changed its encoder.* Edit the merge from before",
        ):
            edit(scene)
    for how, message in (
        ({"method": "sorcery"}, "no merge method 'sorcery'"),
        ({"method": "ties", "spell": 1}, "'ties' has no parameter 'spell'"),
    ):
        (scene / "simo.json").write_text(json.dumps(described))
        record(scene, merge=how)
        with pytest.raises(InputError, match=message):
            edit(scene)
    assert not (tmp_path / "new").exists()


def test_a_head_that_is_missing_and_weights_that_are_damaged(
    scene: Path, shared_models: Models, tiny_base: Path, tmp_path: Path
) -> None:
    (scene / "heads" / "depth.safetensors").unlink()
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"heads/depth\.safetensors: missing"):
        edit_on_disk(scene, tiny_base, tmp_path / "new", add=some(shared_models, "edges"))
    weights = scene / "encoder" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-5])
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        edit_on_disk(scene, tiny_base, tmp_path / "new", add=some(shared_models, "edges"))
    weights.write_bytes(kept)
    assert content(tmp_path) == before


def test_every_checkpoint_is_hashed_only_once(
    scene: Path, shared_models: Models, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(weights: Any) -> str:
        hashed.append(str(weights.path))
        return fingerprint(weights)

    monkeypatch.setattr("simomerge.merging.disk.sources.fingerprint", counted)
    change = some(shared_models, "edges"), some(shared_models, "depth"), some(shared_models, "normals")
    edit_on_disk(scene, tiny_base, tmp_path / "new", *change)
    assert sorted(hashed) == sorted([str(tiny_base), *(f"{shared_models[task]}/encoder" for task in TASKS)])
    hashed.clear()
    merge_on_disk(tiny_base, shared_models, tmp_path / "again")
    assert sorted(hashed) == sorted([str(tiny_base), *(f"{shared_models[task]}/encoder" for task in TASKS)])
    hashed.clear()
    compress(tiny_base, shared_models, tmp_path / "compressed")
    assert sorted(hashed) == sorted([str(tiny_base), *(f"{shared_models[task]}/encoder" for task in TASKS)])


def test_fingerprints_are_of_what_was_given(
    scene: Path, shared_models: Models, tiny_base: Path, tmp_path: Path
) -> None:
    edit_on_disk(scene, tiny_base, tmp_path / "new", add=some(shared_models, "edges"))
    recorded = description_of(tmp_path / "new")["provenance"]
    assert recorded["base"]["fingerprint"] == fingerprint(open_checkpoint(tiny_base))
    for task in TASKS:
        assert recorded["experts"][task] == {
            "source": task,
            "fingerprint": fingerprint(open_checkpoint(shared_models[task])),
        }
