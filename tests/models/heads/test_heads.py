"""Every head keeps the contract, and predicts what its definition, written out here, says."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge.core.classes import register_head
from simomerge.core.errors import InputError
from simomerge.models.encoders import Features, load_encoder
from simomerge.models.heads import HEADS, Foldable, build_head, head_for, head_kind
from simomerge.models.heads.linear import LinearHead
from simomerge.models.heads.resize import resize
from simomerge.models.heads.surgery import SurgeryHead

from .contract import (
    CHANNELS,
    FoldableHeadContract,
    HeadContract,
    TrainableHeadContract,
    random_features,
    random_moments,
)

NECK = {"neck_hidden_sizes": [4, 6, 8, 10], "fusion_hidden_size": 8}


class TestLinearHead(TrainableHeadContract):
    kind = "linear"
    cases = ({}, {"cls": False}, {"subpixels": 2}, {"cls": False, "subpixels": 4})


class TestConvHead(FoldableHeadContract):
    kind = "conv"
    cases = ({}, {"subpixels": 2}, {"taps": [3]}, {"taps": [2, 0]})

    def reads_cls(self, settings: dict[str, Any]) -> bool:
        return False

    def taps_read(self, settings: dict[str, Any]) -> Sequence[int]:
        return settings.get("taps", range(4))


@pytest.mark.parametrize("taps", [[0, 1, 2, 3], [1, 3]])
def test_a_conv_head_is_torchs_convolution_of_the_concatenated_taps(taps: list[int]) -> None:
    channels = [6, 4, 6, 5]
    head = build_head("conv", channels, 3, {"taps": taps})
    plain = nn.Conv2d(sum(channels[tap] for tap in taps), 3, 1)
    head.load_state_dict(plain.state_dict())
    features = random_features(channels=channels)
    wanted = F.interpolate(plain(torch.cat([features.maps[tap] for tap in taps], 1)), (24, 40), mode="bilinear")
    torch.testing.assert_close(head(features), wanted)
    fresh = build_head("conv", channels, 3, {"subpixels": 2})
    nn.init.zeros_(fresh.weight)
    fresh.start_at(torch.tensor([1.5, -2.0, 0.25]))
    torch.testing.assert_close(fresh(features), torch.tensor([1.5, -2.0, 0.25]).view(1, 3, 1, 1).expand(2, 3, 24, 40))
    for wrong in ([4], [-1], []):
        with pytest.raises(InputError, match="the encoder has 4; give places from 0 on"):
            build_head("conv", channels, 3, {"taps": wrong})


def test_a_head_that_is_itself_a_convolution_folds() -> None:
    class Own(Foldable, nn.Conv2d):
        reads = {"": (3,)}  # noqa: RUF012

        def forward(self, features: Features) -> Tensor:  # type: ignore[override]
            return super().forward(features.maps[3])

    head, features = Own(6, 3, 1), random_features()
    projection = head.projections()[0]
    assert projection.maps.keys() == {3} and torch.equal(projection.maps[3], head.weight.flatten(1))
    again = head.with_projections([projection], random_moments())
    torch.testing.assert_close(again(features), head(features))


def test_a_misspelt_argument_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"head 'linear' has no argument 'subpixel': did you mean 'subpixels'\?"):
        build_head("linear", CHANNELS, 3, {"subpixel": 4})
    with pytest.raises(InputError, match=r"head 'conv' has no argument 'x': choose from subpixels, taps\."):
        build_head("conv", CHANNELS, 3, {"x": 4})


class TestDPTHead(TrainableHeadContract):
    kind = "dpt"
    cases = (
        {"fusion_channels": 8},
        {"fusion_channels": 4},
        {"fusion_channels": 4, "cls": False},
        {"fusion_channels": 4, "cross_tap": True},
        {"fusion_channels": 4, "cls": False, "cross_tap": True},
    )


class ImportedHeadContract(FoldableHeadContract):
    """Heads of one positive channel, which end with a ReLU or a clamp."""

    out_channels = 1
    channels = (12, 12, 12, 12)

    def train(self, settings: dict[str, Any], channels: Sequence[int] | None = None) -> nn.Module:
        torch.manual_seed(1)
        head = build_head(self.kind, channels or self.channels, self.out_channels, settings).eval()
        with torch.no_grad():
            for parameter in head.parameters():  # a large last bias keeps the output above the last ReLU
                parameter.add_(0.2 * torch.randn_like(parameter) if parameter.numel() > 1 else 3)
        return head


class TestBinnedDepthHead(ImportedHeadContract):
    kind = "binned-depth"
    cases = ({"bins": 9}, {"bins": 9, "cls": False})


class TestTransformersHead(ImportedHeadContract):
    kind = "transformers"
    cases = (
        {"architecture": "DepthAnythingForDepthEstimation", "config": {**NECK, "head_hidden_size": 4, "max_depth": 1}},
        {"architecture": "DPTForDepthEstimation", "config": {**NECK, "readout_type": "project"}},
        {"architecture": "DPTForDepthEstimation", "config": {**NECK, "readout_type": "ignore"}},
    )
    unused = ("fusion_stage.layers.0.residual_layer1",)  # the coarsest fusion has no skip connection

    def reads_cls(self, settings: dict[str, Any]) -> bool:
        return settings["config"].get("readout_type") == "project"


@register_head
class CustomHead(Foldable, nn.Module):
    """A custom head on the second and fourth tap."""

    reads = {"project": (1, 3)}  # noqa: RUF012
    in_channels = CHANNELS

    def __init__(self, width: int) -> None:
        super().__init__()
        self.settings = {"width": width}
        self.project, self.output = nn.Conv2d(12, width, 1), nn.Conv2d(width, 3, 1)

    def forward(self, features: Features) -> Tensor:
        hidden = self.project(torch.cat([features.maps[1], features.maps[3]], 1)).tanh()
        return F.interpolate(self.output(hidden), features.padded_size, mode="bilinear")


class TestCustomHead(FoldableHeadContract):
    kind = f"{__name__}:CustomHead"
    cases = ({"width": 5},)

    def reads_cls(self, settings: dict[str, Any]) -> bool:
        return False

    def taps_read(self, settings: dict[str, Any]) -> Sequence[int]:
        return (1, 3)


class TestSurgeryHead(HeadContract):
    kind = "surgery"
    cases = (
        {"inner": "linear", "inner_settings": {"cls": True, "subpixels": 2}, "rank": 3},
        {"inner": "linear", "inner_settings": {"cls": False, "subpixels": 1}, "rank": 3, "cls": False},
        {"inner": "dpt", "inner_settings": {"fusion_channels": 4, "cls": True}, "rank": 4},
        {"inner": "dpt", "inner_settings": {"fusion_channels": 4, "cls": True}, "rank": 4, "cls": False},
    )

    def reads_cls(self, settings: dict[str, Any]) -> bool:
        return bool(settings["inner_settings"]["cls"])


def test_every_registered_head_is_tested() -> None:
    tested = (TestLinearHead, TestConvHead, TestDPTHead, TestBinnedDepthHead, TestTransformersHead, TestSurgeryHead)
    assert {each.kind for each in tested} == set(HEADS)


def parameters(head: nn.Module) -> int:
    return sum(p.numel() for p in head.parameters())


# Linear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subpixels", [1, 4])
@pytest.mark.parametrize("cls", [True, False])
def test_linear_head_is_cat_batch_norm_matmul_and_bilinear(subpixels, cls):
    generator = torch.Generator().manual_seed(7)
    head = LinearHead(CHANNELS, 2, cls=cls, subpixels=subpixels).eval()
    with torch.no_grad():
        for tensor in (head.norm.weight, head.norm.bias, head.norm.running_mean, *head.output.parameters()):
            tensor.normal_(generator=generator)
        head.norm.running_var.uniform_(0.5, 2, generator=generator)
    features = random_features()
    height, width = 3, 5
    x = torch.cat(features.maps, 1)
    if cls:
        x = torch.cat([x, torch.cat(features.cls, 1)[..., None, None].repeat(1, 1, height, width)], 1)
    norm = head.norm
    per_channel = [t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    mean, variance, scale, shift = per_channel
    x = (x - mean) / torch.sqrt(variance + norm.eps) * scale + shift
    flat = head.output.weight[:, :, 0, 0] @ x.flatten(2) + head.output.bias[:, None]
    low = torch.zeros(2, 2, height * subpixels, width * subpixels)
    for channel in range(2):
        for row in range(height * subpixels):
            for column in range(width * subpixels):
                # the token's own logits run channel by channel, then row by row
                inside = (row % subpixels) * subpixels + column % subpixels
                token = (row // subpixels) * width + column // subpixels
                low[:, channel, row, column] = flat[:, channel * subpixels**2 + inside, token]
    expected = F.interpolate(low, size=(24, 40), mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)


def test_linear_head_brings_maps_of_other_sizes_to_the_first():
    features = random_features(grids=((3, 5),) * 2, channels=[6, 6])
    coarse = Features((features.maps[0], features.maps[1][..., :1, :1]), features.cls, (24, 40), (24, 40))
    spread = Features(
        (features.maps[0], features.maps[1][..., :1, :1].expand(-1, -1, 3, 5)), features.cls, (24, 40), (24, 40)
    )
    head = LinearHead([6, 6], 2).eval()
    with torch.no_grad():
        torch.testing.assert_close(head(coarse), head(spread))


# DPT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
def test_dpt_head_is_reassemble_and_fuse_written_out_from_its_tensors(grid):
    padded = (8 * grid[0], 8 * grid[1])
    features = random_features(grids=(grid,) * 4, padded=padded, image=padded)
    head = build_head("dpt", CHANNELS, 3, {"fusion_channels": 8}).eval()
    p = head.state_dict()

    def conv(name, x, **options):
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options)

    def residual(name, x):
        inner = conv(f"{name}.first", x.relu(), padding=1)
        return x + conv(f"{name}.second", inner.relu(), padding=1)

    def resize(x, size):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    stages = []
    for i, (patches, cls) in enumerate(zip(features.maps, features.cls, strict=True)):
        readout = cls @ p[f"readouts.{i}.weight"].T  # the CLS readout 'add'
        stages.append(conv(f"projects.{i}", patches) + readout[:, :, None, None])
    for i, stride in ((0, 4), (1, 2)):
        stages[i] = F.conv_transpose2d(stages[i], p[f"resizes.{i}.weight"], p[f"resizes.{i}.bias"], stride=stride)
    stages[3] = conv("resizes.3", stages[3], stride=2, padding=1)
    path = stages[3]
    for i in (3, 2, 1, 0):
        if i < 3:
            path = path + residual(f"fusions.{i}.skip", stages[i])
        path = conv(f"fusions.{i}.project", residual(f"fusions.{i}.refine", path))
        path = resize(path, stages[max(i - 1, 0)].shape[-2:])
    path = resize(conv("smooth", path, padding=1), padded)
    expected = conv("output", conv("refine", path, padding=1).relu())
    with torch.no_grad():
        torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)


# Sizes in the paper -------------------------------------------------------------------------------------


def test_linear_head_has_the_papers_tenth_of_a_million_parameters():
    width = 768 * 4 * 2
    count = parameters(build_head("linear", [768] * 4, 13))
    assert count == 2 * width + 13 * width + 13 == 92_173  # "about 0.1 M"


def test_dpt_head_has_the_papers_three_and_a_half_million_parameters():
    count = parameters(build_head("dpt", [768] * 4, 13))
    assert count == 3_487_373  # "about 3.5 M"
    assert abs(count / 1e6 - 3.5) < 0.05


# Building -----------------------------------------------------------------------------------------------


def test_an_unknown_head_is_refused_with_the_choice():
    with pytest.raises(InputError, match=r"'unet'.*linear, dpt"):
        build_head("unet", CHANNELS, 3)


def test_dpt_needs_four_taps():
    with pytest.raises(InputError, match="four taps, not 3"):
        build_head("dpt", [6] * 3, 3)


def test_what_does_not_fit_is_refused() -> None:
    config = {"architecture": "DPTForDepthEstimation", "config": NECK}
    with pytest.raises(InputError, match="reads 4 taps, not 2"):
        build_head("transformers", [12] * 2, 1, config)
    with pytest.raises(InputError, match="gives 1 channels, but the task has 3"):
        build_head("transformers", [12] * 4, 3, config)
    with pytest.raises(InputError, match="'SegFormer': choose one of DepthAnything"):
        build_head("transformers", [12] * 4, 1, {**config, "architecture": "SegFormer"})
    with pytest.raises(InputError, match="DPT hybrids"):
        build_head("transformers", [12] * 4, 1, {**config, "config": {**NECK, "is_hybrid": True}})
    with pytest.raises(InputError, match="binned depth head gives one channel"):
        build_head("binned-depth", [12], 2)


def test_a_head_for_an_encoder_fits_it(tiny_base):
    encoder = load_encoder(tiny_base)
    head = head_for(encoder, "linear", 5, subpixels=2)
    assert head.settings == {"cls": True, "subpixels": 2}
    with torch.no_grad():
        assert head.eval()(encoder(torch.rand(1, 3, 20, 24))).shape == (1, 5, 24, 24)


def test_a_head_for_a_pyramid_without_cls_tokens_fits_it():
    encoder = SimpleNamespace(channels=(8, 8, 8, 8), strides=(4, 8, 16, 32), has_cls=False)
    head = head_for(encoder, "dpt", 2, fusion_channels=16)
    assert head.settings == {"fusion_channels": 16, "cls": False, "pyramid": True}
    assert head_for(encoder, "linear", 2).settings["cls"] is False


def test_a_head_that_is_not_registered_cannot_be_named():
    class Mine(LinearHead):
        pass

    with pytest.raises(InputError, match="Mine is defined inside a function"):
        head_kind(Mine(CHANNELS, 1))


@pytest.mark.parametrize("size", [(64, 80), (8, 10), (17, 80), (5, 4), (8, 33)])
def test_resize_is_the_librarys_bilinear(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 8, 10, requires_grad=True)
    expected = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    direction = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((expected * direction).sum(), x)
    with torch.inference_mode():  # the weights it keeps must serve training as well
        resize(x, size)
    found = resize(x, size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad((found * direction).sum(), x)[0], gradient, rtol=1e-4, atol=1e-5)


# Surgery ------------------------------------------------------------------------------------------------


def test_a_fresh_surgery_head_is_its_inner_head() -> None:
    inner = build_head("dpt", CHANNELS, 3, {"fusion_channels": 4}).eval()
    head = SurgeryHead(CHANNELS, 3, inner, rank=2).eval()
    features = random_features()
    with torch.no_grad():
        assert head.inner is inner and torch.equal(head(features), inner(features))
    assert parameters(head) == parameters(inner) + 2 * sum(2 * 2 * width for width in CHANNELS)


def test_a_surgery_head_subtracts_a_low_rank_bias_from_every_token() -> None:
    torch.manual_seed(0)
    head = SurgeryHead(CHANNELS, 2, "linear", rank=3).eval()
    for weight in head.corrections.parameters():
        nn.init.normal_(weight)
    features = random_features()
    maps, cls = [], []
    for tap in range(4):
        down, up = (weight.detach() for weight in head.corrections.maps[tap].parameters())
        z = features.maps[tap]
        hidden = torch.einsum("rc,bchw->brhw", down, z).clamp(min=0)
        maps.append(z - torch.einsum("cr,brhw->bchw", up, hidden))
        down, up = (weight.detach() for weight in head.corrections.cls[tap].parameters())
        cls.append(features.cls[tap] - (features.cls[tap] @ down.T).clamp(min=0) @ up.T)
    wanted = Features(tuple(maps), tuple(cls), features.image_size, features.padded_size)
    found = head.corrections(features)
    for ours, theirs in zip((*found.maps, *found.cls), (*wanted.maps, *wanted.cls), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(head(features), head.inner(wanted))


def test_a_surgery_head_without_cls_leaves_the_cls_tokens() -> None:
    head = SurgeryHead(CHANNELS, 2, "linear", rank=3, cls=False)
    features = random_features()
    assert head.corrections(features).cls == features.cls


def test_a_surgery_head_wraps_custom_heads_and_is_rebuilt_around_them() -> None:
    torch.manual_seed(0)
    head = SurgeryHead(CHANNELS, 3, CustomHead(5), rank=2)
    path = f"{__name__}:CustomHead"
    assert head.settings == {"inner": path, "inner_settings": {"width": 5}, "rank": 2, "cls": True}
    again = build_head("surgery", CHANNELS, 3, head.settings)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(random_features()), head(random_features()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank is 0: give at least 1"), ({"inner": "dtp"}, "unknown head 'dtp'")],
)
def test_a_surgery_head_names_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_head("surgery", CHANNELS, 3, settings)
