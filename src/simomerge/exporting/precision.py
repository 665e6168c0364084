"""Lower precision of an ONNX file: half precision and 8-bit integers, both by onnxruntime's tools."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_KEPT = ("Softmax", "LayerNormalization", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Erf", "Resize", "ArgMax", "Range")
"""Operators that stay in float32: sums and exponentials overflow or lose digits in half precision."""


def to_half(file: Path) -> None:
    """Convert an ONNX file to float16, in place. Inputs, outputs, attention scores, norms and softmax keep float32."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(file)
    first = [node.name for node in model.graph.node if node.op_type in ("Div", "Sub", "Mul")][:3]
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_KEPT],
        node_block_list=[*score_nodes(model), *first],
    )
    onnx.save(half, file)


def score_nodes(model: Any) -> list[str]:
    """The nodes between the queries and keys and the softmax: the product, its scaling, and masks and biases."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found: list[str] = []
    for softmax in (node for node in model.graph.node if node.op_type == "Softmax"):
        waiting = [softmax.input[0]]
        while waiting:
            node = makers.get(waiting.pop())
            if node is None or node.name in found or node.op_type not in ("MatMul", "Mul", "Div", "Add", "Reshape"):
                continue
            found.append(node.name)
            if node.op_type != "MatMul":
                waiting += node.input
    return found


class _Reader:
    """The calibration frames as onnxruntime wants them."""

    def __init__(self, batches: Sequence[dict[str, np.ndarray]]) -> None:
        self.batches = batches
        self.rewind()

    def rewind(self) -> None:
        self._left: Iterator[dict[str, np.ndarray]] = iter(self.batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def to_int8(file: Path, batches: Sequence[dict[str, np.ndarray]], excluded: Sequence[str] = ()) -> None:
    """Convert the products and convolutions with weights of an ONNX file to 8-bit integers, in place.

    Weights have one scale per channel, activations one scale each, chosen on the calibration batches.

    Args:
        file: The file.
        batches: Inputs of the graph by name, one frame each.
        excluded: Names of nodes that stay in float32.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    root = logging.getLogger()
    level, target = root.level, file.with_suffix(".int8.onnx")
    root.setLevel(logging.ERROR)
    try:
        quantize_static(
            str(file),
            str(target),
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(excluded),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)
    target.replace(file)
