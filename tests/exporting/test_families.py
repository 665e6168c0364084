"""Every family of encoders and every kind of head exports, and predicts what torch predicts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.encoders.families import TINY, save_tiny
from simomerge.core.errors import InputError
from simomerge.exporting.export import export
from simomerge.merging.tree import Tree
from simomerge.models.encoders import load_encoder
from simomerge.models.encoders.tree import TreeEncoder
from simomerge.models.heads import head_for
from simomerge.models.heads.building import build_head
from simomerge.models.model import SimoModel
from simomerge.runtime import Scene

from .conftest import frames_of
from .contract import ExportContract, QuantisedContract
from .modules import TASKS, small_model

pytestmark = pytest.mark.slow
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def shaken(model: SimoModel) -> SimoModel:
    """The model with heads that are not those of the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class TestFamilies(ExportContract):
    """One linear and one DPT head on every family."""

    @pytest.fixture(params=TINY)
    def model(self, request: pytest.FixtureRequest, tmp_path: Path) -> SimoModel:
        encoder = load_encoder(save_tiny(request.param, tmp_path / "base"))
        torch.manual_seed(0)
        heads = {
            "parts": head_for(encoder, "linear", 3),
            "normals": head_for(encoder, "dpt", 3, fusion_channels=8),
        }
        return shaken(SimoModel(encoder, {name: TASKS[name] for name in heads}, heads))


class TestHeads(QuantisedContract):
    """The other heads, and adapters in the encoder."""

    @pytest.fixture(params=["binned-depth", "surgery", "depth-anything", "dpt-segmentation", "subpixels", "adapters"])
    def model(self, request: pytest.FixtureRequest, tiny_base: Path) -> SimoModel:
        torch.manual_seed(0)
        encoder, kind = load_encoder(tiny_base), request.param
        small = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 4}
        any_depth = {**small, "reassemble_factors": [4, 2, 1, 0.5]}
        any_parts = {**small, "num_labels": 3, "use_auxiliary_head": False}
        depth = {"architecture": "DepthAnythingForDepthEstimation", "config": any_depth}
        parts = {"architecture": "DPTForSemanticSegmentation", "config": any_parts}
        kinds = {
            "binned-depth": ("depth", "binned-depth", {"bins": 16}),
            "surgery": ("depth", "surgery", {"inner": "linear", "rank": 4}),
            "depth-anything": ("depth", "transformers", depth),
            "dpt-segmentation": ("parts", "transformers", parts),
            "subpixels": ("parts", "linear", {"subpixels": 2}),
            "adapters": ("normals", "linear", {}),
        }
        task, head, settings = kinds[kind]
        if kind == "adapters":
            # The random CLS token is nearly zero, so that 8 bits would say nothing about it.
            torch.nn.init.normal_(encoder.backbone.embeddings.cls_token)
            for adapter in encoder.add_adapters(rank=4):
                torch.nn.init.normal_(adapter.up.weight, std=0.1)
        built = build_head(head, encoder.channels, TASKS[task].channels, settings)
        return shaken(SimoModel(encoder, {task: TASKS[task]}, {task: built}))


class TestOwnModules(ExportContract):
    @pytest.fixture
    def model(self) -> SimoModel:
        return small_model(("parts", "depth", "normals", "edges"))


class TestTrees(QuantisedContract):
    """Tasks share the first blocks of the encoder and have their own last ones, in full or of low rank."""

    splits = False

    @pytest.fixture(params=[None, 3])
    def model(self, tiny_base: Path, request: pytest.FixtureRequest) -> SimoModel:
        torch.manual_seed(0)
        plain = load_encoder(tiny_base)
        encoder = TreeEncoder(Tree.of(2, ["parts", "normals"], blocks=4), plain, rank=request.param)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        heads = {"parts": head_for(encoder, "linear", 3), "normals": head_for(encoder, "linear", 3)}
        return shaken(SimoModel(encoder, {name: TASKS[name] for name in heads}, heads))

    def test_it_is_not_split(self, model: SimoModel, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the heads of this model read different branches; export it as one file"):
            export(model, tmp_path / "scene.onnx", self.size, split=True)
        assert list(tmp_path.iterdir()) == []


class TestPrecisionOfTransformers:
    """A tiny DINOv2, whose attention and norms have what half precision would spoil."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> SimoModel:
        encoder = load_encoder(save_tiny("dinov2", tmp_path / "base"))
        torch.manual_seed(0)
        heads = {"depth": head_for(encoder, "linear", 1), "normals": head_for(encoder, "dpt", 3, fusion_channels=8)}
        return shaken(SimoModel(encoder, {name: TASKS[name] for name in heads}, heads))

    def test_scores_norms_and_softmax_stay_in_float32(self, model: SimoModel, tmp_path: Path) -> None:
        import onnx

        said = export(model, tmp_path / "scene.onnx", (60, 90), precision="fp16", images=frames_of((60, 90), 2))
        assert all(row["ok"] for row in said["verification"])
        graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "scene.onnx")).graph
        types = {each.name: each.type.tensor_type.elem_type for each in (*graph.value_info, *graph.output)}
        types |= {each.name: each.data_type for each in graph.initializer}
        half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
        softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
        norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
        assert len(softmaxes) == model.encoder.backbone.config.num_hidden_layers and len(norms) >= 2 * len(softmaxes)
        assert all(types[name] == single for node in (*softmaxes, *norms) for name in (*node.input, *node.output))
        makers = {name: node for node in graph.node for name in node.output}

        def before(node: onnx.NodeProto) -> Iterator[str]:
            """The values from the product of queries and keys on."""
            yield from node.output
            if node.op_type != "MatMul":
                yield from (name for each in node.input if each in makers for name in before(makers[each]))

        scores = {each for node in softmaxes for each in before(makers[node.input[0]])}
        assert not any(types[name] == half for name in scores), "scores that pass half precision would overflow"
        products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
        assert sum(types.get(node.output[0]) == half for node in products) >= 4 * len(softmaxes)

    def test_position_embeddings_of_another_size_are_constants(self, model: SimoModel, tmp_path: Path) -> None:
        import onnx

        config = model.encoder.backbone.config
        assert config.image_size // config.patch_size != 60 // config.patch_size
        export(model, tmp_path / "scene.onnx", (60, 90), images=frames_of((60, 90), 2))
        graph = onnx.load(tmp_path / "scene.onnx").graph
        tokens = 1 + -(-60 // config.patch_size) * -(-90 // config.patch_size)
        sizes = {tuple(each.dims) for each in graph.initializer}
        assert any(size[-2:] in ((tokens, config.hidden_size), (tokens - 1, config.hidden_size)) for size in sizes)
        resized = [name for node in graph.node if node.op_type == "Resize" for name in node.input]
        assert resized and not any("position" in name for name in resized)

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_lower_precision_in_files_of_their_own(self, precision: str, model: SimoModel, tmp_path: Path) -> None:
        images = frames_of((60, 90), 12)
        said = export(model, tmp_path / "scene.onnx", (60, 90), precision=precision, images=images, split=True)
        assert len(said["files"]) == 4 and all(row["ok"] for row in said["verification"])
        found, wanted = Scene(said["files"][0], threads=1).predict(images[0]), model.predict(images[0])
        error = float(np.abs(found["depth"] / wanted["depth"] - 1).mean())
        assert 1e-6 < error < {"fp16": 5e-3, "int8": 5e-2}[precision]
