"""Kill, starve and crowd the commands that write, and count what is lost or left.

    python benchmarks/hardening_writers.py --kills 100 -o writers.json

Each of seven commands is killed (SIGKILL) at random moments while it replaces an older output. The old or the new
output must be there, complete, and the next run of the command must leave nothing else. Then the commands run on a disk
that becomes full after so many bytes, with limits of the system (size of files, open files, memory), and eight at a
time: each run must end with its result or with one clear error, and leave nothing. The exit code is 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hardening import Tally, summarise
from simomerge.checkpoints import open_checkpoint, write_safetensors, write_sharded
from simomerge.core.errors import InputError
from simomerge.merging.disk.compress import restore

SIMOMERGE = (sys.executable, "-m", "simomerge")
FILES = {
    "merge": "merge base.safetensors a=a.safetensors b=b.safetensors --method ties -o out --overwrite",
    "sharded merge": "merge base.safetensors a=a.safetensors --max-shard-size 3MB -o out --overwrite",
    "compress": "compress base.safetensors a=a.safetensors -o out --overwrite",
}
"""Commands on weight files, which need no torch."""
SHORT = "--count 8 --val-count 8 --probe-steps 1 --steps 1 --batch-size 4"
MODELS = {
    "save": "import source --task depth -o out --overwrite",
    "realign": "realign merged depth=depth normals=normals --images pictures -o out --overwrite",
    "train": f"train --task depth --base base --data rooms {SHORT} -o out --overwrite",
    "run": "run recipe.yaml -o out",
}
"""Commands on models."""


def command(text: str) -> list[str]:
    return [*SIMOMERGE, *text.split()]


def files(folder: Path) -> None:
    """A base and two experts of 12 MB each."""
    tensors = {f"w{i}": np.random.default_rng(i).normal(size=(1000, 500)).astype("f4") for i in range(6)}
    write_safetensors(folder / "base.safetensors", tensors)
    for number, name in enumerate("ab", start=1):
        added = {key: value + np.float32(0.01 * number) for key, value in tensors.items()}
        write_safetensors(folder / f"{name}.safetensors", added)


def models(folder: Path) -> None:
    """A tiny base, two experts, their merge, pictures, a model to import, and a recipe."""
    import torch
    from PIL import Image
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=1)).save_pretrained(folder / "base")
    backbone = Dinov2Config(**sizes, mlp_ratio=1, out_indices=[1, 2], reshape_hidden_states=False)
    neck = {"neck_hidden_sizes": [4, 4], "fusion_hidden_size": 4, "head_hidden_size": 4, "reassemble_factors": [2, 1]}
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=32, patch_size=8, **neck)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder / "source")
    (folder / "pictures").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{number}.png")
    for task in ("depth", "normals"):
        run(command(f"train --task {task} --base base --data rooms {SHORT} -o {task}"), folder)
    run(command("merge base depth=depth normals=normals -o merged"), folder)
    short = "{steps: 1, batch_size: 4}"
    (folder / "recipe.yaml").write_text(
        "base: base\ndata: rooms\ntasks: [depth, normals]\nmerges: [average]\nrealigned: []\n"
        f"train_images: 8\nval_images: 4\ntest_images: 4\nprobe: {short}\ntune: {short}\njoint: {short}\n"
    )


def run(arguments: Sequence[str], folder: Path, prepare: Callable[[], None] | None = None) -> tuple[int, str]:
    """The exit code of a command, and what it printed on standard error."""
    done = subprocess.run(
        list(arguments), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=prepare, check=False
    )
    return done.returncode, done.stderr.decode(errors="replace")


def complete(folder: Path) -> bool:
    """Whether everything in an output can be read."""
    try:
        if (folder / "compressed.json").is_file():
            with tempfile.TemporaryDirectory() as other:
                restore(folder, "a", Path(other) / "restored.safetensors")
        elif (folder / "simo.json").is_file():
            from simomerge.models.model import load

            load(str(folder))
        else:
            sum(float(value.sum()) for value in open_checkpoint(folder).values())
    except (InputError, OSError):
        return False
    return True


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def kills(commands: dict[str, str], count: int, folder: Path, seed: int = 0) -> Iterator[Tally]:
    """Kill each command ``count`` times: at any moment of its run, or while it writes, in turn."""
    inputs, draw = contents(folder), random.Random(seed)
    for name, text in commands.items():
        tally, began = Tally(f"SIGKILL of {name}"), time.monotonic()
        code, said = run(command(text), folder)
        seconds = time.monotonic() - began
        if code:
            tally.note("escape", said)
        # A run goes on where it was killed, so its folder may hold a part, and the next run must complete it.
        resumes = name == "run"
        known = inputs if resumes else inputs | {"out"}
        for number in range(count):
            if resumes:
                shutil.rmtree(folder / "out", ignore_errors=True)
            process = subprocess.Popen(command(text), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if number % 2:
                time.sleep(draw.uniform(0.2, 1) * seconds)
            else:  # while it writes
                while process.poll() is None and contents(folder) <= known:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, seconds / 2 if resumes else 0.1))
            process.kill()
            process.wait()
            tally.counts["tried"] += 1
            if not resumes and not complete(folder / "out"):
                tally.note("output lost", name)
            if resumes:
                code, said = run(command(text), folder)
                if code or not (folder / "out/results.json").is_file():
                    tally.note("output lost", said)
        code, said = run(command(text), folder)
        if code:
            tally.note("escape", said)
        for left in contents(folder) - inputs - {"out"}:
            tally.note("leftovers after the next run", left)
        shutil.rmtree(folder / "out", ignore_errors=True)
        yield tally


def full_disk(commands: dict[str, str], count: int, folder: Path, seed: int = 0) -> Iterator[Tally]:
    """Run each command where no file may become larger than so many bytes, as on a disk that is full at this write.

    RLIMIT_FSIZE counts per file, and the error is another one than that of a full disk; where it may, a small file
    system in memory becomes full as well.
    """
    inputs, draw = contents(folder), random.Random(seed)
    for name, text in commands.items():
        tally = Tally(f"full at a write: {name}")
        sizes = [0, 100, 4096, *(int(10 ** draw.uniform(2, 7.1)) for _ in range(count))][:count]
        for size in sizes:
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
            _judge(tally, *run(command(text), folder, limit))
            if (folder / "out.work").exists():  # the state of a training, from which the next run goes on
                run(command(text), folder)
            shutil.rmtree(folder / "out", ignore_errors=True)
            _leftovers(tally, folder, inputs)
        yield tally


def small_disk(text: str, count: int, folder: Path, seed: int = 0) -> Tally:
    """Run a command that writes to a small file system in memory, with any amount of free space."""
    tally, draw, place = Tally("full file system"), random.Random(seed), folder / "disk"
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        return tally  # only an administrator may
    try:
        for number in range(count):
            (place / "filler").write_bytes(bytes(draw.randrange(16 << 20)))
            out = place / ("o.safetensors" if number % 2 else "o")
            code, said = run(command(f"{text} -o {out} --overwrite"), folder)
            _judge(tally, code, said)
            if code == 0 and not complete(out):
                tally.note("output lost", said)
            for path in place.iterdir():
                if path.name not in ("filler", out.name):
                    tally.note("leftovers after the next run", path.name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()
    return tally


def limits(folder: Path) -> Tally:
    """Eight writers at once, few descriptors and little memory."""
    tally = Tally("limits")
    write_sharded(folder / "many", {f"w{i}": np.ones((50, 50), "f4") for i in range(200)}, max_shard_size=10001)
    shutil.copytree(folder / "many", folder / "same")
    inputs = contents(folder)
    merge = command("merge many a=same -o out --overwrite")
    runs = [subprocess.Popen(merge, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(8)]
    ends = [(process.communicate()[1].decode(), process.returncode) for process in runs]
    for said, code in ends:
        _judge(tally, code, said)
    if not any(code == 0 for _, code in ends) or not complete(folder / "out"):
        tally.note("output lost", ends[0][0])
    for kind, value in (
        *((resource.RLIMIT_NOFILE, number) for number in (16, 32, 64)),
        *((resource.RLIMIT_AS, megabytes << 20) for megabytes in (150, 250, 400, 1000)),
        *((resource.RLIMIT_FSIZE, size) for size in (0, 512, 4096, 8192)),
    ):
        _judge(tally, *run(merge, folder, partial(resource.setrlimit, kind, (value, value))))
        _leftovers(tally, folder, inputs | {"out"})
    return tally


def _judge(tally: Tally, code: int, said: str) -> None:
    """A run must end with its result, or with one clear error."""
    tally.counts["tried"] += 1
    tally.counts["result" if code == 0 else "clear error"] += code in (0, 2)
    if code not in (0, 2) or "Traceback" in said:
        tally.note("escape", said[-200:])


def _leftovers(tally: Tally, folder: Path, inputs: set[str]) -> None:
    for left in contents(folder) - inputs:
        tally.note("leftovers after the next run", left)
        path = folder / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def everything(killed: int, seed: int) -> Iterator[Tally]:
    """All of it, in folders that are removed at the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files(folder)
        each = max(killed // (len(FILES) + len(MODELS)), 1)
        yield from kills(FILES, each, folder, seed)
        yield from full_disk(FILES, each, folder, seed)
        yield small_disk("merge base.safetensors a=a.safetensors", each, folder, seed)
        yield limits(folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models(folder)
        yield from kills(MODELS, each, folder, seed)
        yield from full_disk({name: text for name, text in MODELS.items() if name != "run"}, each, folder, seed)


def main() -> int:
    """Run it, print a line for each kind, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=14, help="number of kills, and of writes that fail, in total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    return summarise(everything(given.kills, given.seed), given.output)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
