"""Every dtype of the safetensors format: floats are merged, narrow floats refused, everything else kept."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from simomerge.core.errors import InputError
from simomerge.merging.disk.merge import merge_on_disk

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
FLOATS = ("F16", "BF16", "F32", "F64")


def stored(values: np.ndarray, dtype: str) -> bytes:
    """The bytes of float values in a float dtype of the format."""
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def read(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def write(path: Path, dtype: str, raw: bytes, extra: bytes) -> Path:
    """A file with 16 entries of a dtype and four of float32, made by hand."""
    header = {
        "w": {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, len(raw)]},
        "s": {"dtype": "F32", "shape": [4], "data_offsets": [len(raw), len(raw) + len(extra)]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw + extra)
    return path


def tensor(path: Path) -> tuple[str, bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + length])["w"]
    begin, end = entry["data_offsets"]
    return entry["dtype"], content[8 + length + begin : 8 + length + end]


@pytest.mark.filterwarnings("ignore:.*does not record its base")
@pytest.mark.parametrize("dtype", BITS)
def test_a_merge_of_weights_of_any_dtype_is_right_or_refused(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    files, values, raws = {}, {}, {}
    for name in ("base", "a", "b"):
        values[name] = random.normal(size=16)
        if dtype in FLOATS:
            raws[name] = stored(values[name], dtype)
        else:
            raws[name] = random.integers(0, 2 if dtype == "BOOL" else 120, 2 * BITS[dtype]).astype("u1").tobytes()
        raws[name] = raws[name][:16] if dtype == "BOOL" else raws[name]
        files[name] = write(tmp_path / f"{name}.safetensors", dtype, raws[name], stored(random.normal(size=4), "F32"))
    output = tmp_path / "merged.safetensors"
    experts = {"a": files["a"], "b": files["b"]}
    if dtype in FLOATS:
        merge_on_disk(files["base"], experts, output, "average")
        kept, raw = tensor(output)
        expected = (read(raws["a"], dtype) + read(raws["b"], dtype)) / 2
        tolerance = {"F16": 2**-11, "BF16": 2**-8, "F32": 2**-22, "F64": 2**-22}[dtype]
        assert kept == dtype
        np.testing.assert_allclose(read(raw, dtype), expected, rtol=tolerance, atol=1e-6)
        return
    if dtype[0] == "F":
        with pytest.raises(InputError, match=f"'w' is stored as {dtype}"):
            merge_on_disk(files["base"], experts, output, "average")
        assert not output.exists()
        return
    with pytest.warns(UserWarning, match="differ in 1 tensor that holds no floats: w. Those of the base are kept"):
        merge_on_disk(files["base"], experts, output, "average")
    assert tensor(output) == (dtype, raws["base"])


@pytest.mark.parametrize("dtype", [dtype for dtype in BITS if dtype[0] in "BUI" and dtype != "BF16"])
def test_counters_and_masks_that_are_equal_are_kept(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(1)
    raw = random.integers(0, 2, 2 * BITS[dtype]).astype("u1").tobytes()
    files = {
        name: write(tmp_path / f"{name}.safetensors", dtype, raw, stored(random.normal(size=4), "F32"))
        for name in ("base", "a", "b")
    }
    output = tmp_path / "merged.safetensors"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge_on_disk(files["base"], {"a": files["a"], "b": files["b"]}, output, "average")
    assert not any("no floats" in str(each.message) for each in caught)
    assert tensor(output) == (dtype, raw)


def test_counters_and_masks_are_compared_before_anything_is_written(tmp_path: Path) -> None:
    extra = stored(np.ones(4), "F32")
    base = write(tmp_path / "base.safetensors", "I8", bytes(16), extra)
    expert = write(tmp_path / "a.safetensors", "I8", bytes(range(16)), stored(np.zeros(4), "F32"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no floats")
        with pytest.raises(UserWarning, match="no floats"):
            merge_on_disk(base, {"a": expert}, tmp_path / "out.safetensors", "average")
    assert not (tmp_path / "out.safetensors").exists()
