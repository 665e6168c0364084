"""What commands say: names that are nearly right, counts above what is there, values as people write them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

import simomerge as sm
from simomerge.assembly.realign import get_realignment, realignments
from simomerge.checkpoints import open_checkpoint
from simomerge.checkpoints.experts import own_task
from simomerge.cli import cli, main
from simomerge.cli.merge import _shown
from simomerge.core.errors import InputError
from simomerge.core.text import plain
from simomerge.datasets import load_data
from simomerge.models.model import SimoModel

from .conftest import Story, assert_mistake, simomerge


@pytest.mark.parametrize("name", ["dpth", "dept", "depths", "Depth", "detph"])
def test_a_misspelt_task_is_refused_with_the_near_one(name: str) -> None:
    with pytest.raises(InputError, match=f"expert '{name}' is one of 'depth': write depth=..., or give it a name"):
        own_task(["depth"], name)


@pytest.mark.parametrize("name", ["depth", "distance", "depth2", "depth_indoor", "indoor_depth", "z"])
def test_a_name_on_purpose_is_taken(name: str) -> None:
    assert own_task(["depth"], name) == "depth"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"depth": [0.1, 0.55, 0.25], "normals": [0.3]}, "depth 0.1 to 0.55 over 3 blocks; normals 0.3"),
        (0.4, "0.4"),
        ({"depth": 0.25, "normals": 1.0}, "depth 0.25; normals 1"),
        (None, "none"),
        ("lines", "lines"),
    ],
)
def test_scales_are_shown_as_text(value: Any, text: str) -> None:
    assert _shown(value) == text


def test_values_are_those_of_a_recipe_or_the_command_line() -> None:
    shown = simomerge("methods").out
    for wrong in ("None", "True", "False", "'"):
        lines = [line for line in shown.splitlines() if line.strip().startswith(("-p ", "--")) and wrong in line]
        assert not lines, lines
    assert plain({"a": [True, None, 0.1]}) == "{a: [true, none, 0.1]}"


def test_a_closed_pipe_ends_a_command_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("closed")
    def closed() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(type(cli), "get_command", lambda *_: closed)
    monkeypatch.setattr(type(cli), "resolve_command", lambda self, ctx, args: ("closed", closed, []))
    with pytest.raises(SystemExit) as ended:
        cli.main(["closed"], prog_name="simomerge")
    assert ended.value.code == 0


@pytest.mark.slow
def test_the_first_line_of_a_long_list() -> None:
    command = f"{sys.executable} -m simomerge methods | head -1"
    done = subprocess.run(
        ["bash", "-c", f'{command}; echo "${{PIPESTATUS[0]}}"'],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.stdout.split("\n")[:2] == ["Merge methods:", "0"] and done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
def test_every_encoding_of_a_pipe_can_be_written(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that it does not have become question marks; its own setting for errors stays."""
    for errors, expected in (("strict", "a ?"), ("backslashreplace", "a \\u65e5")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors))
        monkeypatch.setattr(type(cli), "main", lambda *_, **__: print("a 日", end="", flush=True))
        main()
        assert written.getvalue().decode(encoding) == expected


@pytest.fixture
def half(make_model: Callable[..., SimoModel], tiny_base: Path, tmp_path: Path) -> dict[str, Path]:
    """Two experts that store their encoders in half precision."""
    tasks, folders = load_data("rooms", count=1).tasks, {}
    for seed, task in enumerate(("depth", "normals")):
        model = make_model({task: tasks[task]}, seed=seed)
        with torch.no_grad():
            for weight in model.encoder.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        folders[task] = model.save_pretrained(tmp_path / task, dtype="bfloat16")
    return folders


@pytest.mark.filterwarnings("ignore:expert .* does not record its base")
def test_a_merge_on_images_keeps_the_experts_dtype(half: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{index}.png")
    pairs = [f"{task}={folder}" for task, folder in half.items()]
    images = ("--images", tmp_path / "photos", "--count", 20)
    done = simomerge("merge", tiny_base, *pairs, "--scale", "auto", *images, "-o", tmp_path / "merged")
    assert f"--count 20: {tmp_path / 'photos'} has 8 images; all of them are used." in done.err
    assert f"--images {tmp_path / 'photos'} -o" in done.out  # the next command
    assert done.code == 0, done.err
    stored = open_checkpoint(tmp_path / "merged")
    assert {stored.info(name).dtype for name in stored if stored.info(name).is_float} == {"BF16"}
    loaded = sm.load(tmp_path / "merged")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    wanted = sm.merge(str(tiny_base), half, scale=loaded.provenance["merge"]["scale"])
    for ours, exact in zip(loaded.encoder.parameters(), wanted.encoder.parameters(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [("--scale", "auto"), ("--method", "regmean"), ("--method", "auto"), ("--scale", 0.5, "--share", 3)],
    ids=["scale", "regmean", "auto", "tree"],
)
def test_a_merge_on_images_stores_as_asked(
    half: dict[str, Path], tiny_base: Path, tmp_path: Path, given: tuple[object, ...]
) -> None:
    """The experts are in half precision, so that float32 is not the default."""
    pairs = [f"{task}={folder}" for task, folder in half.items()]
    for dtype, stored in {"float32": "F32", "float16": "F16"}.items():
        out = tmp_path / dtype
        done = simomerge(
            *("merge", tiny_base, *pairs, *given, "--images", "rooms", "--count", 8, "--dtype", dtype, "-o", out)
        )
        assert done.code == 0, done.err
        encoder = open_checkpoint(out / "encoder")
        assert {encoder.info(name).dtype for name in encoder if encoder.info(name).is_float} == {stored}


def test_a_dtype_that_is_too_small_is_refused(make_model: Callable[..., SimoModel], tmp_path: Path) -> None:
    model = make_model([])
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(1e6)
    with pytest.raises(InputError, match="too large for float16; store the encoder as float32"):
        model.save_pretrained(tmp_path / "model", dtype="float16")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float16, "F16"), ("BF16", "BF16"), ("float32", "F32"), (None, "F32")], ids=str
)
def test_a_model_is_stored_as_asked(
    make_model: Callable[..., SimoModel], tmp_path: Path, dtype: str | torch.dtype | None, stored: str
) -> None:
    encoder = open_checkpoint(make_model([]).save_pretrained(tmp_path / "model", dtype=dtype) / "encoder")
    assert {encoder.info(name).dtype for name in encoder if encoder.info(name).is_float} == {stored}


@pytest.mark.parametrize("dtype", ["half", torch.int8, "float64"], ids=str)
def test_another_dtype_is_refused(make_model: Callable[..., SimoModel], tmp_path: Path, dtype: object) -> None:
    with pytest.raises(InputError, match=r"dtype .*: use float32, float16 or bfloat16"):
        make_model([]).save_pretrained(tmp_path / "model", dtype=dtype)
    assert not (tmp_path / "model").exists()


@pytest.mark.filterwarnings("ignore:expert .* does not record its base")
def test_fisher_takes_the_labels_of_a_dataset_that_is_given_as_images(half: dict[str, Path], tiny_base: Path) -> None:
    data = load_data("rooms", split="val", count=3, tasks=["depth", "normals"])
    by_images = sm.merge(str(tiny_base), half, "fisher", images=data)
    by_labels = sm.merge(str(tiny_base), half, "fisher", validation=data)
    plain_mean = sm.merge(str(tiny_base), half, "average")
    for name, value in by_labels.encoder.state_dict().items():
        assert torch.equal(by_images.encoder.state_dict()[name], value)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(by_labels.encoder.parameters(), plain_mean.encoder.parameters(), strict=True)
    )
    with pytest.raises(InputError, match="'fisher' computes with labels: give validation="):
        sm.merge(str(tiny_base), half, "fisher", images=[data.image(0)])


def test_evaluate_checks_tasks_and_counts_before_it_computes(
    half: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "simomerge.training.evaluate.evaluate", lambda *_, **__: pytest.fail("computed before the check")
    )
    (tmp_path / "data.csv").write_text("image,normals\na.png,n.npy\n")
    both = sm.SimoModel(
        sm.load(half["depth"]).encoder,
        {task: sm.load(folder).tasks[task] for task, folder in half.items()},
        {task: sm.load(folder).heads[task] for task, folder in half.items()},
    ).save_pretrained(tmp_path / "both")
    done = simomerge("evaluate", both, f"depth={half['depth']}", "--data", tmp_path / "data.csv", "--count", 9)
    assert "--count 9" in done.err and "has 1 images; all of them are used" in done.err
    assert_mistake(done, r"has no labels of 'depth'; leave its expert out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:expert .* does not record its base")
def test_a_delta_over_some_of_the_tasks_says_so(half: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    merged = sm.merge(str(tiny_base), half, "average").save_pretrained(tmp_path / "merged")
    one = simomerge("evaluate", merged, f"depth={half['depth']}", "--count", 2)
    assert "It is over depth only: give the experts of normals too" in one.out
    pairs = [f"{task}={folder}" for task, folder in half.items()]
    assert "only" not in simomerge("evaluate", merged, *pairs, "--count", 2).out


def test_the_help_gives_the_number_of_images_that_each_method_uses() -> None:
    counts = {name: get_realignment(name).default_count for name in realignments()}
    few, many = ([name for name, count in counts.items() if count == most] for most in (64, 4096))
    assert sorted(few) == ["fold", "fold-cross", "prodistill", "react"] and many == ["finetune"]
    assert set(counts.values()) == {64, 256, 4096}
    assert "64 for fold, prodistill, react, fold-cross; 4096 for finetune; else 256" in " ".join(
        simomerge("realign", "--help").out.split()
    )


def test_a_fold_follows_what_leaves_the_heads_as_they_are(story: Story, tmp_path: Path) -> None:
    experts = (f"depth={story / 'depth'}", f"normals={story / 'normals'}")
    given = ("realign", story / "scene", *experts, "--images", "rooms", "--count", 8, "--method", "calibrate")
    done = simomerge(*given, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"Next: simomerge realign {tmp_path / 'out'} " in done.out and "the heads no longer fit" in done.out
