"""simomerge export: options, formats, precisions, and what happens if something is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from cli.conftest import assert_mistake, simomerge
from simomerge.cli import COMMANDS
from simomerge.core.errors import InputError
from simomerge.exporting import verification
from simomerge.exporting.export import export
from simomerge.exporting.graph import HeadGraph, Outputs
from simomerge.exporting.precision import (
    _decibels,
    coarse_layers,
    outer_layers,
    products_of_activations,
    score_nodes,
)
from simomerge.models.model import SimoModel
from simomerge.runtime import Scene, check

from .conftest import SIZE, Exported, frames_of
from .modules import TASKS, SecretEncoder, SortingHead, small_model


def listing(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*")}


# What it writes -----------------------------------------------------------------------------------------


def test_the_table_has_every_output_on_random_and_real_images(exported: Exported) -> None:
    rows = exported.said["verification"]
    outputs = ["parts", "parts_probabilities", "depth", "normals"]
    assert [(row["output"], row["images"]) for row in rows] == [
        (output, source) for source in ("random", "given") for output in outputs
    ]
    assert all(row["ok"] and 0 <= row["difference"] <= row["limit"] for row in rows)
    assert {row["output"]: row["measure"] for row in rows}["normals"] == "deg, mean"
    assert Scene(exported.file).info["verification"] == rows
    assert listing(exported.file.parent) == {"scene.onnx", "scene.onnx.golden.npz"}


def test_the_graph_is_plain_onnx_with_baked_constants(exported: Exported) -> None:
    import onnx

    model = onnx.load(exported.file)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    assert [each.name for each in model.graph.output] == ["parts", "parts_probabilities", "depth", "normals"]
    kinds = {node.op_type for node in model.graph.node}
    assert "Resize" in kinds and not kinds & {"BatchNormalization", "If", "Loop", "Constant"}


def test_its_provenance_and_normalisation_are_in_the_file(exported: Exported) -> None:
    info = Scene(exported.file).info
    assert info["mean"] == [0, 0, 0] and info["std"] == [1, 1, 1] and info["precision"] == "fp32"
    assert info["provenance"] == exported.model.provenance


# Wrong input, found before any work ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "scene.tflite"}, "the suffix chooses the format; use .onnx, .xml, .pt2"),
        ({"size": "big"}, "size big: give HEIGHTxWIDTH"),
        ({"size": (0, 4)}, "give HEIGHTxWIDTH"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"precision": "int8"}, "int8 is calibrated on images"),
        ({"precision": "int8", "images": "nowhere"}, "nowhere: no such folder"),
        ({"precision": "fp16", "output": "scene.pt2"}, "torch files are in fp32"),
        ({"split": True, "output": "scene.xml"}, "--split writes .onnx files"),
        ({"opset": 11}, "opset 11: torch's exporter writes 18 to"),
        ({"layout": "bgr"}, "unknown layout 'bgr'"),
        ({"tasks": "dept"}, "did you mean 'depth'"),
        ({"limits": {"colour": 1}}, "a limit for 'colour', but the export has depth, parts"),
        ({"limits": {"depth": -1}}, "the limit -1 for 'depth'"),
        ({"raw": True, "probabilities": True}, "--raw gives logits only"),
        ({"sizes": 3}, "export has no option 'sizes': choose from precision, dynamic"),
        ({"precison": "fp16"}, "export has no option 'precison': did you mean 'precision'?"),
        ({"count": 0}, "0 images to calibrate on"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(tmp_path: Path, change: dict, message: str) -> None:
    given = {"output": "scene.onnx", "size": SIZE, **change}
    output = tmp_path / "new" / given.pop("output")
    with pytest.raises(InputError, match=re.escape(message) if "." in message else message):
        export(small_model(), output, **given)
    assert listing(tmp_path) == set()


def test_an_encoder_without_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an encoder without heads predicts nothing"):
        export(SimoModel(small_model().encoder, {}, {}), tmp_path / "scene.onnx", SIZE)


def test_files_that_exist_are_not_replaced(exported: Exported) -> None:
    before = exported.file.read_bytes()
    with pytest.raises(InputError, match=r"scene\.onnx already exists"):
        export(exported.model, exported.file, SIZE)
    assert exported.file.read_bytes() == before


def test_the_weights_of_another_file_are_not_replaced(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "scene.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"scene\.bin already exists"):
        export(small_model(("depth",)), tmp_path / "scene.xml", SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["scene.bin"]
    assert (tmp_path / "scene.bin").read_bytes() == b"mine"


def test_what_a_killed_export_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".scene.onnx.0123456789ab.tmp").mkdir()
    seen = []

    def stopped(job: object, folder: Path, *rest: object) -> None:
        seen.extend([folder.parent, listing(tmp_path)])
        raise KeyboardInterrupt

    monkeypatch.setattr("simomerge.exporting.export._write_verified", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(small_model(("depth",)), tmp_path / "scene.onnx", SIZE)
    assert seen[0] == tmp_path and ".scene.onnx.lock" in seen[1] and len(seen[1]) == 2
    assert not listing(tmp_path)


def test_packages_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(InputError, match=r"openvino needs openvino: pip install .*\[export,openvino\]"):
        export(small_model(), tmp_path / "scene.xml", SIZE)


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"none of the 1 images can be read, first .*a\.png"):
        export(small_model(), tmp_path / "scene.onnx", SIZE, images=tmp_path / "photos", precision="int8")


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "m")
    done = simomerge("export", tmp_path / "m", "-o", tmp_path / "s.onnx", "--size", "30x42", "--limit", "depth=much")
    assert_mistake(done, "--limit depth=much: give a number")
    assert "export" in COMMANDS and not (tmp_path / "s.onnx").exists()


# Verification -------------------------------------------------------------------------------------------


def rows_for(found: np.ndarray, wanted: np.ndarray, limit: float) -> list[dict]:
    outputs = {"depth": {"task": "depth", "measure": "relative", "limit": limit}}
    frames = {"given": [np.zeros((2, 2, 3), np.uint8)]}
    return verification.verify(
        lambda given: [{"depth": found}] * len(given), frames, {"given": [{"depth": wanted}]}, outputs
    )


def test_a_difference_beyond_the_limit_is_an_error_that_names_it() -> None:
    rows = rows_for(np.full((2, 2), 1.03), np.ones((2, 2)), 1.0)
    assert rows[0]["difference"] == pytest.approx(3) and not rows[0]["ok"]
    with pytest.raises(InputError, match=r"nothing was written, because depth differs from torch by 3 \(%, mean rel"):
        verification.check_rows(rows, "scene.onnx")
    verification.check_rows(rows_for(np.full((2, 2), 1.03), np.ones((2, 2)), 4.0), "scene.onnx")
    with pytest.raises(InputError, match="Sizes cannot be free here: leave out --dynamic"):
        verification.check_rows([{**rows[0], "images": verification.OTHER_SIZE}], "scene.onnx")


def test_images_to_calibrate_on_are_others_than_those_to_compare() -> None:
    images = frames_of((8, 10), 12)
    calibration, real = verification.real_frames(images, (8, 10), 64)
    both = {frame.tobytes() for frame in calibration} & {frame.tobytes() for frame in real}
    assert (len(calibration), len(real), both) == (8, 4, set())
    calibration, real = verification.real_frames(images[:2], (16, 20), 64)
    assert len(calibration) == len(real) == 2 and real[0].shape == (16, 20, 3)


def test_scores_of_attention_are_found() -> None:
    from onnx import helper

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], "project"),
        helper.make_node("MatMul", ["q", "k"], ["s"], "scores"),
        helper.make_node("Mul", ["s", "c"], ["m"], "scale"),
        helper.make_node("Add", ["m", "mask"], ["a"], "masked"),
        helper.make_node("Softmax", ["a"], ["p"], "softmax"),
        helper.make_node("MatMul", ["p", "v"], ["o"], "values"),
    ]
    assert sorted(score_nodes(helper.make_model(helper.make_graph(nodes, "g", [], [])))) == [
        "masked",
        "scale",
        "scores",
    ]


def test_the_outer_layers_are_those_next_to_images_and_outputs() -> None:
    from onnx import TensorProto, helper

    def value(name: str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    nodes = [
        helper.make_node("Cast", ["image"], ["x"], "cast", to=1),
        helper.make_node("Conv", ["x", "w1"], ["maps"], "patches"),
        helper.make_node("Shape", ["x"], ["size"], "size"),
        helper.make_node("Expand", ["w1", "size"], ["token"], "token"),
        helper.make_node("Concat", ["maps", "token"], ["a"], "tokens"),
        helper.make_node("MatMul", ["a", "w2"], ["b"], "block"),
        helper.make_node("MatMul", ["b", "a"], ["c"], "attention"),
        helper.make_node("MatMul", ["c", "w3"], ["d"], "depth"),
        helper.make_node("Clip", ["d"], ["out"], "clip"),
        helper.make_node("Conv", ["c", "w4"], ["logits"], "labels"),
        helper.make_node("ArgMax", ["logits"], ["other"], "argmax"),
    ]
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in ("w1", "w2", "w3", "w4")]
    graph = helper.make_graph(nodes, "g", [value("image")], [value("out"), value("other")], weights)
    assert sorted(outer_layers(helper.make_model(graph))) == ["depth", "labels", "patches"]
    assert products_of_activations(helper.make_model(graph)) == ["attention"]


def test_layers_whose_inputs_lose_much_stay(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["a"], "first"),
        node("Mul", ["a", "large"], ["outliers"], "mul"),
        node("MatMul", ["outliers", "w"], ["b"], "coarse"),
        node("MatMul", ["a", "w"], ["y"], "fine"),
    ]
    large = np.ones(64, np.float32)
    large[3] = 400  # one channel of 64 has nearly all of the range
    constants = {"w": rng.normal(size=(64, 64)).astype(np.float32) / 8, "large": large}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 50, 64))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "by"],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    save(model, tmp_path / "g.onnx")
    batches = [{"x": rng.normal(size=(1, 50, 64)).astype(np.float32)} for _ in range(3)]
    assert coarse_layers(tmp_path / "g.onnx", batches) == ["coarse"]
    values = batches[0]["x"][0] @ constants["w"] * large
    step = (values.max() - values.min()) / 255
    seen = np.concatenate([[values.min(), values.max()], values.var(0)])[None]
    errors = (np.round(values / step) * step - values)[:, 4:]  # of small channels, which round to zero
    assert errors.std() > 0.9 * values[:, 4:].std() and _decibels(seen) < 0
    normal = rng.normal(size=(1000, 64))
    seen = np.concatenate([[normal.min(), normal.max()], normal.var(0)])[None]
    step = (normal.max() - normal.min()) / 255
    measured = 10 * np.log10(normal.var() / np.square(np.round(normal / step) * step - normal).mean())
    assert _decibels(seen) == pytest.approx(measured, abs=0.5) and measured > 35


# Whole exports ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_precisions_and_formats(tmp_path: Path, suffix: str, precision: str) -> None:
    if suffix == ".xml":
        pytest.importorskip("openvino")
    model, file = small_model(), tmp_path / f"scene{suffix}"
    said = export(model, file, SIZE, precision=precision, images=frames_of(SIZE, 12))
    assert check(file, threads=1)["ok"] and Scene(file).info["precision"] == precision
    frame = frames_of(SIZE, 5)[0]
    depth, wanted = Scene(file, threads=1).predict(frame)["depth"], model.predict(frame)["depth"]
    error = float(np.abs(depth / wanted - 1).mean())
    low, high = {"fp32": (0, 1e-6), "fp16": (1e-6, 1e-3), "int8": (1e-5, 2e-2)}[precision]
    assert low <= error <= high and said["bytes"] > 1000


@pytest.mark.slow
def test_a_file_of_torch_holds_the_same(tmp_path: Path) -> None:
    model, (frame,) = small_model(), frames_of(SIZE, 1)
    export(model, tmp_path / "scene.pt2", SIZE, images=frames_of(SIZE, 2), layout="floats")
    extra = {"simomerge.json": ""}
    module = torch.export.load(tmp_path / "scene.pt2", extra_files=extra).module()
    info = json.loads(extra["simomerge.json"])
    image = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    found = dict(zip(info["outputs"], module(image), strict=True))
    np.testing.assert_allclose(found["depth"][0].detach(), model.predict(frame)["depth"], rtol=1e-5)
    assert info["verification"] and info["input"]["layout"] == "floats"


def test_formats_and_parts_of_one_name_have_golden_frames_of_their_own(tmp_path: Path) -> None:
    """docs/export.md writes scene.onnx, scene.xml and scene.pt2 into one folder."""
    model, frames = small_model(("depth",)), frames_of(SIZE, 2)
    goldens = {}
    for name, options in {"scene.onnx": {}, "scene.encoder.onnx": {"split": True}, "scene.pt2": {}}.items():
        given = name.replace(".encoder", "")
        _, *others, golden = export(model, tmp_path / given, SIZE, images=frames, **options)["files"]
        assert Path(golden).name == f"{name}.golden.npz" and len(others) == len(options)
        with np.load(golden) as stored:
            goldens[name] = str(stored["export"])
    assert len(set(goldens.values())) == 3
    for name in ("scene.onnx", "scene.encoder.onnx"):
        assert check(tmp_path / name, threads=1)["ok"]
    with pytest.raises(InputError, match=r"scene\.encoder\.onnx already exists"):
        export(model, tmp_path / "scene.onnx", SIZE, images=frames, split=True)
    (tmp_path / "scene.encoder.onnx").unlink()
    (tmp_path / "scene.depth.onnx").unlink()
    with pytest.raises(InputError, match=r"scene\.encoder\.onnx\.golden\.npz already exists"):
        export(model, tmp_path / "scene.onnx", SIZE, images=frames, split=True)


@pytest.mark.slow
def test_heads_of_a_split_export_run_at_their_own_rates(tmp_path: Path) -> None:
    model, (frame,) = small_model(), frames_of(SIZE, 1)
    said = export(model, tmp_path / "scene.onnx", SIZE, images=frames_of(SIZE, 2), split=True, raw=True)
    names = ["scene.encoder.onnx", "scene.parts.onnx", "scene.depth.onnx", "scene.encoder.onnx.golden.npz"]
    assert [Path(file).name for file in said["files"]] == names
    scene = Scene(tmp_path / names[0], threads=1)
    features = scene.encode(frame)
    assert set(scene.decode(features, ["depth"])) == {"depth_logits"}
    with torch.no_grad():
        logits = model(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255)
    for task, value in logits.items():
        np.testing.assert_allclose(scene.decode(features)[f"{task}_logits"], value[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"one head of a split export; open the file scene\.encoder\.onnx"):
        Scene(tmp_path / "scene.depth.onnx")
    (tmp_path / "scene.depth.onnx").unlink()
    with pytest.raises(InputError, match=r"scene\.depth\.onnx: no such file"):
        Scene(tmp_path / names[0])


@pytest.mark.slow
def test_a_head_that_cannot_be_exported_runs_on_the_encoder_of_a_split_export(tmp_path: Path) -> None:
    """The error about such a head offers this."""
    model, (frame,) = small_model(("depth",)), frames_of(SIZE, 1)
    heads = {"depth": model.heads["depth"], "edges": SortingHead()}
    model = SimoModel(model.encoder, {name: TASKS[name] for name in heads}, heads).eval()
    export(model, tmp_path / "scene.onnx", SIZE, images=frames_of(SIZE, 2), tasks="depth", split=True)
    found = [torch.from_numpy(each) for each in Scene(tmp_path / "scene.encoder.onnx", threads=1).encode(frame)]
    head = HeadGraph(model, Outputs({"edges": TASKS["edges"]}, raw=True), SIZE)
    with torch.no_grad():
        expected = model(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255)["edges"]
        torch.testing.assert_close(head(found)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "head", "limit"])
def test_what_cannot_be_exported_is_named_and_nothing_is_written(tmp_path: Path, part: str) -> None:
    model, limits = small_model(("depth",)), {}
    if part == "encoder":
        model, message = small_model(encoder=SecretEncoder()), "the encoder .*SecretEncoder.* depends on the values"
    elif part == "head":
        heads = {"depth": model.heads["depth"], "edges": SortingHead()}
        model = SimoModel(model.encoder, {name: TASKS[name] for name in heads}, heads)
        message = "the head of .edges. .*SortingHead.* operation .*bessel_j0.* with --tasks depth, and with --split if"
    else:
        limits, message = {"depth": 0}, "nothing was written, because depth differs"
    with pytest.raises(InputError, match=message):
        export(model, tmp_path / "scene.onnx", SIZE, images=frames_of(SIZE, 2), limits=limits)
    assert listing(tmp_path) == set()


@pytest.mark.slow
def test_the_command_writes_the_file_and_prints_the_table(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "m")
    given = ("export", tmp_path / "m", "-o", tmp_path / "s.onnx", "--size", "30x42", "--tasks", "depth")
    done = simomerge(*given)
    assert done.code == 0, done.err
    assert "Difference from torch:" in done.out and "2 rooms" in done.out and "2 random" in done.out
    assert f"python -m simomerge.runtime check {tmp_path / 's.onnx'}" in done.out
    assert Scene(tmp_path / "s.onnx").tasks == ("depth",)
    assert_mistake(simomerge(*given), r"s\.onnx exists")
