"""Try to break the readers of files, and count what happened.

    python benchmarks/hardening.py --inputs 20000 -o hardening.json

Every reader gets valid files with random damage: changed bytes and values, other types, deep and huge content. Each
input must be accepted or give an `InputError`, within ten seconds of a core and 2 GB. What is accepted must be what
another library reads in the file, where there is one (`hardening_independent.py`); all else is a wrong accept. Kinds of
files that have several readers share the number of inputs, and slow readers get a part of it. The exit code is 1 if
anything was found. `hardening_writers.py` does the same for the commands that write.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hardening_independent import PAIRS, WrongAccept, compared
from simomerge.checkpoints import open_checkpoint, read_description, write_safetensors, write_sharded
from simomerge.checkpoints.lora import open_lora
from simomerge.core.errors import InputError
from simomerge.merging.disk.compress import compress, restore

SECONDS, GIGABYTES = 10, 2.0
GOOD = ("accepted", "InputError", "result", "clear error")
"""How a reader, and a command that writes, may end."""
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
        except WrongAccept as error:
            found, label = "wrong accept", f"{error}: {label}"
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
        if found not in GOOD:
            self.examples.setdefault(found, label[:200])

    def note(self, what: str, example: str) -> None:
        """Count something that must not happen."""
        self.counts[what] += 1
        self.examples.setdefault(what, example[-200:])

    def bad(self) -> int:
        """How many inputs or runs did not end as they should."""
        return sum(count for what, count in self.counts.items() if what not in ("tried", *GOOD))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# Damage -------------------------------------------------------------------------------------------------


def damaged_bytes(content: bytes, draw: random.Random, within: int = 400) -> bytes:
    """A file with a few bytes changed (among the first ``within``), cut, doubled or replaced."""
    kind, changed = draw.choice(["flip", "flip", "cut", "insert", "double", "empty"]), bytearray(content)
    if kind == "flip":
        for _ in range(draw.randrange(1, 6)):
            changed[draw.randrange(min(len(changed), within))] = draw.randrange(256)
    elif kind == "cut":
        del changed[draw.randrange(len(changed)) :]
    elif kind == "insert":
        place = draw.randrange(min(len(changed), within))
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
        ("a.safetensors", open_checkpoint),
        ("i.png", read_image),
        ("i.jpg", read_image),
        ("i.tif", read_array),
        ("i.gif", read_array),
        ("d.npy", both),
    ):
        content = (folder / name).read_bytes()
        found[name] = (name, lambda draw, content=content: damaged_bytes(content, draw), read)
    for name, pair in PAIRS.items():
        place, damage, read = found[name]
        found[name] = (place, damage, compared(read, *pair))
    return found | matlab_readers(folder) | import_readers(folder)


def matlab_readers(folder: Path) -> dict[str, Reader]:
    """The labelled file of NYUv2 (HDF5) and the older MATLAB format of its splits, as far as their libraries exist."""
    try:
        import h5py
        from scipy.io import savemat
    except ImportError:
        return {}
    from simomerge.datasets.published import hdf5
    from simomerge.datasets.published.nyuv2 import nyuv2

    draw = np.random.default_rng(0)
    (folder / "nyu").mkdir()
    with h5py.File(folder / "nyu/nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = draw.integers(0, 255, (3, 3, 8, 6), dtype=np.uint8)
        file["depths"] = draw.random((3, 8, 6), dtype=np.float32) + 1
        file["labels"] = draw.integers(0, 3, (3, 8, 6), dtype=np.uint16)
    savemat(folder / "nyu/splits.mat", {"trainNdxs": [[1], [2]], "testNdxs": [[3]]})
    savemat(folder / "nyu/classMapping40.mat", {"mapClass": [[1, 2, 3]]})

    def read(file: Path) -> None:
        hdf5._opened.cache_clear()  # HDF5 would go on with a file that is open
        for rows in nyuv2(file.parent, (8, 6)).rows.values():
            for frame in (frame for row in rows for frame in (row.image, *row.targets.values())):
                frame.read()

    found: dict[str, Reader] = {}
    for name in ("nyu/nyu_depth_v2_labeled.mat", "nyu/splits.mat"):
        content = (folder / name).read_bytes()
        found[name] = (name, lambda draw, content=content: damaged_bytes(content, draw, len(content)), read)
    return found


def import_readers(folder: Path) -> dict[str, Reader]:
    """The configuration of a model of transformers that is imported, and a weight file that torch wrote."""
    import torch
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    from simomerge.models.importing import import_expert

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    backbone = Dinov2Config(**sizes, patch_size=14, mlp_ratio=1, out_indices=[1, 2], reshape_hidden_states=False)
    neck = {"neck_hidden_sizes": [4, 4], "fusion_hidden_size": 4, "head_hidden_size": 4, "reassemble_factors": [2, 1]}
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16, **neck)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder / "import")
    parsed = json.loads((folder / "import/config.json").read_text())
    torch.save({"decode_head.conv_seg.weight": torch.ones(3, 16, 1, 1)}, folder / "head.pth")
    content = (folder / "head.pth").read_bytes()

    def expert(file: Path) -> Any:
        return import_expert(file.parent, "depth")

    def weights(file: Path) -> Any:
        return [value.sum() for value in open_checkpoint(file).values()]

    return {
        "import/config.json": ("import/config.json", lambda draw: damaged_json(parsed, draw), expert),
        "head.pth": ("head.pth", lambda draw: damaged_bytes(content, draw, len(content)), weights),
    }


SHARES = {
    **dict.fromkeys(("scene/simo.json", "shards/model.safetensors.index.json"), 1 / 4),
    **dict.fromkeys(("compressed/compressed.json", "preprocessor_config.json"), 1 / 4),
    **dict.fromkeys(("i.png", "i.jpg", "i.tif", "i.gif"), 1 / 4),
    **dict.fromkeys(("manifest.yaml", "manifest.csv"), 1 / 8),
    **dict.fromkeys(("nyu/nyu_depth_v2_labeled.mat", "nyu/splits.mat", "import/config.json", "head.pth"), 1 / 8),
    "lora/adapter_config.json": 1 / 4,
}
"""The share of the inputs that a reader gets: readers of one kind of files share them, and slow ones get a quarter."""


def fuzz(count: int, seed: int = 0, only: Sequence[str] = (), share: bool = True) -> Iterator[Tally]:
    """Give every reader, or those named, ``count`` damaged files, or its share of them."""
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    with tempfile.TemporaryDirectory() as given, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (place, damage, read) in readers(Path(given)).items():
            if only and name not in only:
                continue
            tally, draw, file = Tally(name), random.Random(seed), Path(given) / place
            file.parent.mkdir(exist_ok=True)
            good = file.read_bytes() if file.is_file() else None
            for _ in range(round(count * SHARES.get(name, 1)) if share else count):
                content = damage(draw)
                file.write_bytes(content)
                tally.run(lambda read=read, file=file: read(file), repr(content))  # type: ignore[misc]
            file.unlink() if good is None else file.write_bytes(good)
            yield tally


def _hang(number: int, frame: Any) -> None:
    raise Hang


def main() -> int:
    """Run it, print a line for each reader, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="damaged files of every kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="READER", help="some of the readers")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    return summarise(fuzz(given.inputs, given.seed, given.only), given.output)


def summarise(found: Iterable[Tally], output: Path | None) -> int:
    """Print and save what was counted; 1 if anything was found."""
    tallies = []
    for tally in found:
        tallies.append(tally)
        print(
            f"{tally.name:36}", ", ".join(f"{what} {count}" for what, count in tally.counts.most_common()), flush=True
        )
        for what, example in tally.examples.items():
            print(f"    {what}: {example}")
        if output:
            output.write_text(json.dumps({one.name: dict(one.counts) for one in tallies}, indent=2) + "\n")
    bad = sum(tally.bad() for tally in tallies)
    print(f"{sum(tally.counts['tried'] for tally in tallies)} tried, {bad} found; peak {_peak():.2f} GB")
    return int(bad > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
