"""Memory of long runs: many predictions, many merges, many photographs.

    python benchmarks/long_runs.py --predictions 10000 --merges 200 --photographs 1000

Prints the resident memory (RSS) along each run. `flat` is the growth in its second half. The model is the embedded base
with untrained heads for three tasks. The photographs are links to one JPEG file of 12 megapixels, which the command
`simomerge predict` reads in one process; its predictions are deleted while it runs, so that the disk does not fill up.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

LOOKS = 10
"""How often memory is read in one run."""


def rss(process: int | str = "self") -> float:
    """Resident memory of a process in MB, without mapped pages of files."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssShmem"))) / 1024


def repeat(label: str, count: int, work: Callable[[int], object]) -> float:
    """Do the work many times in this process; returns the growth in MB of its second half."""
    seen, began = [], time.monotonic()
    for done in range(1, count + 1):
        work(done)
        if done % max(count // LOOKS, 1) == 0:
            gc.collect()
            seen.append(rss())
    return show(label, count, seen, time.monotonic() - began)


def show(label: str, count: int, seen: list[float], seconds: float) -> float:
    growth = seen[-1] - seen[len(seen) // 2 - 1]
    along = " ".join(f"{megabytes:.0f}" for megabytes in seen)
    print(f"{count} {label} in {seconds:.0f} s: {along} MB; second half {growth:+.1f} MB", flush=True)
    return growth


def make_model(folder: Path) -> None:
    """The embedded base with untrained heads for three tasks."""
    from simomerge.datasets.tasks import Task
    from simomerge.models.encoders import load_encoder
    from simomerge.models.heads import build_head
    from simomerge.models.model import SimoModel

    tasks = [Task("depth"), Task("normals"), Task("parts", "segmentation", classes=tuple(map(str, range(13))))]
    encoder = load_encoder("rooms-base")
    heads = {task.name: build_head("linear", encoder.channels, task.channels) for task in tasks}
    SimoModel(encoder, {task.name: task for task in tasks}, heads).eval().save_pretrained(folder)


def predictions(count: int, folder: Path) -> float:
    """Predict the same model for other images and two sizes."""
    from simomerge.models.model import load

    model, draw = load(str(folder / "model")), np.random.default_rng(0)
    sizes = [(64, 80), (48, 64)]
    return repeat(
        "predictions", count, lambda n: model.predict(draw.integers(0, 255, (*sizes[n % 2], 3), dtype=np.uint8))
    )


def merges(count: int, folder: Path) -> float:
    """Merge files of 16 MB on disk, by methods in turn, and one state dict in memory."""
    from simomerge.checkpoints import open_checkpoint, write_safetensors
    from simomerge.merging import merge_state_dicts
    from simomerge.merging.disk.merge import merge_on_disk
    from simomerge.merging.disk.output import Output

    draw = np.random.default_rng(0)
    base = {f"encoder.layer.{i}.weight": draw.standard_normal((512, 1024), dtype="f4") for i in range(8)}
    paths = {name: folder / f"{name}.safetensors" for name in ("base", "a", "b")}
    for path in paths.values():
        added = {n: v + draw.standard_normal(v.shape, dtype="f4") * np.float32(0.1) for n, v in base.items()}
        write_safetensors(path, base if path == paths["base"] else added)
    methods, experts = ("ties", "task-arithmetic", "breadcrumbs"), {name: paths[name] for name in "ab"}

    def one(number: int) -> None:
        method = methods[number % len(methods)]
        merge_on_disk(paths["base"], experts, Output(folder / "out.safetensors", overwrite=True), method)
        if number % 10 == 0:
            opened = {name: open_checkpoint(path) for name, path in paths.items()}
            merge_state_dicts(opened.pop("base"), opened, method)

    return repeat("merges", count, one)


def photographs(count: int, folder: Path, kinds: str) -> float:
    """Run `simomerge predict` on links to one photograph; returns its largest memory in MB."""
    from PIL import Image

    rows, columns = np.mgrid[:3000, :4000]
    noise = np.random.default_rng(0).integers(0, 30, (3000, 4000, 3))
    pixels = np.stack([rows // 16, columns // 16, (rows + columns) // 32], 2) % 226 + noise
    given, out = folder / "photographs", folder / "predictions"
    given.mkdir()
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "photograph.jpg", quality=90)
    for number in range(count):
        (given / f"{number:05}.jpg").hardlink_to(folder / "photograph.jpg")
    command = [sys.executable, "-m", "simomerge", "predict", folder / "model", given, "-o", out, "--as", kinds]
    began, seen, done = time.monotonic(), list[float](), set[str]()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        most = 0.0
        while process.poll() is None:
            try:
                most = max(most, rss(process.pid))
            except OSError:
                break
            for file in sorted(out.glob("[0-9]*"))[:-20]:  # complete files only appear under their names
                done.add(file.name.partition("-")[0])
                file.unlink()
            if len(done) >= (len(seen) + 1) * count // LOOKS:
                seen.append(most)
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"predict ended with {process.returncode}")
    show(f"photographs of 12 megapixels ({kinds}), largest so far,", count, [*seen, most], time.monotonic() - began)
    return most


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=0)
    parser.add_argument("--merges", type=int, default=0)
    parser.add_argument("--photographs", type=int, default=0)
    parser.add_argument("--as", dest="kinds", default="colours,npy", help="what predict writes for a photograph")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.merges:
            merges(given.merges, folder)
        if given.predictions or given.photographs:
            make_model(folder / "model")
        if given.predictions:
            predictions(given.predictions, folder)
        if given.photographs:
            photographs(given.photographs, folder, given.kinds)


if __name__ == "__main__":
    main()
