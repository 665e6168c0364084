"""Exported files of OpenVINO and torch that were altered after their export are refused, as those of ONNX are."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from simomerge.core.errors import InputError
from simomerge.exporting.timing import opened
from simomerge.exporting.torch_file import describe_program, open_program
from simomerge.exporting.writing import describe, identity_of
from simomerge.runtime.scene import open_engine

CHANGED = "was changed after its export, is incomplete, or has no checksum; export the model again"
DESCRIPTION: dict[str, Any] = {
    "format": 1,
    "simomerge": "0.1",
    "input": {"layout": "floats"},
    "outputs": {"depth": {"measure": "relative"}},
}


def replaced(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert content.count(old) >= 1
    file.write_bytes(content.replace(old, new, 1))


# OpenVINO -----------------------------------------------------------------------------------------------


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """A graph that multiplies by two."""
    openvino = pytest.importorskip("openvino")
    from openvino import opset13

    image = opset13.parameter([2], np.float32, name="image")
    graph = opset13.multiply(image, opset13.constant(np.full(2, 2, np.float32)))
    openvino.save_model(openvino.Model([graph], [image]), str(tmp_path / "x.xml"), compress_to_fp16=False)
    return describe(tmp_path / "x.xml", DESCRIPTION)


def test_a_graph_of_openvino_holds_its_checksum(doubling: Path) -> None:
    describe(doubling, {**DESCRIPTION, "precision": "fp32"})  # again, as an export does after its verification
    engine = open_engine(doubling)
    assert engine.info["precision"] == "fp32"
    np.testing.assert_array_equal(engine.run([np.array([1, 3], np.float32)])[0], [2, 6])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'type="Multiply"', b'type="Add"'),
        (b"floats", b"bytes"),  # in the description
        (b"</net>", b"</net>\n"),
        (b"simomerge_sha256", b"simomerge_nothing"),
    ],
    ids=["operation", "description", "space", "no checksum"],
)
def test_an_altered_graph_of_openvino_is_refused(doubling: Path, old: bytes, new: bytes) -> None:
    replaced(doubling, old, new)
    with pytest.raises(InputError, match=rf"x\.xml: {CHANGED}"):
        open_engine(doubling)


def test_altered_weights_of_openvino_are_refused(doubling: Path) -> None:
    replaced(doubling.with_suffix(".bin"), np.float32(2).tobytes(), np.float32(3).tobytes())
    with pytest.raises(InputError, match=r"x\.bin: was changed after its export"):
        open_engine(doubling)


def test_the_identity_of_an_export_depends_on_graph_and_weights(doubling: Path) -> None:
    found = {identity_of({"model": doubling})}
    for suffix in (".xml", ".bin"):
        with doubling.with_suffix(suffix).open("ab") as file:
            file.write(b"\n")
        found.add(identity_of({"model": doubling}))
    assert len(found) == 3


# torch --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch with a convolution."""
    file = tmp_path_factory.mktemp("torch") / "x.pt2"
    torch.manual_seed(0)
    torch.export.save(torch.export.export(nn.Conv2d(3, 1, 1), (torch.ones(1, 3, 4, 4),)), file)
    describe_program(file, DESCRIPTION)
    describe_program(file, {**DESCRIPTION, "precision": "fp32"})
    return file


@pytest.fixture
def copied(program: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(program, tmp_path / "renamed.pt2"))


def test_a_file_of_torch_holds_a_checksum(copied: Path) -> None:
    module, info = open_program(copied)
    assert info["precision"] == "fp32" and len(info["sha256"]) == 64
    torch.manual_seed(0)
    image = torch.rand(1, 3, 4, 4)
    torch.manual_seed(0)
    torch.testing.assert_close(module(image), nn.Conv2d(3, 1, 1)(image))
    extra = {"simomerge.json": ""}
    torch.export.load(copied, extra_files=extra)  # as docs/export.md says
    assert json.loads(extra["simomerge.json"]) == info


def again(file: Path, change: Any, compress: int = zipfile.ZIP_STORED) -> None:
    """Write a ZIP file again; ``change`` gets the name and content of each entry and returns its content or None."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compress) as archive:
        for name, content in entries.items():
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, content: content, ""),
        (lambda name, content: content.replace(b"conv2d", b"conv1d") if "model" in name else content, CHANGED),
        (lambda name, content: content[:-1] + b"?" if "weight_0" in name else content, CHANGED),
        (lambda name, content: None if "sample_inputs" in name else content, CHANGED),
        (lambda name, content: content.replace(b"floats", b"bytes"), CHANGED),
        (lambda name, content: None if "simomerge.json" in name else content, "not written by `simomerge export`"),
        (
            lambda name, content: content.replace(b'"format": 1', b'"format": 9'),
            "whose format 9 is newer than this runtime reads; upgrade simomerge",
        ),
        (lambda name, content: content.replace(b'{"format": 1', b'{"format": '), "its description is damaged"),
    ],
    ids=["the same", "operation", "weights", "inputs", "layout", "foreign", "newer", "description"],
)
def test_an_altered_file_of_torch_is_refused_before_torch_reads_it(
    copied: Path, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    again(copied, change)
    if not message:
        assert open_program(copied)[1]["format"] == 1
        return
    monkeypatch.setattr("torch.export.load", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(InputError, match=rf"renamed\.pt2: .*{message}"):
        opened(str(copied), 1, None)


@pytest.mark.parametrize("damage", ["cut", "text", "bytes", "compressed", "gone"])
def test_a_damaged_file_of_torch_gives_one_clear_error(copied: Path, damage: str) -> None:
    content, message = copied.read_bytes(), r"cannot be loaded \(.*\); export the model again"
    if damage == "cut":
        copied.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        copied.write_text("no model")
    elif damage == "bytes":
        replaced(copied, b"conv2d", b"conv1d")
    elif damage == "compressed":
        again(copied, lambda name, content: content, zipfile.ZIP_DEFLATED)
    else:
        copied.unlink()
        message = "no such file"
    with pytest.raises(InputError, match=rf"renamed\.pt2: {message}"):
        open_program(copied)
