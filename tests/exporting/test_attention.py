"""Masks that hide nothing leave an ONNX graph; masks that hide something stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.exporting.attention import without_masks
from simomerge.exporting.onnx_file import traced, write_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

QUERIES = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Attention of some values with themselves, under a mask."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, values: Tensor) -> Tensor:
        mask = self.mask if self.mask is None else self.mask.expand(values.shape[0], 1, 5, 5)
        return F.scaled_dot_product_attention(values, values, values, attn_mask=mask)


def written(graph: nn.Module, file: Path) -> tuple[set[str], np.ndarray]:
    """(kinds of operators, prediction) of the ONNX file of a graph, whose batch is free."""
    import onnxruntime as ort

    write_onnx(traced(graph, QUERIES, {0: torch.export.Dim("batch")}), file, ["values"], ["found"], 18)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(file).graph.node}, session.run(None, {"values": QUERIES.numpy()})[0]


EVERYTHING = torch.ones(1, 1, 5, 5, dtype=torch.bool)


@pytest.mark.parametrize("mask", [None, EVERYTHING], ids=["none", "everything"])
def test_attention_to_everything_has_neither_mask_nor_guard(mask: Tensor | None, tmp_path: Path) -> None:
    kinds, found = written(Attention(mask), tmp_path / "graph.onnx")
    assert not kinds & {"IsNaN", "Where", "Add"} and {"MatMul", "Softmax"} <= kinds
    np.testing.assert_allclose(found, Attention(None)(QUERIES).numpy(), rtol=1e-5, atol=1e-6)


def test_a_mask_that_hides_something_stays(tmp_path: Path) -> None:
    causal = Attention(EVERYTHING.tril())
    kinds, found = written(causal, tmp_path / "graph.onnx")
    assert {"Where", "Add"} <= kinds
    np.testing.assert_allclose(found, causal(QUERIES).numpy(), rtol=1e-5, atol=1e-6)


def graph_of(*nodes: object, **constants: np.ndarray) -> object:
    """A graph x (2, 2) -> y (2, 2)."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (2, 2)) for name in "xy"]
    kept = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    return onnx.helper.make_graph(list(nodes), "g", values[:1], values[1:], kept)


def test_an_addition_of_zero_elsewhere_stays() -> None:
    node = onnx.helper.make_node
    graph = graph_of(
        node("MatMul", ["x", "x"], ["product"]),
        node("Add", ["product", "zero"], ["sum"]),
        node("Relu", ["sum"], ["y"]),
        zero=np.zeros((2, 2), np.float32),
    )
    assert without_masks(graph) == 0 and [each.op_type for each in graph.node] == ["MatMul", "Add", "Relu"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_bias_of_scores_stays_unless_it_is_zero(value: float) -> None:
    node = onnx.helper.make_node
    graph = graph_of(
        node("MatMul", ["x", "x"], ["product"]),
        node("Add", ["bias", "product"], ["sum"]),
        node("Softmax", ["sum"], ["y"]),
        bias=np.full((2, 2), value, np.float32),
    )
    assert without_masks(graph) == (value == 0)
    assert [each.op_type for each in graph.node] == ["MatMul", *["Add"] * (value != 0), "Softmax"]
    assert len(graph.initializer) == (value != 0)
