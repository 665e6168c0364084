"""Weights in shards, against huggingface_hub and transformers as oracles."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from simomerge.checkpoints import TensorInfo, fingerprint, open_checkpoint, write_safetensors
from simomerge.checkpoints.writing import parse_size, write_sharded
from simomerge.core.errors import InputError
from simomerge.core.files import atomic_folder

SIZES = {"c": 6, "a": 6, "large": 40, "b": 2, "e": 6, "d": 2, "f": 2}
INDEX = "model.safetensors.index.json"


def tensors(sizes: dict[str, int] = SIZES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def layout(sizes: dict[str, int] = SIZES) -> dict[str, TensorInfo]:
    return {name: TensorInfo((size,), "F32") for name, size in sizes.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_holds(folder: Path, expected: dict[str, np.ndarray]) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint[name], array)


def test_what_fits_is_one_file(tmp_path: Path) -> None:
    total = sum(array.nbytes for array in tensors().values())
    for folder, limit in (("a", None), ("b", total)):
        paths = write_sharded(tmp_path / folder, tensors(), max_shard_size=limit)
        assert paths == [tmp_path / folder / "model.safetensors"] == list((tmp_path / folder).iterdir())
        assert paths[0].read_bytes() == write_safetensors(tmp_path / "one.safetensors", tensors()).read_bytes()
    assert write_sharded(tmp_path / "empty", {}, max_shard_size=1)[0].is_file()


def test_shards_and_their_index(tmp_path: Path) -> None:
    paths = write_sharded(tmp_path, tensors(), max_shard_size=40)
    assert [path.name for path in paths] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert [sorted(open_checkpoint(path)) for path in paths] == [["c"], ["large"], ["a", "b"], ["d", "e", "f"]]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * sum(SIZES.values())}
    assert index["weight_map"]["large"] == paths[1].name and set(index["weight_map"]) == set(SIZES)
    assert_holds(tmp_path, tensors())
    assert set(files(tmp_path)) == {INDEX, *(path.name for path in paths)}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 60))
def test_tensors_are_assigned_to_shards_as_transformers_does(sizes: list[int], limit: int) -> None:
    named = {f"t{number}": size for number, size in enumerate(sizes)}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda size: 4 * size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    with TemporaryDirectory() as folder:
        paths = write_sharded(folder, tensors(named), max_shard_size=limit)
        found = {path.name: sorted(open_checkpoint(path)) for path in paths}
        assert found == {file: sorted(names) for file, names in split.filename_to_tensors.items()}
        assert_holds(Path(folder), tensors(named))


def test_bytes_depend_on_the_content_only(tmp_path: Path) -> None:
    write_sharded(tmp_path / "1", tensors(), "BF16", max_shard_size=20)
    write_sharded(tmp_path / "2", iter(tensors().items()), "BF16", layout=layout(), max_shard_size=20)
    shuffled = iter(sorted(tensors().items()))
    write_sharded(tmp_path / "3", shuffled, "BF16", layout=layout(), max_shard_size=20)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "3")
    assert len(files(tmp_path / "1")) == 5


def test_a_sharded_checkpoint_is_copied_as_stored(tmp_path: Path) -> None:
    write_sharded(tmp_path / "1", tensors(), {"c": "F16"}, max_shard_size=30)
    write_sharded(tmp_path / "2", open_checkpoint(tmp_path / "1"))
    assert open_checkpoint(tmp_path / "2").info("c").dtype == "F16"
    assert fingerprint(open_checkpoint(tmp_path / "1")) == fingerprint(open_checkpoint(tmp_path / "2"))


def test_transformers_reads_the_folder(tmp_path: Path, tiny_base: Path) -> None:
    from transformers import Dinov2Model

    checkpoint = open_checkpoint(tiny_base)
    with atomic_folder(tmp_path / "encoder") as folder:
        assert len(write_sharded(folder, checkpoint, max_shard_size=parse_size("30 KB"))) > 3
        (folder / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    loaded, report = Dinov2Model.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert fingerprint(loaded.state_dict()) == fingerprint(checkpoint)


def test_bad_streams(tmp_path: Path) -> None:
    for pairs, message in (
        ([("c", np.zeros(5))], r"'c' of shape \(5,\), expected \(6,\)"),
        ([("other", np.zeros(6))], "'other', expected no such tensor"),
        ([("c", np.zeros(6)), ("a", np.zeros(6)), ("c", np.zeros(6))], r"'c'.* once"),
        ([("c", np.zeros(6))], "6 of 7 tensors never came"),
    ):
        with (
            pytest.raises(InputError, match=message),
            atomic_folder(tmp_path / "out") as folder,
        ):
            write_sharded(folder, iter(pairs), layout=layout(), max_shard_size=24)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="at most 0 bytes"):
        write_sharded(tmp_path, tensors(), max_shard_size=0)


def test_one_tensor_is_in_memory_and_float32_is_not_copied(tmp_path: Path) -> None:
    sizes = {f"t{number}": 2**20 for number in range(6)}

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, size in sizes.items():
            yield name, np.ones(size, np.float32)

    tracemalloc.start()
    try:
        write_sharded(tmp_path, stream(), layout=layout(sizes), max_shard_size=2**23)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The generator still holds the last tensor while it makes the next: two of 4 MiB, and no copy of either.
    assert peak < 2.2 * 2**22


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("200mb", 2 * 10**8),
        (" 1.5 GiB ", 3 * 2**29),
        ("10KiB", 10240),
        ("1TB", 10**12),
        ("17", 17),
        ("17B", 17),
        (9007199254740993, 9007199254740993),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 X", "-5GB", "5GB5", "nan", "1e9", "0", "0.2B", 0])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(InputError, match=r"give (one|a size) such as 5GB"):
        parse_size(text)
