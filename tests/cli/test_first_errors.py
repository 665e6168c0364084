"""What a user gets wrong first, and the options that decide on which images and how precisely a merge is chosen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click import Command

import simomerge as sm
from simomerge.cli import cli
from simomerge.core.machine import PRECISION
from simomerge.core.registry import settings
from simomerge.datasets.load import load_images
from simomerge.merging import available

from .conftest import Story, assert_mistake, simomerge

CHOICE = ("--scale", "auto", "--images", "rooms", "--count", 32)


def test_a_base_whose_name_has_an_equals_sign_is_taken(
    story: Story, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "seed=1")
    done = simomerge("merge", "seed=1", f"depth={story / 'depth'}", "-o", "out", "--json")
    assert done.code == 0 and done.json["tasks"] == ["depth"], done.err


def options_of_merge() -> set[str]:
    command: Any = cli.get_command(None, "merge")  # type: ignore[arg-type]
    assert isinstance(command, Command)
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


PARAMETERS = {spec.name for method in available().values() for spec in settings(method)}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_every_parameter_of_a_method_is_known_where_it_is_no_option(name: str, tmp_path: Path) -> None:
    option = f"--{name}"
    given = ("merge", "nowhere", "depth=nowhere", "-o", tmp_path / "out")
    if option in options_of_merge():
        assert "is no option" not in simomerge(*given, option, "1").err
        return
    having = [each for each, method in available().items() if name in {spec.name for spec in settings(method)}]
    methods = f"method{'s' if len(having) > 1 else ''} {', '.join(having)}"
    for words in ((option, "0.25"), (f"{option}=0.25",)):
        wanted = f"{option} is no option: {name} is a parameter of the {methods}. Give -p {name}=0.25.\n"
        assert simomerge(*given, *words).err == f"Error: {wanted}"
    for words in ((option,), (option, "--method", "ties")):
        assert simomerge(*given, *words).err.endswith(f"Give -p {name}=VALUE.\n")


def test_what_is_neither_an_option_nor_a_parameter_gets_the_nearest_option() -> None:
    assert_mistake(simomerge("merge", "a", "depth=b", "-o", "c", "--metod", "ties"), "'--metod'.*'--method'")
    assert_mistake(simomerge("relate", "a", "depth=b", "--density", "0.5"), "(?i)no such option.*--density")


def agreements(made: Any) -> list[float]:
    return [trial["agreement"] for trial in made["tried"]]


@pytest.mark.filterwarnings("ignore:.*images")
def test_a_merge_chooses_on_the_split_that_is_named(story: Story, tiny_base: Path, tmp_path: Path) -> None:
    experts = {task: story / task for task in ("depth", "normals")}
    given = ("merge", tiny_base, *(f"{task}={folder}" for task, folder in experts.items()), *CHOICE)
    found = {}
    for split in ("val", "test", None):
        chosen = ("--split", split) if split else ()
        done = simomerge(*given, *chosen, "-o", tmp_path / str(split), "--json")
        assert done.code == 0, done.err
        found[split] = agreements(done.json["merge"])
        model = sm.merge(tiny_base, experts, scale="auto", images=load_images("rooms", split), count=32)
        assert found[split] == agreements(model.provenance["merge"])
    assert found["val"] != found["test"] and found[None] not in (found["val"], found["test"])


def test_statistics_are_computed_on_the_split_that_is_named(story: Story, tiny_base: Path, tmp_path: Path) -> None:
    given = ("merge", tiny_base, *(f"{task}={story / task}" for task in ("depth", "normals")), "--method", "regmean")
    written = {}
    for name, chosen in {"default": (), "val": ("--split", "val"), "train": ("--split", "train")}.items():
        done = simomerge(*given, "--count", 4, *chosen, "-o", tmp_path / name)
        assert done.code == 0, done.err
        written[name] = (tmp_path / name / "encoder" / "model.safetensors").read_bytes()
    assert written["default"] == written["val"] != written["train"]


@pytest.mark.filterwarnings("ignore:.*images")
def test_a_merge_is_chosen_in_the_precision_that_is_named(
    story: Story, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = {task: story / task for task in ("depth", "normals")}
    given = ("merge", tiny_base, *(f"{task}={folder}" for task, folder in experts.items()), *CHOICE)
    found = {}
    for precision in ("fp32", "bf16"):
        monkeypatch.setenv(PRECISION, "auto")  # what the option changes is restored after the test
        done = simomerge(*given, "--precision", precision, "-o", tmp_path / precision, "--json")
        assert done.code == 0, done.err
        monkeypatch.setenv(PRECISION, precision)
        model = sm.merge(tiny_base, experts, scale="auto", images="rooms", count=32)
        found[precision] = agreements(done.json["merge"])
        assert found[precision] == agreements(model.provenance["merge"])
    assert found["fp32"] != found["bf16"]
    assert max(found["fp32"]) == pytest.approx(max(found["bf16"]), abs=0.05)


def test_a_search_computes_in_the_precision_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def searched(*given: Any) -> dict[str, Any]:
        seen.append(os.environ[PRECISION])
        trial = {"delta_mtl": -1.0, "values": {"rows.0.scale": 0.3}}
        return {"trials": [trial], "row": "merge", "images": 8}

    monkeypatch.setattr("simomerge.recipes.search.search_recipe", searched)
    monkeypatch.setenv(PRECISION, "auto")
    done = simomerge("search", "a.yaml", "-o", tmp_path / "out", "--precision", "bf16")
    assert (done.code, seen) == (0, ["bf16"]), done.err
