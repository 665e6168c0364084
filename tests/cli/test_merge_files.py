"""The commands on files: merge, methods, edit, diff, compress, restore; and that they need no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.assembly.realign import realignments
from simomerge.assembly.realign.method import realignment_rows
from simomerge.checkpoints import fingerprint, open_checkpoint, write_safetensors, write_sharded
from simomerge.core.registry import settings
from simomerge.merging import available, merge_state_dicts

from .conftest import assert_mistake, simomerge

TASKS = ("depth", "normals", "edges")
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"layernorm.weight": (5,), **{f"encoder.layer.{i}.mlp.fc1.weight": (4, 5) for i in range(3)}}
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    rng = np.random.default_rng(seed)
    changes = {name: (0.1 * rng.standard_normal(array.shape)).astype(np.float32) for name, array in made.items()}
    return {name: array + changes[name] if seed else array for name, array in made.items()} | {
        "steps": np.array([seed])
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the shell: base.safetensors, a.safetensors, b.safetensors."""
    for seed, name in enumerate(("base", "a", "b")):
        write_safetensors(tmp_path / f"{name}.safetensors", weights(seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def models(tiny_base: Path, make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model folders depth, normals and edges, fine-tuned by dice from the tiny base."""
    from simomerge.datasets.tasks import Task

    folder = tmp_path_factory.mktemp("models")
    for seed, task in enumerate(TASKS, start=1):
        model = make_model([Task(task, task)], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.encoder.backbone.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        model.provenance = {"base": {"source": "base", "fingerprint": fingerprint(open_checkpoint(tiny_base))}}
        model.save_pretrained(folder / task)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    return {name: np.array(checkpoint[name]) for name in checkpoint}


def assert_merged(path: Path, method: str = "task-arithmetic", tolerance: float = 0, **parameters: Any) -> None:
    wanted = merge_state_dicts(weights(0), {"a": weights(1), "b": weights(2)}, method, **parameters)
    found = tensors_of(path)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)


MERGE = ("merge", "base.safetensors", "a=a.safetensors", "b=b.safetensors", "-o", "out.safetensors")


# Merge --------------------------------------------------------------------------------------------------


def test_merge_writes_a_file_and_says_so(here: Path) -> None:
    done = simomerge(*MERGE)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "Merged a, b by task-arithmetic (scale 0.4).",
        "Weights: out.safetensors",
        "Next: simomerge diff base.safetensors out.safetensors   # how far it is from the base",
    ]
    assert_merged(here / "out.safetensors")
    assert set(content(here)) == {"base.safetensors", "a.safetensors", "b.safetensors", "out.safetensors"}


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        (("--scale", "0.2"), {"scale": 0.2}),
        (("--scale", "1"), {"scale": 1}),
        (("-p", "scale=0.2"), {"scale": 0.2}),
        (("--scale", "a:0.3,b:0.5"), {"scale": {"a": 0.3, "b": 0.5}}),
        (("-p", "scale=b:0.5,a:0"), {"scale": {"a": 0, "b": 0.5}}),
        (("--method", "average"), {"method": "average"}),
        (("--method", "weighted-average", "-p", "weight=a:1,b:3"), {"weight": {"a": 1, "b": 3}}),
        (
            ("--method", "ties", "-p", "density=0.4", "-p", "trim=tensor", "--scale", "0.7"),
            {"density": 0.4, "trim": "tensor", "scale": 0.7},
        ),
        (("--method", "dare-ties", "-p", "seed=3"), {"seed": 3, "density": 0.5, "scale": 1.0}),
        (("--method", "emr", "-p", "task=b"), {"task": "b", "scale": 1.0}),
    ],
)
def test_merge_takes_parameters(options: tuple[str, ...], recorded: dict[str, Any], here: Path) -> None:
    done = simomerge(*MERGE, *options, "--json")
    assert done.code == 0, done.err
    method = options[1] if options[0] == "--method" else "task-arithmetic"
    recorded = {"method": method, **recorded}
    assert done.json == {"output": "out.safetensors", "tasks": [], "merge": recorded}
    assert_merged(here / "out.safetensors", **recorded)


@pytest.mark.parametrize("schedule", ["lines", "lines:beta=0.3", "lines:alpha=0.2,beta=0.1", "0.2,1", "0.5", "0,0.5,1"])
def test_merge_takes_a_schedule(schedule: str, here: Path) -> None:
    done = simomerge(*MERGE, "--schedule", schedule, "--json")
    assert done.code == 0, done.err
    recorded = done.json["merge"]["schedule"]
    assert recorded == ([float(part) for part in schedule.split(",")] if schedule[0] != "l" else recorded)
    assert_merged(here / "out.safetensors", schedule=schedule)
    assert_merged(here / "out.safetensors", schedule=recorded)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_merge_stores_as_asked(dtype: str, stored: str, here: Path) -> None:
    assert simomerge(*MERGE, "--dtype", dtype).code == 0
    merged = open_checkpoint(here / "out.safetensors")
    assert {name: merged.info(name).dtype for name in merged} == {**dict.fromkeys(merged, stored), "steps": "I64"}
    assert_merged(here / "out.safetensors", tolerance=0.02)


@pytest.mark.parametrize("size", ["250", "250B", "0.25KB", "0.0002 mib"])
def test_merge_into_shards(size: str, here: Path) -> None:
    done = simomerge(*MERGE[:-1], "out", "--max-shard-size", size)
    assert done.code == 0 and done.out.splitlines()[1] == "Weights: out"
    written = set(content(here / "out"))
    assert "model.safetensors.index.json" in written and len(written) > 2
    assert_merged(here / "out")
    assert simomerge(*MERGE[:-1], "one", "--max-shard-size", "5GB").code == 0
    assert set(content(here / "one")) == {"model.safetensors"}


def test_merge_reads_folders_shards_torch_files_and_adapters(here: Path) -> None:
    write_sharded(here / "shards", weights(0), max_shard_size=200)
    torch.save({"model": {n: torch.from_numpy(array) for n, array in weights(1).items()}}, here / "a.pt")
    (here / "b").mkdir()
    (here / "b.safetensors").rename(here / "b" / "model.safetensors")
    done = simomerge("merge", "shards", "a=a.pt", "b=b", "-o", "out.safetensors")
    assert done.code == 0, done.err
    assert_merged(here / "out.safetensors")
    factor = np.full((4, 1), 0.1, np.float32), np.full((1, 5), 0.1, np.float32)
    name = "base_model.model.encoder.layer.1.mlp.fc1"
    sides = {f"{name}.lora_{side}.weight": value for side, value in zip("BA", factor, strict=True)}
    write_safetensors(here / "lora" / "adapter_model.safetensors", sides)
    (here / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    done = simomerge("merge", "shards", "lora=lora", "-o", "with.safetensors", "--scale", "1")
    assert done.code == 0, done.err
    merged = tensors_of(here / "with.safetensors")
    for key, array in weights(0).items():
        added = 0.02 if key == "encoder.layer.1.mlp.fc1.weight" else 0
        np.testing.assert_allclose(merged[key], array + added, atol=1e-6)


def test_merge_of_models_is_a_model(models: Path, tiny_base: Path, tmp_path: Path) -> None:
    experts = [f"{task}={models / task}" for task in TASKS[:2]]
    options = ("--method", "ties", "-p", "density=0.4", "--scale", "0.3", "--dtype", "bfloat16", "--schedule", "lines")
    done = simomerge("merge", tiny_base, *experts, *options, "-o", tmp_path / "scene")
    first, second, third = done.out.splitlines()
    assert first == "Merged depth, normals by ties (density 0.4, scale 0.3, trim global, schedule lines:beta=0.5)."
    assert second == f"Model: {tmp_path / 'scene'}" and third.startswith(
        f"Next: simomerge realign {tmp_path / 'scene'}"
    )
    assert (done.code, done.err) == (0, "")
    said = json.loads((tmp_path / "scene" / "simo.json").read_text())
    assert list(said["tasks"]) == ["depth", "normals"] and said["provenance"]["merge"]["schedule"] == "lines:beta=0.5"
    assert open_checkpoint(tmp_path / "scene").info("layernorm.weight").dtype == "BF16"
    done = simomerge("merge", tiny_base, *experts, "-o", tmp_path / "weights.safetensors", "--json")
    assert done.json["tasks"] == [] and (tmp_path / "weights.safetensors").is_file()


def test_merge_warns_in_one_line(here: Path) -> None:
    write_safetensors(here / "same.safetensors", weights(0))
    done = simomerge(*MERGE[:-2], "same=same.safetensors", "-o", "out.safetensors")
    assert done.code == 0 and done.err == "Warning: The task vector of same is zero: the weights equal the base's.\n"


def test_merge_overwrites_only_if_asked_to(here: Path) -> None:
    assert simomerge(*MERGE).code == 0
    before = content(here)
    assert_mistake(
        simomerge(*MERGE, "--scale", "0.1"), r"out\.safetensors exists; choose another path, or give --overwrite"
    )
    assert content(here) == before
    assert simomerge(*MERGE, "--scale", "0.1", "--overwrite").code == 0
    assert_merged(here / "out.safetensors", scale=0.1)


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "method": ((*MERGE, "--method", "tie"), "no merge method 'tie': did you mean 'ties'"),
    "parameter": ((*MERGE, "-p", "densty=0.2"), "'task-arithmetic' has no parameter 'densty'"),
    "parameter's form": ((*MERGE, "-p", "density"), "'density': give KEY=VALUE"),
    "parameter's value": ((*MERGE, "--method", "ties", "-p", "density=20"), "density must be a number above 0 and at"),
    "parameter twice": ((*MERGE, "-p", "scale=1", "-p", "scale=2"), "'scale'"),
    "scale": ((*MERGE, "--scale", "best"), "--scale best: give a number, TASK:NUMBER,..., 'auto' or 'learned'"),
    "scale's form": ((*MERGE, "--scale", ":0.3"), "--scale :0.3: give a number"),
    "scale of one": (
        (*MERGE, "--scale", "a:0.3"),
        "scale is given for a, but the experts are a, b: give one value for",
    ),
    "scale of nobody": ((*MERGE, "--scale", "a:0.3,c:0.2"), "scale is given for a, c, but the experts are a, b"),
    "scale of words": ((*MERGE, "--scale", "a:0.3,b:much"), "scale must be a number at least 0, got 'much'"),
    "negative scale": ((*MERGE, "--scale", "-1"), "scale must be a number at least 0, got -1"),
    "no scale": ((*MERGE, "--method", "average", "--scale", "1"), "'average' has no parameter 'scale'"),
    "scales of one number": (
        (*MERGE, "--method", "ties", "--scale", "a:1,b:2"),
        r"ties: scale must be a number at least 0, got \{'a': 1",
    ),
    "schedule": ((*MERGE, "--schedule", "cosine"), "schedule 'cosine': give numbers over the depth as 0.2,0.5,1"),
    "empty schedule": ((*MERGE, "--schedule", ""), "schedule '': give numbers over the depth"),
    "schedule's number": ((*MERGE, "--schedule", "lines:beta=nan"), "lines: beta must be a finite number, got nan"),
    "long schedule": ((*MERGE, "--schedule", "1,2,3,4"), "a schedule of 4 values for 3 blocks"),
    "dtype": ((*MERGE, "--dtype", "float8"), r"dtype 'float8': use float32, float16 or bfloat16\."),
    "size": ((*MERGE, "--max-shard-size", "5XB"), "'5XB' is not a size: give one such as 5GB"),
    "no size": ((*MERGE, "--max-shard-size", "0"), "'0' is less than one byte"),
    "pair": (("merge", "base.safetensors", "a", "-o", "out"), "'a': give TASK=EXPERT"),
    "twice": (
        ("merge", "base.safetensors", "a=a.safetensors", "a=b.safetensors", "-o", "out"),
        "two experts for task 'a'",
    ),
    "same file": (
        ("merge", "base.safetensors", "a=a.safetensors", "b=a.safetensors", "-o", "out"),
        "'a' and 'b' are the same: give each expert once",
    ),
    "no expert": (("merge", "base.safetensors", "-o", "out"), "TASK=EXPERT"),
    "no output": (MERGE[:-2], "--output"),
    "base's path": (
        ("merge", "nowhere.safetensors", "a=a.safetensors", "-o", "out"),
        r"nowhere\.safetensors does not exist",
    ),
    "expert's path": (
        ("merge", "base.safetensors", "a=nowhere", "-o", "out"),
        "nowhere does not exist: check the path",
    ),
    "expert's kind": (("merge", "base.safetensors", "a=notes.txt", "-o", "out"), r"notes\.txt is not a weight file"),
    "cut expert": (
        ("merge", "base.safetensors", "a=cut.safetensors", "-o", "out"),
        "is not a complete safetensors file",
    ),
    "broken expert": (
        ("merge", "base.safetensors", "a=a.safetensors", "c=nan.safetensors", "-o", "out"),
        r"'layernorm\.weight' of the expert 'c' \(nan\.safetensors\) holds NaN or infinite values",
    ),
    "other expert": (
        ("merge", "base.safetensors", "a=a.safetensors", "d=other.safetensors", "-o", "out"),
        "The expert 'd' is missing 3 tensors of the base",
    ),
    "too many": (
        ("merge", "base.safetensors", "--method", "slerp", "a=a.safetensors", "-o", "out"),
        r"'slerp' needs at least 2 expert\(s\), got 1",
    ),
    "images": (
        (*MERGE, "--method", "regmean"),
        r"base\.safetensors is a weight file, and regmean computes with images",
    ),
    "labels": (
        (*MERGE, "--scale", "auto"),
        r"base\.safetensors is a weight file, and --scale auto computes with images",
    ),
    "auto and schedule": (
        ("merge", "base", "a=a", "-o", "out", "--scale", "auto", "--schedule", "lines"),
        "--schedule is not for --scale auto on labels: leave it out, or give a number as --scale",
    ),
    "diff's path": (("diff", "base.safetensors", "nowhere"), "nowhere does not exist"),
    "diff's base": (("diff", "a.safetensors", "b.safetensors", "--base", "other.safetensors"), "3 tensors"),
    "diff's order": (("diff", "a.safetensors"), "(?i)missing argument.*second"),
    "diff's count": (("diff", "a.safetensors", "b.safetensors", "--top", "-1"), "(?i)--top.*-1 is not in the range"),
    "unknown method": (("methods", "ties", "tie"), "no merge method or re-alignment 'tie': did you mean 'ties'"),
    "unknown re-alignment": (
        ("methods", "fodl"),
        r"no merge method or re-alignment 'fodl': did you mean 'fold'\?$",
    ),
    "nothing to edit": (
        ("edit", "a.safetensors", "--base", "base.safetensors", "-o", "out"),
        "nothing to do: name a task",
    ),
    "edit without a base": (("edit", "a.safetensors", "--add", "b=b.safetensors", "-o", "out"), "--base"),
    "edit of a file": (
        ("edit", "a.safetensors", "--base", "base.safetensors", "--add", "b=b.safetensors", "-o", "out"),
        r"a\.safetensors: not a model folder \(no simo\.json in it\)",
    ),
    "edit's pair": (("edit", "a", "--base", "base.safetensors", "--add", "b", "-o", "out"), "'b': give TASK=EXPERT"),
    "compressed threshold": (
        ("compress", "base.safetensors", "a=a.safetensors", "--threshold", "much", "-o", "out"),
        "--threshold much: give a number, or 'auto'",
    ),
    "compressed dtype": (
        ("compress", "base.safetensors", "a=a.safetensors", "--dtype", "F8", "-o", "out"),
        "(?i)'F8' is not one of",
    ),
    "compressed path": (("compress", "base.safetensors", "a=nowhere", "-o", "out"), "nowhere does not exist"),
    "restored path": (("restore", "a.safetensors", "a", "-o", "out"), r"not a compressed folder|compressed\.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence_and_leaves_nothing(name: str, here: Path) -> None:
    (here / "notes.txt").write_text("hello")
    (here / "cut.safetensors").write_bytes((here / "a.safetensors").read_bytes()[:-7])
    write_safetensors("nan.safetensors", {**weights(1), "layernorm.weight": np.full(5, np.nan, np.float32)})
    write_safetensors("other.safetensors", {"layernorm.weight": np.ones(5, np.float32)})
    before = content(here)
    arguments, message = MISTAKES[name]
    assert_mistake(simomerge(*arguments), message)
    assert content(here) == before and not (here / "out").exists()


# Methods ------------------------------------------------------------------------------------------------


def test_methods_lists_every_method_and_re_alignment_with_its_parameters() -> None:
    done = simomerge("methods")
    assert (done.code, done.err) == (0, "")
    merges, realigned = done.out.removeprefix("Merge methods:\n").split("\nRe-alignments:\n")
    blocks = re.split(r"\n(?=\S)", merges.strip())
    assert [block.split()[0] for block in blocks] == list(available())
    for block, method in zip(blocks, available().values(), strict=True):
        assert method.link in block and method.paper in block and "(needs " in block.splitlines()[0]
        assert re.findall(r"-p (\w+)=", block) == [spec.name for spec in settings(method)]
    assert "-p density=0.2; > 0, <= 1" in blocks[list(available()).index("ties")]
    blocks = re.split(r"\n(?=\S)", realigned.strip())
    assert [block.split()[0] for block in blocks] == list(realignments())
    for block, row in zip(blocks, realignment_rows(), strict=True):
        first, summary, *lines, source = block.splitlines()
        assert summary.strip() == row["summary"] and source.strip() == f"{row['paper']}, {row['link']}"
        assert first.startswith(f"{row['name']}  (needs {row['needs']}")
        assert ("changes the encoder" in first) == row["changes_encoder"]
        assert [line.split()[0].lstrip("-").replace("-", "_") for line in lines] == list(row["parameters"])
    assert "Short for fold(variant=cross-tap)." in realigned


def test_methods_of_some_names_and_as_json() -> None:
    found = simomerge("methods", "--json").json
    rows = found["methods"]
    assert [row["name"] for row in rows] == list(available())
    assert found["realignments"] == realignment_rows()
    assert set(rows[0]) == {"name", "summary", "needs", "parameters", "paper", "link"}
    assert {row["name"]: row["needs"] for row in rows if row["name"] in ("average", "slerp", "regmean", "fisher")} == {
        "average": "experts only",
        "slerp": "2 experts",
        "regmean": "base, images",
        "fisher": "labelled images",
    }
    some = simomerge("methods", "slerp", "average", "lora", "--json").json
    assert [row["name"] for row in some["methods"]] == ["average", "slerp"]
    assert [row["name"] for row in some["realignments"]] == ["lora"]
    assert simomerge("methods", "average").out.startswith("Merge methods:\n\naverage  (needs experts only)\n    ")
    assert simomerge("methods", "fold").out.startswith("Re-alignments:\n\nfold  (needs experts, unlabelled images)\n")


def test_the_page_of_methods_is_the_one_in_the_documentation() -> None:
    done = simomerge("methods", "--markdown")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "# Merge methods and re-alignments"
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [*available(), *realignments()]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)  # five cells each: no | of a formula splits one
    assert done.out == PAGE.read_text(encoding="utf-8")


# Edit ---------------------------------------------------------------------------------------------------


def test_edit_names_the_experts_that_lie_next_to_the_model(models: Path, tiny_base: Path, tmp_path: Path) -> None:
    for task in TASKS:
        shutil.copytree(models / task, tmp_path / task)
    given = [f"{task}={tmp_path / task}" for task in TASKS]
    assert simomerge("merge", tiny_base, *given[:2], "-o", tmp_path / "1").code == 0
    done = simomerge("edit", tmp_path / "1", "--base", tiny_base, "--add", given[2], "-o", tmp_path / "2")
    assert done.out.splitlines()[-1] == (
        f"Next: simomerge realign {tmp_path / '2'} {' '.join(given)} --images photos/ -o {tmp_path / '2'}-folded"
        "   # the heads no longer fit; photos/ stands for a folder of your images"
    )


def test_edit_adds_and_removes(models: Path, tiny_base: Path, tmp_path: Path) -> None:
    pairs = {task: f"{task}={models / task}" for task in TASKS}
    assert simomerge("merge", tiny_base, pairs["depth"], pairs["normals"], "-o", tmp_path / "1").code == 0
    done = simomerge("edit", tmp_path / "1", "--base", tiny_base, "--add", pairs["edges"], "-o", tmp_path / "2")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"Merged depth, normals, edges by task-arithmetic, as {tmp_path / '1'} was.",
        f"Model: {tmp_path / '2'}",
        "The heads no longer fit. `simomerge realign` repairs them; it needs the experts of depth, normals too.",
    ]
    remove = ("--remove", pairs["depth"], "--remove", pairs["edges"])
    alone = simomerge("edit", tmp_path / "2", "--base", tiny_base, "--remove", "depth", "-o", tmp_path / "3")
    assert_mistake(alone, "subtracts the expert that leaves, so its weights are needed: remove depth=EXPERT")
    done = simomerge("edit", tmp_path / "2", "--base", tiny_base, *remove, "-o", tmp_path / "3", "--json")
    assert done.json == {
        "output": str(tmp_path / "3"),
        "tasks": ["normals"],
        "merge": {"method": "task-arithmetic", "scale": 0.4},
    }
    assert simomerge("merge", tiny_base, pairs["normals"], "-o", tmp_path / "again").code == 0
    found, wanted = tensors_of(tmp_path / "3"), tensors_of(tmp_path / "again")
    assert all(np.allclose(found[name], wanted[name], rtol=0, atol=1e-6) for name in wanted)
    assert_mistake(
        simomerge("edit", tmp_path / "1", "--base", tiny_base, "--add", pairs["depth"], "-o", tmp_path / "4"),
        "'depth' is in the merged model already",
    )
    assert_mistake(
        simomerge("edit", tmp_path / "1", "--base", tiny_base, "--add", pairs["edges"], "-o", tmp_path / "2"),
        "2 exists; choose another path, or give --overwrite",
    )
    wrong = f"depth={models / 'edges'}"
    assert_mistake(
        simomerge("edit", tmp_path / "1", "--base", tiny_base, "--remove", wrong, "-o", tmp_path / "4"),
        "not what the model was merged from as expert 'depth'",
    )
    assert not (tmp_path / "4").exists()


def test_edit_asks_for_those_that_stay(models: Path, tiny_base: Path, tmp_path: Path) -> None:
    pairs = {task: f"{task}={models / task}" for task in TASKS}
    merged = ("merge", tiny_base, pairs["depth"], pairs["normals"], "--method", "ties", "-o")
    assert simomerge(*merged, tmp_path / "1").code == 0
    edit = ("edit", tmp_path / "1", "--base", tiny_base, "--add", pairs["edges"], "-o", tmp_path / "2")
    assert_mistake(
        simomerge(*edit), r"'ties' weighs every entry by all the experts: give those that stay too \(depth, normals\)"
    )
    done = simomerge(*edit, "--expert", pairs["depth"], "--expert", pairs["normals"])
    assert done.code == 0 and done.out.startswith("Merged depth, normals, edges by ties")


def test_every_command_on_weights_takes_a_key_of_a_training_file(here: Path) -> None:
    states = {
        key: {f"model.{n}": torch.from_numpy(array) for n, array in weights(seed).items()}
        for key, seed in (("state_dict", 2), ("state_dict_ema", 1))
    }
    torch.save({"epoch": 3, **states}, here / "last.ckpt")
    given = ["base.safetensors", "a=last.ckpt::state_dict_ema", "b=b.safetensors"]
    assert simomerge("merge", *given, "-o", "out.safetensors").code == 0
    assert_merged(here / "out.safetensors")
    choice = r"last\.ckpt holds several sets of weights: state_dict, state_dict_ema \(an average\)\. Choose one"
    for command in (
        ("merge", "base.safetensors", "a=last.ckpt", "-o", "again.safetensors"),
        ("inspect", "last.ckpt"),
        ("diff", "base.safetensors", "last.ckpt"),
        ("compress", "base.safetensors", "a=last.ckpt", "b=b.safetensors", "-o", "small"),
    ):
        assert_mistake(simomerge(*command), choice)
    said = simomerge("inspect", "last.ckpt::state_dict_ema", "--json").json
    assert said["path"] == "last.ckpt::state_dict_ema" and said["tensors"] == len(weights(1))
    apart = simomerge("diff", "base.safetensors", "last.ckpt::state_dict_ema", "--json").json["differences"]
    assert apart == simomerge("diff", "base.safetensors", "a.safetensors", "--json").json["differences"]
    assert simomerge("compress", *given, "-o", "small").code == 0
    assert_mistake(
        simomerge("merge", "base.safetensors", "a=lost.ckpt::ema", "-o", "again.safetensors"),
        "lost.ckpt does not exist",
    )
    images = ("--scale", "auto", "--images", ".")
    done = simomerge("merge", "last.ckpt::state_dict", "a=last.ckpt::state_dict_ema", "-o", "m", *images)
    assert_mistake(done, "last.ckpt::state_dict is a weight file, and --scale auto computes with images")


# Diff ---------------------------------------------------------------------------------------------------


def test_diff_of_weights(here: Path) -> None:
    done = simomerge("diff", "base.safetensors", "a.safetensors")
    assert (done.code, done.err) == (0, "")
    title, head, *rows = done.out.splitlines()
    assert title == "weights of base.safetensors (a) and a.safetensors (b), 4 tensors; the 4 furthest apart:"
    assert head.split() == ["tensor", "|a|", "|b|", "|b-a|/|a|", "cosine", "same", "sign"]
    cells = [row.split() for row in rows]
    assert cells[0][0] == "all" and {row[0] for row in cells[1:]} == set(weights(0)) - {"steps"}
    ratios = [float(row[3]) for row in cells[1:]]
    assert ratios == sorted(ratios, reverse=True)
    base, expert = (np.concatenate([w[n].ravel() for n in w if n != "steps"]) for w in (weights(0), weights(1)))
    cosine = base @ expert / np.linalg.norm(base) / np.linalg.norm(expert)
    assert float(cells[0][1]) == pytest.approx(np.linalg.norm(base), rel=1e-3)
    assert float(cells[0][4]) == pytest.approx(cosine, abs=1e-4)
    assert float(cells[0][5].rstrip("%")) == pytest.approx(100 * np.mean(np.sign(base) == np.sign(expert)), abs=0.06)
    assert len({len(row) for row in (head, *rows)}) == 1  # a table
    assert len(simomerge("diff", "base.safetensors", "a.safetensors", "--top", 1).out.splitlines()) == 4
    assert len(simomerge("diff", "base.safetensors", "a.safetensors", "--top", 0).out.splitlines()) == 3


def test_diff_of_task_vectors_and_as_json(here: Path) -> None:
    done = simomerge("diff", "a.safetensors", "b.safetensors", "--base", "base.safetensors")
    assert done.code == 0 and done.out.startswith("task vectors of a.safetensors (a) and b.safetensors (b), 4 tensors")
    said = simomerge("diff", "a.safetensors", "b.safetensors", "--base", "base.safetensors", "--json", "--top", 1).json
    assert (said["first"], said["second"], said["base"]) == ("a.safetensors", "b.safetensors", "base.safetensors")
    assert len(said["differences"]) == 5 and said["differences"][0]["name"] == "all"
    assert set(said["differences"][0]) == {"name", "first", "second", "distance", "cosine", "sign_agreement"}


def test_diff_where_there_is_nothing_to_divide_by(here: Path) -> None:
    write_safetensors("zero.safetensors", {n: np.zeros_like(array) for n, array in weights(0).items()})
    done = simomerge("diff", "zero.safetensors", "a.safetensors")
    assert done.code == 0 and all("inf" in row and "nan" in row for row in done.out.splitlines()[2:])
    done = simomerge("diff", "zero.safetensors", "zero.safetensors", "--json")
    assert done.json["differences"][0]["cosine"] is None


# Compress, restore --------------------------------------------------------------------------------------


def test_compress_and_restore(here: Path) -> None:
    done = simomerge("compress", "base.safetensors", "a=a.safetensors", "b=b.safetensors", "-o", "small", "--json")
    assert done.code == 0, done.err
    assert done.json["output"] == "small" and list(done.json["tasks"]) == ["a", "b"]
    done = simomerge("restore", "small", "b", "-o", "again.safetensors")
    assert done.code == 0 and done.out.startswith("Restored b: again.safetensors\n")
    again, wanted, base = tensors_of(here / "again.safetensors"), weights(2), weights(0)
    error = sum(float(np.square(again[n] - wanted[n]).sum()) for n in wanted if n != "steps")
    change = sum(float(np.square(base[n] - wanted[n]).sum()) for n in wanted if n != "steps")
    assert 0 < error < 0.7 * change
    assert_mistake(simomerge("restore", "small", "c", "-o", "c"), "holds no task 'c': choose from a, b")
    assert_mistake(simomerge("restore", "small", "b", "-o", "again.safetensors"), "again.safetensors exists")
    assert_mistake(
        simomerge("compress", "base.safetensors", "a=a.safetensors", "-o", "small"), "small exists; choose another"
    )
    assert simomerge("restore", "small", "a", "-o", "again.safetensors", "--overwrite").code == 0


# Starting -----------------------------------------------------------------------------------------------


def test_no_command_on_files_imports_torch(here: Path, models: Path, tiny_base: Path) -> None:
    commands = [
        [*MERGE, "--method", "ties", "--schedule", "lines"],
        ["merge", str(tiny_base), f"depth={models / 'depth'}", "-o", "scene"],
        ["edit", "scene", "--base", str(tiny_base), "--add", f"edges={models / 'edges'}", "-o", "scene-2"],
        ["diff", "base.safetensors", "a.safetensors"],
        ["methods"],
        ["methods", "ties", "fold"],
        ["compress", "base.safetensors", "a=a.safetensors", "-o", "small"],
        ["restore", "small", "a", "-o", "again.safetensors"],
        ["inspect", "scene-2"],
    ]
    code = f"""
import sys
from simomerge.cli import main
for arguments in {commands!r}:
    sys.argv = ["simomerge", *arguments]
    main()
loaded = {{"torch", "transformers", "peft", "accelerate", "matplotlib", "PIL", "torchmetrics"}} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (here / "scene-2" / "heads" / "edges.safetensors").is_file() and (here / "again.safetensors").is_file()
