"""Every mistake ends with status 2 and a sentence that names the remedy; no half-written file stays."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from simomerge.cli import COMMANDS, TOGETHER, cli, module_of

from .conftest import TINY, Story, assert_mistake, simomerge


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# Visible in the arguments ----------------------------------------------------------------------------------

MERGE = ("merge", "BASE", "depth=DEPTH", "normals=NORMALS", "-o", "OUT")
TRAIN = ("train", "--base", "BASE", *TINY, "-o", "OUT")
DISTILL = ("realign", "SCENE", "depth=DEPTH", "--images", "./nowhere", "--method", "distill")
MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "home of nobody": (("evaluate", "SCENE", "--data", "~nobody-here/x"), "unknown dataset '~nobody-here/x'"),
    "command": (("merg",), "no such command 'merg'; did you mean 'merge'"),
    "strange command": (("xyzzy",), r"no such command 'xyzzy'\."),
    "option": ((*MERGE, "--metod", "ties"), r"(?i)no such option.*--metod.*--method"),
    "missing argument": (("merge", "BASE", "-o", "OUT"), "TASK=EXPERT"),
    "missing output": (("merge", "BASE", "depth=DEPTH"), "--output"),
    "method": ((*MERGE, "--method", "tie"), "no merge method 'tie': did you mean 'ties'"),
    "parameter": ((*MERGE, "--method", "ties", "-p", "densty=0.2"), "no parameter 'densty': did you mean 'density'"),
    "parameter's form": ((*MERGE, "-p", "density"), "'density': give KEY=VALUE"),
    "parameter's value": ((*MERGE, "--method", "ties", "-p", "density=much"), "density must be a number.*'much'"),
    "parameter's range": ((*MERGE, "--method", "ties", "-p", "density=1.5"), "density must be a number.*1.5"),
    "parameter's parameter": ((*MERGE, "--method", "average", "--scale", "1"), "'average' has no parameter 'scale'"),
    "parameter as an option": (
        (*MERGE, "--method", "ties", "--density", "0.5"),
        r"--density is no option: density is a parameter of the methods .*dare-ties, .*ties\. Give -p density=0\.5\.$",
    ),
    "scale": ((*MERGE, "--scale", "best"), "--scale best: give a number, .*'auto' or 'learned'"),
    "negative scale": ((*MERGE, "--scale", "-1"), "scale must be"),
    "minutes without auto": ((*MERGE, "--minutes", "2"), "--minutes is the time of --method auto"),
    "scale of a method without": ((*MERGE, "--method", "average", "--scale", "auto"), "no parameter 'scale'"),
    "pair": (("merge", "BASE", "depth", "-o", "OUT"), "'depth': give TASK=EXPERT"),
    "task twice": (("merge", "BASE", "depth=DEPTH", "depth=x", "-o", "OUT"), "two experts for task 'depth'"),
    "expert's path": (("merge", "BASE", "depth=./nowhere", "-o", "OUT"), "nowhere does not exist"),
    "base's path": (("merge", "./nowhere", "depth=DEPTH", "-o", "OUT"), "nowhere: no such folder"),
    "forgotten base of a merge": (
        ("merge", "depth=DEPTH", "normals=NORMALS", "-o", "OUT"),
        "first argument of merge is BASE, the encoder that the experts were fine-tuned from; 'depth=.*' looks like an"
        r" expert\. Give BASE before the experts: simomerge merge BASE depth=",
    ),
    "forgotten base of relate": (("relate", "depth=DEPTH", "normals=NORMALS"), "first argument of relate is BASE, the"),
    "forgotten base of compress": (("compress", "depth=DEPTH", "-o", "OUT"), "first argument of compress is BASE, the"),
    "forgotten model": (("evaluate", "depth=DEPTH"), "evaluate is MODEL, the model to evaluate; 'depth=.*' looks like"),
    "forgotten merged model": (
        ("realign", "depth=DEPTH", "--images", "./nowhere", "-o", "OUT"),
        "realign is MODEL, the model that the experts were merged into; 'depth=.*' looks like an expert",
    ),
    "base's path with an equals sign": (
        ("merge", "./lr=1/base", "depth=DEPTH", "-o", "OUT"),
        "lr=1/base: no such folder",
    ),
    "split without images": (
        (*MERGE, "--split", "train"),
        "--split is for merges that compute with images, and this one uses none",
    ),
    "images that nothing uses": (
        (*MERGE, "--images", "FOLDER"),
        "--images is for merges that compute with images, and this one uses none. Give --scale auto to choose",
    ),
    "data that nothing uses": ((*MERGE, "--data", "rooms"), "--data is for merges that compute with images"),
    "count that nothing uses": ((*MERGE, "--count", "3"), "--count is for merges that compute with images"),
    "images that are nowhere": (
        (*MERGE, "--scale", "auto", "--images", "./nowhere"),
        "nowhere: no such folder of images",
    ),
    "output of a prediction": (("predict", "SCENE", "FOLDER"), "Missing option '-o' / '--output'"),
    "kind of a prediction": (
        ("predict", "SCENE", "FOLDER", "--as", "jpg", "-o", "OUT"),
        "unknown kind of output 'jpg'",
    ),
    "suffix of the output": (
        (*MERGE[:-1], "./merged.safetensor"),
        "did you mean merged.safetensors, which is a weight file",
    ),
    "precision without images": (
        (*MERGE, "--precision", "bf16"),
        "--precision is for merges.*uses none. Give --dtype for the stored weights",
    ),
    "split of a folder": (
        (*MERGE, "--scale", "auto", "--images", "FOLDER", "--split", "val"),
        "is a folder of pictures and has no splits; leave the split out",
    ),
    "expert of no task": (
        ("merge", "BASE", "depth=BASE", "--scale", "auto", "-o", "OUT"),
        "expert 'depth' has the tasks none",
    ),
    "other base": (("merge", "DEPTH", "normals=NORMALS", "-o", "OUT"), "fine-tuned from another base"),
    "output exists": ((*MERGE[:-1], "DEPTH"), "exists; choose another path, or give --overwrite"),
    "task": ((*TRAIN, "--task", "deth"), "unknown task 'deth'; did you mean 'depth'"),
    "same task": ((*TRAIN, "--task", "depth", "--task", "depth"), "'depth' is given twice"),
    "no task": (TRAIN, "--task"),
    "dataset": (
        (*TRAIN, "--task", "depth", "--data", "room"),
        r"unknown dataset 'room'; did you mean 'rooms'\? give rooms,",
    ),
    "learning rate": ((*TRAIN, "--task", "depth", "--lr", "0"), "lr must be a number above 0, got 0.0"),
    "encoder's rate": (
        (*TRAIN, "--task", "depth", "--encoder-lr", "-1"),
        "encoder_lr must be a number above 0, got -1.0",
    ),
    "steps": ((*TRAIN, "--task", "depth", "--steps", "0"), "0 is not in the range"),
    "head": ((*TRAIN, "--task", "depth", "--head", "liner"), "no 'liner': did you mean 'linear'"),
    "re-alignment": (("realign", "SCENE", "--method", "head", "-o", "OUT"), "no 'head': did you mean 'heads'"),
    "re-aligned path": (("realign", "./nowhere", "--method", "heads", "-o", "OUT"), "no such folder"),
    "re-aligned base": (("realign", "BASE", "--method", "heads", "--count", "4", "-o", "OUT"), "no heads to re-align"),
    "rate of re-alignment": (
        ("realign", "SCENE", "--method", "heads", "--lr", "-1", "--count", "4", "-o", "OUT"),
        "lr must be a number above 0, got -1.0",
    ),
    "images to fold on": (("realign", "SCENE", "depth=DEPTH", "-o", "OUT"), "give --images FOLDER"),
    "teachers": (("realign", "SCENE", "--images", "./nowhere", "-o", "OUT"), "give each as TASK=EXPERT"),
    "labels for a fold": (
        ("realign", "SCENE", "depth=DEPTH", "--images", "./nowhere", "--steps", "3", "-o", "OUT"),
        "--steps does nothing under --method fold",
    ),
    "adapters and LoRA": ((*DISTILL, "--trains", "both", "-o", "OUT"), "no 'both': choose from heads, adapters"),
    "rank of no adapters": (
        (*DISTILL, "--rank", "2", "-o", "OUT"),
        "rank does nothing unless trains is adapters or lora",
    ),
    "activation of LoRA": (
        (*DISTILL, "--trains", "lora", "--activation", "relu", "-o", "OUT"),
        "activation does nothing unless trains is adapters",
    ),
    "LoRA under a fold": ((*DISTILL[:-1], "fold", "--trains", "lora", "-o", "OUT"), "--trains does nothing under"),
    "alpha": (
        ("realign", "SCENE", "--method", "lora", "--alpha", "0", "--count", "4", "-o", "OUT"),
        "alpha must be a number above 0, got 0.0",
    ),
    "split": (("evaluate", "SCENE", "--split", "tets"), "split"),
    "model without heads": (("evaluate", "BASE", "--count", "4"), "the model predicts nothing"),
    "evaluated path": (("evaluate", "./nowhere"), "no such folder"),
    "unshared expert": (("evaluate", "DEPTH", "normals=NORMALS", "--count", "4"), "does not predict 'normals'"),
    "expert without the task": (
        ("evaluate", "SCENE", "normals=DEPTH", "--count", "4"),
        "expert 'normals' is a model of depth: write depth=...",
    ),
    "predicting base": (("predict", "BASE", "PHOTO", "-o", "OUT"), "without heads predicts nothing"),
    "no photo": (("predict", "SCENE", "./nowhere.png", "-o", "OUT"), "nowhere.png: no such image file"),
    "no picture": (("predict", "SCENE", "TEXT", "-o", "OUT"), "cannot be read as an image"),
    "broken picture": (("predict", "SCENE", "BROKEN", "-o", "OUT"), "cannot be read as an image"),
    "photo of a file": (("predict", "SCENE", "PHOTO", "-o", "TEXT"), "is a file; give a folder to write into"),
    "inspected path": (("inspect", "./nowhere"), "does not exist"),
    "inspected file": (("inspect", "TEXT"), "not a weight file"),
    "inspected folder": (("inspect", "FOLDER"), "holds no weights"),
    "demo's task": (("demo", "--tasks", "deth", "-o", "OUT"), "did you mean 'depth'"),
    "demo's base": (("demo", "--tasks", "depth", "--base", "./nowhere", "-o", "OUT"), "no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence(name: str, story: Story, tiny_base: Path, tmp_path: Path) -> None:
    arguments, message = MISTAKES[name]
    photo, text, broken, folder = (tmp_path / part for part in ("photo.png", "notes.txt", "broken.png", "folder"))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)).save(photo)
    text.write_text("not an image")
    broken.write_bytes(photo.read_bytes()[:200])
    folder.mkdir()
    places = {"BASE": tiny_base, "SCENE": story / "scene", "DEPTH": story / "depth", "NORMALS": story / "normals"}
    places |= {"OUT": tmp_path / "out", "PHOTO": photo, "TEXT": text, "BROKEN": broken, "FOLDER": folder}

    def real(argument: object) -> str:
        task, equals, place = str(argument).rpartition("=")
        return f"{task}{equals}{places.get(place, place)}"

    before = listing(tmp_path), listing(story.folder)
    assert_mistake(simomerge(*map(real, arguments)), message)
    assert (listing(tmp_path), listing(story.folder)) == before


# Visible in the files ----------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layernorm.weight"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, path, metadata={"format": "pt"})


def lose_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["layernorm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def empty(path: Path) -> None:
    path.write_text("{}")


def remove(path: Path) -> None:
    path.unlink()


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated encoder": ("encoder/model.safetensors", cut, "model.safetensors is not a complete safetensors file"),
    "truncated head": ("heads/depth.safetensors", cut, r"heads/depth.safetensors is not a complete safetensors file"),
    "NaN": ("encoder/model.safetensors", poison, "of the expert 'depth'.* holds NaN"),
    "lost tensor": (
        "encoder/model.safetensors",
        lose_a_tensor,
        "'depth' is missing 1 tensor of the base: layernorm.weight",
    ),
    "lost head": ("heads/depth.safetensors", remove, "heads/depth.safetensors: missing"),
    "lost weights": ("encoder/model.safetensors", remove, "holds no weights"),
    "truncated description": ("simo.json", cut, "simo.json: cannot be read"),
    "empty description": ("simo.json", empty, "simo.json: .*missing"),
    "no configuration": ("encoder/config.json", remove, "config.json: missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_expert_is_named(name: str, copy_of: Any, tiny_base: Path, story: Story) -> None:
    file, damage, message = DAMAGE[name]
    expert = copy_of("depth")
    damage(expert / file)
    before = listing(expert.parent)
    out = expert.parent / "out"
    assert_mistake(simomerge("merge", tiny_base, f"normals={story / 'normals'}", f"depth={expert}", "-o", out), message)
    assert listing(expert.parent) == before


def test_a_truncated_checkpoint_is_named_by_inspect(copy_of: Any) -> None:
    expert = copy_of("depth")
    cut(expert / "encoder" / "model.safetensors")
    assert_mistake(simomerge("inspect", expert), "model.safetensors is not a complete safetensors file")


def test_an_output_below_a_file_is_an_error(story: Story, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = simomerge("merge", tiny_base, f"depth={story / 'depth'}", "-o", tmp_path / "file" / "out")
    assert_mistake(done, "(?i)not a directory")
    assert listing(tmp_path) == {tmp_path / "file"}


def test_torchrun_starts_what_processes_do_together(monkeypatch: pytest.MonkeyPatch) -> None:
    joining = {
        command
        for command in COMMANDS
        if "join_processes()" in Path(import_module(module_of(command)).__file__ or "").read_text()
    }
    assert joining == set(TOGETHER)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(click.UsageError, match=r"'merge' is for one process; torchrun starts demo, run"):
        cli.main(["merge", "a", "depth=b", "-o", "c"], standalone_mode=False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out_in_torch_is_one_sentence(
    story: Story, tmp_path: Path, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("simomerge.assembly.realign.fold.Fold.change", full)
    fold = ("realign", story / "scene", f"depth={story / 'depth'}", f"normals={story / 'normals'}", "--images", "rooms")
    done = simomerge(*fold, "--count", "8", "--method", "fold", "-o", tmp_path / "out")
    where = "the GPU is out" if "CUDA" in str(error) else "Error: out"
    assert_mistake(done, f"{where} of memory; free some, .*smaller or fewer images, smaller batches")
    assert ("ulimit" in done.err) == ("CUDA" not in str(error))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("evaluate", "free some, raise ulimit -v, or use smaller or fewer images."),
        ("train", "free some, raise ulimit -v, or use smaller or fewer images or smaller batches (--batch-size)."),
        ("compress", "free some, raise ulimit -v."),
        ("data", "free some, raise ulimit -v, or use smaller or fewer images."),
        ("demo", "free some, raise ulimit -v, or use fewer --workers."),
    ],
)
def test_memory_that_runs_out_names_only_options_of_the_command(
    command: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(click.Command, "invoke", full)
    monkeypatch.setattr(click.Group, "invoke", full)
    assert_mistake(simomerge(command), re.escape(f"Error: out of memory; {advice}"))


def test_another_error_of_torch_is_no_lack_of_memory(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("simomerge.assembly.realign.fold.Fold.change", wrong)
    fold = ("realign", story / "scene", f"depth={story / 'depth'}", f"normals={story / 'normals'}", "--images", "rooms")
    with pytest.raises(RuntimeError, match="shapes differ"):
        simomerge(*fold, "--count", "8", "--method", "fold", "-o", tmp_path / "out")
