"""`simomerge.export`: one file per scene model, verified before it is written."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simomerge.core.errors import InputError
from simomerge.core.files import check_absent, temporary_folder
from simomerge.core.pixels import height_width
from simomerge.core.registry import check_known
from simomerge.core.version import __version__
from simomerge.datasets.colours import class_colours
from simomerge.datasets.tasks import Task
from simomerge.exporting import verification
from simomerge.exporting.graph import Outputs, WholeGraph
from simomerge.exporting.options import Options, check_packages
from simomerge.exporting.parts import LEAST_PATCHES
from simomerge.exporting.writing import Job, as_input, describe, identity_of, write
from simomerge.models.model import SimoModel, as_model
from simomerge.runtime import FORMAT, Maps, Scene, golden_file


def export(
    model: Any,
    output: str | Path,
    size: tuple[int, int] | str,
    tasks: str | Iterable[str] = "all",
    images: Any = None,
    limits: Mapping[str, float] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export a model to one file for other runtimes, after a comparison with torch.

    Next to the file lies ``OUTPUT.golden.npz``: one frame and what torch predicts for it.

    Args:
        model: A model, or its folder or hub id.
        output: The file to write: ``.onnx``, ``.xml`` (OpenVINO) or ``.pt2`` (torch.export).
        size: (height, width) or "HEIGHTxWIDTH" of the images in pixels. The batch size is free.
        tasks: The tasks to export; all by default.
        images: A folder or list of images without labels, for the comparison and to calibrate int8. Without it the
            comparison uses rendered rooms.
        limits: Task -> the largest difference from torch, in the unit of the table; see `verification.LIMITS`.
        overwrite: Replace files that exist.
        options: The attributes of `simomerge.exporting.options.Options`: precision, dynamic, split, raw, probabilities,
            layout, opset, count.

    Returns:
        ``files`` (paths, the model first), ``bytes``, ``seconds``, and ``verification``: rows with the differences.

    Raises:
        InputError: A wrong argument, a module that cannot be exported, or a difference beyond its limit. Nothing is
            written.

    Example:
        >>> export("runs/scene", "scene.onnx", (480, 640))["files"]                            # doctest: +SKIP
        ['scene.onnx', 'scene.onnx.golden.npz']
    """
    start, target = time.perf_counter(), Path(output)
    job = _job(model, target, height_width(size), tasks, images, options)
    parts = ("encoder", *job.model.tasks) if job.options.split else ("model",)
    files = [target.with_name(job.file_of(part)) for part in parts]
    beside = [golden_file(files[0]), *([target.with_suffix(".bin")] if job.form == "openvino" else [])]
    for file in [*files, *beside]:
        check_absent(file, overwrite)
    described = job.outputs.described()
    for name, limit in verification.limits_of(described, job.options.precision, limits or {}).items():
        described[name]["limit"] = limit
    calibration, frames = _frames(images, job.size, job.options)
    with temporary_folder(_existing(target.parent) / target.name) as folder:
        names, rows = _write_verified(job, folder, described, calibration, frames)
        moved = _move(folder, target.parent, names)
    size_on_disk = sum(file.stat().st_size for file in moved if file.suffix != ".npz")
    found = {"files": [str(file) for file in moved], "bytes": size_on_disk}
    return {**found, "seconds": time.perf_counter() - start, "verification": rows}


def _write_verified(
    job: Job, folder: Path, described: dict[str, Any], calibration: verification.Frames, frames: dict[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Write all files into a folder and compare them with torch. Returns their names and the rows of the comparison."""
    wanted = _wanted(job, list(described), frames)
    files = write(job, folder, calibration)
    description = _description(job, described, files)
    _describe(files, description, described)
    rows = verification.verify(_predictor(job, files), frames, wanted, described)
    verification.check_rows(rows, job.name)
    _describe(files, {**description, "verification": rows}, described)
    real = next(reversed(frames))
    golden = golden_file(next(iter(files.values())))
    pair = {"image": frames[real][0], **wanted[real][0]}
    np.savez_compressed(golden, allow_pickle=False, export=description["export"], **pair)
    return [*(file.name for file in files.values()), golden.name], rows


def _job(model: Any, target: Path, size: tuple[int, int], tasks: Any, images: Any, given: dict[str, Any]) -> Job:
    """What is to be done, with all that can be checked before any work."""
    options = _options(given)
    form = options.format_of(target, images)
    check_packages(form)
    prepared = _prepared(model, tasks)
    return Job(prepared, target.name, form, size, options, Outputs(prepared.tasks, options.raw, options.probabilities))


def _options(given: dict[str, Any]) -> Options:
    check_known("export", given, [each.name for each in fields(Options)], "option")
    return Options(**given)


def _prepared(model: Any, tasks: str | Iterable[str]) -> SimoModel:
    """A copy of the model with the chosen tasks, on the CPU, in float32 and evaluation mode."""
    given = as_model(model)
    if not given.tasks:
        raise InputError(f"{given.place}: an encoder without heads predicts nothing; give an expert or a merged model.")
    return copy.deepcopy(given.select(tasks if isinstance(tasks, str) else list(tasks))).cpu().float().eval()


def _frames(images: Any, size: tuple[int, int], options: Options) -> tuple[verification.Frames, dict[str, Any]]:
    """Frames to calibrate on, and frames to verify on by their source; the last source has real images."""
    calibration, real = verification.real_frames(images, size, options.count)
    frames = {}
    if options.precision != "int8":  # its scales fit images, not noise
        frames["random"] = verification.random_frames(size)
        if options.dynamic:
            frames[verification.OTHER_SIZE] = verification.random_frames((size[0] * 2 // 3 + 1, size[1] * 3 // 4 + 1))
    frames["rooms" if images is None else "given"] = real
    return calibration, frames


@torch.no_grad()
def _wanted(job: Job, names: list[str], frames: dict[str, verification.Frames]) -> dict[str, list[Maps]]:
    """What torch predicts, by source of frames."""
    graph = WholeGraph(job.model, job.outputs)
    wanted = {}
    for source, given in frames.items():
        inputs = [torch.from_numpy(as_input(frame, job.options.layout)) for frame in given]
        wanted[source] = [
            {name: value[0].numpy() for name, value in zip(names, graph(each), strict=True)} for each in inputs
        ]
    return wanted


def _predictor(job: Job, files: dict[str, Path]) -> Callable[[verification.Frames], list[Maps]]:
    """The written file as a function of frames."""
    first = next(iter(files.values()))
    if job.form != "torch":
        return Scene(first, threads=torch.get_num_threads()).predict
    module, names = torch.export.load(first).module(), list(job.outputs.described())

    def predict(frames: verification.Frames) -> list[Maps]:
        batch = torch.from_numpy(np.concatenate([as_input(frame, job.options.layout) for frame in frames]))
        with torch.no_grad():
            found = module(batch)
        return [{n: v[index].numpy() for n, v in zip(names, found, strict=True)} for index in range(len(frames))]

    return predict


def _description(job: Job, outputs: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """What all files of an export say about the model; the runtime reads it."""
    encoder, options = job.model.encoder, job.options
    least = encoder.padded(*[encoder.multiple * LEAST_PATCHES if options.dynamic else 1] * 2)
    return {
        "format": FORMAT,
        "simomerge": __version__,
        "export": identity_of(files),
        "part": "model",
        "heads": {},
        "input": {
            "layout": options.layout,
            "size": None if options.dynamic else list(job.size),
            "multiple": encoder.multiple,
            "smallest": list(least),
        },
        "outputs": outputs,
        "tasks": {name: _task(task) for name, task in job.model.tasks.items()},
        "mean": encoder.preprocessing["mean"],
        "std": encoder.preprocessing["std"],
        "precision": options.precision,
        "opset": options.opset,
        "provenance": job.model.provenance,
    }


def _task(task: Task) -> dict[str, Any]:
    """A task with all its colours."""
    colours = [list(map(int, colour)) for colour in (task.colours or class_colours(len(task.classes)))]
    return {**task.to_dict(), **({"colours": colours} if task.classes else {})}


def _describe(files: dict[str, Path], description: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Store the description in every file. Those of a split export say which part they are."""
    heads = {name: file.name for name, file in files.items() if name not in ("model", "encoder")}
    for name, file in files.items():
        own: dict[str, Any] = {}
        if name == "encoder":
            own = {"part": "encoder", "heads": heads, "outputs": {}}
        elif name != "model":
            mine = {output: about for output, about in outputs.items() if about["task"] == name}
            own = {"part": "head", "encoder": files["encoder"].name, "outputs": mine}
        describe(file, {**description, **own})


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return folder if folder.is_dir() else _existing(folder.parent)


def _move(source: Path, target: Path, names: list[str]) -> list[Path]:
    """Move files into the target folder, the first one last: with it the export is complete."""
    names += [Path(name).with_suffix(".bin").name for name in names if name.endswith(".xml")]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in reversed(names):
            (source / name).replace(target / name)
    except OSError as error:
        raise InputError(f"Cannot write {target / names[0]}: {error.strerror or error}.") from error
    return [target / name for name in names]
