"""Merging from disk to disk: every kind of input and output, and every way in which it must not go wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from simomerge.checkpoints import fingerprint, open_checkpoint, write_safetensors, write_sharded, writing
from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.merging import Lines, MergeMethod, TaskArithmetic, available, merge_state_dicts
from simomerge.merging.disk.compress import compress
from simomerge.merging.disk.diff import diff_on_disk
from simomerge.merging.disk.merge import MergedOnDisk, merge_on_disk
from simomerge.merging.disk.output import Output
from simomerge.merging.disk.sources import open_source

from .conftest import TASKS, assert_equal, content, tensors_of, weights

INDEX = "model.safetensors.index.json"


def experts(files: Mapping[str, Path], count: int = 3) -> dict[str, Path]:
    return {task: files[task] for task in TASKS[:count]}


def expected(method: str | MergeMethod = "task-arithmetic", count: int = 3, **parameters: Any) -> dict[str, np.ndarray]:
    """The merge of the same weights in memory."""
    models = {task: weights(seed) for seed, task in enumerate(TASKS[:count], start=1)}
    return merge_state_dicts(weights(), models, method, **parameters)


# Files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in available() if not available()[name].needs_data])
def test_files_merge_as_arrays_do(method: str, files: dict[str, Path], tmp_path: Path) -> None:
    count = 2 if method == "slerp" else 3
    done = merge_on_disk(files["base"], experts(files, count), tmp_path / "out.safetensors", method)
    assert done.output == tmp_path / "out.safetensors" and done.tasks == () and done.merge["method"] == method
    assert_equal(tensors_of(done.output), expected(method, count))
    assert set(content(tmp_path)) == {f"{name}.safetensors" for name in ("base", "out", *TASKS)}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.module.", "model.", "model._orig_mod.", "module.model.", "net.encoder."]
)
def test_training_files_merge_as_their_weights_do(prefix: str, files: dict[str, Path], tmp_path: Path) -> None:
    """As DDP, torch.compile and Lightning write them, with an average; a prefix of some names only is no wrapper."""
    trained, other = ({n: torch.from_numpy(a) for n, a in weights(seed).items()} for seed in (1, 2))
    states = {
        key: {f"{prefix}{name}": tensor for name, tensor in state.items()}
        for key, state in (("state_dict", other), ("state_dict_ema", trained))
    }
    torch.save({"epoch": 3, **states}, tmp_path / "last.ckpt")
    given = {TASKS[0]: f"{tmp_path}/last.ckpt::state_dict_ema", TASKS[1]: f"{tmp_path}/last.ckpt::state_dict"}
    done = merge_on_disk(files["base"], given, tmp_path / "out.safetensors")
    assert_equal(tensors_of(done.output), expected(count=2))
    opened = open_source(given[TASKS[0]], open_checkpoint(files["base"]))
    assert opened.place == given[TASKS[0]] and opened.origin()["source"] == "last.ckpt::state_dict_ema"
    with pytest.raises(InputError, match=r"state_dict, state_dict_ema \(an average\)"):
        merge_on_disk(files["base"], {"a": tmp_path / "last.ckpt"}, tmp_path / "again.safetensors")
    names = list(trained)
    torch.save({(name if name == names[0] else f"model.{name}"): trained[name] for name in names}, tmp_path / "some.pt")
    with pytest.raises(InputError, match=r"is missing \d+ tensors of the base"):
        merge_on_disk(files["base"], {"a": tmp_path / "some.pt"}, tmp_path / "again.safetensors")


@pytest.mark.parametrize(
    ("parameters", "recorded"),
    [
        ({}, {"scale": 0.4}),
        ({"scale": 0.2}, {"scale": 0.2}),
        (
            {"scale": {"normals": 0.5, "edges": 0.0, "depth": 0.1}},
            {"scale": {"normals": 0.5, "edges": 0, "depth": 0.1}},
        ),
        ({"scale": [0.1, 0.2, 0.3]}, {"scale": [0.1, 0.2, 0.3]}),
        ({"schedule": "lines:beta=0.3"}, {"scale": 0.4, "schedule": "lines:beta=0.3"}),
        ({"schedule": [0.2, 1]}, {"scale": 0.4, "schedule": [0.2, 1.0]}),
        ({"schedule": Lines(0.5), "scale": 1}, {"scale": 1, "schedule": "lines:alpha=0.5,beta=0.5"}),
    ],
)
def test_parameters_and_schedules(
    parameters: dict[str, Any], recorded: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    done = merge_on_disk(files["base"], experts(files), tmp_path / "out.safetensors", **parameters)
    assert_equal(tensors_of(done.output), expected(**parameters))
    assert done.merge == {"method": "task-arithmetic", **recorded}
    if "schedule" not in parameters:
        method = TaskArithmetic(**parameters)
        again = merge_on_disk(files["base"], experts(files), tmp_path / "again.safetensors", method)
        assert again.output.read_bytes() == done.output.read_bytes()


def test_the_same_input_gives_the_same_bytes(files: dict[str, Path], tmp_path: Path) -> None:
    outputs = []
    for number, (threads, names) in enumerate([(None, TASKS), (1, TASKS), (5, TASKS), (2, TASKS[::-1])]):
        given = {task: files[task] for task in names}
        for method in ("ties", "dare-ties", "iso-c"):
            outputs.append(tmp_path / f"{number}-{method}.safetensors")
            merge_on_disk(files["base"], given, Output(outputs[-1], threads=threads), method)
    for method in range(3):
        assert len({path.read_bytes() for path in outputs[method::3]}) == 1
    # Not even the name of the folder or the order of the tensors in the inputs is in them.
    other = tmp_path / "elsewhere"
    moved = {}
    for name, path in files.items():
        moved[name] = write_safetensors(other / "x" / path.name, dict(reversed(list(weights_of(path).items()))))
    done = merge_on_disk(moved["base"], experts(moved), other / "out.safetensors", "ties")
    assert done.output.read_bytes() == outputs[0].read_bytes()


def weights_of(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint}


@pytest.mark.parametrize("storage", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16", "F32", "F16", "BF16"])
def test_storage_is_the_base_s_or_as_asked(storage: str, dtype: str | None, tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", weights(), storage)
    given = {}
    for seed, task in enumerate(TASKS, start=1):  # whatever the experts are stored as
        kind = ("F32", "F16", "BF16")[seed % 3]
        given[task] = write_safetensors(tmp_path / f"{task}.safetensors", weights(seed), kind)
    done = merge_on_disk(base, given, Output(tmp_path / "out.safetensors", dtype=dtype), "average")
    merged = open_checkpoint(done.output)
    wanted = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", None: storage}.get(dtype, dtype)
    assert {merged.info(name).dtype for name in merged if name != "steps"} == {wanted}
    assert merged.info("steps").dtype == "I64" and merged["steps"].tolist() == [7]
    exact = merge_state_dicts(weights_of(base), {task: weights_of(path) for task, path in given.items()}, "average")
    reference = write_safetensors(tmp_path / "reference.safetensors", exact, wanted)
    assert_equal(tensors_of(done.output), tensors_of(reference))


def test_storage_of_each_tensor_is_its_own(files: dict[str, Path], tmp_path: Path) -> None:
    kinds = ["F16", "BF16", "F32", "F64"]
    mixed = {name: kinds[place % 4] for place, name in enumerate(weights())}
    base = write_safetensors(tmp_path / "mixed.safetensors", weights(), mixed)
    merged = open_checkpoint(merge_on_disk(base, experts(files), tmp_path / "out.safetensors").output)
    assert {name: merged.info(name).dtype for name in merged} == {**mixed, "steps": "I64"}


@pytest.mark.filterwarnings("ignore:expert 'a' does not record its base")
def test_torch_files_and_names_in_memory(files: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    for number, (task, path) in enumerate(experts(files).items()):
        state = {name: torch.from_numpy(np.array(array)) for name, array in weights_of(path).items()}
        torch.save({"state_dict": state} if number else state, tmp_path / f"{task}.pt")
    given = {task: tmp_path / f"{task}.pt" for task in TASKS}
    done = merge_on_disk(files["base"], given, tmp_path / "out.safetensors")
    assert_equal(tensors_of(done.output), expected())
    # transformers 5 has other names in memory than on disk: the output has the base's.
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(tiny_base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    torch.save(model.state_dict(), tmp_path / "memory.bin")
    assert set(model.state_dict()) != set(open_checkpoint(tiny_base))
    done = merge_on_disk(tiny_base, {"a": tmp_path / "memory.bin"}, tmp_path / "named.safetensors", scale=1.0)
    base = tensors_of(tiny_base)
    assert_equal(tensors_of(done.output), {name: array + 0.5 for name, array in base.items()}, 1e-6)


def test_adapters_are_experts(
    files: dict[str, Path], adapter_of: Callable[..., tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    adapter, delta = adapter_of("adapter", "encoder.layer.1.mlp.fc1", (9, 6))
    base = weights()
    full = {**base, "encoder.layer.1.mlp.fc1.weight": base["encoder.layer.1.mlp.fc1.weight"] + delta}
    for method in ("task-arithmetic", "ties", "average"):
        given = {"depth": files["depth"], "small": adapter}
        done = merge_on_disk(files["base"], given, tmp_path / f"{method}.safetensors", method)
        in_memory = merge_state_dicts(base, {"depth": weights(1), "small": full}, method)
        assert_equal(tensors_of(done.output), in_memory, 2e-6)
        assert done.tasks == ()


@pytest.mark.filterwarnings("ignore:expert '.' does not record its base", "ignore::FutureWarning")
def test_adapters_that_peft_wrote(tiny_base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import Dinov2Model

    paths, full = {}, {}
    for seed, name in enumerate(("a", "b")):
        model = Dinov2Model.from_pretrained(tiny_base)
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / name)
        paths[name] = tmp_path / name
        full[name] = {key: value.clone() for key, value in adapted.merge_and_unload().state_dict().items()}
    done = merge_on_disk(tiny_base, paths, tmp_path / "out", "ties", density=0.5)
    assert set(content(done.output)) == {"model.safetensors", "config.json", "preprocessor_config.json"}
    in_memory = merge_state_dicts(tensors_of(tiny_base), full, "average")
    mean = merge_on_disk(tiny_base, paths, tmp_path / "mean.safetensors", "average").output
    assert_equal(tensors_of(mean), in_memory, 1e-6)


# Folders ------------------------------------------------------------------------------------------------


def test_transformers_folders(folder_of: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    given = {"a": folder_of("a", 1), "b": folder_of("b", 2)}
    done = merge_on_disk(tiny_base, given, tmp_path / "out", "ties")
    assert set(content(done.output)) == {"model.safetensors", "config.json", "preprocessor_config.json"}
    for name in ("config.json", "preprocessor_config.json"):
        assert (done.output / name).read_bytes() == (tiny_base / name).read_bytes()
    in_memory = merge_state_dicts(
        tensors_of(tiny_base), {task: tensors_of(path) for task, path in given.items()}, "ties"
    )
    assert_equal(tensors_of(done.output), in_memory)
    loaded, report = Dinov2Model.from_pretrained(done.output, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert fingerprint(loaded.state_dict()) == fingerprint(open_checkpoint(done.output))
    one_file = merge_on_disk(tiny_base, given, tmp_path / "out.safetensors", "ties").output
    assert one_file.read_bytes() == (done.output / "model.safetensors").read_bytes()


def test_bare_files_into_a_folder(files: dict[str, Path], tmp_path: Path) -> None:
    done = merge_on_disk(files["base"], experts(files), tmp_path / "deep" / "out")
    assert set(content(done.output)) == {"model.safetensors"}
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')  # next to the base, so it belongs to it
    done = merge_on_disk(files["base"], experts(files), tmp_path / "out")
    assert content(done.output)["config.json"] == b'{"model_type": "dinov2"}'
    assert_equal(tensors_of(done.output), expected())


def test_shards_in_and_out(files: dict[str, Path], tmp_path: Path) -> None:
    sharded = {}
    for name, path in files.items():
        assert len(write_sharded(tmp_path / "in" / name, weights_of(path), max_shard_size=250)) > 1
        sharded[name] = tmp_path / "in" / name
    single = merge_on_disk(files["base"], experts(files), tmp_path / "single", "ties")
    done = merge_on_disk(sharded["base"], experts(sharded), tmp_path / "out", "ties")
    assert content(done.output) == content(single.output)
    done = merge_on_disk(sharded["base"], experts(sharded), Output(tmp_path / "shards", max_shard_size=300), "ties")
    written = content(done.output)
    index = json.loads(written.pop(INDEX))
    assert len(written) > 1 and set(written) == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights().values())
    assert_equal(tensors_of(done.output), expected("ties"))
    again = merge_on_disk(
        sharded["base"], experts(files), Output(tmp_path / "again", max_shard_size=300, threads=1), "ties"
    )
    assert content(again.output) == content(done.output)


def test_shards_load_in_transformers(folder_of: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    done = merge_on_disk(
        tiny_base, {"a": folder_of("a", 1)}, Output(tmp_path / "out", max_shard_size=60_000), scale=1.0
    )
    assert len(list(done.output.glob("model-*.safetensors"))) > 2
    _, report = Dinov2Model.from_pretrained(done.output, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(tensors_of(done.output), tensors_of(tmp_path / "a"), 1e-6)


def test_model_folders_become_a_model_folder(shared_models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    import simomerge

    done = merge_on_disk(tiny_base, shared_models, tmp_path / "scene", "ties", scale=0.4, density=0.3)
    assert done == MergedOnDisk(
        tmp_path / "scene", {"method": "ties", "density": 0.3, "scale": 0.4, "trim": "global"}, TASKS
    )
    assert set(content(done.output)) == {
        "simo.json",
        "README.md",
        "encoder/model.safetensors",
        "encoder/config.json",
        "encoder/preprocessor_config.json",
        *(f"heads/{task}.safetensors" for task in TASKS),
    }
    for task in TASKS:
        head = f"heads/{task}.safetensors"
        assert (done.output / head).read_bytes() == (shared_models[task] / head).read_bytes()
    scene = simomerge.load(done.output)
    loaded = {task: simomerge.load(path) for task, path in shared_models.items()}
    in_memory = simomerge.merge(simomerge.load(tiny_base), loaded, "ties", scale=0.4, density=0.3)
    ours, theirs = (model.encoder.backbone.state_dict() for model in (scene, in_memory))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()) and ours.keys() == theirs.keys()
    assert scene.provenance == in_memory.provenance
    assert scene.description() == in_memory.description()
    picture = torch.rand(1, 3, 24, 32)
    with torch.no_grad():
        for task, value in scene(picture).items():
            assert torch.allclose(value, in_memory(picture)[task], atol=1e-6)
    card = (done.output / "README.md").read_text()
    assert all(f"| {task} |" in card for task in TASKS) and '"method": "ties"' in card
    assert str(tmp_path) not in card + (done.output / "simo.json").read_text()


def test_a_model_folder_s_storage_and_shards(models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    import simomerge

    target = Output(tmp_path / "scene", dtype="bfloat16", max_shard_size=30_000)
    done = merge_on_disk(tiny_base, models, target, "average")
    encoder = open_checkpoint(done.output)
    assert {encoder.info(name).dtype for name in encoder} == {"BF16"}
    assert len(list((done.output / "encoder").glob("model-*.safetensors"))) > 2
    plain = merge_on_disk(tiny_base, models, tmp_path / "plain", "average").output
    assert_equal(tensors_of(done.output), tensors_of(plain), 0.02)
    loaded = simomerge.load(done.output).encoder.backbone
    assert fingerprint(loaded.state_dict()) == fingerprint(encoder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_configuration_says_how_the_weights_are_stored(
    dtype: str, models: dict[str, Path], folder_of: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    """transformers loads them in that dtype."""
    from transformers import Dinov2Model

    scene = merge_on_disk(tiny_base, models, Output(tmp_path / "scene", dtype=dtype)).output / "encoder"
    plain = merge_on_disk(tiny_base, {"a": folder_of("a", 1)}, Output(tmp_path / "plain", dtype=dtype)).output
    original = json.loads((tiny_base / "config.json").read_text())
    for folder in (scene, plain):
        assert json.loads((folder / "config.json").read_text()) == {**original, "dtype": dtype}
        loaded = Dinov2Model.from_pretrained(folder)
        assert {value.dtype for value in loaded.state_dict().values()} == {getattr(torch, dtype)}


def test_what_no_expert_has_is_left_out_of_a_model(models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    """Such as a pooler, which training drops. Weight files must have all tensors of the base."""
    import simomerge

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    pooler = {"pooler.dense.weight": np.ones((32, 32), np.float32), "pooler.dense.bias": np.ones(32, np.float32)}
    write_safetensors(base / "model.safetensors", {**tensors_of(tiny_base), **pooler})
    done = merge_on_disk(base, models, tmp_path / "scene", "ties")
    expected_scene = merge_on_disk(tiny_base, models, tmp_path / "expected", "ties").output
    assert_equal(tensors_of(done.output), tensors_of(expected_scene))
    recorded = json.loads((done.output / "simo.json").read_text())["provenance"]["base"]
    assert recorded["fingerprint"] == fingerprint(open_checkpoint(tiny_base))  # what the experts recorded
    assert list(simomerge.load(done.output).tasks) == list(models)
    merge_on_disk(base, models, tmp_path / "weights.safetensors", "ties")
    assert_equal(tensors_of(tmp_path / "weights.safetensors"), tensors_of(expected_scene))
    compress(base, models, tmp_path / "compressed")
    compress(tiny_base, models, tmp_path / "expected-compressed")
    assert content(tmp_path / "compressed") == content(tmp_path / "expected-compressed")
    assert diff_on_disk(models["depth"], models["normals"], base) == diff_on_disk(
        models["depth"], models["normals"], tiny_base
    )
    files = {task: model / "encoder" / "model.safetensors" for task, model in models.items()}
    with pytest.raises(InputError, match="is missing 2 tensors of the base: pooler"):
        merge_on_disk(base, files, tmp_path / "of-files.safetensors")
    # What one expert has is not left out.
    changed = {**tensors_of(models["depth"]), **pooler}
    write_safetensors(models["depth"] / "encoder" / "model.safetensors", changed)
    with pytest.raises(InputError, match="The expert 'normals' is missing 2 tensors of the base: pooler"):
        merge_on_disk(base, models, tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("merged.pt", {}, r"merged\.pt: weights are written as safetensors; name it merged\.safetensors"),
        ("merged.safetensors", {"max_shard_size": 100}, "is one file, not shards"),
        ("file/below", {}, r"Cannot write .*file.*: Not a directory"),
    ],
)
def test_an_output_that_cannot_be_what_was_asked_for(
    name: str, options: dict[str, Any], message: str, models: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file")
    before = content(tmp_path)
    with pytest.raises(InputError, match=message):
        merge_on_disk(tiny_base, models, Output(tmp_path / name, **options))
    assert content(tmp_path) == before


def test_an_output_must_not_hold_an_input(models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    for output in (tmp_path, models["depth"] / ".." / ".." / tmp_path.name):
        with pytest.raises(InputError, match=r"holds the input .* and would be replaced: choose another path"):
            merge_on_disk(tiny_base, models, Output(output, overwrite=True))
    with pytest.raises(InputError, match="depth holds the input"):
        merge_on_disk(models["depth"] / "encoder", {"x": models["normals"]}, Output(models["depth"], overwrite=True))
    assert content(tmp_path) == before


@pytest.mark.parametrize("task", ["a/b", "../depth", "a b", "", "2d", "a.b"])
def test_tasks_that_cannot_be_files(task: str, models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be the name of a task: use letters, digits and underscores"):
        merge_on_disk(tiny_base, {task: models["depth"]}, tmp_path / "scene")
    assert not (tmp_path / "scene").exists()


def test_one_model_under_another_name(models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    import simomerge

    given = {"far": models["depth"], "normals": models["normals"]}
    done = merge_on_disk(tiny_base, given, tmp_path / "scene")
    assert done.tasks == ("far", "normals")
    scene = simomerge.load(done.output)
    assert list(scene.tasks) == ["far", "normals"] and scene.tasks["far"].kind == "depth"
    in_memory = simomerge.merge(simomerge.load(tiny_base), {t: simomerge.load(path) for t, path in given.items()})
    assert scene.description() == in_memory.description()


def test_one_task_of_a_model_of_several(models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    import simomerge

    both = merge_on_disk(tiny_base, models, tmp_path / "both", "average").output
    done = merge_on_disk(tiny_base, {"normals": both, "depth": models["depth"]}, tmp_path / "scene")
    assert list(simomerge.load(done.output).tasks) == ["normals", "depth"]
    with pytest.raises(InputError, match="expert 'edges' has the tasks depth, normals; name one of them"):
        merge_on_disk(tiny_base, {"edges": both}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_models_and_files_together_give_weights_only(
    models: dict[str, Path], folder_of: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    folder = folder_of("plain", 5)
    given = {**models, "plain": folder, "file": folder_of("other", 6) / "model.safetensors"}
    done = merge_on_disk(tiny_base, given, tmp_path / "out", "average")
    assert done.tasks == ()
    assert set(content(done.output)) == {"model.safetensors", "config.json", "preprocessor_config.json"}
    in_memory = {task: tensors_of(path) for task, path in given.items()}
    assert_equal(tensors_of(done.output), merge_state_dicts(tensors_of(tiny_base), in_memory, "average"))
    only = merge_on_disk(tiny_base, models, tmp_path / "weights.safetensors", "average")
    assert only.tasks == () and only.output.is_file()
    assert_equal(
        tensors_of(only.output), tensors_of(merge_on_disk(tiny_base, models, tmp_path / "scene", "average").output)
    )


def test_the_base_may_be_a_model_folder_or_go_by_name(models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    base = merge_on_disk(tiny_base, {"depth": models["depth"]}, tmp_path / "base-model", "zero-shot").output
    for given in (base, base / "encoder", base / "encoder" / "model.safetensors"):
        done = merge_on_disk(given, models, Output(tmp_path / "out", overwrite=True))
        assert done.tasks == ("depth", "normals")
        recorded = json.loads((done.output / "simo.json").read_text())["provenance"]
        assert recorded["base"] == {"source": Path(given).name, "fingerprint": fingerprint(open_checkpoint(tiny_base))}
    with pytest.warns(UserWarning, match="The task vector of same is zero"):
        done = merge_on_disk("rooms-base", {"same": resolve("rooms-base")}, tmp_path / "x.safetensors", "average")
    assert_equal(tensors_of(done.output), tensors_of(resolve("rooms-base")))


def resolve(name: str) -> Path:
    from simomerge.core.assets import resolve_source

    return Path(resolve_source(name))


def test_an_output_that_exists_is_replaced_only_if_asked(
    files: dict[str, Path], models: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    for base, given, output in (
        (files["base"], experts(files), tmp_path / "out.safetensors"),
        (files["base"], experts(files), tmp_path / "out"),
        (tiny_base, models, tmp_path / "scene"),
    ):
        merge_on_disk(base, given, output)
        before = content(tmp_path)
        with pytest.raises(InputError, match=f"{output.name} already exists: choose another path, or pass overwrite"):
            merge_on_disk(base, given, output, "average")
        assert content(tmp_path) == before
        merge_on_disk(base, given, Output(output, overwrite=True), "average")
        assert content(tmp_path) != before and content(tmp_path).keys() == before.keys()


# How it works -------------------------------------------------------------------------------------------


def test_neither_torch_nor_transformers_nor_peft_is_imported(
    files: dict[str, Path],
    models: dict[str, Path],
    adapter_of: Callable[..., tuple[Path, np.ndarray]],
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    adapter_of("adapter", "encoder.layer.1.mlp.fc1", (9, 6))
    shutil.copytree(tiny_base, tmp_path / "tiny")
    code = """
import sys
from pathlib import Path
from simomerge.merging.disk.compress import compress
from simomerge.merging.disk.diff import diff_on_disk
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.merging.disk.output import Output
from simomerge.merging.disk.edit import edit_on_disk
from simomerge.merging.disk.diff import diff_on_disk
merge_on_disk("base.safetensors", {"depth": "depth.safetensors", "lora": "adapter"}, "1.safetensors", "ties")
merge_on_disk("base.safetensors", {"depth": "depth.safetensors"}, Output(Path("2"), None, 300), "iso-c", "lines")
merge_on_disk("tiny", {"depth": "depth"}, Output(Path("3"), "float16"))
edit_on_disk("3", "tiny", "4", add={"normals": "normals"})
diff_on_disk("tiny", "4")
loaded = {"torch", "transformers", "peft", "accelerate", "matplotlib", "PIL"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "4" / "heads" / "normals.safetensors").is_file()


def test_one_tensor_of_each_model_is_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"t{number}": rng.standard_normal(2**18).astype(np.float32) for number in range(24)}
    files = {"base": write_safetensors(tmp_path / "base.safetensors", base)}
    for task in TASKS:
        changed = {name: array + 0.01 * rng.standard_normal(2**18, np.float32) for name, array in base.items()}
        files[task] = write_safetensors(tmp_path / f"{task}.safetensors", changed)
    del base, changed
    for method, options in (("ties", {}), ("dare-ties", {}), ("average", {"schedule": [0.5]})):
        tracemalloc.start()
        try:
            target = Output(tmp_path / "out.safetensors", threads=1, overwrite=True)
            merge_on_disk(files["base"], experts(files), target, method, **options)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 30 * 2**20, method  # a tensor has 1 MiB, and a model 24; the stream touches 24 MiB for a moment


def test_progress_counts_the_tensors(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[str, int, int]] = []

    def progress(label: str, done: int, total: int, note: str) -> None:
        recorded.append((label, done, total))

    with show_progress(progress):
        merge_on_disk(files["base"], experts(files), tmp_path / "1.safetensors")
    assert not recorded  # short work reports nothing
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(writing.time, "monotonic", lambda: next(clock))
    with show_progress(progress):
        merge_on_disk(files["base"], experts(files), tmp_path / "2.safetensors")
    total = len(weights())
    assert recorded == [("write", done, total) for done in range(1, total + 1)]


# Another base -------------------------------------------------------------------------------------------


def forget_the_base(model: Path) -> None:
    recorded = json.loads((model / "simo.json").read_text())
    (model / "simo.json").write_text(json.dumps({**recorded, "provenance": {}}))


def test_experts_of_another_base_are_refused(
    models: dict[str, Path], folder_of: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    other = folder_of("another", 9)
    before = content(tmp_path)
    for output in ("scene", "weights.safetensors"):
        with pytest.raises(InputError, match=r"expert 'depth' .* was fine-tuned from another base .*; give base\."):
            merge_on_disk(other, models, tmp_path / output)
        with pytest.raises(InputError, match=r"expert 'normals' .* was fine-tuned from another base"):
            merge_on_disk(other, {"plain": folder_of("plain", 3), "normals": models["normals"]}, tmp_path / output)
        shutil.rmtree(tmp_path / "plain")
    assert content(tmp_path) == before


@pytest.mark.parametrize(("percent", "warned"), [(45, False), (55, True)])
def test_a_weight_file_far_from_the_base_is_warned_of(tmp_path: Path, percent: int, warned: bool) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", {"w": np.full(8, 4, np.float32)})
    expert = write_safetensors(tmp_path / "a.safetensors", {"w": np.full(8, 4 + percent / 25, np.float32)})
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        merge_on_disk(base, {"a": expert}, tmp_path / "out.safetensors")
    assert [f"by {percent}% of their norm" in str(one.message) for one in log] == [True] * warned


def test_hub_ids_are_recorded_and_names_of_folders_and_of_the_embedded_base_are_not(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simomerge.merging.disk.sources.local_source", lambda given, bare: str(tiny_base))
    for given, recorded in (
        ("facebook/dinov2-base", "facebook/dinov2-base"),
        ("rooms-base", tiny_base.name),
        (str(tiny_base), tiny_base.name),
    ):
        source = open_source(given)
        assert source.origin()["source"] == recorded and source.hub_id == ("" if recorded != given else given)


def test_an_expert_without_a_recorded_base_is_measured(
    models: dict[str, Path], folder_of: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    forget_the_base(models["depth"])
    with pytest.warns(UserWarning, match=r"expert 'depth' does not record its base.* by [\d.]+% of.*plausible") as log:
        merge_on_disk(tiny_base, models, tmp_path / "scene")
    assert len(log) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_on_disk(tiny_base, {"plain": folder_of("plain", 1)}, tmp_path / "near")  # a bare file never says
    stranger = {name: np.roll(array, 1) + 1 for name, array in tensors_of(tiny_base).items()}
    far = write_safetensors(tmp_path / "far.safetensors", stranger)
    with pytest.warns(UserWarning, match="expert 'far' does not record its base.*this looks like another base"):
        merge_on_disk(tiny_base, {"far": far, "plain": tmp_path / "plain"}, tmp_path / "out")


def test_an_expert_that_is_the_base_is_reported(files: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copyfile(files["base"], tmp_path / "copy.safetensors")
    with pytest.warns(UserWarning, match="The task vector of copy is zero"):
        merge_on_disk(files["base"], {"depth": files["depth"], "copy": copy}, tmp_path / "out.safetensors")


# Mistakes: nothing is written, and nothing is left ------------------------------------------------------


@dataclass
class Given:
    """What a merge is called with, in a folder of its own."""

    folder: Path
    base: Path
    experts: dict[str, Path]
    output: str = "out.safetensors"

    def __post_init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.storage: dict[str, Any] = {}

    def change(self, task: str, **tensors: Any) -> None:
        """Write an expert again with other tensors; None removes one."""
        path = self.experts[task]
        changed = {**weights_of(path), **tensors}
        write_safetensors(path, {name: array for name, array in changed.items() if array is not None})


def no_such_expert(given: Given) -> None:
    given.experts["depth"] = given.folder / "nowhere.safetensors"


def no_such_base(given: Given) -> None:
    given.base = given.folder / "nowhere"


def no_weights(given: Given) -> None:
    given.experts["depth"] = given.folder / "empty"
    (given.folder / "empty").mkdir()


def no_weight_file(given: Given) -> None:
    given.experts["depth"] = given.folder / "notes.txt"
    given.experts["depth"].write_text("hello")


def truncated(given: Given) -> None:
    path = given.experts["normals"]
    path.write_bytes(path.read_bytes()[:-9])


def truncated_base(given: Given) -> None:
    given.base.write_bytes(given.base.read_bytes()[:40])


def missing_shard(given: Given) -> None:
    paths = write_sharded(given.folder / "shards", weights_of(given.experts["depth"]), max_shard_size=250)
    paths[1].unlink()
    given.experts["depth"] = given.folder / "shards"


def truncated_shard(given: Given) -> None:
    paths = write_sharded(given.folder / "shards", weights_of(given.experts["depth"]), max_shard_size=250)
    paths[-1].write_bytes(paths[-1].read_bytes()[:-1])
    given.experts["depth"] = given.folder / "shards"


def broken_index(given: Given) -> None:
    write_sharded(given.folder / "shards", weights_of(given.experts["depth"]), max_shard_size=250)
    (given.folder / "shards" / INDEX).write_text("{}")
    given.experts["depth"] = given.folder / "shards"


def nan(given: Given) -> None:
    given.change("edges", **{"encoder.layer.1.norm1.bias": np.array([1, 2, np.nan, 4, 5, 6], np.float32)})


def infinite_base(given: Given) -> None:
    base = weights_of(given.base)
    write_safetensors(given.base, {**base, "scalar": np.array(np.inf, np.float32)})


def lost_tensor(given: Given) -> None:
    given.change("depth", **{"layernorm.weight": None})


def head_inside(given: Given) -> None:
    given.change("depth", **{"head.weight": np.ones(3, np.float32), "head.bias": np.ones(1, np.float32)})


def other_shape(given: Given) -> None:
    given.change("depth", **{"layernorm.weight": np.ones(7, np.float32)})


def given_twice(given: Given) -> None:
    given.experts["edges"] = given.experts["depth"]


def nobody(given: Given) -> None:
    given.experts.clear()


def option(**options: Any) -> Callable[[Given], None]:
    return lambda given: given.options.update(options)


def storage(**settings: Any) -> Callable[[Given], None]:
    return lambda given: given.storage.update(settings)


def too_large(given: Given) -> None:
    given.change("depth", **{"layernorm.weight": np.full(6, 1e6, np.float32)})
    given.storage["dtype"] = "float16"


def three_for_slerp(given: Given) -> None:
    given.options["method"] = "slerp"


def below_a_file(given: Given) -> None:
    given.output = "base.safetensors/out"


def file_in_the_way(given: Given) -> None:
    (given.folder / "out").write_text("precious")
    given.output = "out"
    given.storage["overwrite"] = True


MISTAKES: dict[str, tuple[Callable[[Given], None], str]] = {
    "no such expert": (no_such_expert, r"nowhere\.safetensors does not exist: check the path"),
    "no such base": (no_such_base, r"nowhere does not exist: check the path"),
    "no weights": (no_weights, r"empty holds no weights \(looked for model\.safetensors"),
    "no weight file": (no_weight_file, r"notes\.txt is not a weight file: give a folder or a file that ends in"),
    "truncated file": (truncated, r"normals\.safetensors is not a complete safetensors file .*: copy or download it"),
    "truncated base": (truncated_base, r"base\.safetensors is not a complete safetensors file"),
    "missing shard": (missing_shard, r"index\.json names the shard 'model-00002-.*', which is not next to it"),
    "truncated shard": (truncated_shard, r"model-0000\d-of-0000\d\.safetensors is not a complete safetensors file"),
    "broken index": (broken_index, r"entry 'weight_map' is missing"),
    "NaN": (nan, r"'encoder\.layer\.1\.norm1\.bias' of the expert 'edges' \(.*/edges\.safetensors\) holds NaN or inf"),
    "infinite base": (infinite_base, r"'scalar' of the base \(.*/base\.safetensors\) holds NaN or infinite values"),
    "lost tensor": (lost_tensor, r"The expert 'depth' is missing 1 tensor of the base: layernorm\.weight"),
    "head inside": (
        head_inside,
        r"The expert 'depth' has 2 tensors that the base does not have: head\.bias, head\.weight",
    ),
    "other shape": (
        other_shape,
        r"base and the expert 'depth' differ in the shapes of 1 tensor: layernorm\.weight \(6",
    ),
    "given twice": (given_twice, "The experts 'depth' and 'edges' are the same: give each expert once"),
    "nobody": (nobody, r"'task-arithmetic' needs at least 1 expert\(s\), got 0"),
    "method": (option(method="tie"), "no merge method 'tie': did you mean 'ties'"),
    "parameter": (option(densty=0.2), "'task-arithmetic' has no parameter 'densty'"),
    "value": (option(method="ties", density=20), "density must be a number above 0 and at most 1, got 20"),
    "scale of whom": (option(scale={"depth": 0.1}), "scale is given for depth, but the experts are depth, normals, ed"),
    "dtype": (storage(dtype="float8"), r"dtype 'float8': use float32, float16 or bfloat16\."),
    "dtype of integers": (storage(dtype="I64"), "dtype 'I64': use float32, float16 or bfloat16"),
    "schedule": (option(schedule="cosine"), "schedule 'cosine': give numbers over the depth"),
    "too many factors": (option(schedule=[1, 2, 3]), "a schedule of 3 values for 2 blocks: give at most one per block"),
    "too large": (too_large, r"'layernorm\.weight' holds .*e\+05, too large for F16: store it as F32"),
    "three for slerp": (three_for_slerp, "'slerp' merges exactly 2 experts, got 3: depth, normals, edges"),
    "data": (option(method="regmean"), "regmean: grams are needed of every expert"),
    "below a file": (below_a_file, "(?i)not a directory"),
    "file in the way": (file_in_the_way, "out is a file: choose the path of a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", ["file", "folder", "shards"])
def test_a_mistake_is_reported_and_leaves_nothing(
    mistake: str, kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    given = Given(tmp_path, files["base"], experts(files), "out.safetensors" if kind == "file" else "out")
    make, message = MISTAKES[mistake]
    make(given)
    if kind == "shards":
        given.storage["max_shard_size"] = 250
    before = content(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((InputError, OSError) if mistake == "below a file" else InputError, match=message):
            merge_on_disk(given.base, given.experts, Output(tmp_path / given.output, **given.storage), **given.options)
    assert content(tmp_path) == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("output", ["out.safetensors", "out"])
def test_a_mistake_leaves_what_was_there(output: str, files: dict[str, Path], tmp_path: Path) -> None:
    merge_on_disk(files["base"], experts(files), tmp_path / output, "average")
    given = Given(tmp_path, files["base"], experts(files))
    nan(given)
    before = content(tmp_path)
    with pytest.raises(InputError, match="holds NaN"):
        merge_on_disk(files["base"], experts(files), Output(tmp_path / output, overwrite=True))
    assert content(tmp_path) == before


@pytest.mark.parametrize("output", ["out.safetensors", "out", "scene"])
def test_a_full_disk(
    output: str,
    files: dict[str, Path],
    models: dict[str, Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = content(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    base, given = (tiny_base, models) if output == "scene" else (files["base"], experts(files))
    with pytest.raises(
        InputError, match=r"Cannot write .* \([\d,]+ bytes\): No space left .* 100 bytes are free; free"
    ):
        merge_on_disk(base, given, tmp_path / output)
    assert content(tmp_path) == before and not (tmp_path / output).exists()


@dataclass(frozen=True)
class Stopped(MergeMethod):
    """The user presses Ctrl-C at the fourth tensor."""

    name: ClassVar[str] = "stopped"
    seen: ClassVar[list[str]] = []

    def merge_tensor(
        self, name: str, base: np.ndarray, task_vectors: Mapping[str, np.ndarray], statistics: Any
    ) -> np.ndarray:
        self.seen.append(name)
        if len(self.seen) > 3:
            raise KeyboardInterrupt
        return base


@pytest.mark.parametrize("output", ["out.safetensors", "out", "scene"])
def test_an_interruption_leaves_nothing(
    output: str, files: dict[str, Path], models: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    base, given = (tiny_base, models) if output == "scene" else (files["base"], experts(files))
    before = set(tmp_path.rglob("*"))
    Stopped.seen.clear()
    limit = None if output.endswith(".safetensors") else 200
    with pytest.raises(KeyboardInterrupt):
        merge_on_disk(base, given, Output(tmp_path / output, max_shard_size=limit, threads=1), Stopped())
    assert set(tmp_path.rglob("*")) == before


def lose_the_head(model: Path) -> None:
    (model / "heads" / "depth.safetensors").unlink()


def lose_the_configuration(model: Path) -> None:
    (model / "encoder" / "config.json").unlink()


def lose_the_weights(model: Path) -> None:
    (model / "encoder" / "model.safetensors").unlink()


def say(**changed: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        recorded = json.loads((model / "simo.json").read_text())
        for key, value in changed.items():
            recorded[key] = {**recorded[key], **value} if isinstance(recorded[key], dict) else value
        (model / "simo.json").write_text(json.dumps(recorded))

    return change


def cut_the_description(model: Path) -> None:
    (model / "simo.json").write_text((model / "simo.json").read_text()[:50])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "head": (lose_the_head, r"depth/heads/depth\.safetensors: missing; take the model from its source again"),
    "configuration": (lose_the_configuration, r"depth/encoder/config\.json: missing; take the model from its source"),
    "weights": (lose_the_weights, r"depth/encoder holds no weights"),
    "adapters": (
        say(adapters={"rank": 2}),
        "expert 'depth' has adapters in addition to its blocks, and merging weights would lose them: give",
    ),
    "taps": (say(encoder={"taps": [0, 1]}), r"experts 'normals' and 'depth' differ in taps: \[.*\] and \[0, 1\]"),
    "norm": (say(encoder={"apply_layernorm": "other"}), "differ in final layer norm|apply_layernorm is .other."),
    "normalisation": (say(encoder={"mean": [0, 0, 0]}), r"differ in image normalisation: .* and \[\[0, 0, 0\]"),
    "description": (cut_the_description, r"depth/simo\.json: cannot be read"),
    "newer format": (say(format=99), r"simo\.json: format 99 is newer than this simomerge reads"),
    "headless": (say(tasks={"edges": {"kind": "edges"}}), r"simo\.json: task 'edges' has no head in it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_named_and_nothing_is_left(
    damage: str, models: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    make, message = DAMAGE[damage]
    make(models["depth"])
    before = content(tmp_path)
    with pytest.raises(InputError, match=message):
        merge_on_disk(tiny_base, {"normals": models["normals"], "depth": models["depth"]}, tmp_path / "scene")
    assert content(tmp_path) == before and not (tmp_path / "scene").exists()


def test_a_damaged_base_is_reported_though_all_experts_are_adapters(
    tmp_path: Path, adapter_of: Callable[..., tuple[Path, np.ndarray]]
) -> None:
    """Their task vectors are not made from the base, so only a look at the base itself can tell."""
    weight = np.ones((80, 80), np.float32)
    weight[-1, -1] = np.nan
    write_safetensors(tmp_path / "base.safetensors", {"layer.weight": weight})
    experts = {name: adapter_of(name, "layer", (80, 80))[0] for name in ("a", "b")}
    for method in ("task-arithmetic", "average"):
        with pytest.raises(InputError, match=r"'layer\.weight' of the base .* holds NaN"):
            merge_on_disk(tmp_path / "base.safetensors", experts, tmp_path / "out.safetensors", method)
    assert not (tmp_path / "out.safetensors").exists()


def test_another_base_is_reported_before_the_long_work(
    tmp_path: Path, tiny_base: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simomerge.datasets.tasks import Task

    expert = make_model([Task("depth")])
    expert.provenance = {"base": {"source": "other", "fingerprint": "0" * 64}}
    folder = expert.save_pretrained(tmp_path / "depth")

    def never(*given: object) -> None:
        raise AssertionError("computed statistics before it looked at the base")

    monkeypatch.setattr("simomerge.merging.ties.Ties._trimmed", never)
    with pytest.raises(InputError, match="fine-tuned from another base"):
        merge_on_disk(tiny_base, {"depth": folder}, tmp_path / "out", "ties")
