"""Features on disk: equal to the encoder's output, memory-mapped, complete or absent."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.core.text import size_text
from simomerge.datasets import DenseDataset
from simomerge.datasets.batches import images_within, ordered_batches
from simomerge.datasets.tasks import Task
from simomerge.models.encoders import Encoder, load_encoder
from simomerge.training.features import CachedFeatures, bytes_per_image, cache_features
from simomerge.training.loop import fit
from simomerge.training.lpft import fresh_head, train_head
from simomerge.training.settings import TrainSettings


@pytest.fixture(scope="module")
def encoder(tiny_base: Path) -> Encoder:
    return load_encoder(tiny_base).requires_grad_(False)


@pytest.fixture
def cache(encoder: Encoder, rooms: DenseDataset, tmp_path: Path) -> Path:
    return cache_features(encoder, rooms, tmp_path / "features", batch_size=5)


def test_cached_features_equal_the_encoders_output_in_half_precision(
    encoder: Encoder, rooms: DenseDataset, cache: Path
) -> None:
    cached = CachedFeatures(cache, rooms, ["depth", "segmentation"])
    (images,) = ordered_batches(rooms.select(["depth", "segmentation"]), 100)
    (batch,) = ordered_batches(cached, 100)
    expected, got = encoder(images["image"]), cached.features(batch)
    assert (got.image_size, got.padded_size) == (expected.image_size, expected.padded_size) == ((24, 32), (24, 32))
    assert len(got) == len(rooms) and len(got.maps) == len(got.cls) == 4
    for ours, theirs in zip((*got.maps, *got.cls), (*expected.maps, *expected.cls), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    assert set(batch) == {"maps", "cls", "depth", "segmentation"}
    assert torch.equal(batch["depth"], images["depth"])


def test_an_image_of_odd_size_is_cropped_back(encoder: Encoder, tmp_path: Path) -> None:
    from simomerge.datasets import load_data

    odd = load_data("rooms", split="train", count=3, size=(20, 30), tasks="depth")
    cached = CachedFeatures(cache_features(encoder, odd, tmp_path / "odd"), odd, ["depth"])
    assert (cached.image_size, cached.padded_size) == ((20, 30), (24, 32))
    head = fresh_head(encoder, odd.tasks["depth"], odd)
    (batch,) = ordered_batches(cached, 3)
    (images,) = ordered_batches(odd, 3)
    expected = odd.tasks["depth"].loss(head.eval()(encoder(images["image"]))[..., :20, :30], images["depth"])
    with torch.no_grad():
        (loss,) = cached.head_losses(odd.tasks["depth"], "loss", head, batch).values()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-3, atol=0)


def test_cached_features_are_memory_mapped_in_half_precision(rooms: DenseDataset, cache: Path) -> None:
    cached = CachedFeatures(cache, rooms, [])
    for array in (*cached.maps, *cached.cls):
        assert isinstance(array, np.memmap) and array.dtype == np.float16 and not array.flags.writeable
    sample = cached[0]
    sample["maps"][0].zero_()
    assert float(cached[0]["maps"][0].abs().max()) > 0  # a sample is a copy


def test_a_dataset_of_another_length_is_refused(rooms: DenseDataset, cache: Path) -> None:
    with pytest.raises(InputError, match="features of 12 images, but the dataset has 7"):
        CachedFeatures(cache, rooms.take(7), ["depth"])


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "other", "objects"])
def test_a_damaged_file_is_named(rooms: DenseDataset, cache: Path, damage: str) -> None:
    file = cache / "map0.npy"
    if damage == "other":
        np.save(file, np.ones((12, 3, 3, 3), np.float32))
    elif damage == "objects":
        np.save(file, np.array([{}]), allow_pickle=True)
    elif damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 300 if damage == "truncated" else 0)
    with pytest.raises(InputError, match=rf"map0\.npy: .*; remove the folder {cache}, and repeat the command"):
        CachedFeatures(cache, rooms, [])


def test_targets_are_not_decoded_while_encoding(
    encoder: Encoder, rooms: DenseDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(rooms), "targets", lambda *_: pytest.fail("read a target"))
    assert cache_features(encoder, rooms, tmp_path / "features").is_dir()


def test_large_images_are_encoded_in_small_batches(
    encoder: Encoder, rooms: DenseDataset, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as have two million pixels, here made fewer. The features are the same, up to rounding."""
    pixels = rooms.image(0)[0].numel()
    monkeypatch.setattr("simomerge.training.features.images_within", partial(images_within, max_pixels=2 * pixels))
    sizes: list[int] = []
    hook = encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    cache_features(encoder, rooms, tmp_path / "small")
    hook.remove()
    assert max(sizes) == 2 and sum(sizes) == len(rooms) + 1
    for name in ("map0.npy", "cls0.npy"):
        np.testing.assert_allclose(np.load(tmp_path / "small" / name), np.load(cache / name), rtol=2e-3, atol=2e-3)


def test_progress_counts_images(encoder: Encoder, rooms: DenseDataset, tmp_path: Path) -> None:
    lines: list[Any] = []
    with show_progress(lambda *line: lines.append(line[:3])):
        cache_features(encoder, rooms, tmp_path / "f", 5, label="base")
    # The first line gives the size on disk.
    assert lines == [("base", 0, 12), ("base", 5, 12), ("base", 10, 12), ("base", 12, 12)]


def test_a_full_disk_is_reported_before_anything_is_written(
    encoder: Encoder, rooms: DenseDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(InputError, match=r"the features of 12 images need [\d.]+ kB, 10 B are free; use fewer images"):
        cache_features(encoder, rooms, tmp_path / "features")
    assert list(tmp_path.iterdir()) == []


def test_exceeding_the_budget_is_reported_before_anything_is_written(
    encoder: Encoder, rooms: DenseDataset, tmp_path: Path
) -> None:
    notes: list[str] = []
    with show_progress(lambda *line: notes.append(line[3])):
        folder = cache_features(encoder, rooms, tmp_path / "f")
    taken = sum(np.load(file, mmap_mode="r").nbytes for file in folder.glob("*.npy"))
    assert notes[0] == f"{size_text(taken)} on disk" and taken == 12 * bytes_per_image(encoder, rooms.image(0))
    cache_features(encoder, rooms, tmp_path / "g", budget=taken)
    with pytest.raises(InputError, match=r"need [\d.]+ kB, [\d.]+ kB may be used"):
        cache_features(encoder, rooms, tmp_path / "h", budget=taken - 1)
    assert not (tmp_path / "h").exists()


def test_an_interrupted_cache_leaves_nothing(encoder: Encoder, rooms: DenseDataset, tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int, note: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), show_progress(stop):
        cache_features(encoder, rooms, tmp_path / "features", batch_size=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task_name", ["depth", "segmentation"])
def test_training_on_cached_features_equals_training_through_the_frozen_encoder(
    encoder: Encoder, rooms: DenseDataset, cache: Path, task_name: str
) -> None:
    task: Task = rooms.tasks[task_name]
    settings = TrainSettings(steps=15, batch_size=4, lr=1e-2, seed=5)
    cached_head, direct_head, start = (fresh_head(encoder, task, rooms, seed=2) for _ in range(3))
    train_head(cached_head, task, CachedFeatures(cache, rooms, [task_name]), settings)
    data = rooms.select([task_name])
    fit(direct_head, lambda head, b: {task_name: task.loss(head(encoder(b["image"])), b[task_name])}, data, settings)
    heads = (cached_head, direct_head, start)
    one, other, before = (torch.nn.utils.parameters_to_vector(head.parameters()).detach() for head in heads)
    assert float((one - before).norm()) > 0.1
    assert float((one - other).norm()) < 0.05 * float((one - before).norm())
