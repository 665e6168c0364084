"""Every family of encoders and every kind of head exports, and predicts what torch predicts."""

from __future__ import annotations

from pathlib import Path

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
