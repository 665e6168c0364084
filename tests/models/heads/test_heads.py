"""What every head must do, and the linear head against one written out here."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from simomerge.core.errors import InputError
from simomerge.models.encoders import Features, load_encoder
from simomerge.models.heads import HEADS, LinearHead, build_head, head_for, head_kind
from simomerge.models.heads.resize import resize

CHANNELS = [6, 6, 6, 6]
SETTINGS = {  # every head that is trained here, with settings that are not its defaults
    "linear": [{}, {"subpixels": 2}, {"cls": False, "subpixels": 4}],
    "dpt": [{"fusion_channels": 8}, {"fusion_channels": 4, "cls": False}, {"fusion_channels": 4, "cross_tap": True}],
}
CASES = [(kind, settings) for kind in SETTINGS for settings in SETTINGS[kind]]


def random_features(batch=2, grid=(3, 5), padded=(24, 40), image=(22, 37), channels=CHANNELS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Features(
        tuple(torch.randn(batch, c, *grid, generator=generator) for c in channels),
        tuple(torch.randn(batch, c, generator=generator) for c in channels),
        image,
        padded,
    )


def parameters(head):
    return sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(("kind", "settings"), CASES)
class TestEveryHead:
    @pytest.fixture
    def head(self, kind, settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            return build_head(kind, CHANNELS, 3, settings)

    @pytest.mark.parametrize(
        ("batch", "grid", "padded"), [(2, (3, 5), (24, 40)), (1, (1, 1), (8, 8)), (3, (4, 1), (56, 14))]
    )
    def test_logits_have_the_padded_size(self, head, batch, grid, padded):
        with torch.no_grad():
            logits = head.eval()(random_features(batch, grid, padded, image=padded))
        assert logits.shape == (batch, 3, *padded) and logits.dtype == torch.float32

    def test_gradients_reach_every_parameter(self, head):
        features = random_features()
        weights = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(5))
        (head.train()(features) * weights).sum().backward()
        without = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []

    def test_every_tap_and_cls_token_counts_where_it_is_asked_for(self, head, settings):
        features = random_features()
        inputs = [*features.maps, *features.cls]
        for tensor in inputs:
            tensor.requires_grad_()
        weights = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(5))
        (head.eval()(features) * weights).sum().backward()
        assert all(m.grad.abs().sum() > 0 for m in features.maps)
        assert all((c.grad is not None) == settings.get("cls", True) for c in features.cls)

    def test_a_saved_head_comes_back_bit_for_bit(self, head, kind, settings, tmp_path):
        head.train()(random_features(seed=6))  # moves the running statistics, where there are any
        save_file(head.state_dict(), tmp_path / "head.safetensors")
        again = build_head(kind, CHANNELS, 3, head.settings)
        again.load_state_dict(load_file(tmp_path / "head.safetensors"))
        with torch.no_grad():
            assert torch.equal(head.eval()(random_features()), again.eval()(random_features()))

    def test_its_settings_rebuild_it(self, head, kind, settings):
        again = build_head(kind, CHANNELS, 3, head.settings)
        assert again.settings == head.settings and settings.items() <= head.settings.items()
        assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in head.named_parameters()}
        assert head_kind(again) == kind

    def test_it_starts_at_a_constant_when_the_last_layer_has_no_weights(self, head):
        values = torch.tensor([1.5, -2.0, 0.25])
        head.start_at(values)
        with torch.no_grad():
            head.output.weight.zero_()
            logits = head.eval()(random_features())
        torch.testing.assert_close(logits, values.view(1, 3, 1, 1).expand(2, 3, 24, 40), rtol=1e-6, atol=0)

    def test_samples_of_a_batch_do_not_mix_when_it_predicts(self, head):
        features = random_features()
        first = Features(tuple(m[:1] for m in features.maps), tuple(c[:1] for c in features.cls), (22, 37), (24, 40))
        with torch.no_grad():
            torch.testing.assert_close(head.eval()(features)[:1], head(first), rtol=1e-4, atol=1e-5)


def test_every_registered_head_is_tested():
    assert set(SETTINGS) | {"binned-depth", "transformers"} == set(HEADS)  # those two: test_imported_heads.py


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
    features = random_features(channels=[6, 6])
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
    features = random_features(grid=grid, padded=padded, image=padded)
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


@pytest.mark.parametrize("kind", HEADS)
def test_an_unknown_setting_is_refused_by_name(kind):
    with pytest.raises(InputError, match=f"head '{kind}': .*'colour'"):
        build_head(kind, CHANNELS, 3, {"colour": 1})


def test_dpt_needs_four_taps():
    with pytest.raises(InputError, match="four taps, not 3"):
        build_head("dpt", [6] * 3, 3)


def test_a_head_for_an_encoder_fits_it(tiny_base):
    encoder = load_encoder(tiny_base)
    head = head_for(encoder, "linear", 5, subpixels=2)
    assert head.settings == {"cls": True, "subpixels": 2}
    with torch.no_grad():
        assert head.eval()(encoder(torch.rand(1, 3, 20, 24))).shape == (1, 5, 24, 24)


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
