"""Try to break the readers and the writers, and count what happened.

    python benchmarks/hardening.py --inputs 20000 --kills 100 -o hardening.json

Every reader gets valid files with random damage: changed bytes and values, other types, deep and huge content. Each
input must be accepted or give an `InputError`, within ten seconds of a core and 2 GB. Then commands that write are
killed at random moments, run at the same time, and run into limits of the system. The exit code is 1 if anything was
found.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.checkpoints import open_checkpoint, read_description, write_safetensors, write_sharded
from simomerge.checkpoints.lora import open_lora
from simomerge.core.errors import InputError
from simomerge.merging.disk.compress import compress, restore

SECONDS, GIGABYTES = 10, 2.0
VALUES: list[Any] = [
    *(None, True, 0, -1, 10**6, 10**18, 2**64, 1e308, float("nan"), float("inf"), "", "x", "../../x", "/", ".", "\x00"),
    *("\x1b[31m", "\ud800", "<script>", "ü" * 300, [], [[]], {}, [None], [1, 2], {"a": 1}, "os:system", "(.*.*)*x"),
]
YAML = [
    *("!!python/object/apply:os.system [x]", "&a [*a]", "1" + "0" * 5000, "0x" + "f" * 5000, ".nan", "2001-02-31"),
    *("<<: [1]", "!!binary aGVsbG8=", "!!set {a, b}", "? [a]\n: b", '"\\ud800"', "[" * 1000 + "]" * 1000, "*nope"),
    *("{lr: .nan}", "{steps: -1}"),
]


class Hang(BaseException):
    """A reader needed more than `SECONDS` of a core, or waited twenty times as long."""


class Tally:
    """What became of the inputs of one reader."""

    def __init__(self, name: str) -> None:
        self.name, self.counts, self.examples = name, collections.Counter[str](), dict[str, str]()

    def run(self, read: Callable[[], Any], label: str = "") -> None:
        """Read one input."""
        before = _peak()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS)
        try:
            read()
            found = "accepted"
        except InputError as error:
            found = "InputError"
            if len(str(error)) > 5000 or "\x1b" in str(error):
                found = "unprintable message"
        except Hang:
            found = "hang"
        except Exception as error:
            place = [frame for frame in traceback.extract_tb(error.__traceback__) if "simomerge" in frame.filename][-1:]
            found = f"escape: {type(error).__name__} at {place[0].name if place else '?'}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.counts["tried"] += 1
        self.counts[found] += 1
        if _peak() > max(GIGABYTES, before + 0.5):
            found = "memory"
            self.counts[found] += 1
        if found not in ("accepted", "InputError"):
            self.examples.setdefault(found, label[:200])

    def bad(self) -> int:
        """How many inputs were neither accepted nor refused cleanly."""
        return sum(count for what, count in self.counts.items() if what not in ("tried", "accepted", "InputError"))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# Damage -------------------------------------------------------------------------------------------------


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """A file with a few bytes changed, cut, doubled or replaced."""
    kind, changed = draw.choice(["flip", "flip", "cut", "insert", "double", "empty"]), bytearray(content)
    if kind == "flip":
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(min(len(changed), 400))] = draw.randrange(256)
    elif kind == "cut":
        del changed[draw.randrange(len(changed)) :]
    elif kind == "insert":
        place = draw.randrange(min(len(changed), 400))
        changed[place:place] = draw.choice([b"\x00", b"\xff", b'"', b"{", b"[" * 5000, b"9" * 5000, b"\xef\xbb\xbf"])
    elif kind == "double":
        changed = changed + changed
    else:
        changed.clear()
    return bytes(changed)


def damaged_json(content: Any, draw: random.Random) -> bytes:
    """JSON in which a value is another one, or is missing, or whose text is damaged."""
    if draw.random() < 0.3:
        return damaged_bytes(json.dumps(content).encode(), draw)
    changed = copy.deepcopy(content)
    path = draw.choice([path for path in _paths(changed) if path])
    place = changed
    for step in path[:-1]:
        place = place[step]
    if draw.random() < 0.2:
        del place[path[-1]]
    else:
        place[path[-1]] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))


def damaged_yaml(text: str, draw: random.Random) -> bytes:
    """YAML with a value that is another one, or whose text is damaged."""
    if draw.random() < 0.4:
        return damaged_bytes(text.encode(), draw)
    lines = text.split("\n")
    place = draw.randrange(len(lines))
    lines[place] = f"{lines[place].partition(':')[0]}: {draw.choice([*YAML, laughs(draw.choice((3, 9)))])}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def laughs(depth: int) -> str:
    """A few hundred bytes of YAML that stand for 9 ** depth values."""
    text = "&a0 [lol]"
    for level in range(1, depth):
        text = f"&a{level} [{text}" + f", *a{level - 1}" * 8 + "]"
    return text


# Readers ------------------------------------------------------------------------------------------------


def models(folder: Path) -> None:
    """Small files of every kind, as this version writes them."""
    draw = np.random.default_rng(0)
    base = {f"encoder.layer.{i}.weight": draw.normal(size=(16, 16)).astype("f4") for i in range(4)}
    write_safetensors(folder / "base.safetensors", base)
    write_safetensors(folder / "a.safetensors", {name: value + 0.1 for name, value in base.items()})
    write_sharded(folder / "shards", base, max_shard_size=1100)
    compress(folder / "base.safetensors", {"a": folder / "a.safetensors"}, folder / "compressed")
    name = "base_model.model.encoder.layer.0"
    factors = {f"{name}.lora_A.weight": np.ones((2, 16), "f4"), f"{name}.lora_B.weight": np.ones((16, 2), "f4")}
    write_safetensors(folder / "lora/adapter_model.safetensors", factors)


SIMO = {
    "format": 1,
    "tasks": {"depth": {"name": "depth", "kind": "depth", "classes": [], "colours": []}},
    "heads": {"depth": {"kind": "linear", "settings": {"cls": True}}},
    "encoder": {"taps": [1, 2], "mean": [0.5] * 3, "std": [0.5] * 3, "apply_layernorm": True},
    "adapters": None,
    "provenance": {"base": {"source": "base", "fingerprint": "0" * 64}, "experts": {}, "merge": {"method": "ties"}},
}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"layer.0": 2}, "alpha_pattern": {"layer.1.*": 3}}
RECIPE = (
    "title: x\nbase: rooms-base\ntasks: [depth, normals]\nseeds: [0]\ntune: {steps: 3}\nmerges: [ties]\ndata: rooms\n"
)
MANIFEST = "tasks:\n  depth: {scale: 1.0}\nimages:\n- {image: i.png, split: test, depth: d.npy}\nsize: [8, 8]\n"
TABLE = "image,split,depth\ni.png,test,d.npy\ni.png,val,d.npy\n"

Reader = tuple[str, Callable[[random.Random], bytes], Callable[[Path], Any]]


def readers(folder: Path) -> dict[str, Reader]:
    """By name: the file to damage, the damage, and what reads it."""
    from PIL import Image

    from simomerge.core.images import read_image
    from simomerge.datasets.manifest import read_manifest
    from simomerge.datasets.stored import Stored, may_be_truncated, read_array
    from simomerge.datasets.tasks import Task
    from simomerge.models.encoders.preprocessing import read_normalisation
    from simomerge.recipes.file import read_recipe

    def both(file: Path) -> None:
        may_be_truncated(file)
        Stored(Task("depth")).read(file, (8, 8))

    models(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    for name in ("i.png", "i.jpg", "i.tif", "i.gif"):
        Image.fromarray(pixels).save(folder / name)
    np.save(folder / "d.npy", np.ones((8, 8), "f4"))
    index = folder / "shards/model.safetensors.index.json"
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True, "image_processor_type": "X"}
    paths = (folder / "compressed/compressed.json", index)
    parsed = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in paths}
    parsed |= {"scene/simo.json": SIMO, "lora/adapter_config.json": LORA, "preprocessor_config.json": processor}
    reads: dict[str, Callable[[Path], Any]] = {
        "scene/simo.json": lambda file: read_description(file.parent),
        "shards/model.safetensors.index.json": lambda file: open_checkpoint(file.parent),
        "compressed/compressed.json": lambda file: restore(file.parent, "a", folder / "out", overwrite=True),
        "lora/adapter_config.json": lambda file: open_lora(file.parent, open_checkpoint(folder / "base.safetensors")),
        "preprocessor_config.json": lambda file: read_normalisation(file.parent),
    }
    found: dict[str, Reader] = {
        name: (name, lambda draw, name=name: damaged_json(parsed[name], draw), read) for name, read in reads.items()
    }
    for name, text, read in (
        ("recipe.yaml", RECIPE, read_recipe),
        ("manifest.yaml", MANIFEST, read_manifest),
    ):
        found[name] = (name, lambda draw, text=text: damaged_yaml(text, draw), read)
    found["manifest.csv"] = ("manifest.csv", lambda draw: damaged_bytes(TABLE.encode(), draw), read_manifest)
    for name, read in (
        ("a.safetensors", lambda file: [value.sum() for value in open_checkpoint(file).values()]),
        ("i.png", read_image),
        ("i.jpg", read_image),
        ("i.tif", read_array),
        ("i.gif", read_array),
        ("d.npy", both),
    ):
        content = (folder / name).read_bytes()
        found[name] = (name, lambda draw, content=content: damaged_bytes(content, draw), read)
    return found


def fuzz(count: int, seed: int = 0) -> Iterator[Tally]:
    """Give every reader ``count`` damaged files."""
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    with tempfile.TemporaryDirectory() as given, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (place, damage, read) in readers(Path(given)).items():
            tally, draw, file = Tally(name), random.Random(seed), Path(given) / place
            file.parent.mkdir(exist_ok=True)
            good = file.read_bytes() if file.is_file() else None
            for _ in range(count):
                content = damage(draw)
                file.write_bytes(content)
                tally.run(lambda read=read, file=file: read(file), repr(content))  # type: ignore[misc]
            file.unlink() if good is None else file.write_bytes(good)
            yield tally


def _hang(number: int, frame: Any) -> None:
    raise Hang


# Writers ------------------------------------------------------------------------------------------------

WRITERS = {
    "merge": "merge_on_disk('base.safetensors', {'a': 'a.safetensors'}, Output(Path('out'), overwrite=True))",
    "sharded merge": "merge_on_disk('base.safetensors', {'a': 'a.safetensors'},"
    " Output(Path('out'), max_shard_size=3000000, overwrite=True))",
    "compress": "compress('base.safetensors', {'a': 'a.safetensors'}, 'out', overwrite=True)",
}
SETUP = """
from pathlib import Path
from simomerge.merging.disk.compress import compress
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.merging.disk.output import Output
"""


def kills(count: int, folder: Path, seed: int = 0) -> Tally:
    """Kill writers at random moments. The old or the new output must be there, and the next run leaves nothing else."""
    tally, draw = Tally("SIGKILL"), random.Random(seed)
    tensors = {f"w{i}": np.random.default_rng(i).normal(size=(1000, 500)).astype("f4") for i in range(6)}
    write_safetensors(folder / "base.safetensors", tensors)
    write_safetensors(folder / "a.safetensors", {name: value + 0.01 for name, value in tensors.items()})
    inputs = {path.name for path in folder.iterdir()}
    for number in range(count):
        name = list(WRITERS)[number % len(WRITERS)]
        code = f"{SETUP}\nprint('go', flush=True)\n{WRITERS[name]}"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.random() * 0.3)
        process.kill()
        process.wait()
        process.stdout.close()
        tally.counts["tried"] += 1
        if number and not _complete(folder / "out"):
            tally.counts["output lost"] += 1
        subprocess.run([sys.executable, "-c", f"{SETUP}\n{WRITERS[name]}"], cwd=folder, check=True)
        if left := {path.name for path in folder.iterdir()} - inputs - {"out"}:
            tally.counts["leftovers after the next run"] += len(left)
    return tally


def _complete(folder: Path) -> bool:
    try:
        if (folder / "compressed.json").is_file():
            restore(folder, "a", folder.parent / "restored.safetensors")
            (folder.parent / "restored.safetensors").unlink()
        else:
            sum(float(value.sum()) for value in open_checkpoint(folder).values())
    except InputError:
        return False
    return True


def limits(folder: Path) -> Tally:
    """Eight writers at once, files that may not grow, few descriptors: done or one clear error, and no leftovers."""
    tally = Tally("limits")
    write_sharded(folder / "many", {f"w{i}": np.ones((50, 50), "f4") for i in range(200)}, max_shard_size=10001)
    shutil.copytree(folder / "many", folder / "same")
    inputs = {path.name for path in folder.iterdir()} | {"out"}
    merge = [sys.executable, "-m", "simomerge", "merge", "many", "a=same", "-o", "out", "--overwrite"]
    runs = [subprocess.Popen(merge, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(8)]
    ends = [(process.communicate()[1], process.returncode) for process in runs]
    for limit in ("ulimit -n 64", *(f"ulimit -f {blocks}" for blocks in (0, 1, 8, 16))):
        command = f"{limit}; exec {' '.join(map(str, merge))}"
        done = subprocess.run(["bash", "-c", command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        ends.append((done.stderr, done.returncode))
    for said, code in ends:
        tally.counts["tried"] += 1
        if code not in (0, 2) or b"Traceback" in said:
            tally.counts["escape"] += 1
            tally.examples.setdefault("escape", said.decode(errors="replace")[-200:])
    if left := {path.name for path in folder.iterdir()} - inputs:
        tally.counts["leftovers after the next run"] += len(left)
    return tally


def _all(inputs: int, killed: int, seed: int) -> Iterator[Tally]:
    yield from fuzz(inputs, seed)
    for measure in (lambda folder: kills(killed, folder, seed), limits):
        with tempfile.TemporaryDirectory() as folder:
            yield measure(Path(folder))


def main() -> int:
    """Run it, print a line for each reader and writer, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="damaged files for every reader")
    parser.add_argument("--kills", type=int, default=12, help="writers that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    tallies = []
    for tally in _all(given.inputs, given.kills, given.seed):
        tallies.append(tally)
        print(
            f"{tally.name:36}", ", ".join(f"{what} {count}" for what, count in tally.counts.most_common()), flush=True
        )
        for what, example in tally.examples.items():
            print(f"    {what}: {example}")
    bad = sum(tally.bad() for tally in tallies)
    print(f"{sum(tally.counts['tried'] for tally in tallies)} tried, {bad} found; peak {_peak():.2f} GB")
    if given.output:
        given.output.write_text(json.dumps({tally.name: dict(tally.counts) for tally in tallies}, indent=2) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
