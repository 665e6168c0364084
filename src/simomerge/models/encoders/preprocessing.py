"""How an image processor of transformers turns an image into pixels, as one mean and standard deviation per channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simomerge.core.documents import read_json
from simomerge.core.errors import InputError
from simomerge.core.normalisation import check_normalisation
from simomerge.core.text import shown
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD

_RESCALE = 1 / 255
_LARGEST = 1e6
_OTHER_PIXELS = {
    "do_flip_channel_order": "swaps the colours (BGR)",
    "do_grayscale": "removes the colours",
    "do_color_quantize": "replaces colours by numbers",
    "rescale_offset": "shifts the pixels after rescaling",
    "offset": "shifts the pixels after rescaling",
    "include_top": "normalises twice",
}
"""Switches of image processors that a mean and standard deviation cannot express, and what they do."""


def read_normalisation(source: str | Path) -> tuple[Sequence[float], Sequence[float]]:
    """RGB mean and standard deviation, for images in [0, 1], of a folder or hub id.

    A processor computes ``(255 * image * factor - mean) / std``, with ``factor`` 1 where ``do_rescale`` is false, and
    mean 0 and std 1 where ``do_normalize`` is false. The result here gives the same pixels as ``(image - mean) / std``.
    A file that names neither a mean nor its class means ImageNet's, and so does a missing file.

    Raises:
        InputError: The file holds something else, or a switch that no mean and standard deviation can express; the
            message names it.

    Example:
        >>> _ = Path("preprocessor_config.json").write_text('{"do_rescale": false, "do_normalize": false}')
        >>> mean, std = read_normalisation(".")
        >>> mean, [round(255 * value, 6) for value in std]
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """
    path, settings = _image_processor(str(source))
    for switch, effect in _OTHER_PIXELS.items():
        if settings.get(switch):
            raise InputError(
                f"{path}: {switch} {effect}, which cannot be read here. If the model was trained without it, set it to"
                " false."
            )
    factor = 255 * (_number(path, "rescale_factor", settings) if settings.get("do_rescale", True) else 1.0)
    if settings.get("do_normalize", True):
        mean, std = (_channels(path, name, settings) for name in ("image_mean", "image_std"))
    else:
        mean, std = [0.0] * 3, [1.0] * 3
    if min(std) <= 0:
        raise InputError(f"{path}: image_std is {list(std)}; give three numbers above 0.")
    if not math.isclose(factor, 1, rel_tol=1e-6):  # else the usual case, to the last digit
        mean, std = [value / factor for value in mean], [value / factor for value in std]
    check_normalisation(mean, std, f"{path}: for images in [0, 1], ")
    return mean, std


def _number(path: str, name: str, settings: Mapping[str, Any]) -> float:
    value = settings.get(name, _RESCALE)
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < _LARGEST):
        raise InputError(f"{path}: {name} is {shown(value)}; give a number above 0, such as 1/255 = {_RESCALE}.")
    return float(value)


def _channels(path: str, name: str, settings: Mapping[str, Any]) -> Sequence[float]:
    """Three numbers of the file, or the default of the processor's class."""
    values = settings[name] if name in settings else _default(path, name, settings)
    if not (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(isinstance(v, (int, float)) and abs(v) < _LARGEST for v in values)
    ):
        raise InputError(f"{path}: {name} is {shown(values)}; give three numbers, or remove it to use the default.")
    return values


def _default(path: str, name: str, settings: Mapping[str, Any]) -> Any:
    """What the class named in the file uses for a mean or standard deviation that the file does not name."""
    import transformers

    given = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if not given:
        return {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}[name]
    kind = str(given).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    candidates = (f"{kind}Pil", kind) if kind.endswith("ImageProcessor") else ()
    for candidate in candidates:  # transformers 5 has variants that need no torchvision
        try:
            return getattr(getattr(transformers, candidate)(), name)
        except (AttributeError, ImportError, TypeError, ValueError):
            continue
    raise InputError(f"{path}: names no {name}, and the default of {given} is unknown; add it.")


def _image_processor(source: str) -> tuple[str, Mapping[str, Any]]:
    """The path of an image processor's file and its content; empty if there is no such file."""
    from transformers.utils import cached_file

    for name, key in (("preprocessor_config.json", ""), ("processor_config.json", "image_processor")):
        try:
            path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if not path:
                continue
        except OSError:
            continue
        content = read_json(Path(path), "fix it, or remove it to use ImageNet's.", {f"{key}?": dict} if key else dict)
        return str(path), content.get(key, {}) if key else content
    return source, {}
