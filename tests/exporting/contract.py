"""What an export of any model must do, as tests to inherit. A test class gives a fixture ``model``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.core.errors import InputError
from simomerge.exporting.export import export
from simomerge.models.heads import head_kind
from simomerge.models.model import SimoModel
from simomerge.runtime import Scene, check

from .conftest import frames_of


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Labels equal on 99.9 % of the pixels, other maps up to 1e-4 of their range."""
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype
        if value.dtype == np.int64:
            assert (found[name] == value).mean() >= 0.999
        else:
            assert np.abs(found[name] - value).max() <= 1e-4 * np.abs(value).max()


class ExportContract:
    """Fixed and free sizes, batches of 1 and 3, sizes that are no whole patches, one file or several."""

    size = (60, 90)
    splits = True

    @pytest.fixture
    def model(self) -> SimoModel:
        pytest.fail("a contract names its model")

    def export(self, model: SimoModel, folder: Path, **options: Any) -> Scene:
        said = export(model, folder / "scene.onnx", self.size, images=frames_of(self.size, 2), **options)
        assert all(row["ok"] for row in said["verification"])
        return Scene(said["files"][0], threads=1)

    def assert_predicts(self, scene: Scene, model: SimoModel, size: tuple[int, int]) -> None:
        frames = frames_of(size, 3)
        wanted = [model.predict(frame) for frame in frames]
        for found, expected in zip(scene.predict(frames), wanted, strict=True):
            assert_same(found, expected)
        assert_same(scene.predict(frames[0]), wanted[0])

    def test_one_file_of_a_fixed_size(self, model: SimoModel, tmp_path: Path) -> None:
        scene = self.export(model, tmp_path)
        self.assert_predicts(scene, model, self.size)
        assert check(scene.file, threads=1)["ok"]

    def test_free_sizes_and_files_of_their_own(self, model: SimoModel, tmp_path: Path) -> None:
        try:
            scene = self.export(model, tmp_path, split=self.splits, dynamic=True)
        except InputError as error:  # it says so, and writes nothing
            assert not self.promised(model) and "leave out --dynamic" in str(error)
            assert not [file for file in tmp_path.iterdir() if "scene" in file.name or "export" in file.name]
            return
        assert len(list(tmp_path.glob("*.onnx"))) == (1 + len(model.tasks) if self.splits else 1)
        for size in (self.size, (97, 65)):
            self.assert_predicts(scene, model, size)

    def promised(self, model: SimoModel) -> bool:
        """Whether docs/export.md promises free sizes for a model."""
        kinds = {head_kind(head) for head in model.heads.values()}
        encoder = type(model.encoder.backbone).__name__
        return encoder in ("Dinov2Model", "DINOv3ViTModel", "SmallEncoder") and kinds <= {"linear", "dpt"}

    def test_the_model_itself_is_left_as_it_was(self, model: SimoModel, tmp_path: Path) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        self.export(model, tmp_path, tasks=list(model.tasks)[:1])
        assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class QuantisedContract(ExportContract):
    """8 bits too. They do not depend on the family of the encoder, so that one with every kind of head is enough."""

    def test_eight_bits_cost_little(self, model: SimoModel, tmp_path: Path) -> None:
        images = frames_of(self.size, 12)
        said = export(model, tmp_path / "scene.onnx", self.size, images=images, precision="int8")
        onnx = pytest.importorskip("onnx")
        kinds = {node.op_type for node in onnx.load(said["files"][0]).graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
        assert all(row["ok"] for row in said["verification"])
