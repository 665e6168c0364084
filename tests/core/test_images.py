"""Images in every form a user has them, and the ones that are refused."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.core import images
from simomerge.core.errors import InputError
from simomerge.core.images import read_image, resized, to_tensor


@pytest.fixture
def picture():
    """uint8 RGB (9, 14, 3)."""
    return np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)


def expected(picture):
    return torch.tensor(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]


def png(path, width, height):
    """A PNG whose header claims a size; it holds almost no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b""))
    return path


# What is accepted ---------------------------------------------------------------------------------------


def test_every_form_of_one_image_gives_the_same_tensor(picture, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(picture).save(path)
    channels_first = torch.from_numpy(picture).permute(2, 0, 1)
    forms = {
        "path": path,
        "text": str(path),
        "PIL": Image.fromarray(picture),
        "array": picture,
        "float array": picture.astype(np.float32) / 255,
        "double array": picture.astype(np.float64) / 255,
        "big-endian array": (picture.astype(np.float32) / 255).astype(">f4"),
        "mirrored view": np.ascontiguousarray(picture[:, ::-1])[:, ::-1],
        "RGBA array": np.concatenate([picture, picture[..., :1]], axis=2),
        "tensor": channels_first,
        "batch of one": channels_first[None],
        "float tensor": channels_first.float() / 255,
    }
    for name, form in forms.items():
        tensor = to_tensor(form)
        assert tensor.dtype == torch.float32 and tensor.shape == (1, 3, 9, 14), name
        torch.testing.assert_close(tensor, expected(picture), rtol=0, atol=1e-7, msg=name)


def test_reading_warns_of_nothing(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "photo.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_tensor(tmp_path / "photo.png")
        to_tensor(Image.fromarray(picture))


def test_the_callers_array_is_not_shared(picture):
    floats = picture.astype(np.float32) / 255
    before = floats.copy()
    to_tensor(floats).zero_()
    assert np.array_equal(floats, before)


def test_a_photo_is_turned_upright_by_its_exif_tag(picture, tmp_path):
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its left side: turn clockwise to see it
    image.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "photo.png"), np.rot90(picture, -1))
    assert to_tensor(tmp_path / "photo.png").shape == (1, 3, 14, 9)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_pillow_modes_become_rgb(picture, mode, tmp_path):
    image = Image.fromarray(picture).convert("L" if mode == "LA" else "RGB").convert(mode)
    suffix = "tiff" if mode == "CMYK" else "png"
    image.save(tmp_path / f"photo.{suffix}")
    wanted = expected(np.asarray(image.convert("RGB")))
    assert torch.equal(to_tensor(image), wanted)
    assert torch.equal(to_tensor(tmp_path / f"photo.{suffix}"), wanted)


def test_gray_is_repeated_into_three_channels(picture):
    gray = picture[..., 0]
    assert torch.equal(to_tensor(gray), expected(np.stack([gray] * 3, 2)))
    assert torch.equal(to_tensor(Image.fromarray(gray)), to_tensor(gray))


def test_gray_of_16_bits_is_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 20).round().astype(np.uint16).reshape(4, 5)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    shades = np.round(deep / 257).astype(np.uint8)
    assert np.array_equal(read_image(tmp_path / "deep.png"), np.stack([shades] * 3, 2))


def test_rounding_just_outside_the_range_is_let_pass():
    assert to_tensor(torch.full((3, 2, 2), 1.0005)).max() == pytest.approx(1.0005)


# What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(9,), (9, 14, 1), (9, 14, 2), (9, 14, 5), (3, 9, 14), (1, 9, 14, 3), (0, 14, 3), (9, 0)]
)
def test_arrays_of_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match="image"):
        to_tensor(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(9, 14), (9, 14, 3), (1, 9, 14), (2, 3, 9, 14), (1, 4, 9, 14), (3, 0, 4)])
def test_tensors_of_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match="image"):
        to_tensor(torch.zeros(shape))


def test_an_opened_file_that_is_truncated_is_named(picture, tmp_path):
    """Pillow decodes it only when it is used."""
    file = tmp_path / "photo.png"
    Image.fromarray(picture).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"photo\.png: cannot be read as an image .*; give a PNG or JPEG file"):
        to_tensor(Image.open(file))
    with pytest.raises(InputError, match=r"^image: cannot be read as an image"):
        to_tensor(Image.open(io.BytesIO(file.read_bytes())))


def test_a_shape_error_gives_the_shape_and_the_remedy():
    with pytest.raises(InputError, match=r"shape \(9, 14, 2\); give \(H, W\), \(H, W, 3\)"):
        to_tensor(np.zeros((9, 14, 2)))
    with pytest.raises(InputError, match=r"shape \(2, 3, 9, 14\); give \(3, H, W\)"):
        to_tensor(torch.zeros(2, 3, 9, 14))


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint16, bool, complex, object])
def test_arrays_of_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match=r"dtype .*; give uint8 in 0\.\.255 or floats"):
        to_tensor(np.zeros((4, 4, 3), dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tensors_of_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match="dtype"):
        to_tensor(torch.zeros(3, 4, 4, dtype=dtype))


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1, 1), (0, np.nan), (0, np.inf), (0, 1.1)])
def test_floats_out_of_range_are_refused(low, high):
    values = np.full((4, 4, 3), low, np.float32)
    values[2, 1, 0] = high
    with pytest.raises(InputError, match=r"image values from .* floats in \[0, 1\]"):
        to_tensor(values)


@pytest.mark.parametrize("thing", [None, 3, [[1, 2]], b"bytes"])
def test_what_is_no_image_is_refused_by_type(thing):
    with pytest.raises(InputError, match=f"{type(thing).__name__} is not an image"):
        to_tensor(thing)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}/gone.png: no such image file"):
        to_tensor(tmp_path / "gone.png")
    with pytest.raises(InputError, match=f"^{tmp_path} is no file but a folder; give an image"):
        to_tensor(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_a_file_that_is_no_image_is_named(content, tmp_path):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: cannot be read as an image"):
        to_tensor(path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_refused_wherever_it_was_cut(picture, tmp_path, suffix):
    complete = tmp_path / f"complete.{suffix}"
    Image.fromarray(np.tile(picture, (4, 4, 1))).save(complete)
    content = complete.read_bytes()
    for keep in (len(content) // 10, len(content) // 2, len(content) * 9 // 10):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match=f"^{path}: cannot be read as an image"):
            to_tensor(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_file_that_claims_far_too_many_pixels_is_refused_before_they_are_decoded(tmp_path, side):
    path = png(tmp_path / "huge.png", side, side)
    with pytest.raises(InputError, match=f"^{path}: .*pixels"):
        to_tensor(path)


def test_the_size_limit_holds_for_arrays_and_tensors(picture, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 9 * 14)
    assert to_tensor(picture).shape == (1, 3, 9, 14)
    monkeypatch.setattr(images, "MAX_PIXELS", 9 * 14 - 1)
    for form in (picture, torch.from_numpy(picture).permute(2, 0, 1), Image.fromarray(picture)):
        with pytest.raises(InputError, match=r"14 x 9 pixels.*resize it"):
            to_tensor(form)


def test_a_large_jpeg_that_becomes_small_is_nearly_the_same(tmp_path):
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8))
    coarse.resize((1200, 900), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    whole = resized(to_tensor(tmp_path / "a.jpg"), (60, 80))
    assert read_image(tmp_path / "a.jpg", (60, 80)).shape == (225, 300, 3)
    assert (to_tensor(tmp_path / "a.jpg", (60, 80)) - whole).abs().max() < 0.03
    assert read_image(tmp_path / "a.jpg", (800, 900)).shape == (900, 1200, 3)
