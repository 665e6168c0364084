"""Times one target in a process of its own, so that its memory is its own. Files need no torch, and import none.

`simomerge.exporting.benchmark` calls `run` with one argument, a JSON object.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.classes import allow
from simomerge.core.errors import InputError
from simomerge.runtime import Scene

Predict = Callable[[np.ndarray], list[dict[str, np.ndarray]]]
"""Frames uint8 (B, H, W, 3) -> the maps of each."""


def opened(target: str, threads: int, provider: str | None) -> tuple[Predict, dict[str, str]]:
    """The prediction function of an exported file or a model, and the measure of each output. Raises InputError."""
    if Path(target).suffix in (".onnx", ".xml"):
        scene = Scene(target, provider, threads)
        return scene.predict, _measures(scene.outputs)
    import torch

    torch.set_num_threads(threads)
    return _of_torch_file(target) if Path(target).suffix == ".pt2" else _of_model(target)


def _measures(outputs: dict[str, Any]) -> dict[str, str]:
    return {name: about["measure"] for name, about in outputs.items()}


def _of_torch_file(target: str) -> tuple[Predict, dict[str, str]]:
    import torch

    from simomerge.exporting.torch_file import open_program

    module, info = open_program(Path(target))

    def predict(frames: np.ndarray) -> list[dict[str, np.ndarray]]:
        images = torch.from_numpy(frames)
        if info["input"]["layout"] == "floats":
            images = images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            found = [value.numpy() for value in module(images)]
        return [dict(zip(info["outputs"], values, strict=True)) for values in zip(*found, strict=True)]

    return predict, _measures(info["outputs"])


def _of_model(target: str) -> tuple[Predict, dict[str, str]]:
    import torch

    from simomerge.exporting.graph import Outputs
    from simomerge.models.model import load

    model = load(target)

    def predict(frames: np.ndarray) -> list[dict[str, np.ndarray]]:
        images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        found = {name: value.numpy() for name, value in model.predict_batch(images, max_patches=sys.maxsize).items()}
        return [{name: value[index] for name, value in found.items()} for index in range(len(frames))]

    return predict, _measures(Outputs(model.tasks).described())


def timed(predict: Predict, frames: np.ndarray, runs: int) -> dict[str, list[float]]:
    """Seconds on the clock ("wall") and of the processor ("cpu") of each of some runs, after two that do not count."""
    seconds: dict[str, list[float]] = {"wall": [], "cpu": []}
    for run in range(runs + 2):
        start = time.perf_counter(), time.process_time()
        predict(frames)
        if run >= 2:
            seconds["wall"].append(time.perf_counter() - start[0])
            seconds["cpu"].append(time.process_time() - start[1])
    return seconds


def peak_memory() -> int:
    """The peak of this process in bytes. Linux counts that of the parent into ru_maxrss, so its own record is read."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Time the parts of a target, such as several experts, one after the other.

    Args:
        given: ``target`` (paths joined by "+"), ``frames`` (an NPY file), ``out`` (an NPZ file for the predictions),
            ``batches``, ``runs``, ``threads``, ``provider``, ``allowed`` (the code of models that may run).

    Returns:
        ``seconds`` by batch size, ``memory``, the peak of the process in bytes, and ``measures`` by output.
    """
    allow(*given["allowed"])
    parts = [opened(part, given["threads"], given["provider"]) for part in given["target"].split("+")]
    frames = np.load(given["frames"])

    def predict(batch: np.ndarray) -> list[dict[str, np.ndarray]]:
        found = [part(batch) for part, _ in parts]
        return [{name: value for maps in each for name, value in maps.items()} for each in zip(*found, strict=True)]

    maps = [predict(frames[index : index + 1])[0] for index in range(len(frames))]
    np.savez(given["out"], allow_pickle=False, **{n: np.stack([each[n] for each in maps]) for n in maps[0]})
    batches = {size: np.resize(frames, (size, *frames.shape[1:])) for size in given["batches"]}
    seconds = {str(size): timed(predict, batch, given["runs"]) for size, batch in batches.items()}
    measures = {name: measure for _, of_part in parts for name, measure in of_part.items()}
    return {"seconds": seconds, "memory": peak_memory(), "measures": measures}


def run() -> None:
    """Print as JSON what `main` returns for the first argument, or the entry ``error`` with a message."""
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except InputError as error:
        print(json.dumps({"error": str(error)}))
