"""torch -> ONNX: the exporter of torch, then the graph optimiser of onnxruntime, and the description in the file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simomerge.core.errors import InputError
from simomerge.exporting.attention import without_masks

_MAX_BYTES = 2_000_000_000
"""A protobuf file cannot be larger."""
UNSEALED = "0" * 64
"""What stands in the place of a file's checksum until `sealed` writes it."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the messages that the exporters print about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def traced(graph: nn.Module, example: Any, shapes: Any) -> torch.export.ExportedProgram:
    """The program of a graph, by torch.export. Raises whatever torch raises for a module it cannot trace."""
    with quiet(), torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=(shapes,), strict=False)


def write_onnx(
    program: torch.export.ExportedProgram, file: Path, inputs: Sequence[str], outputs: Sequence[str], opset: int
) -> None:
    """Write a program as ONNX, simplified.

    onnxruntime computes everything that depends on constants alone, such as position embeddings in another size, and
    removes what has no effect. Attention loses masks that hide nothing. Equal matrices are kept once. Only operators of
    the ONNX standard remain.

    Raises:
        InputError: The file would be too large for its format.
    """
    import onnx
    import onnxruntime as ort

    with quiet():
        made = torch.onnx.export(
            program,
            (),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamo=True,
            verbose=False,
            optimize=True,
        )
        assert made is not None
        model = made.model_proto
    if (size := model.ByteSize()) > _MAX_BYTES:
        raise InputError(f"{file}: {size:,} bytes; an ONNX file may have {_MAX_BYTES:,}. Write a .pt2 file.")
    content = model.SerializeToString()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(file)
    options.log_severity_level = 3
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    simple = onnx.load(file)
    without_masks(simple.graph)
    share_matrices(simple.graph)
    used = {node.domain for node in simple.graph.node}
    for entry in [each for each in simple.opset_import if each.domain not in used]:
        simple.opset_import.remove(entry)
    for entry in [*simple.graph.value_info]:
        simple.graph.value_info.remove(entry)
    simple.graph.name, simple.producer_name = "simomerge", "simomerge"
    for node in simple.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    onnx.save(simple, file)


def share_matrices(graph: Any) -> None:
    """Keep one of equal matrices, in place: onnxruntime copies the weights that branches of low rank share.

    Vectors stay, because 8 bits need a scale for each bias.
    """
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for place, each in enumerate(list(graph.initializer)):
        if len(each.dims) > 1 and each.raw_data:
            key = (each.data_type, *each.dims, hashlib.sha256(each.raw_data).digest())
            if (same := first.setdefault(key, each.name)) != each.name:
                names[each.name] = same
                del graph.initializer[place - len(names) + 1]
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)


def describe_onnx(file: Path, description: dict[str, Any]) -> None:
    """Store the description in an ONNX file, and the file's own checksum; see `simomerge.runtime.checksum`."""
    import onnx

    model = onnx.load(file)
    del model.metadata_props[:]
    for key, value in (("simomerge", json.dumps(description)), ("simomerge_sha256", UNSEALED)):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    file.write_bytes(sealed(model.SerializeToString()))


def sealed(content: bytes) -> bytes:
    """The content of a file with its checksum in the place of the zeros after the last ``simomerge_sha256`` in it."""
    place = content.rindex(b"simomerge_sha256")
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[:place] + content[place:].replace(UNSEALED.encode(), digest, 1)
