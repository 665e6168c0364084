"""The heads that only imports make: a fold that undoes a linear map of their input leaves them as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simomerge.core.errors import InputError
from simomerge.models.encoders import Features
from simomerge.models.heads import build_head, head_kind
from simomerge.models.heads.projections import Moments, Projection

WIDTH, TAPS = 12, 4
NECK = {"neck_hidden_sizes": [4, 6, 8, 10], "fusion_hidden_size": 8}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("binned-depth", {"bins": 9}),
    ("binned-depth", {"bins": 9, "cls": False}),
    (
        "transformers",
        {"architecture": "DepthAnythingForDepthEstimation", "config": {**NECK, "head_hidden_size": 4, "max_depth": 1}},
    ),
    ("transformers", {"architecture": "DPTForDepthEstimation", "config": {**NECK, "readout_type": "project"}}),
    ("transformers", {"architecture": "DPTForDepthEstimation", "config": {**NECK, "readout_type": "ignore"}}),
]


def random_features() -> Features:
    generator = torch.Generator().manual_seed(0)
    maps = tuple(torch.randn(2, WIDTH, 3, 4, generator=generator) for _ in range(TAPS))
    return Features(maps, tuple(torch.randn(2, WIDTH, generator=generator) for _ in range(TAPS)), (40, 50), (42, 56))


@pytest.mark.parametrize(("kind", "settings"), CASES)
@torch.no_grad()
def test_a_fold_that_undoes_a_linear_map_gives_the_same_predictions(kind: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(1)
    head = build_head(kind, [WIDTH] * TAPS, 1, settings).eval()
    for parameter in head.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter) if parameter.numel() > 1 else 3)  # above the last ReLU
    features = random_features()
    wanted = head(features)
    assert wanted.shape == (2, 1, 42, 56) and wanted.std() > 0
    mix = [torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH) for _ in range(2 * TAPS)]
    moved = Features(
        tuple(torch.einsum("oc,bchw->bohw", m, f) for m, f in zip(mix[:TAPS], features.maps, strict=True)),
        tuple(f @ m.T for m, f in zip(mix[TAPS:], features.cls, strict=True)),
        features.image_size,
        features.padded_size,
    )
    back = [m.inverse() for m in mix]
    folded = head.with_projections(
        [
            Projection(
                {tap: w @ back[tap] for tap, w in p.maps.items()},
                {tap: w @ back[TAPS + tap] for tap, w in p.cls.items()},
                p.bias,
                p.grid,
            )
            for p in head.projections()
        ],
        Moments(),
    )
    assert not torch.allclose(head(moved), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(folded(moved), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head(features), wanted)  # the head itself is as it was
    assert head_kind(folded) == kind and folded.settings == head.settings


def test_what_does_not_fit_is_refused() -> None:
    config = {"architecture": "DPTForDepthEstimation", "config": NECK}
    with pytest.raises(InputError, match="reads 4 taps, not 2"):
        build_head("transformers", [WIDTH] * 2, 1, config)
    with pytest.raises(InputError, match="gives 1 channels, the task has 3"):
        build_head("transformers", [WIDTH] * 4, 3, config)
    with pytest.raises(InputError, match="'SegFormer': choose one of DepthAnything"):
        build_head("transformers", [WIDTH] * 4, 1, {**config, "architecture": "SegFormer"})
    with pytest.raises(InputError, match="DPT hybrids"):
        build_head("transformers", [WIDTH] * 4, 1, {**config, "config": {**NECK, "is_hybrid": True}})
    with pytest.raises(InputError, match="binned depth head gives one channel"):
        build_head("binned-depth", [WIDTH], 2)
