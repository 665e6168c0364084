"""Images without labels: what a user may give, and how they come in batches."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.core.images import to_tensor
from simomerge.core.progress import show_progress
from simomerge.datasets import DenseDataset
from simomerge.datasets.pictures import SUFFIXES, Images, as_images, files_of, image_batches
from simomerge.datasets.tasks import Task


def grey(value: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def save(folder: Path, name: str, value: int, height: int = 6, width: int = 8) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey(value, height, width)).save(path)
    return path


def values(images: Any) -> list[int]:
    """The grey of every image, which tells which one it is."""
    return [round(float(images.image(i).mean()) * 255) for i in range(len(images))]


class Labelled(DenseDataset):
    """A dataset whose labels nobody may read."""

    def __init__(self, count: int, sizes: Sequence[tuple[int, int]] = ((6, 8),)) -> None:
        super().__init__({"depth": Task("depth")}, count)
        self.sizes = sizes

    def image(self, index: int) -> Tensor:
        return torch.full((3, *self.sizes[index % len(self.sizes)]), index / 255)

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        raise AssertionError("read a label")


class Duck:
    """Neither of our classes: has images and a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Tensor:
        return torch.full((3, 6, 8), index / 255)


# What images may be given as ----------------------------------------------------------------------------


def test_a_folder_gives_its_pictures_and_those_of_its_subfolders_in_order(tmp_path: Path) -> None:
    save(tmp_path, "b/2.png", 20)
    save(tmp_path, "a/x/1.jpg", 10)
    save(tmp_path, "c.PNG", 30)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "d.png").mkdir()  # nor is a folder
    (tmp_path / "depth.npy").write_bytes(b"0")
    for source in (tmp_path, str(tmp_path)):
        images = as_images(source)
        assert isinstance(images, Images) and values(images) == [10, 20, 30]
    assert [Path(images.name(i)).name for i in range(3)] == ["1.jpg", "2.png", "c.PNG"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_can_be_read(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path, f"picture{suffix}", 40)
    for source in (tmp_path, path, str(path)):
        images = as_images(source)
        assert len(images) == 1 and values(images) == [40]
        assert images.image(0).shape == (3, 6, 8) and images.image(0).dtype == torch.float32


def test_a_count_takes_evenly_spaced_pictures(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path, f"{i:02}.png", i)
    assert values(as_images(tmp_path, count=4)) == [0, 3, 6, 9]
    assert values(as_images(tmp_path, count=1)) == [0]
    assert values(as_images([grey(i) for i in range(11)], count=3)) == [0, 5, 10]
    for count in (10, 64, None):
        assert values(as_images(tmp_path, count=count)) == list(range(10))
    for count in range(1, 10):
        found = values(as_images(tmp_path, count=count))
        assert len(set(found)) == count and found == sorted(found)


def test_pictures_of_other_formats_are_named(tmp_path: Path) -> None:
    save(tmp_path / "both", "0.png", 0)
    for folder in ("both", "none"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("a.HEIC", "b.avif", "notes.txt"):
            (tmp_path / folder / name).touch()
    with pytest.warns(
        UserWarning, match=r"both: pictures of formats that are not read \(.avif, .heic\) are left out: 2 of them"
    ):
        assert values(as_images(tmp_path / "both")) == [0]
    with pytest.raises(InputError, match=r"none: no picture in it .*, found .avif, .heic\)"):
        as_images(tmp_path / "none")


def test_pictures_that_were_found_before_are_counted_off_evenly_too(tmp_path: Path) -> None:
    """The command line looks for them first and leaves the count to what it calls."""
    for i in range(10):
        save(tmp_path, f"{i:02}.png", i)
    assert values(as_images(as_images(tmp_path), count=4)) == [0, 3, 6, 9]


def test_linked_folders_and_files_are_searched_each_once(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    save(there / "deep", "2.png", 2)
    save(here, "1.png", 1)
    save(tmp_path, "3.png", 3)
    (here / "linked").symlink_to(there, target_is_directory=True)
    (here / "again").symlink_to(there / "deep", target_is_directory=True)
    (here / "loop").symlink_to(here, target_is_directory=True)
    (here / "3.png").symlink_to(tmp_path / "3.png")
    (here / "broken.png").symlink_to(tmp_path / "gone.png")
    assert sorted(values(as_images(here))) == [1, 2, 3]
    (tmp_path / "whole").symlink_to(here, target_is_directory=True)
    assert sorted(values(as_images(tmp_path / "whole"))) == [1, 2, 3]


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(tmp_path: Path, count: int) -> None:
    save(tmp_path, "1.png", 1)
    for source in (tmp_path, [grey(1), grey(2)], Labelled(3)):
        with pytest.raises(InputError):
            as_images(source, count=count)


def test_a_list_may_hold_whatever_a_model_predicts_for(tmp_path: Path) -> None:
    path = save(tmp_path, "1.png", 10)
    floats = grey(40).astype(np.float32) / 255
    sources: list[Any] = [path, str(path), Image.fromarray(grey(20)), grey(30), floats, torch.full((3, 6, 8), 50 / 255)]
    expected = [10, 10, 20, 30, 40, 50]
    for given in (sources, tuple(sources)):
        images = as_images(given)
        assert values(images) == expected and images.name(1) == str(path) and images.name(3) == "image 3"
    assert images.tasks == {} and images.targets(0, []) == {} and list(images[0]) == ["image"]


@pytest.mark.parametrize("kind", ["array", "floats", "tensor"])
def test_four_dimensions_are_a_batch(kind: str) -> None:
    batch: Any = np.stack([grey(i) for i in (5, 6, 7)])
    if kind == "floats":
        batch = batch.astype(np.float32) / 255
    if kind == "tensor":
        batch = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
    images = as_images(batch)
    assert values(images) == [5, 6, 7] and images.image(0).shape == (3, 6, 8)
    assert values(as_images(batch, count=2)) == [5, 7]


@pytest.mark.parametrize("dataset", [Labelled(5), Duck(5)], ids=["dataset", "duck"])
def test_a_dataset_is_taken_as_it_is(dataset: Any) -> None:
    for count in (None, 5, 9):
        images = as_images(dataset, count)
        assert images.source is dataset and len(images) == 5 and images.readable(one_size=True) is images
        assert as_images(images, count) is images
    assert values(as_images(dataset, 2)) == [0, 1] and len(dataset) == 5


def test_pictures_cross_processes_without_what_was_decoded(tmp_path: Path) -> None:
    save(tmp_path, "1.png", 10, height=200, width=200)
    images = as_images(tmp_path).readable()
    data = pickle.dumps(images)
    assert len(data) < 10_000 and values(pickle.loads(data)) == values(images) == [10]


# Decoding only what is used -----------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded so far."""
    names: list[str] = []

    def noted(source: Any, size: Any = None, crop: bool = False) -> Tensor:
        names.append(Path(source).name)
        return to_tensor(source, size, crop)

    monkeypatch.setattr("simomerge.datasets.pictures.to_tensor", noted)
    return names


def test_a_check_decodes_an_image_once_and_its_first_use_not_again(tmp_path: Path, decoded: list[str]) -> None:
    for i in range(4):
        save(tmp_path, f"{i}.png", i)
    spoil(tmp_path, "1.png")
    with pytest.warns(UserWarning, match=r"1 of 4 images .*1\.png"):
        images = as_images(tmp_path).readable(one_size=True)
    assert decoded == ["0.png", "1.png", "2.png", "3.png"]
    few = as_images(images, 2).readable(one_size=True)
    assert as_images(images).readable() is images and [few.name(i)[-5:] for i in range(2)] == ["0.png", "3.png"]
    assert values(few) == [0, 3] and values(images.take(3)) == [0, 2, 3] and len(decoded) == 6  # 0 and 3 once more
    with pytest.warns(UserWarning, match=r"1 of 4 images .*1\.png"):
        assert len(as_images(as_images(tmp_path)).readable()) == 3


def test_what_batches_have_read_is_not_checked_again(tmp_path: Path, decoded: list[str]) -> None:
    for i in range(3):
        save(tmp_path, f"{i}.png", i)
    images = as_images(tmp_path)
    assert [indices for indices, _ in image_batches(images)] == [[0, 1, 2]]
    assert images.readable(one_size=True) is images and len(decoded) == 3


def test_no_more_is_kept_than_allowed(tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        save(tmp_path, f"{i}.png", i)
    monkeypatch.setattr("simomerge.datasets.pictures.KEPT_BYTES", 2 * 3 * 6 * 8 * 4)
    images = as_images(tmp_path).readable()
    assert values(images) == [0, 1, 2] and decoded == ["0.png", "1.png", "2.png", "2.png"]


def test_another_size_is_read_again_and_checked_again() -> None:
    images = as_images([grey(1), grey(2, 9, 4)])
    with pytest.raises(InputError, match=r"image 1 is 4 x 9 pixels, the first 8 x 6; this needs images of one size"):
        images.readable(one_size=True)
    alike = as_images(images, size="5x7").readable(one_size=True)
    assert len(alike) == 2 and alike.image(1).shape == (3, 5, 7) and images.image(1).shape == (3, 9, 4)


def test_images_of_a_dataset_are_checked_where_one_size_is_needed() -> None:
    images = as_images(Labelled(5, [(6, 8), (6, 8), (9, 4)]))
    assert images.readable() is images
    with pytest.raises(InputError, match=r"image 2 is 4 x 9 pixels, the first 8 x 6; .*let the dataset resize them\.$"):
        images.readable(one_size=True)
    alike = as_images(Labelled(5))
    assert alike.readable(one_size=True) is alike


def test_a_check_of_many_images_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simomerge.datasets.pictures.SHOWN_EVERY", 4)
    lines: list[tuple[str, int, int, str]] = []
    with show_progress(lambda *line: lines.append(line)):
        as_images([grey(i) for i in range(10)]).readable()
        as_images([grey(i) for i in range(4)]).readable()  # so few take no time
    assert lines == [("images", done, 10, "checked") for done in (4, 8, 10)]


def test_skip_is_what_take_leaves() -> None:
    images = as_images([grey(i) for i in range(10)])
    assert values(images.take(4)) == [0, 3, 6, 9] and values(images.skip(4)) == [1, 2, 4, 5, 7, 8]
    assert values(as_images(Labelled(5)).skip(2)) == [2, 3, 4] == values(as_images(Duck(5)).skip(2))


# What is refused ----------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_holds_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(InputError, match=rf"{tmp_path}: no picture in it \(looked for \.png, \.jpg.*subfolders"):
        as_images(tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        as_images(tmp_path / "nowhere")


@pytest.mark.parametrize("source", [[], (), np.zeros((0, 4, 4, 3)), Labelled(0), Duck(0)])
def test_no_images_are_refused(source: Any) -> None:
    with pytest.raises(InputError, match="at least one"):
        as_images(source)


@pytest.mark.parametrize(
    "source", [grey(1), torch.zeros(3, 6, 8), Image.fromarray(grey(1)), {"a": 1}, 7, None, iter([grey(1)])]
)
def test_other_objects_are_refused_with_what_to_give(source: Any) -> None:
    with pytest.raises(InputError, match="give a folder of pictures, a list of at least one image, or a dataset"):
        as_images(source)


# Sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["12x20", "12X20", " 12 x 20 ", (12, 20), [12, 20], np.array([12, 20])])
def test_a_size_is_height_and_width(size: Any) -> None:
    images = as_images([grey(9), grey(9, 12, 20), grey(9, 100, 30)], size=size)
    assert all(images.image(i).shape == (3, 12, 20) for i in range(3)) and values(images) == [9, 9, 9]


@pytest.mark.parametrize(
    "size", ["12", "12x", "x20", "12x20x3", "axb", "0x5", "-3x4", "1.5x4", "", (12,), (12, 20, 3), (0, 4), (1.5, 4)]
)
def test_a_wrong_size_is_refused_with_the_form(size: Any) -> None:
    with pytest.raises(InputError, match="HEIGHTxWIDTH in pixels, such as 480x640"):
        as_images([grey(1)], size=size)


def test_resizing_does_not_alias() -> None:
    """A fine checkerboard comes out grey, not as some of its pixels."""
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    small = as_images([board.astype(np.uint8)], size=(8, 8)).image(0)
    assert (small - 0.5).abs().max() < 0.1


# Batches ------------------------------------------------------------------------------------------------


def batches(images: Any, **options: Any) -> list[tuple[list[int], tuple[int, ...]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(image_batches(images, **options))
    for indices, batch in found:
        assert batch.dtype == torch.float32 and len(indices) == len(batch)
        for index, image in zip(indices, batch, strict=True):
            assert torch.equal(image, images.image(index))
    return [(indices, tuple(batch.shape)) for indices, batch in found]


def test_batches_hold_neighbours_of_one_size() -> None:
    images = Images([grey(0), grey(1), grey(2, 9, 4), grey(3, 9, 4), grey(4, 9, 4), grey(5), grey(6, 9, 5)])
    assert batches(images) == [
        ([0, 1], (2, 3, 6, 8)),
        ([2, 3, 4], (3, 3, 9, 4)),
        ([5], (1, 3, 6, 8)),
        ([6], (1, 3, 9, 5)),
    ]


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_batches_are_no_larger_than_asked(batch_size: int, sizes: list[int]) -> None:
    found = batches(Labelled(7), batch_size=batch_size)
    assert [len(indices) for indices, _ in found] == sizes
    assert [index for indices, _ in found for index in indices] == list(range(7))


@pytest.mark.parametrize(("pixels", "sizes"), [(48 * 3, [3, 3, 1]), (48 * 3 - 1, [2, 2, 2, 1]), (1, [1] * 7)])
def test_batches_have_no_more_pixels_than_asked(pixels: int, sizes: list[int]) -> None:
    assert [len(indices) for indices, _ in batches(Labelled(7), max_pixels=pixels)] == sizes


def test_every_process_has_its_share() -> None:
    images = Labelled(7, [(6, 8), (4, 4)])
    assert [indices for indices, _ in batches(images, start=0, step=2)] == [[0, 2, 4, 6]]
    assert [indices for indices, _ in batches(images, start=1, step=2)] == [[1, 3, 5]]
    assert batches(images, start=7, step=8) == []
    shares = [index for start in range(3) for indices, _ in batches(images, start=start, step=3) for index in indices]
    assert sorted(shares) == list(range(7))


# Unreadable ones ----------------------------------------------------------------------------------------


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n but not really")


def test_pictures_that_cannot_be_read_are_left_out_counted_and_named_once(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path, f"{i}.png", i)
    spoil(tmp_path, "1.png", "4.png")
    images = as_images(tmp_path)
    with pytest.warns(UserWarning) as caught:
        found = [indices for indices, _ in image_batches(images, batch_size=3)]
    assert found == [[0, 2, 3], [5]]
    (warning,) = caught
    assert str(warning.message) == (
        f"2 of 6 images cannot be read and were left out: {tmp_path / '1.png'}, {tmp_path / '4.png'}"
    )


def test_a_truncated_picture_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    save(tmp_path, "2.png", 2)
    with pytest.warns(UserWarning, match=r"1 of 2 images cannot.*1\.png"):
        assert [indices for indices, _ in image_batches(as_images(tmp_path))] == [[1]]


def test_of_many_the_first_three_are_named(tmp_path: Path) -> None:
    save(tmp_path, "9.png", 9)
    spoil(tmp_path, *[f"{i}.png" for i in range(5)])
    with pytest.warns(UserWarning, match=r"5 of 6 images .*0\.png, .*1\.png, .*2\.png, \.\.\.$"):
        list(image_batches(as_images(tmp_path)))


def test_images_without_a_file_are_named_by_their_number() -> None:
    too_bright = np.full((6, 8, 3), 2.0, np.float32)
    wrong_shape = np.zeros((6, 8, 2), np.uint8)
    empty = np.zeros((0, 8, 3), np.uint8)
    sources: list[Any] = [grey(0), too_bright, grey(2), wrong_shape, empty]
    with pytest.warns(UserWarning, match=r"3 of 5 images .*: image 1, image 3, image 4$"):
        assert [indices for indices, _ in image_batches(as_images(sources))] == [[0, 2]]


def test_a_share_counts_its_own_only(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path, f"{i}.png", i)
    spoil(tmp_path, "1.png")
    assert batches(as_images(tmp_path), start=0, step=2)
    with pytest.warns(UserWarning, match="1 of 2 images"):
        list(image_batches(as_images(tmp_path), start=1, step=2))


def test_if_none_can_be_read_the_first_is_named(tmp_path: Path) -> None:
    spoil(tmp_path, "a.png", "b.png")
    with pytest.raises(InputError, match=rf"none of the 2 images can be read, first {tmp_path / 'a.png'} "):
        list(image_batches(as_images(tmp_path)))


def test_a_dataset_that_cannot_read_an_image_says_so_itself() -> None:
    class Broken(Labelled):
        def image(self, index: int) -> Tensor:
            if index == 2:
                raise InputError("scene 2: the disk is gone.")
            return super().image(index)

    with pytest.raises(InputError, match="scene 2: the disk is gone"):
        list(image_batches(Broken(4)))


def test_of_many_images_of_a_dataset_some_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simomerge.datasets.pictures.CHECKED_OF_DATASET", 3)
    one_size, other_in_the_middle = [(6, 8)] * 9, [*[(6, 8)] * 4, (5, 5), *[(6, 8)] * 4]
    assert len(as_images(Labelled(9, one_size)).readable(one_size=True)) == 9
    with pytest.raises(InputError, match="is 5 x 5 pixels, the first 8 x 6"):
        as_images(Labelled(9, other_in_the_middle)).readable(one_size=True)
    unseen = [*[(6, 8)] * 3, (5, 5), *[(6, 8)] * 5]
    assert len(as_images(Labelled(9, unseen)).readable(one_size=True)) == 9  # image 3 is not among 0, 4 and 8


def test_hidden_files_and_folders_are_no_pictures(tmp_path: Path) -> None:
    """They are copies, as in .ipynb_checkpoints, or no pictures, as ._a.png of macOS."""
    for name in ("a.png", "._a.png", ".thumbnails/a.png", "day/b.png", "day/.ipynb_checkpoints/b-checkpoint.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [str(path.relative_to(tmp_path)) for path in files_of(tmp_path, (".png",))] == ["a.png", "day/b.png"]
    assert files_of(tmp_path / ".thumbnails", (".png",)) == [tmp_path / ".thumbnails" / "a.png"]  # it was asked for
