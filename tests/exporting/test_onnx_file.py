"""What is done to an ONNX graph before it is written."""

from __future__ import annotations

import numpy as np
import pytest

from simomerge.exporting.onnx_file import share_matrices

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def test_equal_matrices_are_kept_once() -> None:
    """Two branches with one matrix and a third with another; their biases are equal, and stay."""
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 4, 5)).astype(np.float32)
    weights = {"w0": one, "w1": one.copy(), "w2": other, "w3": one.copy()}
    biases = {f"b{n}": np.ones(5, np.float32) for n in range(4)}
    nodes = [onnx.helper.make_node("Gemm", ["x", f"w{n}", f"b{n}"], [f"y{n}"]) for n in range(4)]
    values = [onnx.helper.make_tensor_value_info(f"y{n}", onnx.TensorProto.FLOAT, [2, 5]) for n in range(4)]
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4])],
        values,
        [onnx.numpy_helper.from_array(value, name) for name, value in (weights | biases).items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    x = {"x": rng.standard_normal((2, 4)).astype(np.float32)}

    def run() -> list[np.ndarray]:
        return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, x)

    before = run()
    share_matrices(model.graph)
    onnx.checker.check_model(model)
    assert [each.name for each in model.graph.initializer] == ["w0", "w2", *biases]
    assert all(np.array_equal(a, b) for a, b in zip(before, run(), strict=True))
