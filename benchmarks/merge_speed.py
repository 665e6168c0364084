"""Time and memory of merging from disk to disk: simomerge, a lower bound, and other libraries if they are installed.

    python benchmarks/merge_speed.py --work /tmp/merge_speed [--sections vitb svd growth vitg] [--mergekit PATH]
        [--fusion-bench PYTHON]

Creates the checkpoints (random weights, and task vectors a tenth of their size). Then it runs every command in a
process of its own; the commands take turns, `--repeats` times. Prints medians with ranges: seconds of wall time, and
the peak of anonymous memory (pages of mapped files do not count), read from /proc every few milliseconds. Linux only.

- The lower bound ("floor") reads the four files and writes one with the safetensors library, without arithmetic.
- mergekit runs through its command `mergekit-yaml`, given by --mergekit, on folders with the same files and a config
  of the architecture that it expects.
- fusion_bench has no command that reads such files. A script of ours loads them, calls its functions and saves the
  result, with the Python given by --fusion-bench. The seconds after its imports are printed too. Its
  task_arithmetic_merge fails on parameters in 0.2.33, so the script calls the functions that it is made of.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from simomerge.checkpoints import TensorInfo, write_safetensors
from simomerge.merging import available
from simomerge.recipes.results import machine

SIZES = {"S": (384, 12, 1536), "B": (768, 12, 3072), "L": (1024, 24, 4096), "g": (1536, 40, 4096)}
"""Hidden width, blocks and width of the MLP of DINOv2's encoders (g has a gated MLP: two tensors of twice that)."""

SVD = ("iso-c", "iso-cts", "tsv-m")
SKIPPED = {"slerp": "two experts", "regmean": "needs images", "fisher": "needs labels"}

FLOOR = """
import sys
from safetensors import safe_open
from safetensors.numpy import save_file
kept = {}
for number, path in enumerate(sys.argv[2:]):
    with safe_open(path, "numpy") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if number == 0:
                kept[name] = tensor
save_file(kept, sys.argv[1])
"""
SVDS = """
import sys, numpy as np
from threadpoolctl import threadpool_limits
from safetensors import safe_open
mode, base, *experts = sys.argv[1:]
with threadpool_limits(1, "blas"):
    files = [safe_open(path, "numpy").__enter__() for path in (base, *experts)]
    for name in files[0].keys():
        tensors = [file.get_tensor(name) for file in files]
        if tensors[0].ndim == 2:
            taus = [tensor - tensors[0] for tensor in tensors[1:]]
            for matrix in [sum(taus)] if mode == "sum" else taus:
                np.linalg.svd(matrix, full_matrices=False)
"""

FUSION = """
import sys, time
import torch
from safetensors.torch import load_file, save_file
from fusion_bench.method.ties_merging.ties_merging_utils import state_dict_to_vector, ties_merging, vector_to_state_dict
from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_mul, state_dict_sub
began = time.perf_counter()
method, output, base, *experts = sys.argv[1:]
if method == "ties":
    base = load_file(base)
    vector = state_dict_to_vector(base)
    taus = torch.vstack([state_dict_to_vector(load_file(path)) - vector for path in experts])
    merged = vector_to_state_dict(vector + ties_merging(taus, reset_thresh=20, merge_func="mean"), base)
else:
    base, taus = load_file(base), []
    for path in experts:
        taus.append(state_dict_sub(load_file(path), base))
    total = taus[0]
    for tau in taus[1:]:
        total = state_dict_add(total, tau)
    merged = state_dict_add(base, state_dict_mul(total, 0.4))
save_file({name: value.contiguous() for name, value in merged.items()}, output)
print(f"after imports: {time.perf_counter() - began:.2f} s", file=sys.stderr)
"""


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a DINOv2 encoder."""
    width, blocks, inner = SIZES[size]
    found: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 1370, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    mlp = {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    if size == "g":
        mlp = {"mlp.weights_in": (2 * inner, width), "mlp.weights_out": (width, inner)}
    for block in range(blocks):
        layer = f"encoder.layer.{block}."
        for norm in ("norm1", "norm2"):
            found |= {f"{layer}{norm}.weight": (width,), f"{layer}{norm}.bias": (width,)}
        for number in (1, 2):
            found[f"{layer}layer_scale{number}.lambda1"] = (width,)
        attention = dict.fromkeys(
            ("attention.query", "attention.key", "attention.value", "output.dense"), (width, width)
        )
        for name, shape in {**{f"attention.{key}": value for key, value in attention.items()}, **mlp}.items():
            found |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    return found


def make(folder: Path, size: str, experts: int, dtype: str = "F32") -> list[Path]:
    """Write base.safetensors and the experts' files if they do not exist, with one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: TensorInfo(shape, "F32") for name, shape in shapes(size).items()}
    paths = [folder / f"{name}.safetensors" for name in ("base", *(f"expert{i}" for i in range(experts)))]
    for number, path in enumerate(paths):
        if not path.exists():
            write_safetensors(path, _tensors(layout, number), dtype, layout=layout)
    return paths


def _tensors(layout: Mapping[str, TensorInfo], number: int) -> Iterable[tuple[str, np.ndarray]]:
    for place, (name, info) in enumerate(layout.items()):
        values = np.random.default_rng([0, place]).standard_normal(info.shape, dtype=np.float32) * 0.02
        if number:
            values += np.random.default_rng([number, place]).standard_normal(info.shape, dtype=np.float32) * 0.002
        yield name, values


def measure(command: Sequence[str], output: Path | None = None) -> tuple[float, float]:
    """Wall seconds and peak anonymous memory in GB of one process with its threads."""
    if output is not None and output.exists():
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    began, peak = time.perf_counter(), 0
    with (
        tempfile.TemporaryFile() as printed,  # a pipe that nobody reads would block a command with long output
        subprocess.Popen(list(command), stdout=printed, stderr=printed) as process,
    ):
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = status.read_text().splitlines()
            except OSError:
                break
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.003)
        process.wait()
        seconds = time.perf_counter() - began
        printed.seek(0)
        if (text := printed.read()) and b"after imports" in text:
            print(text.decode().strip().splitlines()[-1])
        printed.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{printed.read().decode()[-3000:]}")
    return seconds, peak * 1024 / 1e9


def ours(paths: Sequence[Path], output: Path, method: str, *more: str) -> list[str]:
    """The command of simomerge that merges these files."""
    experts = [f"{path.stem}={path}" for path in paths[1:]]
    command = [sys.executable, "-m", "simomerge", "merge", str(paths[0]), *experts, "--method", method]
    return [*command, "-o", str(output), *more]


def in_turn(commands: Mapping[str, Sequence[str]], repeats: int, output: Path) -> dict[str, list[tuple[float, float]]]:
    """Run the commands in turn, `repeats` times, so that a drift of the machine's speed affects all of them equally."""
    for command in commands.values():  # once unmeasured: the files are in the page cache then
        measure(command, output)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            found[name].append(measure(command, output))
    return found


def show(title: str, found: Mapping[str, list[tuple[float, float]]], reference: str | None) -> None:
    print(f"\n### {title}\n")
    print("| command | seconds, median (range) | times the floor | anonymous memory, GB |")
    print("| --- | --: | --: | --: |")
    floor = statistics.median(seconds for seconds, _ in found[reference]) if reference else float("nan")
    for name, runs in found.items():
        seconds, memory = [run[0] for run in runs], max(run[1] for run in runs)
        median = statistics.median(seconds)
        ratio = f"{median / floor:.2f}" if reference else ""
        print(f"| {name} | {median:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {ratio} | {memory:.2f} |")
    sys.stdout.flush()


def vit_b(work: Path, repeats: int, mergekit: str | None, fusion: str | None) -> None:
    paths, output = make(work / "B", "B", 3), work / "out.safetensors"
    floor = [sys.executable, "-c", FLOOR, str(output), *map(str, paths)]
    commands: dict[str, Sequence[str]] = {
        "floor: read four, write one": floor,
        "task-arithmetic": ours(paths, output, "task-arithmetic"),
        "ties, trim global": ours(paths, output, "ties"),
        "ties, trim tensor": ours(paths, output, "ties", "-p", "trim=tensor"),
    }
    show("ViT-B, base and 3 experts, float32", in_turn(commands, repeats, output), "floor: read four, write one")
    if mergekit:
        peers = {
            f"mergekit {m}": mergekit_command(mergekit, paths, work / "mergekit", m)
            for m in ("task_arithmetic", "ties")
        }
        commands = {"floor: read four, write one": floor, "ties, trim global": commands["ties, trim global"], **peers}
        outputs = {name: work / "mergekit" / "out" if name in peers else output for name in commands}
        found = {name: [measure(command, outputs[name])] for name, command in commands.items()}
        show("The same next to mergekit, one run each", found, "floor: read four, write one")
    if fusion:
        once = {
            f"fusion_bench {m}": measure([fusion, "-c", FUSION, m, str(output), *map(str, paths)], output)
            for m in ("task-arithmetic", "ties")
        }
        show("fusion_bench, one run each", {name: [run] for name, run in once.items()}, None)
    others = [name for name in available() if name not in SVD and name not in SKIPPED]
    commands = {"floor: read four, write one": floor, **{name: ours(paths, output, name) for name in others}}
    found = {name: [measure(command, output)] for name, command in commands.items()}
    show("ViT-B, all methods without images or SVD, one run each", found, "floor: read four, write one")


def mergekit_command(program: str, paths: Sequence[Path], folder: Path, method: str) -> list[str]:
    """Run mergekit-yaml on folders with the same weights; it guesses the ViT architecture from the tensors."""
    config = {"architectures": ["Dinov2Model"], "model_type": "dinov2", "torch_dtype": "float32"}
    for path in paths:
        target = folder / path.stem
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(config))
        link = target / "model.safetensors"
        if not link.exists():
            link.symlink_to(path.resolve())
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / path.stem), "parameters": {"weight": 0.4, "density": 0.2}} for path in paths[1:]
        ],
        "dtype": "float32",
    }
    file = folder / f"{method}.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    return [program, str(file), str(folder / "out"), "--allow-crimes"]


def svd(work: Path, repeats: int) -> None:
    paths, output = make(work / "S", "S", 3), work / "out.safetensors"
    alone = [sys.executable, "-c", SVDS]
    import os

    core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]  # all on one core, so that the ratio is of work
    found = in_turn(
        {
            "the SVDs of the sums alone": [*core, *alone, "sum", *map(str, paths)],
            "iso-c": [*core, *ours(paths, output, "iso-c")],
        },
        repeats,
        output,
    )
    show("iso-c, ViT-S, 3 experts, one core (floor: its SVDs, numpy, float32)", found, "the SVDs of the sums alone")
    found = in_turn(
        {
            "the SVDs of the task vectors alone": [*core, *alone, "each", *map(str, paths)],
            "tsv-m": [*core, *ours(paths, output, "tsv-m")],
            "iso-cts": [*core, *ours(paths, output, "iso-cts")],
        },
        repeats,
        output,
    )
    title = "tsv-m and iso-cts, ViT-S, 3 experts, one core (floor: the SVDs of the task vectors, numpy, float32)"
    show(title, found, "the SVDs of the task vectors alone")


def growth(work: Path, repeats: int, picture: Path) -> None:
    """Print and plot time and memory against parameters, experts and cores."""
    import os

    output, cores = work / "out.safetensors", sorted(os.sched_getaffinity(0))
    series: dict[str, dict[str, list[tuple[float, float]]]] = {"parameters (M)": {}, "experts": {}, "cores": {}}
    for method in ("task-arithmetic", "ties"):
        for size in ("S", "B", "L"):
            millions = sum(TensorInfo(shape, "F32").size for shape in shapes(size).values()) / 1e6
            command = ours(make(work / size, size, 3), output, method)
            series["parameters (M)"][f"{method} {millions:.0f}"] = in_turn({"": command}, repeats, output)[""]
        paths = make(work / "S", "S", 16)
        for experts in (2, 4, 8, 16):
            command = ours(paths[: experts + 1], output, method)
            series["experts"][f"{method} {experts}"] = in_turn({"": command}, repeats, output)[""]
        for count in range(1, len(cores) + 1):
            pinned = ["taskset", "-c", ",".join(map(str, cores[:count]))]
            command = [*pinned, *ours(make(work / "B", "B", 3), output, method)]
            series["cores"][f"{method} {count}"] = in_turn({"": command}, repeats, output)[""]
    for what, found in series.items():
        show(f"Growth with {what}", found, None)
    draw(series, picture)


def draw(series: Mapping[str, Mapping[str, list[tuple[float, float]]]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(series), figsize=(10, 5.4), sharey="row", constrained_layout=True)
    for column, (what, found) in enumerate(series.items()):
        for method in dict.fromkeys(name.rpartition(" ")[0] for name in found):
            chosen = {float(n.rpartition(" ")[2]): runs for n, runs in found.items() if n.rpartition(" ")[0] == method}
            for row, pick in enumerate((0, 1)):
                values = [statistics.median(run[pick] for run in runs) for runs in chosen.values()]
                axes[row, column].plot(list(chosen), values, marker="o", label=method)
        axes[1, column].set_xlabel(what)
        for axis in axes[:, column]:
            axis.xaxis.get_major_locator().set_params(integer=True)
    for row in (0, 1):
        axes[row, 0].set_ylim(bottom=0)  # of the whole row, once everything is drawn
    axes[0, 0].set_ylabel("seconds, whole process")
    axes[1, 0].set_ylabel("peak anonymous memory, GB")
    axes[0, 0].legend(frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(picture, dpi=110)
    print(f"\nPlot: {picture}")


def vit_g(work: Path, methods: Sequence[str] | None) -> None:
    paths, output = make(work / "g", "g", 3, "F16"), work / "out.safetensors"
    others = methods or [name for name in available() if name not in SVD and name not in SKIPPED]
    found = {name: [measure(ours(paths, output, name), output)] for name in others}
    show("ViT-g size (1.1 B parameters), base and 3 experts, float16, one run each", found, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints (13 GB with vitg)")
    sections = ("vitb", "svd", "growth", "vitg")
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", help="for the section vitg; default: all without images and SVD")
    parser.add_argument("--mergekit", help="path of the command mergekit-yaml")
    parser.add_argument("--fusion-bench", help="a Python interpreter with fusion_bench")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/merge_speed.png"))
    args = parser.parse_args()
    print(f"Machine: {machine()}")
    if "vitb" in args.sections:
        vit_b(args.work, args.repeats, args.mergekit, args.fusion_bench)
    if "svd" in args.sections:
        svd(args.work, min(args.repeats, 3))
    if "growth" in args.sections:
        growth(args.work, min(args.repeats, 3), args.picture)
    if "vitg" in args.sections:
        vit_g(args.work, args.methods)


if __name__ == "__main__":
    main()
