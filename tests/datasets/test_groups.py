"""Which images are held out: whole folders, or runs of neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from simomerge.datasets.groups import LEAST_IMAGES, held_out, training_images
from simomerge.datasets.pictures import as_images


class Folders(list[str]):
    """Images, each of which is the name of its folder."""

    def group(self, index: int) -> str:
        return self[index]


SHARES = st.sampled_from([0.1, 0.125, 0.2, 0.25, 0.3, 0.5])


@given(st.integers(0, 500), SHARES)
def test_about_the_share_is_held_out_and_nothing_is_in_both_parts(count: int, share: float) -> None:
    out, kept = held_out(range(count), share), training_images(range(count), share)
    assert sorted([*out, *kept]) == list(range(count)) and out == sorted(out)
    assert len(out) <= share * count
    assert bool(out) == (share * count >= 1)
    if count >= 8 / share:
        assert len(out) >= 0.6 * share * count


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
@example([7, 1])
@example([3, 1, 4])
def test_two_of_the_least_images_are_held_out_whatever_their_folders(sizes: list[int]) -> None:
    folders = Folders(str(number) for number, size in enumerate(sizes) for _ in range(size))
    assert len(held_out(folders)) >= (2 if len(folders) >= LEAST_IMAGES else 0)


@given(st.integers(32, 500), SHARES)
def test_few_neighbours_are_on_both_sides(count: int, share: float) -> None:
    out = set(held_out(range(count), share))
    borders = sum((index in out) != (index + 1 in out) for index in range(count - 1))
    assert 1 <= borders <= 4


def test_without_a_share_nothing_is_held_out() -> None:
    assert held_out(range(100), 0) == [] and training_images(range(3), 0) == [0, 1, 2]


def write(folder: Path, sizes: dict[str, int]) -> Path:
    for name, count in sizes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name / f"{index:03}.png")
    return folder


def test_folders_are_held_out_whole(tmp_path: Path) -> None:
    images = as_images(write(tmp_path, dict.fromkeys("abcdefgh", 5)))
    assert [images.name(index).split("/")[-2] for index in held_out(images)] == ["d"] * 5 + ["h"] * 5
    assert held_out(images.take(20)._subset([0, 1, 2])) == []


@pytest.mark.parametrize("sizes", [{"a": 30}, {"a": 30, "b": 2}, {"a": 1, "b": 1, "c": 1, "d": 1, "e": 36}])
def test_runs_are_held_out_where_folders_do_not_give_the_share(tmp_path: Path, sizes: dict[str, int]) -> None:
    images = as_images(write(tmp_path, sizes))
    assert held_out(images) == held_out(range(len(images)))


def test_a_list_in_mixed_order_still_keeps_folders_together(tmp_path: Path) -> None:
    files = sorted(write(tmp_path, dict.fromkeys("abcd", 4)).rglob("*.png"), key=lambda path: path.name)
    images = as_images(files)
    assert {Path(images.name(index)).parent.name for index in held_out(images)} == {"d"}
    assert len(held_out(images)) == 4
