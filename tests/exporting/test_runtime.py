"""The runtime: numpy and onnxruntime only; the same predictions as torch; one clear sentence for what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from simomerge import runtime
from simomerge.core.errors import InputError
from simomerge.core.images import read_image, to_tensor
from simomerge.exporting.writing import describe
from simomerge.runtime import Scene, check, difference, resized
from simomerge.runtime import scene as scene_file
from simomerge.runtime.__main__ import main

from .conftest import SIZE, Exported, frames_of
from .modules import small_model

WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "PIL", "click", "rich", "safetensors", "matplotlib"}:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Path:
    """The file and its golden frame in a folder of their own, to be damaged."""
    for file in exported.file.parent.iterdir():
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / exported.file.name


def by_torch(exported: Exported, frame: np.ndarray) -> dict[str, np.ndarray]:
    return exported.model.predict(frame)


# Predictions --------------------------------------------------------------------------------------------


def test_it_predicts_what_torch_predicts(exported: Exported) -> None:
    scene = Scene(exported.file, threads=1)
    for frame in frames_of(SIZE, 3):
        found, wanted = scene.predict(frame), by_torch(exported, frame)
        assert set(found) == {*wanted, "parts_probabilities"}
        assert np.array_equal(found["parts"], wanted["parts"]) and found["parts"].dtype == np.int64
        np.testing.assert_allclose(found["depth"], wanted["depth"], rtol=1e-4)
        np.testing.assert_allclose(found["normals"], wanted["normals"], atol=1e-4)
        assert found["parts_probabilities"].shape == (3, *SIZE)
        np.testing.assert_allclose(found["parts_probabilities"].sum(0), 1, atol=1e-5)
        assert np.array_equal(found["parts_probabilities"].argmax(0), found["parts"])


def test_a_batch_gives_what_its_frames_give(exported: Exported) -> None:
    scene, frames = Scene(exported.file, threads=1), frames_of(SIZE, 3)
    together = scene.predict(frames)
    assert len(together) == 3 and np.array_equal(scene.predict(np.stack(frames))[2]["depth"], together[2]["depth"])
    for one, frame in zip(together, frames, strict=True):
        np.testing.assert_allclose(one["depth"], scene.predict(frame)["depth"], rtol=1e-5)


def test_tasks_choose_outputs(exported: Exported) -> None:
    scene, (frame,) = Scene(exported.file, threads=1), frames_of(SIZE, 1)
    assert set(scene.predict(frame, ["depth"])) == {"depth"}
    assert set(scene.predict(frame, "parts")) == {"parts", "parts_probabilities"}
    with pytest.raises(InputError, match=r"unknown task 'colour'; .* predicts parts, depth, normals"):
        scene.predict(frame, ["colour"])


def test_frames_of_another_size_are_resized_and_back(exported: Exported) -> None:
    scene, (frame,) = Scene(exported.file, threads=1), frames_of((60, 84), 1)
    found = scene.predict(frame)
    half = scene.predict(resized(frame[None], SIZE)[0])
    assert found["depth"].shape == (60, 84) and found["normals"].shape == (3, 60, 84)
    assert np.array_equal(found["depth"], half["depth"].repeat(2, 0).repeat(2, 1))  # each pixel the nearest one's


@pytest.mark.parametrize("options", [{}, {"split": True}, {"raw": True}])
def test_flow_of_a_resized_frame_is_in_pixels_of_the_frame(tmp_path: Path, options: dict) -> None:
    """x by the ratio of the widths, y by that of the heights, as in torch. Disparity keeps its values."""
    from simomerge.exporting.export import export

    export(small_model(("flow", "disparity")), tmp_path / "scene.onnx", SIZE, **options)
    file = tmp_path / ("scene.encoder.onnx" if "split" in options else "scene.onnx")
    scene, (frame,) = Scene(file, threads=1), frames_of((60, 126), 1)
    flow, disparity = (f"{task}_logits" if "raw" in options else task for task in ("flow", "disparity"))
    found, small = scene.predict(frame), scene.predict(resized(frame[None], SIZE)[0])
    enlarged = {name: values.repeat(2, -2).repeat(3, -1) for name, values in small.items()}
    assert found[flow].shape == (2, 60, 126) and found[flow].dtype == np.float32
    np.testing.assert_allclose(found[flow], enlarged[flow] * [[[3]], [[2]]], rtol=1e-6)
    assert np.array_equal(found[disparity], enlarged[disparity])
    if not options:
        assert np.abs(found[flow] - small_model(("flow", "disparity")).predict(frame, size=SIZE)["flow"]).max() < 0.5


def test_resizing_is_that_of_torch() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (1, 40, 30, 3), np.uint8)
    tensor = torch.from_numpy(frame).permute(0, 3, 1, 2).float()
    for size in ((20, 15), (13, 47), (80, 61), (40, 30)):
        wanted = torch.nn.functional.interpolate(tensor, size, mode="bilinear", antialias=True)
        assert np.abs(resized(frame, size) - wanted.permute(0, 2, 3, 1).numpy()).max() <= 0.501


@pytest.mark.parametrize("kind", ["floats", "grey", "alpha", "path", "PIL"])
def test_frames_come_in_many_forms(exported: Exported, tmp_path: Path, kind: str) -> None:
    from PIL import Image

    scene, (frame,) = Scene(exported.file, threads=1), frames_of(SIZE, 1)
    grey = np.repeat(frame[..., :1], 3, 2)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    given = {
        "floats": frame / np.float32(255),
        "grey": frame[..., 0],
        "alpha": np.dstack([frame, frame[..., 0]]),
        "path": tmp_path / "frame.png",
        "PIL": Image.fromarray(frame),
    }[kind]
    wanted = scene.predict(grey if kind == "grey" else frame)
    assert np.array_equal(scene.predict(given)["depth"], wanted["depth"])
    assert len(scene.predict([given, given])) == 2


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16-big.tif", "16.pgm", "floats.tif", "turned.png", "turned.tif"])
def test_pictures_are_read_as_torch_reads_them(tmp_path: Path, name: str) -> None:
    """Pillow alone clips 16 bits to white, and floats to black."""
    from PIL import Image

    deep = np.linspace(0, 65535, 24).round().astype(np.uint16).reshape(4, 6)
    values = (deep / 65535).astype(np.float32) if name.startswith("floats") else deep
    image = Image.fromarray(deep.astype(">u2") if "big" in name else values)
    exif = image.getexif()
    exif[0x0112] = 6 if name.startswith("turned") else 1
    image.save(tmp_path / name, **({} if name.endswith("pgm") else {"exif": exif}))
    shades = np.rint(deep / 257).astype(np.uint8)
    wanted = np.repeat((np.rot90(shades, -1) if name.startswith("turned") else shades)[..., None], 3, 2)
    assert np.array_equal(runtime.read_picture(tmp_path / name), wanted)
    assert np.array_equal(read_image(tmp_path / name), wanted)
    with (tmp_path / name).open("rb") as file, Image.open(file) as opened:
        assert np.array_equal(scene_file.as_batch(opened)[0], wanted[None])
    with (tmp_path / name).open("rb") as file, Image.open(file) as opened:
        assert np.array_equal(np.rint(to_tensor(opened)[0].numpy().transpose(1, 2, 0) * 255), wanted)


def test_pictures_of_unknown_range_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((4, 6), 70000, np.int32)).save(tmp_path / "whole.tif")
    Image.fromarray(np.full((4, 6), 1.5, np.float32)).save(tmp_path / "large.tif")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:60])
    for name, message in (("whole.tif", "dtype int32"), ("large.tif", "floats in"), ("half.png", "truncated|broken")):
        for given in (tmp_path / name, Image.open(tmp_path / name)):
            with pytest.raises(InputError, match=rf"{name}: cannot be read as an image \(.*({message})"):
                scene_file.as_batch(given)
        with pytest.raises(InputError):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 5, 2), np.uint8), r"shape \(4, 5, 2\)"),
        (np.zeros((4, 5, 3), np.int32), "dtype int32"),
        (np.full((4, 5, 3), 7.0), "dtype float64"),
        ([np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], "differ in size"),
        ([], "no frames"),
        ("nowhere.png", "nowhere.png: cannot be read as an image"),
        (
            "nowhere.mp4",
            r"nowhere.mp4: cannot be read as an image .* Give predict the frames of video_frames\(file\)\.",
        ),
    ],
)
def test_what_is_no_frame_is_refused(exported: Exported, frames: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scene(exported.file, threads=1).predict(frames)


# Differences --------------------------------------------------------------------------------------------


def test_differences_are_in_the_tasks_measure() -> None:
    turned = np.array([[[np.sin(0.1)]], [[0.0]], [[np.cos(0.1)]]])
    up = np.array([[[0.0]], [[0.0]], [[1.0]]])
    assert difference("angle", turned, up) == pytest.approx(np.rad2deg(0.1))
    assert difference("angle", -up, up) == pytest.approx(180)
    assert difference("angle", up * 1e-3, up) == 0
    assert difference("relative", np.array([1.1, 4.0]), np.array([1.0, 4.0])) == pytest.approx(5)
    assert difference("range", np.array([0.5, 0.25]), np.array([0.5, 0.5])) == pytest.approx(12.5)
    assert difference("largest", np.array([0.0, 3.0]), np.array([-1.0, 3.0])) == pytest.approx(0.25)
    assert difference("range", np.array([np.nan, 0]), np.zeros(2)) == np.inf


# Starting -----------------------------------------------------------------------------------------------


def test_it_imports_nothing_but_numpy_and_at_once() -> None:
    code = WITHOUT_TORCH + "import numpy, time; start = time.process_time(); import simomerge.runtime as r\n"
    code += "print(time.process_time() - start, 'onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, loaded = done.stdout.split()
    assert float(seconds) < 0.3 and loaded == "False"


def test_one_copied_file_predicts_where_there_is_no_torch(exported: Exported, tmp_path: Path) -> None:
    shutil.copy(scene_file.__file__, tmp_path / "scene_runtime.py")
    (frame,) = frames_of(SIZE, 1)
    np.save(tmp_path / "frame.npy", frame)
    code = (
        WITHOUT_TORCH.replace('"torch",', '"torch", "simomerge",')
        + "import numpy as np; from scene_runtime import Scene\n"
    )
    code += "found = Scene(sys.argv[1]).predict(np.load('frame.npy')); np.save('depth.npy', found['depth'])"
    done = subprocess.run([sys.executable, "-c", code, exported.file], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "depth.npy"), by_torch(exported, frame)["depth"], rtol=1e-4)


def test_warming_up_and_threads(exported: Exported) -> None:
    scene = Scene(exported.file, threads=1)
    scene.warm_up()
    start = time.perf_counter()
    scene.predict(frames_of(SIZE, 1)[0])
    assert time.perf_counter() - start < 2


# The check on the device --------------------------------------------------------------------------------


def test_the_check_passes_on_a_fresh_file_and_fails_on_other_predictions(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = check(copied, threads=1)
    assert result["ok"] and [row["output"] for row in result["rows"]] == list(Scene(copied).outputs)
    assert main(["check", str(copied), "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "depth" in shown and "%, mean relative  ok" in shown and "ms per frame" in shown
    golden = runtime.golden_file(copied)
    with np.load(golden) as stored:
        changed = {**stored, "depth": stored["depth"] * 1.01}
    np.savez(golden, **changed)
    row = next(row for row in check(copied)["rows"] if row["output"] == "depth")
    assert row["difference"] == pytest.approx(100 * 0.01 / 1.01, rel=1e-3) and not row["ok"]
    assert main(["check", str(copied)]) == 1 and "DIFFERS" in capsys.readouterr().out


def test_info_is_the_description(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(copied)]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["tasks"]["parts"]["classes"] == ["wall", "floor", "sky"]
    assert info["tasks"]["parts"]["colours"] == [[9, 9, 9], [0, 255, 0], [0, 0, 255]]
    assert info["outputs"]["depth"]["unit"] == "m" and info["input"]["size"] == list(SIZE)
    assert [row["ok"] for row in info["verification"]] == [True] * len(info["verification"]) and info["verification"]


@pytest.mark.parametrize("damage", ["weights", "cut", "text", "newer", "foreign", "gone", "suffix"])
def test_a_file_that_is_not_as_it_was_written_is_refused(copied: Path, damage: str) -> None:
    content, message = copied.read_bytes(), "was changed after its export"
    if damage == "weights":
        place = len(content) // 3
        copied.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        message = "was changed after its export|cannot be loaded"
    elif damage == "cut":
        copied.write_bytes(content[: len(content) // 2])
        message = "cannot be loaded"
    elif damage == "text":
        copied.write_text("no model")
        message = "cannot be loaded"
    elif damage == "newer":
        copied.write_bytes(content.replace(b'{"format": 1,', b'{"format": 9,'))
        message = "format 9 is newer than this runtime reads; upgrade"
    elif damage == "foreign":
        import onnx

        model = onnx.load(copied)
        del model.metadata_props[:]
        onnx.save(model, copied)
        message = "was not written by `simomerge export`"
    elif damage == "gone":
        copied.unlink()
        message = "no such file"
    else:
        copied = copied.rename(copied.with_suffix(".pt2"))
        message = "does not run such files; load it with torch.export.load"
    with pytest.raises(InputError, match=message):
        Scene(copied)


def test_a_golden_frame_of_another_export_or_none_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = runtime.golden_file(copied)
    with np.load(golden) as stored:
        np.savez(golden, **{**stored, "export": "other"})
    with pytest.raises(InputError, match="belongs to another export"):
        check(copied)
    golden.unlink()
    assert main(["check", str(copied)]) == 2
    assert "scene.onnx.golden.npz: cannot be read" in capsys.readouterr().err


def test_a_golden_frame_of_an_earlier_version_is_read_if_it_belongs_to_the_file(copied: Path) -> None:
    earlier = copied.with_name("scene.golden.npz")
    runtime.golden_file(copied).rename(earlier)
    assert check(copied, threads=1)["ok"]
    with np.load(earlier) as stored:
        np.savez(earlier, **{**stored, "export": "other"})
    with pytest.raises(InputError, match=r"scene\.onnx\.golden\.npz: cannot be read .* or export the model again"):
        check(copied)


def test_a_provider_that_is_absent_is_named(exported: Exported) -> None:
    with pytest.raises(InputError, match=r"provider 'tensorrt' is not in this onnxruntime, which has .*CPU"):
        Scene(exported.file, providers=["tensorrt", "cpu"])
    assert Scene(exported.file, providers="cpu").tasks == ("parts", "depth", "normals")


@pytest.mark.parametrize("kept", [0, 100])
def test_a_golden_frame_that_was_copied_in_part_is_named(copied: Path, kept: int) -> None:
    golden = runtime.golden_file(copied)
    golden.write_bytes(golden.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"scene\.onnx\.golden\.npz: cannot be read"):
        check(copied)


def test_a_head_of_another_export_is_refused(copied: Path) -> None:
    head = copied.with_name("scene.depth.onnx")
    info = Scene(copied).info
    describe(Path(shutil.copy(copied, head)), {**info, "part": "head", "encoder": copied.name, "export": "other"})
    describe(copied, {**info, "part": "encoder", "heads": {"depth": head.name}, "outputs": {}})
    with pytest.raises(InputError, match=r"scene\.depth\.onnx: belongs to another export than scene\.onnx"):
        Scene(copied)
    describe(head, {**info, "part": "head", "encoder": copied.name})
    assert set(Scene(copied).outputs) == set(info["outputs"])
