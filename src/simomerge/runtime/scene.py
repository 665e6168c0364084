"""Exported models as Python objects: ``Scene("scene.onnx").predict(frame)``, without torch.

This file needs numpy, and onnxruntime (for .onnx files) or openvino (for .xml files). Nothing else of simomerge is
needed, so it can also be copied alone. `simomerge export` writes the files; docs/export.md describes them.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from simomerge.core.errors import InputError
except ImportError:  # this file was copied alone

    class InputError(ValueError):  # type: ignore[no-redef]
        """A user's input is wrong; the message names the remedy."""


FORMAT = 1
"""Version of the description in an exported file. Files with a higher number are refused."""

VIDEOS = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts")
"""How the names of video files end."""

_CHECKSUM = re.compile(rb'simomerge_sha256(?:[^0-9a-f]{1,8}| value=")([0-9a-f]{64})')

Maps = dict[str, np.ndarray]
"""Output -> array of one frame."""


class Scene:
    """An exported model: frames in, a map per task out.

    Args:
        file: ``scene.onnx``, ``scene.xml`` (OpenVINO), or the ``scene.encoder.onnx`` of a split export, whose heads lie
            next to it.
        providers: Execution providers of onnxruntime in the order of preference, such as ``["tensorrt", "cuda"]``, or
            the device of OpenVINO, such as ``"GPU"``; the CPU by default.
        threads: Threads of one operation; by default as many as the engine chooses.

    Attributes:
        info: The description in the file: tasks with classes, colours and kinds, units, size, provenance, verification.
        size: (height, width) of the images of the graph in pixels; None if it takes any size.

    Raises:
        InputError: The file is missing, damaged, was changed after its export, comes from a newer version or another
            program, or a provider is not available.

    Example:
        >>> scene = Scene("scene.onnx", threads=1)                                            # doctest: +SKIP
        >>> scene.predict(np.zeros((480, 640, 3), np.uint8))["depth"].shape                   # doctest: +SKIP
        (480, 640)
    """

    def __init__(
        self, file: str | Path, providers: str | Sequence[str] | None = None, threads: int | None = None
    ) -> None:
        self.file = Path(file)
        self._engine = open_engine(self.file, providers, threads)
        self.info = self._engine.info
        if self.info["part"] == "head":
            raise InputError(f"{self.file}: one head of a split export; open the file {self.info['encoder']} instead.")
        size = self.info["input"]["size"]
        self.size: tuple[int, int] | None = (size[0], size[1]) if size else None
        self._heads = {
            task: open_engine(self.file.with_name(name), providers, threads)
            for task, name in self.info["heads"].items()
        }
        self.outputs: dict[str, dict[str, Any]] = dict(self.info["outputs"])
        for task, head in self._heads.items():
            if head.info["export"] != self.info["export"]:
                name = self.file.with_name(self.info["heads"][task])
                raise InputError(f"{name}: belongs to another export than {self.file.name}; copy all files again.")
            self.outputs |= head.info["outputs"]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.info["tasks"])

    def predict(self, frames: Any, tasks: Sequence[str] | None = None) -> Any:
        """Predict every task, or some, for one frame or for a list of frames.

        Args:
            frames: An RGB frame as uint8 (H, W, 3), or as floats in [0, 1], a PIL image, or the path of a picture
                (needs Pillow); or a list of them, or an array (B, H, W, 3), which run as one batch.
            tasks: The tasks to return. A split export runs only their heads.

        Returns:
            Output -> array at the frame's size, or a list of such dictionaries for several frames: int64 labels (H, W);
            float32 (H, W) in the task's unit; float32 (3, H, W) for normals, colours, probabilities and logits. Frames
            of another size than that of the graph are resized for it, and each pixel gets the value of the nearest one.
            Flow is then in pixels of the frame, and disparity keeps the values for the resized frame.

        Raises:
            InputError: Not a frame, frames of several sizes, or an unknown task.
        """
        wanted = self._outputs_of(tasks)
        batch, single = as_batch(frames)
        found = self._decode(self._encode(batch), wanted, batch.shape[1:3])
        each = [{name: values[index] for name, values in found.items()} for index in range(len(batch))]
        return each[0] if single else each

    def encode(self, frame: Any) -> list[np.ndarray]:
        """What the encoder of a split export gives for one frame, for `decode`."""
        if not self._heads:
            raise InputError(f"{self.file}: encoder and heads are one graph; export with --split to run them apart.")
        return self._encode(as_batch(frame)[0])

    def decode(self, features: list[np.ndarray], tasks: Sequence[str] | None = None) -> Maps:
        """The maps of some tasks from the features of one frame, at the size of the graph."""
        return {name: values[0] for name, values in self._decode(features, self._outputs_of(tasks), None).items()}

    def warm_up(self, runs: int = 2, batch: int = 1) -> None:
        """Predict zeros, so that the next prediction is not slowed down by what engines do at first."""
        height, width = self.size or [2 * side for side in self.info["input"]["smallest"]]
        for _ in range(runs):
            self.predict(np.zeros((batch, height, width, 3), np.uint8))

    def _outputs_of(self, tasks: Sequence[str] | None) -> list[str]:
        tasks = [tasks] if isinstance(tasks, str) else tasks
        for task in tasks or ():
            if task not in self.tasks:
                raise InputError(f"unknown task {task!r}; {self.file} predicts {', '.join(self.tasks)}.")
        return [name for name, output in self.outputs.items() if tasks is None or output["task"] in tasks]

    def _encode(self, batch: np.ndarray) -> list[np.ndarray]:
        """The graph's own outputs, in their order."""
        about = self.info["input"]
        if self.size is not None:
            batch = resized(batch, self.size)
        else:
            padding = [
                max(-(-side // about["multiple"]) * about["multiple"], least) - side
                for side, least in zip(batch.shape[1:3], about["smallest"], strict=True)
            ]
            batch = np.pad(batch, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0)), mode="edge")
        if about["layout"] == "floats":
            batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
        return self._engine.run([np.ascontiguousarray(batch)])

    def _decode(self, given: list[np.ndarray], wanted: list[str], size: tuple[int, int] | None) -> Maps:
        if self._heads:
            tasks = {self.outputs[name]["task"] for name in wanted}
            found: Maps = {}
            for task in (task for task in self.tasks if task in tasks):
                head = self._heads[task]
                found |= dict(zip(head.info["outputs"], head.run(given), strict=True))
        else:
            found = dict(zip(self.info["outputs"], given, strict=True))
        return {name: self._at_size(name, found[name], size) for name in wanted}

    def _at_size(self, name: str, values: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
        if size is None or values.shape[-2:] == tuple(size):
            return values
        if self.size is None:  # the frame was padded at the bottom and on the right
            return values[..., : size[0], : size[1]]
        rows, columns = (
            ((np.arange(new) + 0.5) * (old / new)).astype(np.int64)
            for old, new in zip(values.shape[-2:], size, strict=True)
        )
        if self.info["tasks"][self.outputs[name]["task"]]["kind"] == "flow":  # in pixels; channels 0 and 1 are x and y
            values = values * np.array([[[size[1] / values.shape[-1]]], [[size[0] / values.shape[-2]]]], np.float32)
        return values[..., rows[:, None], columns]


# Frames -------------------------------------------------------------------------------------------------


def as_batch(frames: Any) -> tuple[np.ndarray, bool]:
    """Frames as uint8 (B, H, W, 3), and whether it was a single one. Raises InputError."""
    single = isinstance(frames, (str, Path)) or hasattr(frames, "convert") or getattr(frames, "ndim", 0) in (2, 3)
    if not single and not len(frames):
        raise InputError("no frames given.")
    batch = [_as_frame(frame) for frame in ([frames] if single else frames)]
    if len({frame.shape for frame in batch}) > 1:
        raise InputError("the frames of a batch differ in size; predict them one at a time.")
    return np.stack(batch), single


def _as_frame(frame: Any) -> np.ndarray:
    if isinstance(frame, (str, Path)):
        frame = read_picture(frame)
    elif hasattr(frame, "convert"):
        frame = _as_rgb(frame, getattr(frame, "filename", "") or "image")
    frame = np.asarray(frame)
    frame = np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame
    if frame.ndim != 3 or frame.shape[2] not in (3, 4) or not frame.size:
        raise InputError(f"frame of shape {frame.shape}; give RGB frames (H, W, 3).")
    frame = frame[..., :3]
    if frame.dtype == np.uint8:
        return frame
    if frame.dtype.kind != "f" or not (frame.min() >= -1e-3 and frame.max() <= 1 + 1e-3):
        raise InputError(f"frame of dtype {frame.dtype}; give uint8 in 0..255 or floats in [0, 1].")
    return np.rint(frame.clip(0, 1) * 255).astype(np.uint8)


def read_picture(path: str | Path) -> np.ndarray:
    """A picture as uint8 RGB (H, W, 3), upright by its EXIF tag, scaled to 8 bits; needs Pillow. Raises InputError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(f"{path}: pictures need Pillow: pip install pillow; or give the frame as an array.") from error
    if Path(path).exists() and not Path(path).is_file():  # opening a named pipe waits for a writer
        raise InputError(f"{path} is no file; give a picture.")
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:  # Pillow turns mapped TIFF files wrongly
            return _as_rgb(image, path)
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        hint = " Give predict the frames of video_frames(file)." if str(path).lower().endswith(VIDEOS) else ""
        raise InputError(f"{path}: cannot be read as an image ({error}).{hint}") from error


def _as_rgb(image: Any, name: str | Path) -> np.ndarray:
    """A PIL image as uint8 RGB, with the values of `simomerge.core.images.to_tensor`. Raises InputError."""
    from PIL import ImageOps

    file_type = getattr(image, "format", None)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and file_type in ("PNG", "PPM"))
    try:
        if file_type != "TIFF":  # Pillow has turned these
            image = ImageOps.exif_transpose(image)
        if not deep and image.mode not in ("I", "F"):
            return np.asarray(image.convert("RGB"))
        return _as_frame(np.asarray(image) / 65535 if deep else np.asarray(image))  # Pillow would clip them at 255
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise InputError(f"{name}: cannot be read as an image ({str(error).rstrip('.')}).") from error


def video_frames(source: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, or of a camera ("camera:0"), as uint8 RGB (H, W, 3); needs PyAV.

    Raises:
        InputError: PyAV is not installed, or the video cannot be read.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(f"{source}: video needs PyAV: pip install av.") from error
    name = str(source)
    options: dict[str, str] = {}
    if name.startswith("camera:"):
        name = name.removeprefix("camera:") if sys.platform == "darwin" else f"/dev/video{name[7:]}"
        options = {"format": "avfoundation"} if sys.platform == "darwin" else {}
    try:
        with av.open(name, **options) as container:
            if not container.streams.video:
                raise InputError(f"{source}: has no video in it.")
            for frame in container.decode(video=0):
                turns = round(getattr(frame, "rotation", 0) / 90)
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{source}: cannot be read as a video ({error}).") from error


def resized(batch: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 frames (B, H, W, 3) resized to (height, width), bilinearly with antialiasing."""
    if batch.shape[1:3] == tuple(size):
        return batch
    rows, columns = (_weights(old, new) for old, new in zip(batch.shape[1:3], size, strict=True))
    wide = np.tensordot(batch.astype(np.float32), columns, (2, 1))  # (B, H, 3, width)
    both = np.tensordot(wide, rows, (1, 1))  # (B, 3, width, height)
    return np.rint(both.transpose(0, 3, 2, 1)).clip(0, 255).astype(np.uint8)


def _weights(old: int, new: int) -> np.ndarray:
    """(new, old): the weight of each old place in each new one. The triangle widens where the size shrinks."""
    centres, reach = (np.arange(new) + 0.5) * (old / new), max(old / new, 1.0)
    weights = np.maximum(1 - np.abs(np.arange(old) + 0.5 - centres[:, None]) / reach, 0)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)


# Engines ------------------------------------------------------------------------------------------------


def open_engine(file: Path, providers: str | Sequence[str] | None = None, threads: int | None = None) -> Any:
    """The engine for a file, with ``info`` and ``run(inputs) -> outputs``. Raises InputError."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; `simomerge export` writes one.")
    names = [providers] if isinstance(providers, str) else list(providers or [])
    if file.suffix == ".onnx":
        return _Onnx(file, names, threads)
    if file.suffix == ".xml":
        return _OpenVino(file, names, threads)
    remedy = "load it with torch.export.load" if file.suffix == ".pt2" else "give an .onnx or .xml file"
    raise InputError(f"{file}: this runtime does not run such files; {remedy}.")


class _Onnx:
    def __init__(self, file: Path, providers: list[str], threads: int | None) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise InputError(f"{file}: needs onnxruntime: pip install onnxruntime.") from error
        available = ort.get_available_providers()
        chosen = [next((p for p in available if p.lower().startswith(n.lower())), n) for n in providers or ["CPU"]]
        if missing := [name for name in chosen if name not in available]:
            raise InputError(
                f"provider {missing[0]!r} is not in this onnxruntime, which has {', '.join(available)}; install a"
                " package of onnxruntime that has it, such as onnxruntime-gpu."
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        content = file.read_bytes()
        try:
            self.session = ort.InferenceSession(str(file), options, providers=chosen)
        except Exception as error:  # onnxruntime has its own classes of errors
            raise InputError(f"{file}: cannot be loaded ({_first_line(error)}).") from error
        if (got := self.session.get_providers()[0]) != chosen[0]:
            raise InputError(f"{file}: {chosen[0]} could not start, onnxruntime would use {got}; check its libraries.")
        self.info = described(file, self.session.get_modelmeta().custom_metadata_map.get("simomerge"))
        _check_unchanged(file, content)
        self.file = file
        self._inputs = [each.name for each in self.session.get_inputs()]

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        try:
            found: list[np.ndarray] = self.session.run(None, dict(zip(self._inputs, inputs, strict=True)))
        except Exception as error:  # onnxruntime has its own classes of errors
            shape = " x ".join(map(str, inputs[0].shape))
            raise InputError(f"{self.file}: cannot run on an input of {shape} ({_first_line(error)}).") from error
        return found


class _OpenVino:
    def __init__(self, file: Path, providers: list[str], threads: int | None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise InputError(f"{file}: needs openvino: pip install openvino.") from error
        core, device = openvino.Core(), (providers or ["CPU"])[0].upper()
        if device not in ("AUTO", *core.available_devices):
            raise InputError(f"device {device!r} is not available to OpenVINO, which has {core.available_devices}.")
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} if device == "CPU" else {}
        settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        try:
            model = core.read_model(str(file))
            text = model.get_rt_info("simomerge").value if model.has_rt_info("simomerge") else None
            self.info = described(file, text)
            _check_unchanged(file, file.read_bytes())
            if self.info["sha256"] != hashlib.sha256(file.with_suffix(".bin").read_bytes()).hexdigest():
                raise InputError(f"{file.with_suffix('.bin')}: was changed after its export; export the model again.")
            self.model = core.compile_model(model, device, settings)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{file}: cannot be loaded ({_first_line(error)}).") from error

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        found = self.model(inputs)
        return [np.asarray(found[index]) for index in range(len(self.model.outputs))]


def described(file: Path, text: str | None) -> dict[str, Any]:
    """The description in an exported file. Raises InputError."""
    if text is None:
        raise InputError(f"{file}: was not written by `simomerge export`; it holds no description of tasks.")
    try:
        info: dict[str, Any] = json.loads(text)
        newer = info["format"] > FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: its description is damaged ({error}); export the model again.") from error
    if newer:
        raise InputError(
            f"{file}: comes from simomerge {info['simomerge']}, whose format {info['format']} is newer than this"
            " runtime reads; upgrade simomerge, or copy the new scene.py."
        )
    return info


def checksum(content: bytes) -> str | None:
    """The sha256 that an ONNX or XML file holds of itself, with zeros in its place; None if it is not right."""
    found = _CHECKSUM.search(content)
    if found is None:
        return None
    start, end = found.span(1)
    digest = hashlib.sha256(content[:start])
    digest.update(b"0" * 64)
    digest.update(content[end:])
    return digest.hexdigest() if digest.hexdigest().encode() == found[1] else None


def _check_unchanged(file: Path, content: bytes) -> None:
    if checksum(content) is None:
        raise InputError(
            f"{file}: was changed after its export, is incomplete, or has no checksum; export the model again."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
