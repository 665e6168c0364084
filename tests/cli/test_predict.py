"""simomerge predict checks all files, and reads them one at a time, in the order given."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simomerge.core import images
from simomerge.core.errors import InputError
from simomerge.core.images import read_image
from simomerge.datasets.colours import colourise
from simomerge.datasets.legend import legend_of
from simomerge.datasets.load import load_data
from simomerge.datasets.stored import read_array
from simomerge.datasets.tasks import KINDS, Task
from simomerge.models import prediction
from simomerge.models.model import SimoModel
from simomerge.models.prediction import find_sources
from simomerge.models.predictions import predicted
from simomerge.models.saving import SCALES16

from .conftest import assert_mistake, simomerge


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    for index in range(4):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (20, 24, 3), np.uint8)).save(
            tmp_path / f"{3 - index}.png"
        )
    return [tmp_path / f"{3 - index}.png" for index in range(4)]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of images as they are read, and "predicted"."""
    found: list[str] = []
    read, predict = images.read_image, SimoModel.predict_batch

    def noted(path: str | Path) -> np.ndarray:
        found.append(Path(path).name)
        return read(path)

    def after(self: SimoModel, *given: object, **options: object) -> dict[str, torch.Tensor]:
        made = predict(self, *given, **options)
        found.append("predicted")
        return made

    monkeypatch.setattr(prediction, "read_image", noted)
    monkeypatch.setattr(SimoModel, "predict_batch", after)
    return found


def test_each_image_is_read_when_its_turn_comes(
    photos: list[Path], events: list[str], make_model, tmp_path: Path
) -> None:
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    done = simomerge("predict", tmp_path / "m", *photos, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert events == [word for photo in photos for word in (photo.name, "predicted")]
    assert [Path(name).name for name in done.json["written"]] == [f"{photo.stem}-depth.png" for photo in photos]


ODD_NAMES = [
    b"with space.png",
    "K\u00fcche\u2192\u65e5\u672c.png".encode(),
    b"caf\xe9.png",  # no UTF-8
    b"a=b.png",
    b"[x]*?.png",
    b"-dash.png",
    b"new\nline.png",
    b"a#b%20.png",
    b"CAPS.PNG",
    b"x.tar.png",
    b"'quote\".png",
]


def test_every_name_that_a_file_may_have(make_model, tmp_path: Path) -> None:
    photos = tmp_path / "photos [1] = 50%"
    photos.mkdir()
    names = [os.fsdecode(name) for name in ODD_NAMES]
    for name in names:
        Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(photos / name)
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    done = simomerge("predict", tmp_path / "m", photos, "-o", tmp_path / "out=é", "--as", "colours")
    assert done.code == 0, done.err
    expected = {f"{Path(name).stem}-depth.png" for name in names}
    assert {file.name for file in (tmp_path / "out=é").iterdir() if file.suffix == ".png"} == expected


def damage(file: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif how == "text":
        file.write_text("no picture")
    elif how == "inside":  # only decoding finds it
        content = bytearray(file.read_bytes())
        content[200:230] = bytes(30)
        file.write_bytes(content)
    else:
        Image.new("RGB", (30, 30)).save(file)
        monkeypatch.setattr(images, "MAX_PIXELS", 20 * 24)


@pytest.mark.parametrize("how", ["cut", "text", "huge"])
def test_nothing_is_loaded_if_no_file_can_be_read(
    how: str, photos: list[Path], events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for photo in photos[:2]:
        damage(photo, how, monkeypatch)
    one, two = (
        simomerge("predict", tmp_path / "no model", *photos[:count], "-o", tmp_path / "out") for count in (1, 2)
    )
    assert_mistake(one, "3.png")
    assert (two.code, two.out) == (2, "") and two.err.count("Warning: ") == 2
    last = two.err.splitlines()[-1]
    assert last == f"Error: 2 of 2 images cannot be read ({photos[0]}, {photos[1]}); nothing is predicted."
    assert not (tmp_path / "out").exists() and "predicted" not in events


@pytest.mark.parametrize("how", ["cut", "text", "huge", "inside"])
def test_a_file_that_cannot_be_read_is_left_out_and_named_at_the_end(
    how: str,
    photos: list[Path],
    events: list[str],
    make_model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    damage(photos[1], how, monkeypatch)
    done = simomerge("predict", tmp_path / "m", *photos, "-o", tmp_path / "out", "--json")
    assert done.code == 2 and list(done.json["broken"]) == [str(photos[1])]
    *_, message, last = done.err.splitlines()
    assert message == f"Warning: {done.json['broken'][str(photos[1])]}" and str(photos[1]) in message
    assert last == f"Error: 1 of 4 images cannot be read ({photos[1]}); the others are predicted."
    assert [Path(name).name for name in done.json["written"]] == [f"{name}-depth.png" for name in (3, 1, 0)]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == [f"{name}-depth.npy" for name in (0, 1, 3)]
    assert events.count("predicted") == 3


def test_progress_is_reported_from_the_first_second_on(
    photos: list[Path], make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    clock = iter(range(10**6))
    monkeypatch.setattr(prediction.time, "monotonic", lambda: next(clock))  # each look at a file takes a second
    done = simomerge("predict", tmp_path / "m", *photos, "-o", tmp_path / "out")
    assert done.code == 0
    lines = [" ".join(line.split()) for line in done.err.splitlines()]
    assert lines[:2] == ["load 0/1", "check 1/4"] and lines.index("check 4/4") < lines.index("load 1/1")
    assert lines[lines.index("load 1/1") + 1] == "predict 1/4" and lines[-1] == "predict 4/4"


# Kinds of input -----------------------------------------------------------------------------------------


def test_folders_patterns_and_files_come_in_the_order_given(photos: list[Path], tmp_path: Path) -> None:
    deep = tmp_path / "deep" / "down"
    deep.mkdir(parents=True)
    for name in ("b.jpg", "a.png"):
        Image.new("RGB", (5, 4)).save(deep / name)
    found = find_sources([str(photos[1]), str(tmp_path / "deep"), str(tmp_path / "[03].png")])
    assert [(Path(source.path).name, source.name) for source in found] == [
        (name, Path(name).stem) for name in ("2.png", "a.png", "b.jpg", "0.png", "3.png")
    ]
    again = find_sources([str(photos[0]), str(photos[0])])
    assert [source.name for source in again] == ["3-1", "3-2"]
    with pytest.raises(InputError, match="no file matches"):
        find_sources([str(tmp_path / "*.gif")])
    with pytest.raises(InputError, match="no such image file"):
        find_sources([str(tmp_path / "nowhere.png")])


def test_batches_give_what_single_images_give(photos: list[Path], make_model, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (200, 9, 9)).save(tmp_path / "odd.png")
    make_model([Task("depth"), Task("normals")]).save_pretrained(tmp_path / "m")
    given = ("predict", tmp_path / "m", *photos[:3], tmp_path / "odd.png", photos[3])
    for out, options in (("one", ()), ("many", ("--batch-size", "3"))):
        done = simomerge(*given, "-o", tmp_path / out, *options, "--as", "npz")
        assert done.code == 0, done.err
        assert [Path(name).name for name in done.out.split()] == ["3.npz", "2.npz", "1.npz", "odd.npz", "0.npz"]
    for file in (tmp_path / "one").iterdir():
        one, many = np.load(file), np.load(tmp_path / "many" / file.name)
        assert set(one) == {"depth", "normals"}
        for task in one:
            np.testing.assert_allclose(many[task], one[task], rtol=1e-4, atol=1e-5)


def test_a_list_of_images_gives_a_list_and_a_tensor_gives_tensors(photos: list[Path], make_model) -> None:
    model = make_model([Task("depth"), Task("parts", "segmentation", classes=("a", "b", "c"))])
    one_by_one = [model.predict(photo) for photo in photos]
    for ours, theirs in zip(model.predict(photos), one_by_one, strict=True):
        assert all(np.array_equal(ours[task], theirs[task]) for task in theirs)
    batch = torch.stack([torch.from_numpy(read_image(photo).copy()).permute(2, 0, 1) for photo in photos]).float() / 255
    model.train()
    found = model.predict_batch(batch)
    assert model.training and not found["depth"].requires_grad
    assert found["depth"].shape == (4, 20, 24) and found["parts"].dtype == torch.int64
    np.testing.assert_allclose(found["depth"][2], one_by_one[2]["depth"], rtol=1e-4)
    assert set(model.predict(photos[0], tasks=["depth"])) == {"depth"}
    with pytest.raises(InputError, match=r"batch of \(3, 20, 24\)"):
        model.predict_batch(batch[0])


@pytest.mark.parametrize("levels", [3, 1000])  # few levels: many ties, in which the first class wins
def test_labels_of_large_images_are_those_of_the_upscaled_logits(levels: int) -> None:
    """They are found class by class, which takes the memory of one class."""
    drawn = torch.randint(levels, (2, 7, 5, 6), generator=torch.Generator().manual_seed(0)).float()
    for size in ((5, 6), (40, 33)):
        upscaled = torch.nn.functional.interpolate(drawn, size, mode="bilinear", align_corners=False)
        labels = predicted(Task("parts", "segmentation", classes=tuple("abcdefg")), drawn, size)
        assert torch.equal(labels, upscaled.argmax(1)) and len(labels.unique()) >= 6
        expected = torch.nn.functional.normalize(upscaled[:, :3], dim=1)
        torch.testing.assert_close(predicted(Task("normals"), drawn[:, :3], size), expected)


def test_a_size_is_for_the_encoder_only(photos: list[Path], make_model) -> None:
    model = make_model([Task("depth")])
    small, own = model.predict(photos[0], size=(8, 8))["depth"], model.predict(photos[0])["depth"]
    assert small.shape == own.shape == (20, 24) and not np.allclose(small, own)
    image = torch.nn.functional.interpolate(images.to_tensor(photos[0]), (8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        wanted = torch.nn.functional.interpolate(model(image)["depth"], (20, 24), mode="bilinear")
    np.testing.assert_allclose(small, wanted[0, 0].clamp(min=1e-3), rtol=1e-4)


@pytest.mark.parametrize("how", ["size", "patches"])
def test_flow_of_a_resized_image_is_in_pixels_of_the_image(photos: list[Path], make_model, how: str) -> None:
    """x by the ratio of the widths, y by that of the heights. Disparity keeps its values."""
    model = make_model([Task("flow"), Task("disparity")])
    with torch.no_grad():  # the same everywhere, whatever the image is
        for head, values in zip(model.heads.values(), ((3.0, -2.0), (5.0,)), strict=True):
            head.output.weight.zero_()
            head.output.bias.copy_(torch.tensor(values).repeat_interleave(len(head.output.bias) // len(values)))
    own = model.predict(photos[0])
    assert own["flow"].shape == (2, 20, 24)
    np.testing.assert_allclose(own["flow"].mean((1, 2)), [3, -2], rtol=1e-5)
    size = (8, 12)
    if how == "patches":
        size = tuple(model.fit(torch.zeros(1, 3, 20, 24), max_patches=2).shape[-2:])
        assert size < (20, 24)
    found = model.predict(photos[0], **({"size": size} if how == "size" else {"max_patches": 2}))
    assert found["flow"].shape == (2, 20, 24) and found["flow"].dtype == np.float32
    np.testing.assert_allclose(found["flow"][0], 3 * 24 / size[1], rtol=1e-5)
    np.testing.assert_allclose(found["flow"][1], -2 * 20 / size[0], rtol=1e-5)
    np.testing.assert_allclose(found["disparity"], own["disparity"], rtol=1e-5)
    np.testing.assert_allclose(found["disparity"], 5, rtol=1e-5)


def test_images_of_another_size_than_the_training_images_are_a_warning(
    photos: list[Path], make_model, tmp_path: Path
) -> None:
    model = make_model([Task("depth")])
    model.provenance = {"training": {"size": [60, 72]}}
    model.save_pretrained(tmp_path / "model")
    done = simomerge("predict", tmp_path / "model", *photos, "-o", tmp_path / "out")
    assert done.code == 0 and done.err.count("Warning: ") == 1
    assert "3 has 24 x 20 pixels, the model's training images 72 x 60" in done.err and "--size 60x72;" in done.err
    for more in (("--size", "20x24"), ("--size", "60x72")):
        done = simomerge("predict", tmp_path / "model", *photos, "-o", tmp_path / "out", "--overwrite", *more)
        assert done.code == 0 and "Warning" not in done.err


# Kinds of output ----------------------------------------------------------------------------------------


STEPS = {"segmentation": 0, "depth": 5e-4, "disparity": 1 / 512, "normals": 1e-4, "autoencoder": 1 / 510}
"""Half a step of what is stored, by kind; the images of an autoencoder are read with 8 bits. All else has 1e-5."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("flow", "regression")])
def test_a_manifest_reads_pictures_of_16_bits(photos: list[Path], make_model, tmp_path: Path, kind: str) -> None:
    """With the scale that SCALES16 and docs/export.md name, or without one."""
    classes = ("a", "b", "c") if kind == "segmentation" else ()
    model = make_model([Task("task", kind, classes=classes)])
    with torch.no_grad():
        model.heads["task"].output.bias.add_(0.5)
    model.save_pretrained(tmp_path / "m")
    done = simomerge("predict", tmp_path / "m", photos[0], "-o", tmp_path / "out", "--as", "png16,npy")
    assert done.code == 0 and "Warning" not in done.err
    values = np.load(tmp_path / "out" / "3-task.npy")
    assert len(np.unique(values)) > 20 or kind == "segmentation"
    scale = {"scale": SCALES16[kind]} if kind in SCALES16 else {}
    about = {"kind": kind, **({"classes": list(classes)} if classes else {}), **scale}
    rows = [{"image": str(photos[0]), "task": str(tmp_path / "out" / "3-task-16.png")}]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"images": rows, "tasks": {"task": about}}))
    again = load_data(str(tmp_path / "data.yaml")).targets(0, ["task"])["task"].numpy()
    np.testing.assert_allclose(again.reshape(values.shape), values, atol=1.01 * STEPS.get(kind, 1e-5))
    if kind in SCALES16:  # as it is written in the docs
        text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
        (written,) = re.findall(rf"^\| `{kind}`.*`scale: ([0-9.]+)`", text, re.M)
        assert float(written) == pytest.approx(SCALES16[kind], rel=1e-6)


def test_kinds_without_bounds_have_no_pictures_of_16_bits(photos: list[Path], make_model, tmp_path: Path) -> None:
    for kind in ("flow", "regression"):
        make_model([Task(kind)]).save_pretrained(tmp_path / kind)
        done = simomerge("predict", tmp_path / kind, photos[0], "-o", tmp_path / "out", "--as", "png16")
        assert_mistake(done, f"task '{kind}' has values of any size, which 16 bits cannot hold; use npy")


@pytest.mark.parametrize(("kind", "largest"), [("depth", 65.535), ("disparity", 65535 / 256)])
def test_values_that_16_bits_cannot_hold_are_one_warning(
    photos: list[Path], make_model, tmp_path: Path, kind: str, largest: float
) -> None:
    model = make_model([Task(kind)])
    with torch.no_grad():
        model.heads[kind].output.weight.zero_()
        model.heads[kind].output.bias.fill_(largest - 1e-3)
    model.save_pretrained(tmp_path / "fits")
    with torch.no_grad():
        model.heads[kind].output.bias.fill_(300.0)
    model.save_pretrained(tmp_path / "large")
    done = simomerge("predict", tmp_path / "fits", *photos, "-o", tmp_path / "out", "--as", "png16")
    assert done.code == 0 and "Warning" not in done.err
    done = simomerge("predict", tmp_path / "large", *photos, "-o", tmp_path / "out", "--overwrite", "--as", "png16")
    assert done.code == 0 and done.err.count("Warning: ") == 1
    assert f"3-{kind}-16.png: 16 bits hold {kind} up to {largest:.6g} only, and the largest value is 300." in done.err
    stored = read_array(tmp_path / "out" / f"3-{kind}-16.png")
    assert stored.dtype == np.uint16 and (stored == 65535).all()


def test_an_overlay_is_half_image_and_half_colours(photos: list[Path], make_model, tmp_path: Path) -> None:
    model = make_model([Task("depth")])
    model.save_pretrained(tmp_path / "m")
    given = ("predict", tmp_path / "m", photos[0], "-o", tmp_path / "out", "--as", "colours", "--no-legend")
    assert simomerge(*given, "--overlay").code == 0
    colours = colourise(Task("depth"), model.predict(photos[0])["depth"])
    assert np.array_equal(read_image(tmp_path / "out" / "3-depth.png"), read_image(photos[0]) // 2 + colours // 2)
    assert_mistake(simomerge(*given), "out has files in it; choose another folder, or give --overwrite")
    assert simomerge(*given, "--overwrite").code == 0
    assert np.array_equal(read_image(tmp_path / "out" / "3-depth.png"), colours)


def test_below_a_picture_stands_what_its_colours_mean(photos: list[Path], make_model, tmp_path: Path) -> None:
    model = make_model([Task("depth")])
    model.save_pretrained(tmp_path / "m")
    assert simomerge("predict", tmp_path / "m", photos[0], "-o", tmp_path / "out", "--as", "colours").code == 0
    values = model.predict(photos[0])["depth"]
    written, colours = read_image(tmp_path / "out" / "3-depth.png"), colourise(Task("depth"), values)
    assert np.array_equal(written[:20, :24], colours) and (written[:20, 24:] == 255).all()
    legend = legend_of(Task("depth"), values)
    below = written[20:].reshape(-1, 3)
    assert {tuple(colour) for colour in legend.bar} <= {tuple(colour) for colour in below}
    assert float(legend.low) == pytest.approx(values.min(), rel=0.01) and legend.high.endswith(" m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--as", "gif"), "unknown kind of output 'gif'; choose some of colours, npy"),
        (("--tasks", "dept"), "did you mean 'depth'"),
        (("--size", "big"), "size big: give HEIGHTxWIDTH"),
        (("--device", "cuda:77"), "device 'cuda:77' cannot be used here"),
        (("--device", "toaster"), "device 'toaster' cannot be used here"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_writes_nothing(
    photos: list[Path], make_model, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    assert_mistake(simomerge("predict", tmp_path / "m", photos[0], "-o", tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()


def test_half_precision_changes_little(photos: list[Path], make_model, tmp_path: Path) -> None:
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    for out, options in (("full", ()), ("half", ("--half",))):
        done = simomerge("predict", tmp_path / "m", photos[0], "-o", tmp_path / out, "--as", "npy", *options)
        assert done.code == 0, done.err
    full, half = (np.load(tmp_path / out / "3-depth.npy") for out in ("full", "half"))
    assert half.dtype == np.float32 and 0 < np.abs(full - half).max() < 0.05


@pytest.mark.parametrize("linked", [False, True])
def test_no_input_is_replaced(photos: list[Path], events: list[str], make_model, tmp_path: Path, linked: bool) -> None:
    """A folder that is predicted into itself for the second time holds pictures with names of results."""
    make_model([Task("depth"), Task("edges")]).save_pretrained(tmp_path / "m")
    folder = tmp_path / "photos"
    folder.mkdir()
    photos[0].rename(folder / "a.png")
    given = ("predict", tmp_path / "m", folder, "-o", folder, "--overwrite", "--as")
    assert simomerge(*given, "colours,png16,npy", "--tasks", "edges").code == 0
    if linked:
        (folder / "a-edges.png").rename(tmp_path / "elsewhere.png")
        (folder / "a-edges.png").symlink_to(tmp_path / "elsewhere.png")
    before = {file: file.read_bytes() for file in sorted(folder.iterdir())}
    events.clear()
    for kind, name in (("colours", "a-edges.png"), ("png16", "a-edges-16.png")):
        assert_mistake(simomerge(*given, kind), f"{name} is the input .*{name} and would be replaced: choose another")
    assert {file: file.read_bytes() for file in sorted(folder.iterdir())} == before and not events
    done = simomerge(*given, "colours", "--tasks", "depth", "--json")  # no input has these names
    assert done.code == 0 and (folder / "a-depth.png").is_file()
    assert {file: file.read_bytes() for file in before} == before


# Video --------------------------------------------------------------------------------------------------


def write_video(file: Path, rate: int | Fraction) -> None:
    """Three frames of 32 x 48 pixels, each brighter than the one before."""
    av = pytest.importorskip("av")
    file.parent.mkdir(exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for level in (40, 120, 200):
            image = np.full((32, 48, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_a_video_in_and_a_video_out(make_model, tmp_path: Path) -> None:
    write_video(tmp_path / "drive.mp4", 10)
    make_model([Task("depth"), Task("edges")]).save_pretrained(tmp_path / "m")
    done = simomerge("predict", tmp_path / "m", tmp_path / "drive.mp4", "-o", tmp_path / "out", "--as", "npz,video")
    assert done.code == 0, done.err
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"drive.mp4", "drive-000001.npz", "drive-000002.npz", "drive-000003.npz"}
    shown = list(prediction.video_frames(tmp_path / "out" / "drive.mp4"))
    assert len(shown) == 3 and shown[0].shape == (32, 3 * 48, 3)
    levels = [frame[:, :48].mean() for frame in shown]  # the left third is the input
    assert np.abs(np.array(levels) - [40, 120, 200]).max() < 6


@pytest.mark.parametrize("rate", [50, Fraction(30000, 1001)])
def test_a_video_keeps_its_speed(make_model, tmp_path: Path, rate: int | Fraction) -> None:
    av = pytest.importorskip("av")
    write_video(tmp_path / "drive.mp4", rate)
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    given = ("predict", tmp_path / "m", tmp_path / "drive.mp4", "-o", tmp_path / "out", "--as", "video")
    assert simomerge(*given).code == 0
    with av.open(str(tmp_path / "out" / "drive.mp4")) as container:
        assert container.streams.video[0].average_rate == rate


def test_a_camera_has_25_frames_per_second(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    monkeypatch.setattr(prediction, "video_frames", lambda path: iter([np.zeros((32, 48, 3), np.uint8)] * 3))
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    done = simomerge("predict", tmp_path / "m", "camera:0", "-o", tmp_path / "out", "--as", "video")
    assert done.code == 0, done.err
    with av.open(str(tmp_path / "out" / "camera-0.mp4")) as container:
        assert container.streams.video[0].average_rate == 25


def test_a_source_video_is_never_replaced(make_model, tmp_path: Path) -> None:
    """Neither by the video of its results, nor a picture by one of its frames."""
    write_video(tmp_path / "videos" / "drive.mp4", 10)
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    video = tmp_path / "videos" / "drive.mp4"
    content = video.read_bytes()
    given = ("predict", tmp_path / "m", video, "-o", video.parent, "--overwrite", "--as")
    assert_mistake(simomerge(*given, "video"), r"drive\.mp4 is the input .* would be replaced: choose another folder")
    assert video.read_bytes() == content and list(video.parent.iterdir()) == [video]
    assert simomerge(*given, "colours").code == 0
    frame = video.parent / "drive-000002-depth.png"
    both = ("predict", tmp_path / "m", video, frame, "-o", video.parent, "--overwrite", "--as", "colours")
    # Their names begin alike, so that the frames of the video are drive-1-000001 and so on.
    assert simomerge(*both).code == 0
    frame.rename(video.parent / "drive-1-000002-depth.png")
    both = (*both[:3], video.parent / "drive-1-000002-depth.png", *both[4:])
    assert_mistake(simomerge(*both), r"drive-1-000002-depth\.png is the input")


def test_a_video_that_cannot_be_read_is_named(make_model, tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_text("no video")
    make_model([Task("depth")]).save_pretrained(tmp_path / "m")
    done = simomerge("predict", tmp_path / "m", tmp_path / "broken.mp4", "-o", tmp_path / "out")
    assert_mistake(done, r"broken\.mp4: cannot be read as a video")
    assert not (tmp_path / "out").exists()
