"""Lower precision of an ONNX file: half precision and 8-bit integers, both by onnxruntime's tools."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
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
    _skip_round_trips(half)
    onnx.save(half, file)


def _skip_round_trips(model: Any) -> None:
    """Remove casts to float16 and back, which the converter puts between nodes that stay in float32."""
    import onnx

    graph = model.graph
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}

    def is_to(node: Any, kind: int) -> bool:
        return bool(node.attribute[0].i == kind)

    skipped = {}
    for node in casts.values():
        inner = casts.get(node.input[0])
        if inner is not None and is_to(node, onnx.TensorProto.FLOAT) and is_to(inner, onnx.TensorProto.FLOAT16):
            skipped[inner.output[0]] = inner
            node.input[0] = inner.input[0]
    needed = _read_in(graph) | {each.name for each in graph.output}
    for name, node in skipped.items():
        if name not in needed:
            graph.node.remove(node)


def _read_in(graph: Any) -> set[str]:
    """The values that the nodes of a graph read, also those in branches and loops."""
    names = {name for node in graph.node for name in node.input}
    inner = [each for node in graph.node for each in node.attribute]
    return names.union(*(_read_in(each) for attribute in inner for each in (attribute.g, *attribute.graphs)))


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


_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def outer_layers(model: Any) -> list[str]:
    """The products and convolutions with weights nearest to the inputs and to the outputs of a graph.

    They stay in float32: together they are a small part of the work, and their rounding would reach the outputs most
    directly.
    """
    weights = {each.name for each in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    before = _nearest(
        weights,
        [node for each in model.graph.input for node in users.get(each.name, []) if node.op_type != "Shape"],
        lambda node: [user for name in node.output for user in users.get(name, []) if user.op_type != "Shape"],
    )
    after = _nearest(
        weights,
        [makers[each.name] for each in model.graph.output],
        lambda node: [makers[name] for name in node.input if name in makers],
    )
    return [*before, *after]


def products_of_activations(model: Any) -> list[str]:
    """The matrix products without weights, such as attention: 8 bits lose much there, and their softmax is slower."""
    weights = {each.name for each in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and not weights.intersection(node.input)]


LEAST_DECIBELS = 15.0
"""A layer stays in float32 if the channels of its input have a lower ratio of signal to rounding error at 8 bits.

Values with a normal distribution have nearly 40 dB. Hidden states with a few very large channels, which adapters and
the stitches of trees read, have much less: their largest value decides about the steps of all channels.
"""

_OBSERVED = 8
"""Batches on which the ratio is measured."""


def coarse_layers(file: Path, batches: Sequence[dict[str, np.ndarray]]) -> list[str]:
    """The products and convolutions with weights whose inputs lose too much at 8 bits; see `LEAST_DECIBELS`.

    Rounding to one of 256 steps between the smallest and the largest value has an error of variance step^2 / 12. The
    signal is the variance of the median channel.
    """
    import onnx
    import onnxruntime as ort

    model = onnx.load(file)
    weights = {each.name for each in model.graph.initializer}
    inputs: dict[str, tuple[str, int]] = {}  # layer -> its input, and the axis of the input's channels
    for node in model.graph.node:
        if node.op_type in _WEIGHTED and weights.intersection(node.input):
            name = next(name for name in node.input if name not in weights)
            inputs[node.name] = name, 1 if node.op_type.startswith("Conv") else -1
    axes = dict(inputs.values())
    names = sorted(set(axes) - {each.name for each in model.graph.input})
    if not names:  # such as in a file of its own for a linear head
        return []
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    seen: dict[str, list[np.ndarray]] = {}  # smallest, largest and, by channel, variance of every batch
    for batch in batches[:_OBSERVED]:
        for name, values in zip(names, session.run(names, batch), strict=True):
            rows = np.moveaxis(values, axes[name], 0).reshape(values.shape[axes[name]], -1)
            seen.setdefault(name, []).append(np.concatenate([[values.min(), values.max()], rows.var(1)]))
    decibels = {name: _decibels(np.stack(rows)) for name, rows in seen.items()}
    return [layer for layer, (name, _) in inputs.items() if decibels.get(name, np.inf) < LEAST_DECIBELS]


def _decibels(seen: np.ndarray) -> float:
    """Signal to rounding error, from rows of smallest value (or 0), largest value and variances of the channels."""
    step = (max(seen[:, 1].max(), 0) - min(seen[:, 0].min(), 0)) / 255
    signal = float(np.median(seen[:, 2:].mean(0)))
    return float(10 * np.log10(signal / (step**2 / 12))) if step and signal else np.inf


def _nearest(weights: set[str], start: list[Any], following: Callable[[Any], list[Any]]) -> list[str]:
    """The layers with weights that are reached first from some nodes."""
    found, seen, waiting = [], set(), list(start)
    while waiting:
        node = waiting.pop()
        if node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in _WEIGHTED and any(name in weights for name in node.input):
            found.append(node.name)
        else:
            waiting += following(node)
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


def to_int8(file: Path, batches: Sequence[dict[str, np.ndarray]]) -> None:
    """Convert the products and convolutions with weights of an ONNX file to 8-bit integers, in place.

    Weights have one scale per channel, activations one scale each, chosen on the calibration batches. The layers next
    to the images and to the outputs stay in float32, and so do those whose inputs lose too much.

    Args:
        file: The file.
        batches: Inputs of the graph by name, one frame each.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = onnx.load(file)
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
            nodes_to_exclude=[*outer_layers(model), *products_of_activations(model), *coarse_layers(file, batches)],
            calibrate_method=CalibrationMethod.MinMax,
        )
    finally:
        root.setLevel(level)
    target.replace(file)
