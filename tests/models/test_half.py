"""Models in half precision predict what they predict in single precision, up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from simomerge.datasets.tasks import Task
from simomerge.models.heads import build_head
from simomerge.models.model import SimoModel

KINDS = ("linear", "dpt", "binned-depth")
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", KINDS)
def test_every_head_predicts_in_half_precision(
    make_model: Callable[..., SimoModel], kind: str, dtype: torch.dtype, adapted: bool
) -> None:
    encoder = make_model({}).encoder
    torch.manual_seed(0)
    settings = {"fusion_channels": 8} if kind == "dpt" else {}
    model = SimoModel(encoder, {"depth": Task("depth")}, {"depth": build_head(kind, encoder.channels, 1, settings)})
    if adapted:
        for adapter in model.encoder.add_adapters(2):
            torch.nn.init.normal_(adapter.up.weight, std=0.1)
    image = np.random.default_rng(0).integers(0, 255, (37, 45, 3), dtype=np.uint8)
    wanted = model.predict(image)["depth"]
    found = copy.deepcopy(model).to(dtype).predict(image)["depth"]
    assert found.dtype == np.float32 and found.shape == (37, 45)
    assert np.abs(found - wanted).mean() < TOLERANCE[dtype] * np.abs(wanted).mean()
