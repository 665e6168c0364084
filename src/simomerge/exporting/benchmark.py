"""Speed, memory and agreement of models and exported files on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.classes import allowed
from simomerge.core.errors import InputError
from simomerge.core.hub import local_source
from simomerge.core.progress import progress
from simomerge.exporting.verification import real_frames
from simomerge.runtime import Maps, Scene, difference


def benchmark(
    targets: Sequence[str],
    size: tuple[int, int],
    images: Any = None,
    batches: Sequence[int] = (1,),
    runs: int = 20,
    threads: int = 1,
    provider: str | None = None,
) -> list[dict[str, Any]]:
    """Time models and exported files, each in a process of its own.

    Args:
        targets: Model folders and exported files. Several models joined by "+" run one after the other, such as the
            experts that one model replaces.
        size: (height, width) of the frames in pixels.
        images: A folder or list of images to predict; rendered rooms by default.
        batches: Frames per run.
        runs: Runs of each batch size that are timed.
        threads: Threads of each process.
        provider: Execution provider of onnxruntime.

    Returns:
        One row per target: ``target``, ``milliseconds`` per run of the first batch size (median, 5 and 95 % on the
        clock, and the median of the processor's time, which other programs on the machine change little),
        ``per_second`` by batch size, ``memory`` (peak of the process) and ``disk`` in bytes, and ``difference`` from
        the first target by task, in the units of `simomerge.runtime.MEASURES`.

    Raises:
        InputError: A target cannot be opened.
    """
    frames = real_frames(images, size, 1)[1]
    rows: list[dict[str, Any]] = []
    reference: Maps = {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "frames.npy", np.stack(frames))
        for number, target in enumerate(targets):
            given = {"target": target, "batches": list(batches), "runs": runs, "threads": threads}
            given |= {
                "frames": f"{folder}/frames.npy",
                "out": f"{folder}/maps.npz",
                "provider": provider,
                "allowed": allowed(),
            }
            measured = _measure(given)
            with np.load(f"{folder}/maps.npz") as stored:
                maps = dict(stored)
            reference = reference or maps
            row = {"target": target, **_speed(measured["seconds"]), "memory": measured["memory"]}
            row["disk"] = sum(map(_bytes, target.split("+")))
            rows.append({**row, "difference": _differences(maps, reference, measured["measures"])})
            progress("benchmark", number + 1, len(targets), target)
    return rows


def _measure(given: dict[str, Any]) -> dict[str, Any]:
    """What `simomerge.exporting.timing` measures, in a process with as many threads as asked for."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(given["threads"]))
    # Python would look for modules in the current folder first, where files may be anyone's.
    code = "import sys; sys.path[:] = filter(None, sys.path); from simomerge.exporting.timing import run; run()"
    command = [sys.executable, "-c", code, json.dumps(given)]
    # Modules of one's own are found where this process finds them.
    environment = {**os.environ, **limits, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"{given['target']}: cannot be timed ({last[:200]}).")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in measured:
        raise InputError(measured["error"])
    return measured


def _speed(seconds: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    first = next(iter(seconds.values()))
    low, median, high = np.percentile(np.array(first["wall"]) * 1000, [5, 50, 95]).tolist()
    per_second = {size: int(size) / float(np.median(values["wall"])) for size, values in seconds.items()}
    milliseconds = {"median": median, "low": low, "high": high, "cpu": float(np.median(first["cpu"]) * 1000)}
    return {"milliseconds": milliseconds, "per_second": per_second}


def _bytes(target: str) -> int:
    """Bytes on the disk: a folder, or a file with its weights and the heads of a split export."""
    path = Path(local_source(target, bare=False))
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    files = [path] if path.is_file() else []
    if path.suffix == ".xml":
        files.append(path.with_suffix(".bin"))
    elif path.name.endswith(".encoder.onnx"):
        start = path.name.removesuffix("encoder.onnx")
        files = [each for each in path.parent.iterdir() if each.name.startswith(start) and each.suffix == ".onnx"]
    return sum(file.stat().st_size for file in files)


def _differences(maps: Maps, reference: Maps, measures: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The difference of each output that both have."""
    return {
        name: {"value": difference(measures[name], values, reference[name]), "measure": measures[name]}
        for name, values in maps.items()
        if name in reference and values.shape == reference[name].shape
    }


def scored_tasks(scene: Scene, labelled: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks that an exported file predicts and a dataset has labels of, by name.

    Raises:
        InputError: There is none, a task differs in kind, channels or classes, or the file gives only its logits.
    """
    from simomerge.datasets.tasks import Task
    from simomerge.training.evaluate import shared_tasks

    known = {name: {k: v for k, v in about.items() if k != "colours"} for name, about in scene.info["tasks"].items()}
    tasks = {name: Task.from_dict(about) for name, about in known.items()}
    try:
        shared = shared_tasks(tasks, labelled)
    except InputError as error:
        raise InputError(f"{scene.file}: {error}") from error
    if missing := [name for name in shared if name not in scene.outputs]:
        raise InputError(
            f"{scene.file}: gives no predictions of {', '.join(missing)}, only logits, which have no metric; export it"
            " without --raw."
        )
    return {name: tasks[name] for name in shared}


def evaluate_file(file: str | Path, dataset: Any, threads: int | None = None, provider: str | None = None) -> Any:
    """Metrics of every task of an exported file on a dataset, as `simomerge.evaluate` has them for models.

    Args:
        file: An .onnx or .xml file.
        dataset: Samples with ``image`` and targets.
        threads, provider: As in `simomerge.runtime.Scene`.

    Raises:
        InputError: The file cannot be opened, or as in `scored_tasks`.
    """
    from simomerge.training.metrics import TaskMetrics, batched

    scene = Scene(file, provider, threads)
    tasks = scored_tasks(scene, dataset.tasks)
    metrics = {name: TaskMetrics(task) for name, task in tasks.items()}
    for index in range(len(dataset)):
        sample = dataset[index]
        frame = (sample["image"].permute(1, 2, 0) * 255).round().byte().numpy()
        for name, values in scene.predict(frame, list(tasks)).items():
            if name not in metrics:  # probabilities have no metric
                continue
            metrics[name].update(batched(tasks[name], values), sample[name][None])
        progress("evaluate", index + 1, len(dataset), str(file))
    return {name: metric.compute() for name, metric in metrics.items()}
