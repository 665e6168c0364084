"""Writes the files of an export into a folder, in any format and precision."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simomerge.core.errors import InputError
from simomerge.exporting.graph import Outputs
from simomerge.exporting.onnx_file import UNSEALED, describe_onnx, sealed, write_onnx
from simomerge.exporting.options import Options
from simomerge.exporting.parts import Part, parts_of
from simomerge.exporting.precision import to_half, to_int8
from simomerge.exporting.torch_file import describe_program
from simomerge.models.model import SimoModel


@dataclass
class Job:
    """One export.

    Attributes:
        model: The model, on the CPU in float32, with the tasks to export.
        name: The name of the file to write.
        form: "onnx", "openvino" or "torch".
        size: (height, width).
        options: How.
        outputs: Which outputs.
    """

    model: SimoModel
    name: str
    form: str
    size: tuple[int, int]
    options: Options
    outputs: Outputs

    def file_of(self, part: str) -> str:
        """The name of the file of a part."""
        return self.name if part == "model" else f"{Path(self.name).stem}.{part}.onnx"


def write(job: Job, folder: Path, calibration: Sequence[np.ndarray]) -> dict[str, Path]:
    """Write the files into a folder, without their description. Returns them by part: "model", or "encoder" and tasks.

    Args:
        job: The export.
        folder: An empty folder.
        calibration: Frames to calibrate int8 on.

    Raises:
        InputError: A module cannot be exported.
    """
    files = {}
    for part in parts_of(job.model, job.outputs, job.options, job.size):
        files[part.name] = file = folder / job.file_of(part.name)
        try:
            _write_part(job, part, file)
        except InputError:
            raise
        except Exception as error:  # torch raises errors of many kinds for what it cannot export
            raise _cannot(job, part, folder, error) from error
    if job.form != "torch":
        _lower(job, {name: file.with_suffix(".onnx") for name, file in files.items()}, calibration)
    if job.form == "openvino":
        for file in files.values():
            _to_openvino(file, job.options.precision)
    return files


def _write_part(job: Job, part: Part, file: Path) -> None:
    program = part.program()
    if job.form == "torch":
        torch.export.save(program, file)
    else:
        write_onnx(program, file.with_suffix(".onnx"), part.inputs, part.outputs, job.options.opset)


def _cannot(job: Job, part: Part, folder: Path, error: Exception) -> InputError:
    """The message about a part that cannot be exported. For a whole model it finds the part by trying each."""
    if part.name == "model":
        for each in parts_of(job.model, job.outputs, replace(job.options, split=True), job.size):
            try:
                _write_part(job, each, folder / f"try.{each.name}{Path(job.name).suffix}")
            except Exception as found:
                part, error = each, found
                break
    what, remedy = "the encoder", "leave out --dynamic" if job.options.dynamic else "change it"
    module: Any = job.model.encoder.backbone
    if part.name in job.outputs.tasks:
        others = [task for task in job.outputs.tasks if task != part.name]
        what, module = f"the head of {part.name!r}", job.model.heads[part.name]
        remedy += f", or export the others with --tasks {','.join(others)}" if others else ""
        if others and job.form == "onnx" and not job.options.split:
            remedy += ", and with --split if this head is to run in torch on what the exported encoder gives"
    return InputError(
        f"{what} ({type(module).__module__}:{type(module).__name__}) cannot be exported: {_reason(error)}; {remedy}."
    )


def _reason(error: BaseException | None) -> str:
    """The operation that an exporter's error is about, and the first line of its cause."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    text = "\n".join(str(each) for each in chain)
    if "data-dependent" in text:
        return "what it does depends on the values of the images, which a graph cannot express"
    operation = re.search(r"\b(?:aten|prims|torchvision)[.:]+\w+", text)
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()] or [type(chain[-1]).__name__]
    first = lines[0].partition(" For more information")[0][:160].rstrip(".! ")
    return (f"operation {operation[0]}: " if operation else "") + first


# Precision and formats ----------------------------------------------------------------------------------


def _lower(job: Job, files: dict[str, Path], calibration: Sequence[np.ndarray]) -> None:
    """Lower the precision of ONNX files, in place. OpenVINO stores half precision itself."""
    if job.options.precision == "fp16" and job.form == "onnx":
        for file in files.values():
            to_half(file)
    if job.options.precision != "int8":
        return
    given = [{"image": as_input(frame, job.options.layout)} for frame in calibration]
    first = next(iter(files))
    features = _run_all(files[first], given) if first == "encoder" else []
    for name, file in files.items():
        to_int8(file, given if name == first else features)


def _run_all(file: Path, inputs: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The outputs of an ONNX file by name, for each of the inputs."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return [dict(zip(names, session.run(None, each), strict=True)) for each in inputs]


def _to_openvino(file: Path, precision: str) -> None:
    """Write the OpenVINO file of an ONNX file, which lies next to it."""
    import openvino

    source = file.with_suffix(".onnx")
    openvino.save_model(openvino.convert_model(str(source)), str(file), compress_to_fp16=precision == "fp16")
    source.unlink()


def as_input(frame: np.ndarray, layout: str) -> np.ndarray:
    """A frame as a batch for a graph: uint8 (1, H, W, 3), or float32 (1, 3, H, W) for the layout "floats"."""
    if layout == "bytes":
        return frame[None]
    return np.ascontiguousarray(frame[None].transpose(0, 3, 1, 2), np.float32) / np.float32(255)


# The description ----------------------------------------------------------------------------------------


def identity_of(files: dict[str, Path]) -> str:
    """A short name of what was exported, by which a golden file knows its model."""
    digest = hashlib.sha256()
    for file in files.values():
        for each in (file, file.with_suffix(".bin")) if file.suffix == ".xml" else (file,):
            digest.update(each.read_bytes())
    return digest.hexdigest()[:16]


def describe(file: Path, description: dict[str, Any]) -> Path:
    """Store a description in an exported file, as `simomerge.runtime` reads it."""
    if file.suffix == ".onnx":
        describe_onnx(file, description)
    elif file.suffix == ".xml":
        import openvino

        checksum = hashlib.sha256(file.with_suffix(".bin").read_bytes()).hexdigest()
        model = openvino.Core().read_model(str(file))
        model.set_rt_info(json.dumps({**description, "sha256": checksum}), ["simomerge"])
        model.set_rt_info(UNSEALED, ["simomerge_sha256"])
        again = file.with_name("described.xml")
        openvino.save_model(model, str(again), compress_to_fp16=False)
        file.write_bytes(sealed(again.read_bytes()))
        again.unlink()
        again.with_suffix(".bin").replace(file.with_suffix(".bin"))
    else:
        describe_program(file, description)
    return file
