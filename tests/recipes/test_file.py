"""Recipe files: each file in recipes/ describes itself correctly, and mistakes are reported together."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from PIL import Image

from simomerge.assembly.realign import get_realignment
from simomerge.cli import cli
from simomerge.core.errors import InputError
from simomerge.recipes.demo import ALL_TASKS, demo_recipe
from simomerge.recipes.file import read_recipe, recipe_schema
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.run import _planned
from simomerge.training.settings import TrainSettings

RECIPES = Path(__file__).parent.parent.parent / "recipes"


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def test_rooms_small_is_the_demo() -> None:
    assert read_recipe(RECIPES / "rooms-small.yaml").to_dict() == demo_recipe().to_dict()


def test_rooms_full_is_the_benchmark() -> None:
    dpt = read_recipe(RECIPES / "rooms-full.yaml")
    assert dpt.to_dict() == demo_recipe(ALL_TASKS, "dpt", 3, full=True).to_dict()
    linear = read_recipe(RECIPES / "rooms-full.yaml", ["head=linear", "head_settings={subpixels: 4}"])
    assert linear.to_dict() == demo_recipe(ALL_TASKS, "linear", 3, full=True).to_dict()


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_one_and_says_its_command(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.output == f"runs/{file.stem}" and recipe.title != file.stem
    assert f"simomerge run recipes/{file.name}" in file.read_text()


def test_the_schema_in_the_docs_is_the_one_that_is_generated() -> None:
    schema = json.loads((RECIPES.parent / "docs" / "recipe.schema.json").read_text())
    assert schema == json.loads(json.dumps(recipe_schema())), "run `simomerge run --schema > docs/recipe.schema.json`"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_names_the_schema_and_is_valid_by_it(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../docs/recipe.schema.json"
    jsonschema.validate(yaml.safe_load(file.read_text()), recipe_schema())


@pytest.mark.parametrize(
    "wrong", ["heads: {steps: 3}", "realign: {heads: {stps: 3}}", "tasks: 3", "realign: {fold: {steps: 3}}"]
)
def test_the_schema_refuses_what_the_reader_refuses(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(wrong), recipe_schema())
    with pytest.raises(InputError):
        read_recipe(write(tmp_path, wrong))


def test_what_a_file_does_not_say_is_the_default(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, "tasks: [depth, normals]\ntune: {steps: 7}\n"))
    expected = replace(Recipe(), tasks=("depth", "normals"), tune=replace(Recipe().tune, steps=7))
    assert recipe.to_dict() == expected.to_dict()
    assert (recipe.title, recipe.output, recipe.base, recipe.data, recipe.data_options) == (
        "mine",
        "runs/mine",
        "rooms-base",
        "rooms",
        {},
    )


def test_changes_reach_into_mappings_and_lists(tmp_path: Path) -> None:
    file = write(tmp_path, "tune: {steps: 7}\ndata_options: {size: [24, 32]}\n")
    recipe = read_recipe(file, ["tune.steps=9", "tune.lr=1e-3", "probe.steps=3", "seeds=[1, 2]", "data=mine.yaml"])
    assert (recipe.tune.steps, recipe.tune.lr, recipe.probe.steps) == (9, 1e-3, 3)
    assert (recipe.seeds, recipe.data, recipe.data_options) == ((1, 2), "mine.yaml", {"size": (24, 32)})
    assert isinstance(recipe.tune, TrainSettings)


def test_epochs_are_full_batches_of_the_images_a_training_sees(tmp_path: Path) -> None:
    text = """
train_images: 100
val_images: 40
tune: {epochs: 2, batch_size: 16}
joint: {epochs: 0.5, batch_size: 16}
realign:
  heads: {epochs: 3, batch_size: 16}
  distill: {epochs: 1, batch_size: 64, count: 30}
  distill-adapters: {epochs: 1, batch_size: 10, count: 99}
"""
    recipe = read_recipe(write(tmp_path, text), ["align_split=val"])
    assert (recipe.tune.steps, recipe.joint.steps, recipe.realign["heads"]["steps"]) == (12, 3, 6)
    assert (recipe.realign["distill"]["steps"], recipe.realign["distill-adapters"]["steps"]) == (1, 4)
    assert recipe.probe == Recipe().probe and not hasattr(recipe.tune, "epochs")
    for split in ("train", "train+val"):  # only rows with labels stay on val
        other = read_recipe(write(tmp_path, text), [f"align_split={split}"])
        steps = {name: other.realign[name]["steps"] for name in ("heads", "distill", "distill-adapters")}
        assert steps == {"heads": 6, "distill": 1, "distill-adapters": 9}
    changed = read_recipe(write(tmp_path, text), ["tune.steps=7", "probe.epochs=1", "train_images=64"])
    assert (changed.tune.steps, changed.probe.steps, changed.joint.steps) == (7, 2, 2)


def test_epochs_of_a_refinement_count_what_the_refined_training_has(tmp_path: Path) -> None:
    text = """
val_images: 100
train_images: 100
realigned: [task-arithmetic+fold+distill]
gallery: [experts]
realign: {distill: {count: 64, batch_size: 16}}
refine: {distill: {epochs: 3}}
"""
    recipe = read_recipe(write(tmp_path, text))
    method = recipe.method(recipe.rows[0])
    assert (method.count, method.training.batch_size, method.training.steps) == (64, 16, 3 * 4)
    narrower = ["realign.distill.epochs=2", "refine={distill: {count: 32}}"]
    recipe = read_recipe(write(tmp_path, text), narrower)
    assert recipe.realign["distill"]["steps"] == 2 * 4 and recipe.method(recipe.rows[0]).training.steps == 2 * 2
    kept = read_recipe(write(tmp_path, text), ["realign.heads.epochs=2", "refine.heads.lr=1e-4"])
    assert kept.realign["heads"]["steps"] == 2 * 3 and kept.refine["heads"]["steps"] == 40  # the default of refine


def test_epochs_count_the_images_that_exist(tmp_path: Path) -> None:
    rows = ["image,split,depth"]
    for index, split in enumerate(["train"] * 9 + ["val"] * 4 + ["extra"] * 5):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{index}.png")
        np.save(tmp_path / f"{index}.npy", np.ones((16, 16), np.float32))
        rows.append(f"{index}.png,{split},{index}.npy")
    (tmp_path / "data.csv").write_text("\n".join(rows))
    text = f"""
data: {tmp_path / "data.csv"}
tasks: [depth]
tune: {{epochs: 2, batch_size: 3}}
realign:
  heads: {{epochs: 2, batch_size: 2}}
  distill-encoder: {{epochs: 3, batch_size: 2, count: null}}
"""
    recipe = read_recipe(write(tmp_path, text), ["align_split=train+extra"])
    assert (recipe.tune.steps, recipe.realign["heads"]["steps"]) == (2 * 3, 2 * 2)
    assert recipe.realign["distill-encoder"]["steps"] == 3 * 7
    pictures = read_recipe(write(tmp_path, text), [f"align_images={tmp_path}"])
    assert pictures.realign["distill-encoder"]["steps"] == 3 * 9
    assert read_recipe(write(tmp_path, text), ["train_images=6"]).tune.steps == 2 * 2
    with pytest.raises(InputError, match=r"realign.distill-encoder: epochs need the number of images, .*; give steps"):
        read_recipe(write(tmp_path, text), ["align_images=/no/such/photos"])


def test_the_papers_protocols_are_in_epochs_of_their_images() -> None:
    sizes = {"nyuv2": (795, 400, 254, 16), "cityscapes": (2380, 595, 500, 16), "taskonomy": (16000, 4000, 4000, 32)}
    for name, (train, val, test, batch) in sizes.items():
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        assert (recipe.train_images, recipe.val_images, recipe.test_images) == (train, val, test)
        assert recipe.tune.steps == 50 * (train // batch) and recipe.joint.steps == 200 * (train // batch)
        adapters = recipe.realign["adapters"]
        assert adapters["steps"] == 200 * (val // batch) and get_realignment("adapters", **adapters).rank == 16
        assert recipe.tune.batch_size == adapters["batch_size"] == batch
        assert recipe.augmentation == "scale-crop-flip" and recipe.base == "facebook/dinov2-base"
        assert recipe.tune.validate_every == train // batch
        assert recipe.search.space["realign.heads.lr"] == {"low": 1e-8, "high": 1e-3, "log": True}


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
task: [depth]
head: 3
seeds: 2
tune: {step: 5, lr: fast}
probe: 7
train_images: 2.5
realign: {adapters: {steps: 0}}
""",
    )
    with pytest.raises(InputError) as caught:
        read_recipe(file)
    for part in (
        "unknown key 'task' (did you mean 'tasks'?)",
        "head is 3; give text",
        "seeds is 2; give a list",
        "tune: unknown key 'step' (did you mean 'steps'?)",
        "tune.lr is 'fast'; give a number",
        "probe is 7; give a mapping",
        "train_images is 2.5; give a whole number",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("realigned: [dare+heads]\n", [], "row 'dare\\+heads' starts with 'dare'; add it to `merges`"),
        ("merges: [fisher]\n", [], "'fisher' needs statistics"),
        ("merge_settings: {ties: {densty: 0.1}}\n", [], "no parameter 'densty': did you mean 'density'"),
        ("merge_settings: {ties: {density: 2}}\n", [], "density"),
        ("merge_settings: {dare: {density: 0.2}}\n", [], "merge_settings has 'dare', which is not one"),
        ("augmentation: paper\n", [], "unknown augmentation 'paper'; choose among: none, flip, scale-crop-flip"),
        ("realigned: [average+heads+fold]\n", [], "a fold comes right after a merge"),
        ("realigned: [auto+fold]\n", [], "auto is folded already"),
        ("realigned: [average+symerge+fold]\n", [], "a fold comes right after a merge"),
        ("realigned: [auto+prodistill+fold]\n", [], "auto is folded already"),
        ("realigned: [average+adapters+distill-adapters]\n", [], "adds adapters twice"),
        ("merges: [slerp]\nrealigned: []\n", [], "'slerp' merges exactly 2 experts, got 3"),
        ("merges: [model-stock]\nrealigned: []\ntasks: [depth]\n", [], "'model-stock' needs at least 2 tasks"),
        ("merges: [ties, ties]\n", [], "merges has 'ties' twice"),
        ("tasks: []\n", [], "tasks is empty; give at least one task"),
        ("tasks: [image]\n", [], "no task can be called 'image'"),
        (
            "train_images: 0\nauto_images: -1\n",
            [],
            "train_images is 0; use at least 1; auto_images is -1; use at least 1",
        ),
        ("realign: {adapters: {rank: 0}}\n", [], "rank must be a number at least 1, got 0"),
        ("seeds: [-1]\n", [], "seed -1; use 0 to 9223372036854775807"),
        ("realign: {adapters: {activation: gelu}}\n", [], "activation must be one of none, relu, got 'gelu'"),
        ("gallery: [experts, tise]\n", [], "gallery has 'tise', which is no row of the recipe; did you mean 'ties'"),
        ("gallery: [joint-mtl-equal]\n", [], "gallery has .joint-mtl-equal., which is no row of the recipe"),
        ("head_settings: {fusion_channels: 8}\n", [], "head_settings: head 'linear'.*fusion_channels"),
        (
            "merge_settings: {average: }\nmerges: [average]\nrealigned: []\n",
            [],
            "merge_settings.average is None; give a mapping",
        ),
        ("head_settings: {subpixels: 100000}\n", [], "head_settings: "),
        ("seeds: [9223372036854775808]\n", [], "use 0 to 9223372036854775807"),
        ("tune: {seed: 3}\n", [], "tune: a recipe's seeds are those of `seeds`"),
        ("data_options: {split: train}\n", [], "data_options.split: the recipe itself decides that"),
        ("tasks: [depth]\ntasks: [normals]\n", [], "the key 'tasks' is given twice, line 1"),
        ("title: 2024-02-31\n", [], "not YAML"),
        ("head: dpt\n", ["title=2024-02-31"], "is not a YAML value"),
        ("tune: {steps: 3, epochs: 2}\n", [], "tune: give steps or epochs, not both"),
        ("tune: {epoch: 3}\n", [], "tune: unknown key 'epoch' \\(did you mean 'epochs'"),
        ("tune: {epochs: some}\n", [], "tune.epochs is 'some'; give a number above 0"),
        ("gallery: {}\ntune: {epochs: 1, batch_size: 0}\n", [], "batch_size must be a number at least 1, got 0"),
        ("a: [\n", [], "not YAML"),
        ("- a\n", [], "holds no mapping"),
        ("tune: {}\n", ["tune"], "--set tune: give KEY=VALUE"),
        ("head: dpt\n", ["head.kind=3"], "head.kind=3: 'head' is not a mapping"),
        ("head: dpt\n", ["seeds=["], "--set seeds=\\[: '\\[' is not a YAML value"),
        ("seeds: [0, true]\n", [], "seeds\\[1\\] is True; give a whole number"),
    ],
)
def test_what_cannot_be_is_told(tmp_path: Path, text: str, changes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe(write(tmp_path, text), changes)
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_a_dry_run_says_what_there_is_to_do(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, f"base: {tiny_base}\ntasks: [depth]\nmerges: [average]\nrealigned: []\n")
    cli.main(["run", str(file), "--dry-run", "-o", str(tmp_path / "run"), "--json"], standalone_mode=False)
    stages = json.loads(capsys.readouterr().out)["stages"]
    names = [stage["stage"] for stage in stages]
    assert not any(stage["done"] for stage in stages) and not (tmp_path / "run").exists()
    assert names.index("features of the base") < names.index("probe depth seed 0") < names.index("expert depth seed 0")
    assert "score average seed 0" in names


def test_data_without_a_task_is_told_before_the_training(tmp_path: Path, tiny_base: Path) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.ones((16, 16), np.float32))
    rows = "".join(f"a.png,{split},a.npy\n" for split in ("train", "val", "test"))
    (tmp_path / "data.csv").write_text("image,split,depth\n" + rows)
    text = f"base: {tiny_base}\ndata: {tmp_path / 'data.csv'}\ntasks: [depth, normals]\nrealigned: []\n"
    with pytest.raises(InputError, match=r"data\.csv, split 'train': unknown task 'normals'.*There are: depth"):
        cli.main(["run", str(write(tmp_path, text)), "-o", str(tmp_path / "run")], standalone_mode=False)


def on_disk(folder: Path) -> str:
    """A manifest of three images for each split, with their depths."""
    import numpy as np
    from PIL import Image

    rows = ["image,split,depth"]
    for split in ("train", "val", "test"):
        for index in range(3):
            noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{split}{index}.png")
            np.save(folder / f"{split}{index}.npy", np.ones((16, 16), np.float32))
            rows.append(f"{split}{index}.png,{split},{split}{index}.npy")
    (folder / "data.csv").write_text("\n".join(rows))
    return f"data: {folder / 'data.csv'}\ntasks: [depth]\ntrain_images: 3\nval_images: 3\ntest_images: 3\n"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda file: file.unlink(), "split 'val': 1 of 6 files are not there: .*val1"),
        (
            lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
            "split 'val': .*val1.*: cannot be read",
        ),
        (lambda file: file.write_bytes(b"nothing of that kind"), "split 'val': .*val1.*: cannot be read"),
        (lambda file: file.write_bytes(b""), "split 'val': .*val1.*: cannot be read"),
    ],
)
@pytest.mark.parametrize("name", ["val1.npy", "val1.png"])
def test_files_that_are_missing_or_damaged_are_told_before_the_training(
    tmp_path: Path, tiny_base: Path, broken: Any, message: str, name: str
) -> None:
    text = on_disk(tmp_path) + f"base: {tiny_base}\nrealigned: []\nmerges: [average]\n"
    broken(tmp_path / name)
    with pytest.raises(InputError, match=message):
        cli.main(["run", str(write(tmp_path, text)), "-o", str(tmp_path / "run")], standalone_mode=False)
    assert not (tmp_path / "run").exists()


def test_values_that_are_wrong_in_every_file_are_told_before_the_training(tmp_path: Path, tiny_base: Path) -> None:
    import numpy as np

    text = on_disk(tmp_path) + f"base: {tiny_base}\nrealigned: []\nmerges: [average]\n"
    for index in range(3):
        np.save(tmp_path / f"test{index}.npy", np.ones((8, 16), np.float32))
    with pytest.raises(InputError, match=r"split 'test': .*test0\.npy is 16 x 8 pixels, its image 16 x 16"):
        cli.main(["run", str(write(tmp_path, text)), "-o", str(tmp_path / "run")], standalone_mode=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"), [("{sise: [8, 8]}", "sise"), ("{size: 8}", "size"), ("{size: [8, -8]}", "size .*pixels")]
)
def test_options_that_the_dataset_does_not_know(tmp_path: Path, tiny_base: Path, options: str, message: str) -> None:
    text = on_disk(tmp_path) + f"base: {tiny_base}\nrealigned: []\ndata_options: {options}\n"
    with pytest.raises(InputError, match=message):
        cli.main(["run", str(write(tmp_path, text)), "--dry-run"], standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [("{sise: [8, 8]}", "'sise'"), ("{size: 8}", "size 8"), ("{size: [8, true]}", "size"), ("{seed: a}", "seed 'a'")],
)
def test_options_that_rooms_do_not_know(tmp_path: Path, tiny_base: Path, options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        file = write(tmp_path, f"base: {tiny_base}\ndata_options: {options}\n")
        cli.main(["run", str(file), "--dry-run"], standalone_mode=False)


def test_a_dry_run_knows_what_the_data_lacks(tmp_path: Path, tiny_base: Path) -> None:
    text = on_disk(tmp_path) + f"base: {tiny_base}\nrealigned: []\n"
    (tmp_path / "test2.npy").unlink()
    for recipe, message in ((text, "1 of 6 files are not there"), ("tasks: [dept]\n", "did you mean 'depth'")):
        with pytest.raises(InputError, match=message):
            cli.main(["run", str(write(tmp_path, recipe)), "--dry-run"], standalone_mode=False)


def test_only_what_sees_a_changed_file_is_done_again(tmp_path: Path, tiny_base: Path) -> None:
    text = on_disk(tmp_path) + f"base: {tiny_base}\nrealigned: [average+fold]\nmerges: [average]\n"
    file = write(tmp_path, text)

    def keys(manifest: str) -> dict[str, str]:
        plan, graph = _planned(read_recipe(file, [f"data={manifest}"]), tmp_path / "run")
        return {stage.name: path.name for path, stage in graph.in_order(plan.wanted()).items()}

    before = keys(str(tmp_path / "data.csv"))
    (tmp_path / "moved").mkdir()
    for each in (*tmp_path.glob("*.png"), *tmp_path.glob("*.npy"), tmp_path / "data.csv"):
        shutil.copy2(each, tmp_path / "moved" / each.name)
    moved = str(tmp_path / "moved" / "data.csv")
    assert keys(moved) == before
    os.utime(tmp_path / "moved" / "test0.npy", (1, 1))
    after = keys(moved)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("score") and " val " not in name}
