"""What simo.json and config.json may say: counts and numbers that can be meant, and text that stays in its line."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import simomerge as sm
from simomerge.checkpoints import write_safetensors
from simomerge.checkpoints.card import model_card
from simomerge.checkpoints.description import _MOST, check_output, read_description, write_description
from simomerge.cli import main
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.core.text import html_table, one_line, printable
from simomerge.merging.disk.compress import compress, restore
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.merging.disk.output import Output
from simomerge.merging.engine.merge import Merged
from simomerge.merging.method import get_method
from simomerge.merging.tree import Tree
from simomerge.models.heads import build_head
from simomerge.report.page import render_html
from simomerge.report.table import aligned, columns

from .test_folders import Change, edit, encoder_of

EVIL = "x\n  fingerprint  deadbeef (verified)\r\nError: all\tfine\u2028a\u2029b\x85c\u061c\u202e\u2066"
TAME = "x   fingerprint  deadbeef (verified)  Error: all fine a b c"


@pytest.fixture
def scene(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_model([sm.Task("depth")]).save_pretrained("scene")
    return Path("scene")


def settings_of(kind: str, **settings: Any) -> Change:
    return lambda description: description["heads"].update(depth={"kind": kind, "settings": settings})


# Counts and numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (encoder_of(tree="4: " + ", ".join(f"t{i}" for i in range(200_000))), r"encoder\.tree has .* most 1,000,000"),
        (encoder_of(tree="4: " + ", ".join(f"t{i}" for i in range(5000))), "the tree has 5,000 tasks, .* 1,000"),
        (encoder_of(kept=["depth"] * 100_000), r"encoder\.kept has 100,000 entries"),
        (encoder_of(taps=[1] * 100_000), r"encoder\.taps has 100,000 entries, .* at most 1,000"),
        (lambda d: d["tasks"].update({f"t{i}": {} for i in range(2000)}), "it has 2,001 tasks"),
        (encoder_of(std=[0, 0, 0]), r"encoder\.std is \[0, 0, 0\]: give three numbers from 1e-06 to 1000"),
        (encoder_of(std=[0.2, 0.2, -0.2]), r"encoder\.std is \[0\.2, 0\.2, -0\.2\]"),
        (encoder_of(std=[0.2, 0.2]), r"encoder\.std is \[0\.2, 0\.2\]"),
        (encoder_of(mean=[1e308] * 3), r"encoder\.mean is \[1e\+308, .*\]: give three numbers from -1000 to 1000"),
        (lambda d: d["encoder"].pop("taps"), r"entry 'encoder\.taps' is missing"),
        (encoder_of(**{"class": "a:B"}), r"entry 'encoder\.settings' is missing"),
        (lambda d: d.update(adapters={"x": 1}), r"entry 'adapters\.rank' is missing"),
        (lambda d: d["tasks"]["depth"].update(classes=5), r"tasks\.depth\.classes is 5, not a list"),
        (lambda d: d["tasks"]["depth"].update(zoom=5), "a task has the entry 'zoom', which this simomerge does not"),
        (settings_of("dpt", fusion_channels="x"), "head 'dpt': fusion_channels is 'x', not a whole number"),
        (settings_of("dpt", fusion_channels=0), "head 'dpt': fusion_channels is 0: give at least 1"),
        (settings_of("conv", taps=5), r"head 'conv' cannot be made with the settings \{'taps': 5\} \("),
        (settings_of("conv", taps=True), r"head 'conv' cannot be made with the settings \{'taps': True\} \("),
    ],
)
def test_descriptions_that_cannot_be_meant(scene: Path, change: Change, message: str) -> None:
    edit(scene / "simo.json", change)
    started = time.process_time()
    with pytest.raises(InputError, match=rf"^scene/simo\.json: .*{message}"):
        sm.load(scene)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_no_error_of_a_setting(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **settings: object) -> None:
        raise error("no memory")

    monkeypatch.setattr(nn, "Conv2d", full)
    with pytest.raises(error, match="no memory"):
        build_head("linear", [8], 1)


@pytest.mark.parametrize("where", [".", "head"])
def test_errors_of_files_name_them_wherever_the_model_is(
    scene: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder "head", messages about heads begin as its path does."""
    if where == ".":
        monkeypatch.chdir(scene)
    else:
        scene.rename(where)
    folder, place = Path(where), Path(where).resolve() if where == "." else Path(where)
    edit(folder / "simo.json", settings_of("conv", taps="x"))
    with pytest.raises(InputError, match=f"^{place}/simo.json: head 'conv': "):
        sm.load(where)
    edit(folder / "simo.json", settings_of("linear"))
    (folder / "heads/depth.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=f"^{place}/heads/depth.safetensors is not a complete safetensors file"):
        sm.load(where)


def test_what_could_not_be_read_again_is_not_written(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model([sm.Task("depth")])
    monkeypatch.setitem(_MOST, "taps", 1)
    with pytest.raises(InputError, match=r"cannot be saved.*encoder\.taps has 4 entries, .* at most 1"):
        model.save_pretrained(tmp_path / "scene")
    assert not list(tmp_path.iterdir())


def test_the_tree_of_220_tasks_is_read_again(scene: Path) -> None:
    """Its tasks part one by one, from the first to the last of 24 blocks."""
    tasks = [f"semantic_task_{i}" for i in range(220)]
    steps = [", ".join(["+".join(tasks[i:]), *tasks[:i]]) for i in range(0, 220, 10)]
    description = read_description(scene)
    description["tasks"] = dict.fromkeys(tasks, description["tasks"]["depth"])
    description["heads"] = dict.fromkeys(tasks, description["heads"]["depth"])
    description["encoder"]["tree"] = " | ".join(f"{block}: {step}" for block, step in enumerate(steps, 1))
    assert len(description["encoder"]["tree"]) > 50_000
    write_description(scene, description)
    assert read_description(scene) == description
    assert len(Tree.read(description["encoder"]["tree"]).leaves) == 211


def test_the_largest_tree_takes_seconds() -> None:
    tasks = [f"t{i}" for i in range(1000)]
    started = time.process_time()
    tree = Tree.read(f"5000: {'+'.join(tasks)} | 5001: {'+'.join(tasks[:-1])}, t999 | 10000: {', '.join(tasks)}")
    rest = tree.without(tasks[2:])
    assert len(tree.nodes) == 1002 and len(tree.leaves) == 1000 and tree.leaf_of("t999") == 2
    assert str(rest) == "5001: t0+t1 | 10000: t0, t1" and tree.cost() == pytest.approx(500.4002)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": "4"}, "num_layers is '4', not a number above 0; take the file"),
        ({"patch_size": 0}, "patch_size is 0, not a number above 0"),
        (
            {"hidden_size": [16]},
            "cannot load the encoder that it describes .*hidden_size.*take the file from the model's",
        ),
        (
            {"dtype": [1]},
            "cannot load the encoder that it describes .*of the wrong kind.*take the file from the model's",
        ),
        ({"vision_config": {"patch_size": "8"}}, "patch_size is '8', not a number above 0"),
        ({"num_attention_heads": 0}, "cannot load the encoder that it describes .a value that no encoder can have"),
    ],
    ids=str,
)
def test_configurations_name_the_file_and_the_remedy(scene: Path, change: dict[str, Any], message: str) -> None:
    edit(scene / "encoder/config.json", lambda config: config.update(change))
    with pytest.raises(InputError, match=rf"^scene/encoder/config\.json: {message}"):
        sm.load(scene)


CODE = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (None, r"cannot load an encoder \(config\.json is missing or names no model type\)\. Give a folder with"),
        (5, r"cannot load an encoder \(config\.json is missing or names no model type\)\. Give a folder with"),
        ("evil", "model type 'evil' is no vision encoder that can be read here"),
        ("encodec", "model type 'encodec' is no vision encoder that can be read here"),
        ("siglip2_text_model", "model type 'siglip2_text_model' is no vision encoder that can be read here"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"auto_map": CODE}, {"auto_map": {"AutoModel": CODE["AutoModel"]}}])
def test_model_types_that_cannot_be_read(
    scene: Path, model_type: Any, message: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask whether to run the code, or tell users to trust it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    edit(scene / "encoder/config.json", lambda config: config.update(model_type=model_type, **more))
    with pytest.raises(InputError, match=f"^scene/encoder: {message}") as caught:
        sm.load(scene)
    assert "trust" not in str(caught.value)


def test_code_next_to_a_known_encoder_is_left_out(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    edit(scene / "encoder/config.json", lambda config: config.update(auto_map=CODE))
    assert not hasattr(sm.load(scene).encoder.backbone.config, "auto_map")


def test_only_sizes_of_encoders_must_be_numbers(scene: Path) -> None:
    """Parameters of tasks have names like those of sizes, but are none."""
    edit(scene / "encoder/config.json", lambda config: config.update(task_specific_params={"num_beams": "auto"}))
    assert list(sm.load(scene).tasks) == ["depth"]
    edit(scene / "encoder/config.json", lambda config: config.update(task_specific_params={"num_beams": 10**9}))
    with pytest.raises(InputError, match="num_beams is 1000000000, which no encoder has"):
        sm.load(scene)


def test_weights_of_another_shape_are_named(scene: Path) -> None:
    edit(scene / "encoder/config.json", lambda config: config.update(num_channels=4))
    first = r"embeddings\.patch_embeddings\.projection\.weight of shape \(32, 3, 8, 8\), not \(32, 4, 8, 8\)\."
    with pytest.raises(InputError, match=f"1 tensor is missing or has another shape, first {first}"):
        sm.load(scene)


# Text from files stays in its line ------------------------------------------------------------------------


def test_one_line() -> None:
    assert one_line(EVIL) == TAME and printable("a\n b\u2028") == "a\n b "
    assert str(InputError(f"{EVIL}: wrong")) == f"{TAME}: wrong"
    assert str(InputError("Its log ends with:", "one", "two\nthree")) == "Its log ends with:\none\ntwo three"


def test_no_file_adds_lines_to_inspect(
    scene: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def inspect() -> list[str]:
        monkeypatch.setattr(sys, "argv", ["simomerge", "inspect", "scene"])
        main()
        return capsys.readouterr().out.splitlines()

    def change(description: dict[str, Any]) -> None:
        description["provenance"] = {"base": {"source": text, "license": text}}
        description["tasks"]["depth"]["kind"] = text

    text = "plain"
    edit(scene / "simo.json", change)
    lines = inspect()
    text = EVIL
    edit(scene / "simo.json", change)
    assert inspect() == [line.replace("plain", TAME) for line in lines]


def test_no_file_adds_lines_to_cards_tables_and_pages(scene: Path) -> None:
    description = read_description(scene)
    lines = len(model_card(description).splitlines())
    description["encoder"]["tree"] = f"`{EVIL}"
    description["tasks"]["depth"]["kind"] = EVIL
    card = model_card(description)
    assert len(card.splitlines()) == lines + 1 and f"`'{TAME}`" in card
    assert len(aligned([["task", EVIL], [EVIL, "1"]])) == 2
    assert html_table([["task"], [EVIL]]).count(TAME) == 1
    assert TAME in render_html("base.html", title=EVIL, sentences=[], about="")
    rows = [{"method": EVIL}]
    assert columns({"tasks": [], "rows": rows})[0].cells == (TAME,)


def test_warnings_are_short_lines() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(EVIL)
        warn("\x1b[31m" + "x" * 5000)
    assert str(caught[0].message) == TAME
    assert str(caught[1].message).startswith("[31mxx") and len(str(caught[1].message)) <= 2000


# Before anything is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "options"), [("pcb", {}), ("emr", {"task": "b"})])
def test_statistics_find_wrong_values_before_the_first_tensor(method: str, options: dict[str, Any]) -> None:
    base = {"w": np.zeros((8, 8), "f4"), "v": np.zeros(8, "f4")}
    wrong = {**base, "v": np.full(8, np.nan, "f4")}
    merged = Merged(get_method(method, **options), base, {"a": {"w": base["w"] + 1, "v": base["v"]}, "b": wrong})
    with pytest.raises(InputError, match="'v' of the expert 'b' holds NaN"):
        merged.at_once()


def test_nothing_is_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single weight file is written over what is there: only `check_output` refuses that."""
    monkeypatch.chdir(tmp_path)
    values = {"base": 1.0, "depth": 2.0, "normals": 3.0, "mine": 4.0}
    files = {name: write_safetensors(f"{name}.safetensors", {"w": np.full(4, v, "f4")}) for name, v in values.items()}
    precious, experts = files["mine"].read_bytes(), {name: files[name] for name in ("depth", "normals")}
    compress(files["base"], experts, "compressed")
    with pytest.raises(InputError, match=r"mine\.safetensors already exists"):
        merge_on_disk(files["base"], experts, Output(files["mine"]))
    with pytest.raises(InputError, match=r"mine\.safetensors already exists"):
        restore("compressed", "depth", files["mine"])
    with pytest.raises(InputError, match="compressed already exists"):
        check_output(Path("compressed"), overwrite=False)
    assert files["mine"].read_bytes() == precious
    restore("compressed", "depth", files["mine"], overwrite=True)
    assert files["mine"].read_bytes() != precious
