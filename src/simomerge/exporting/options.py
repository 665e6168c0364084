"""What an export is asked for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simomerge.core.environment import install_command
from simomerge.core.errors import InputError

FORMATS = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}
"""The suffix of the file to write chooses the format."""

PRECISIONS = ("fp32", "fp16", "int8")

OPSET = 18
"""The version of ONNX's operators. It is the oldest that torch's exporter writes, and the most widely read."""

_OPSETS = range(18, 24)


@dataclass(frozen=True)
class Options:
    """How a model is exported.

    Attributes:
        precision: "fp32"; "fp16", where attention scores, norms and softmax stay in float32; or "int8".
        dynamic: Leave height and width free, in whole patches.
        split: Write the encoder and each head as a file of its own: ``NAME.encoder.onnx``, ``NAME.TASK.onnx``.
        raw: Give logits instead of predictions.
        probabilities: Also give the probability of every class.
        layout: "bytes": images are uint8 (B, H, W, 3); or "floats": float32 (B, 3, H, W) in [0, 1].
        opset: Version of ONNX's operators.
        count: Images to calibrate int8 on, at most.

    Raises:
        InputError: An unknown precision or layout, an opset that is not supported, or options that exclude each other.
    """

    precision: str = "fp32"
    dynamic: bool = False
    split: bool = False
    raw: bool = False
    probabilities: bool = False
    layout: str = "bytes"
    opset: int = OPSET
    count: int = 64

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}; choose one of {', '.join(PRECISIONS)}.")
        if self.layout not in ("bytes", "floats"):
            raise InputError(f"unknown layout {self.layout!r} of the images; choose bytes or floats.")
        if self.opset not in _OPSETS:
            raise InputError(
                f"opset {self.opset}: torch's exporter writes {_OPSETS[0]} to {_OPSETS[-1]}; use {OPSET}, which most"
                " runtimes read."
            )
        if self.count < 1:
            raise InputError(f"{self.count} images to calibrate on; use at least 1.")
        if self.raw and self.probabilities:
            raise InputError("--raw gives logits only; leave out --raw or --probabilities.")

    def format_of(self, output: Path, images: Any) -> str:
        """The format that the suffix of a file names. Raises InputError if it does not have these options."""
        if output.suffix not in FORMATS:
            raise InputError(f"{output}: the suffix chooses the format; use {', '.join(FORMATS)}.")
        form = FORMATS[output.suffix]
        if form == "torch" and self.precision != "fp32":
            raise InputError(f"{output}: {self.precision} needs an .onnx or .xml file; torch files are in fp32.")
        if form != "onnx" and self.split:
            raise InputError(f"{output}: --split writes .onnx files; give such a name.")
        if self.precision == "int8" and images is None:
            raise InputError("int8 is calibrated on images: give a folder with --images.")
        return form


def missing_packages(form: str) -> list[str]:
    """The packages that a format needs and that are not installed."""
    from importlib.util import find_spec

    needed = {
        "torch": (),
        "onnx": ("onnx", "onnxscript", "onnxruntime"),
        "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    }
    return [name for name in needed[form] if find_spec(name) is None]


def check_packages(form: str) -> None:
    """Raise InputError if a format needs packages that are not installed."""
    if missing := missing_packages(form):
        extra = "export,openvino" if form == "openvino" else "export"
        raise InputError(f"the format {form} needs {', '.join(missing)}: {install_command(extra)}.")
