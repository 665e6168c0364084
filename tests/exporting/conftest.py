"""One small model exported once, and frames for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from simomerge.models.model import SimoModel

from .modules import small_model

SIZE = (30, 42)
"""No whole places of the encoder's last map, which has stride 8."""


def frames_of(size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Smooth random frames (H, W, 3)."""
    generator = np.random.default_rng(count)
    coarse = generator.integers(0, 256, (count, -(-size[0] // 5), -(-size[1] // 5), 3), np.uint8)
    return list(coarse.repeat(5, 1).repeat(5, 2)[:, : size[0], : size[1]])


@dataclass
class Exported:
    model: SimoModel
    file: Path
    said: dict


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The small model as scene.onnx at a fixed size. Do not write into its folder."""
    from simomerge.exporting.export import export

    folder, model = tmp_path_factory.mktemp("exported"), small_model(("parts", "depth", "normals"))
    said = export(model, folder / "scene.onnx", SIZE, images=frames_of(SIZE, 3), probabilities=True)
    return Exported(model, folder / "scene.onnx", said)
