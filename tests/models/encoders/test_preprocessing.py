"""Mean and standard deviation of a folder, against the pixels of transformers' own image processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from simomerge.core.errors import InputError
from simomerge.models.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD
from simomerge.models.encoders.preprocessing import read_normalisation

IMAGE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
USUAL = {
    "image_processor_type": "DPTImageProcessor",
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
BYTES = {"image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]}
LEFT_OUT = {"image_mean": None, "image_std": None}
SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "not normalised": {"do_normalize": False},
    "in bytes": {"do_rescale": False, **BYTES},
    "neither": {"do_rescale": False, "do_normalize": False},
    "in [-1, 1]": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "in [0, 2], not normalised": {"rescale_factor": 1 / 127.5, "do_normalize": False},
    "the class decides": LEFT_OUT,
    "another class decides": {"image_processor_type": "BitImageProcessor", **LEFT_OUT},
    "a fast class decides": {"image_processor_type": "ViTImageProcessorFast", **LEFT_OUT},
}


def write(folder: Path, **settings: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("what", SETTINGS)
def test_pixels_are_those_of_transformers(tmp_path: Path, what: str) -> None:
    # A value of None stands for a key that the file does not have.
    settings = {key: value for key, value in {**USUAL, **SETTINGS[what]}.items() if value is not None}
    write(tmp_path, **settings)
    kind = settings["image_processor_type"].removesuffix("Fast")
    processor = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    plain = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    expected = processor.from_pretrained(tmp_path, **plain)(IMAGE, return_tensors="np")["pixel_values"][0]
    mean, std = (np.array(values).reshape(3, 1, 1) for values in read_normalisation(tmp_path))
    np.testing.assert_allclose((IMAGE.transpose(2, 0, 1) / 255 - mean) / std, expected, rtol=1e-5, atol=1e-5)


def test_the_usual_file_is_read_to_the_last_digit(tmp_path: Path) -> None:
    assert read_normalisation(tmp_path) == (IMAGENET_MEAN, IMAGENET_STD)
    write(tmp_path, **USUAL)
    assert read_normalisation(tmp_path) == (USUAL["image_mean"], USUAL["image_std"])
    write(tmp_path, rescale_factor=0.00392156862745098)
    assert read_normalisation(tmp_path) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_flip_channel_order": True}, r"do_flip_channel_order swaps the colours \(BGR\)"),
        ({"do_grayscale": True}, "do_grayscale removes the colours"),
        ({"rescale_offset": True}, "rescale_offset shifts"),
        ({"rescale_factor": 0}, "rescale_factor is 0; give a number above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"image_std": [1, 0, 1]}, "image_std is"),
        ({"image_mean": [float("nan")] * 3}, "cannot be read .NaN is not a number"),
        ({"image_mean": 0.5}, "image_mean is 0.5; give three numbers"),
        ({"image_processor_type": "MyProcessor"}, "names no image_mean, and the default of MyProcessor is unknown"),
    ],
)
def test_what_cannot_be_folded_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write(tmp_path, **settings)
    with pytest.raises(InputError, match=rf"preprocessor_config\.json: {message}"):
        read_normalisation(tmp_path)
    switches = {key: False for key, value in settings.items() if value is True}
    write(tmp_path, **USUAL, **switches)
    assert read_normalisation(tmp_path)[0] == USUAL["image_mean"]
