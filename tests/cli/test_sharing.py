"""Trees of shared blocks on the command line: merge, inspect, predict, edit, and what is refused before any work."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from models.encoders.families import save_tiny
from simomerge.checkpoints import open_checkpoint
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import load_encoder
from simomerge.models.heads import build_head
from simomerge.models.model import SimoModel, load

from .conftest import Story, assert_mistake, simomerge

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(8):
        coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3)).astype(np.uint8)
        Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def shared(story: Story, tiny_base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "scene"
    experts = (f"depth={story / 'depth'}", f"normals={story / 'normals'}")
    done = simomerge(
        "merge", tiny_base, *experts, "--scale", "0.5", "--branch", 3, "--images", photos, "-o", folder, "--json"
    )
    assert done.code == 0, done.err
    assert done.json["merge"]["tree"] == "3: depth+normals | 4: depth, normals" and done.json["merge"]["cost"] == 1.25
    return folder


def test_inspect_draws_the_tree(shared: Path) -> None:
    done = simomerge("inspect", shared)
    assert "    blocks 1-3: depth + normals\n    |-- block 4: depth\n    `-- block 4: normals\n" in done.out
    assert "shared blocks, cost 1.25; 0." in done.out
    block = sum(
        np.prod(t.shape)
        for name, t in load_file(shared / "encoder" / "model.safetensors").items()
        if "layer.3." in name
    )
    assert simomerge("inspect", shared, "--json").json["branch_parameters"] == block + 2 * 32 + 2 * (32 * 32 + 32)


def test_a_tree_predicts(shared: Path, photos: Path, tmp_path: Path) -> None:
    done = simomerge("predict", shared, photos / "0.png", "-o", tmp_path / "maps")
    assert done.code == 0, done.err
    assert np.load(tmp_path / "maps" / "0-depth.npy").shape == (32, 40)


@pytest.mark.parametrize("form", ["text", "number", "yaml", "number in yaml", "text in yaml", "budget"])
def test_other_ways_to_say_it(story: Story, tiny_base: Path, photos: Path, tmp_path: Path, form: str) -> None:
    contents = {"yaml": "3: all\n4: [[normals], [depth]]\n", "number in yaml": "3", "text in yaml": '"3"'}
    (tmp_path / "tree.yaml").write_text(contents.get(form, ""))
    ways: dict[str, tuple[object, ...]] = {
        "text": ("--share", "3: all | each"),
        "number": ("--share", "3"),
        "budget": ("--budget", "1.3"),
    } | dict.fromkeys(contents, ("--share", tmp_path / "tree.yaml"))
    experts = (f"depth={story / 'depth'}", f"normals={story / 'normals'}")
    done = simomerge(
        "merge", tiny_base, *experts, "--scale", "0.5", *ways[form], "--images", photos, "-o", tmp_path / "scene"
    )
    assert done.code == 0, done.err
    if form != "budget":
        assert "  |-- block 4: depth\n" in done.out and "stitch 4-normals" in done.out
    assert "The heads are folded." in done.out


def test_own_blocks_of_low_rank(story: Story, tiny_base: Path, photos: Path, tmp_path: Path) -> None:
    experts = (f"depth={story / 'depth'}", f"normals={story / 'normals'}")
    given = ("--scale", "0.5", "--branch", 3, "--branch-rank", 2, "--images", photos, "-o", tmp_path / "scene")
    done = simomerge("merge", tiny_base, *experts, *given)
    assert done.code == 0, done.err
    assert "own blocks of rank 2" in done.out and "  own blocks 4-depth: rank 2 keeps " in done.out
    done = simomerge("inspect", tmp_path / "scene")
    assert "own blocks are differences of rank 2 to shared weights:\n    blocks 1-3: depth + normals\n" in done.out
    found = simomerge("inspect", tmp_path / "scene", "--json").json
    linear = [v for k, v in load_file(tmp_path / "scene" / "encoder" / "model.safetensors").items() if "layer.3." in k]
    small = sum(t.size for t in linear if t.ndim < 2)
    factors = 2 * 2 * sum(sum(t.shape) for t in linear if t.ndim == 2)
    assert found["branch_parameters"] == small + factors + 2 * 32 + 2 * (32 * 32 + 32)
    one = load(tmp_path / "scene").select("normals").save_pretrained(tmp_path / "one")
    said = simomerge("inspect", one).out
    assert "    blocks 1-4: normals\n" in said
    assert "shared blocks, 1.00 encoders if all blocks cost the same (all tasks: cost 1.25); " in said
    assert "Only what normals need is here" in (one / "README.md").read_text()
    done = simomerge("predict", one, photos / "0.png", "-o", tmp_path / "maps")
    assert done.code == 0, done.err


def test_the_storage_is_as_asked(story: Story, tiny_base: Path, photos: Path, tmp_path: Path) -> None:
    """The experts are in float32, and so is the tree without the option."""
    experts = (f"depth={story / 'depth'}", f"normals={story / 'normals'}")
    given = ("merge", tiny_base, *experts, "--scale", "0.5", "--share", 3, "--images", photos)
    for dtype, stored in {"": "F32", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}.items():
        done = simomerge(*given, *(("--dtype", dtype) if dtype else ()), "-o", tmp_path / (dtype or "default"))
        assert done.code == 0, done.err
        files = [open_checkpoint(path) for path in (tmp_path / (dtype or "default")).glob("*/**/*.safetensors")]
        of_blocks = {file.info(name).dtype for file in files for name in file if "layer.3." in name}
        assert of_blocks == {stored}
    done = simomerge(*given, "--dtype", "float8", "-o", tmp_path / "out")
    assert done.code == 2 and "dtype 'float8': use float32, float16 or bfloat16." in done.err


MERGE = ("merge", "BASE", "depth=./nowhere", "normals=./nowhere", "-o", "OUT")
MISTAKES = {
    "no images": (("--branch", 2), "--branch fits the branches on images without labels: give --images"),
    "data": (("--branch", 1, "--data", "rooms"), "and --data gives labels: give --images rooms instead."),
    "data for a budget": (
        ("--budget", 1.5, "--data", "x"),
        "--images x instead, and --labels x to choose by its labels",
    ),
    "images and data": (("--branch", 1, "--data", "rooms", "--images", "x"), "--data .* give --images x instead"),
    "two ways": (("--branch", 2, "--budget", 1.5, "--images", "x"), "--branch and --budget both say what is shared"),
    "joins again": (("--share", "2: depth, normals | all", "--images", "x"), r"depth\+normals at block 3 joins tasks"),
    "unknown task": (
        ("--share", "2: all | depth, edges", "--images", "x"),
        "--share: the tree names 'edges', which is",
    ),
    "no groups": (("--share", "1:", "--images", "x"), "--share: level 1 of the tree has no groups of tasks"),
    "word": (("--share", "photos", "--images", "x"), "--share 'photos' is neither a tree nor a YAML file"),
    "text file": (("--share", "tree.yaml.txt", "--images", "x"), "--share 'tree.yaml.txt' is neither a tree nor a"),
    "less than no block": (("--share", "-1", "--images", "x"), "--share: the tasks cannot leave after block -1"),
    "branch": (("--branch", "-1", "--images", "x"), "--branch -1: the tasks cannot leave after block -1"),
    "missing task": (("--share", "2: all | depth", "--images", "x"), "leaves out task 'normals'"),
    "rank without a tree": (("--branch-rank", 4, "--images", "x"), "--branch-rank is the rank of own blocks: give"),
    "negative rank": (("--branch", 2, "--branch-rank", -1, "--images", "x"), "-1 is not in the range x>=0"),
    "budget": (("--budget", 2.5, "--images", "x"), "a budget of 2.5 encoders: give a number from 1 .* to 2"),
    "auto": (("--budget", 1.5, "--images", "x", "--method", "auto"), "--budget needs a merge method"),
    "no file": (("--share", "nowhere.yaml", "--images", "x"), r"nowhere\.yaml: no such file; give a tree"),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"tree\.yaml: empty; give a tree, such as"),
        ("[2]", r"tree\.yaml: \[2\] is no tree of shared blocks: give the number"),
        ("2: all\n3: [[depth, edges]]", r"tree\.yaml: the tree names 'edges', which is no task here"),
        ("2: all\n3:", r"tree\.yaml: level 3 of the tree has no groups"),
        (
            "3: all | each",
            r"tree\.yaml: level 3 of the tree is 'all \| each': put quotes around the tree, or each level",
        ),
        ("-2", r"tree\.yaml: the tasks cannot leave after block -2"),
    ],
)
def test_mistakes_in_a_file(content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree.yaml").write_text(content)
    assert_mistake(simomerge(*MERGE, "--share", "tree.yaml", "--images", "x"), message)


@pytest.mark.parametrize("given", [("--branch", 1), ("--share", "1"), ("--budget", 1)])
def test_a_single_task_shares_nothing(given: tuple[object, ...], tmp_path: Path) -> None:
    done = simomerge("merge", "BASE", "depth=./nowhere", "-o", tmp_path / "out", *given, "--images", "x")
    assert_mistake(done, rf"{given[0]}.*: a single task \(depth\) shares blocks with no other: give more experts, or")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_that_need_no_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    assert_mistake(simomerge(*MERGE, *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_is_too_deep(story: Story, tiny_base: Path, photos: Path, tmp_path: Path) -> None:
    experts = (f"depth={story / 'depth'}", f"normals={story / 'normals'}")
    done = simomerge("merge", tiny_base, *experts, "--branch", 5, "--images", photos, "-o", tmp_path / "out")
    assert_mistake(done, "--branch 5: the tree splits after block 5, but the encoder has 4 blocks: give at most 4")
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_applies_to_shared_blocks(story: Story, tiny_base: Path, photos: Path, tmp_path: Path) -> None:
    experts = (f"depth={story / 'depth'}", f"normals={story / 'normals'}")
    given = ("--scale", "0.5", "--branch", 3, "--images", photos, "--json")
    done = simomerge("merge", tiny_base, *experts, *given, "--schedule", "0,1,1,1", "-o", tmp_path / "scene")
    assert done.code == 0, done.err
    assert done.json["merge"]["groups"]["depth+normals"]["schedule"] == [0, 1, 1, 1]
    merged, base = (load_file(f / "model.safetensors") for f in (tmp_path / "scene" / "encoder", tiny_base))
    same = {name: bool((merged[name] == base[name]).all()) for name in merged if ".layer." in name}
    assert all(same[name] for name in same if ".layer.0." in name)
    assert not all(same[name] for name in same if ".layer.1." in name)


def test_pyramids_count_stages_and_their_cost_is_that_of_the_merge(photos: Path, tmp_path: Path) -> None:
    encoder = load_encoder(save_tiny("convnext", tmp_path / "base"))
    experts = []
    for seed, task in enumerate(("depth", "normals")):
        other = copy.deepcopy(encoder)
        with torch.no_grad():
            for weight in other.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        head = build_head("linear", other.channels, Task(task).channels, {"cls": False})
        SimoModel(other, {task: Task(task)}, {task: head}).save_pretrained(tmp_path / task)
        experts.append(f"{task}={tmp_path / task}")
    given = ("merge", tmp_path / "base", *experts, "--images", photos, "-o", tmp_path / "scene")
    assert_mistake(
        simomerge(*given, "--branch", 9), "splits after stage 9, but the encoder has 4 stages: give at most 4"
    )
    done = simomerge(*given, "--branch", 2)
    assert done.code == 0, done.err
    cost = load(tmp_path / "scene").provenance["merge"]["cost"]
    assert cost > 1.6  # the last two stages have most parameters
    assert f"cost {cost:.6g}" in done.out
    assert f"  shared blocks, cost {cost:.6g}; " in simomerge("inspect", tmp_path / "scene").out


@pytest.fixture(scope="module")
def edges(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert of a third task."""
    other = load(story / "normals")
    head = build_head("linear", other.encoder.channels, 1, {})
    folder = tmp_path_factory.mktemp("edges") / "expert"
    SimoModel(other.encoder, {"edges": Task("edges")}, {"edges": head}, other.provenance).save_pretrained(folder)
    return folder


def test_edit_adds_a_task_and_removes_one(
    shared: Path, story: Story, edges: Path, tiny_base: Path, photos: Path, tmp_path: Path
) -> None:
    depth, normals = (f"{task}={story / task}" for task in ("depth", "normals"))
    added = ("--add", f"edges={edges}", "--expert", depth, "--expert", normals)
    done = simomerge("edit", shared, "--base", tiny_base, *added, "--images", photos, "-o", tmp_path / "more")
    assert done.code == 0, done.err
    assert "  blocks 1-3: depth + normals + edges\n" in done.out and "  |-- block 4: depth\n" in done.out
    removed = ("--remove", "depth", "--expert", normals, "--expert", f"edges={edges}", "--share", "2")
    given = ("edit", tmp_path / "more", "--base", tiny_base, *removed, "-o", tmp_path / "less", "--json")
    assert_mistake(simomerge(*given), "its branches are fitted on images without labels: give --images FOLDER")
    done = simomerge(*given, "--images", photos)
    assert done.json["tasks"] == ["normals", "edges"] and done.json["merge"]["tree"].startswith("2: normals+edges |")
    assert list(load(tmp_path / "less").tasks) == ["normals", "edges"]
    load(shared).save_pretrained(tmp_path / "half", dtype="float16")
    done = simomerge("edit", tmp_path / "half", "--base", tiny_base, *added, "--images", photos, "-o", tmp_path / "16")
    assert done.code == 0, done.err
    files = [*(tmp_path / "16" / "encoder").glob("*.safetensors"), *(tmp_path / "16" / "branches").iterdir()]
    for weights in map(open_checkpoint, files):
        assert {weights.info(name).dtype for name in weights if "stitch" not in name} == {"F16"}
    (tmp_path / "e.yaml").write_text("1: all\nend: each")
    given = ("edit", shared, "--base", tiny_base, "--images", photos, *added, "-o", tmp_path / "3", "--json")
    done = simomerge(*given, "--share", tmp_path / "e.yaml")
    assert done.json["merge"]["tree"] == "1: depth+normals+edges | 4: depth, normals, edges"
    given = (*given[:-2], tmp_path / "4", "--share")
    (tmp_path / "e.yaml").write_text("5: all\nend: each")
    assert_mistake(
        simomerge(*given, tmp_path / "e.yaml"), r"e\.yaml: the tree splits after block 5, but the encoder has"
    )
    assert_mistake(simomerge(*given, "1: depth, all"), "--share: the tree names 'all', which is no task here")
    assert_mistake(simomerge(*given, "e.txt"), "--share 'e.txt' is neither a tree nor a YAML file")


def test_labels_choose_for_a_budget_only(story: Story, tiny_base: Path, photos: Path, tmp_path: Path) -> None:
    experts = (f"depth={story / 'depth'}", f"normals={story / 'normals'}")
    given = ("merge", tiny_base, *experts, "--scale", "0.5", "--images", photos, "-o", tmp_path / "scene")
    assert_mistake(simomerge(*given, "--labels", "rooms"), "--labels chooses what is shared for a --budget")
    done = simomerge(*given, "--budget", "1.5", "--labels", "rooms")
    assert done.code == 0, done.err
    assert "  loss in %: depth " in done.out and "disagreement" not in done.out


@pytest.mark.parametrize("command", ["merge", "diff"])
def test_a_tree_has_no_single_set_of_weights(
    shared: Path, story: Story, tiny_base: Path, tmp_path: Path, command: str
) -> None:
    given = {
        "merge": ("merge", tiny_base, f"depth={shared}", f"normals={story / 'normals'}", "-o", tmp_path / "out"),
        "diff": ("diff", tiny_base, shared),
    }
    assert_mistake(simomerge(*given[command]), "a tree of shared blocks, which has no single set of encoder weights")
