"""Writing safetensors, read back with the safetensors library."""

import errno
import os
import threading
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import load_file

from simomerge.checkpoints import TensorInfo, open_checkpoint, write_safetensors, write_sharded
from simomerge.checkpoints.tensors import decode, encode
from simomerge.core import files
from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.standard_normal((4, 3)).astype(np.float32),
        "a": np.array(1.5, np.float32),
        "empty": np.zeros((0, 2), np.float32),
        "steps": np.array([1, 2**40], np.int64),
        "flag": np.array([True, False, True]),
    }


@pytest.mark.parametrize("dtype", list(TORCH))
def test_dtypes_round_like_torch(tmp_path: Path, dtype: str) -> None:
    loaded = load_file(write_safetensors(tmp_path / "w.safetensors", tensors(), dtype))
    for name, array in tensors().items():
        expected = torch.from_numpy(array)
        expected = expected.to(TORCH[dtype]) if expected.is_floating_point() else expected
        assert loaded[name].dtype == expected.dtype and torch.equal(loaded[name], expected)


def test_torch_tensors_keep_their_dtype(tmp_path: Path) -> None:
    given = {"half": torch.randn(3).half(), "brain": torch.randn(3, 2).bfloat16().T, "n": torch.tensor([3])}
    loaded = load_file(write_safetensors(tmp_path / "w.safetensors", given))
    assert all(torch.equal(loaded[name], given[name]) for name in given)
    mixed = load_file(write_safetensors(tmp_path / "w.safetensors", given, {"half": "F32"}))
    assert [mixed[name].dtype for name in given] == [torch.float32, torch.bfloat16, torch.int64]


def test_bytes_depend_on_the_content_only(tmp_path: Path) -> None:
    one = write_safetensors(tmp_path / "1.safetensors", tensors(), "BF16")
    reverse = dict(reversed(tensors().items()))
    two = write_safetensors(tmp_path / "2.safetensors", reverse, "BF16")
    layout = {name: open_checkpoint(one).info(name) for name in reverse}
    three = write_safetensors(tmp_path / "3.safetensors", iter(reverse.items()), layout=layout)
    assert one.read_bytes() == two.read_bytes() == three.read_bytes()
    with safe_open(one, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_checkpoint_is_copied_as_stored(tmp_path: Path) -> None:
    one = write_safetensors(tmp_path / "1.safetensors", tensors(), "F16")
    two = write_safetensors(tmp_path / "2.safetensors", open_checkpoint(one))
    assert one.read_bytes() == two.read_bytes()


@given(hnp.arrays(np.uint32, st.integers(0, 40)))
@example(np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x7FFFFFFF, 0x7F800001], np.uint32))
def test_bfloat16_rounds_like_torch_on_any_bits(bits: np.ndarray) -> None:
    array = bits.view(np.float32)
    expected = torch.from_numpy(array.copy()).bfloat16()
    if np.any(np.isinf(expected.float().numpy()) & np.isfinite(array)):
        with pytest.raises(InputError, match="too large for BF16"):
            encode(array, "BF16")
        return
    stored = encode(array, "BF16")
    back = decode(stored, TensorInfo(array.shape, "BF16"))
    np.testing.assert_array_equal(back, expected.float().numpy())


def test_bad_requests(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match="'big' holds 1e\\+06, too large for F16"):
        write_safetensors(file, {"big": np.array([1.0, -1e6, np.inf], np.float32)}, "F16")
    with pytest.raises(InputError, match="cannot be stored as 'fp16': use one of BF16"):
        write_safetensors(file, tensors(), "fp16")
    with pytest.raises(InputError, match="'w' is a list"):
        write_safetensors(file, {"w": [1.0]})
    layout = {"w": TensorInfo((2,), "F32"), "v": TensorInfo((1,), "F32")}
    for pairs, message in (
        ([("w", np.zeros(3))], r"'w' of shape \(3,\), expected \(2,\)"),
        ([("u", np.zeros(3))], "'u'.*expected no such tensor"),
        ([("w", np.zeros(2))] * 2, "'w'.* once"),
        ([("w", np.zeros(2))], "1 of 2 tensors never came, the first is 'v'"),
    ):
        with pytest.raises(InputError, match=message):
            write_safetensors(file, iter(pairs), layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_streaming_leaves_the_old_file(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "w.safetensors", tensors())
    before = file.read_bytes()

    def broken() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", np.zeros(2, np.float32)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_safetensors(file, broken(), layout={"a": TensorInfo((2,), "F32")})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_full_disk_names_the_path_and_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"w\.safetensors \(\d+ bytes\): No space left.*free some space"):
        write_safetensors(tmp_path / "w.safetensors", tensors())
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_the_disk_fails_before_writing(tmp_path: Path) -> None:
    layout = {"w": TensorInfo((10**15,), "F32")}
    with pytest.raises(InputError, match=r"4,000,000,000,\d+,\d+ bytes\): No space left .* are free"):
        write_safetensors(tmp_path / "w.safetensors", iter([]), layout=layout)
    assert list(tmp_path.iterdir()) == []


class Computed(Mapping[str, np.ndarray]):
    """Tensors that are computed when they are read; remembers which threads did."""

    def __init__(self, count: int, fails_at: str = "") -> None:
        self.names, self.fails_at, self.threads = [f"t{i}" for i in range(count)], fails_at, set[int]()

    def __getitem__(self, name: str) -> np.ndarray:
        self.threads.add(threading.get_ident())
        if name == self.fails_at:
            raise RuntimeError("cannot be computed")
        time.sleep(0.002)
        return np.full((3, 5), int(name[1:]), np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@pytest.mark.parametrize("limit", [None, 150])
def test_threads_compute_and_write_side_by_side_the_same_bytes(tmp_path: Path, limit: int | None) -> None:
    content = []
    for threads in (1, 4):
        computed, folder = Computed(40), tmp_path / str(threads)
        layout = {name: TensorInfo((3, 5), "F32") for name in computed}
        written = write_sharded(folder, computed, "BF16", layout=layout, max_shard_size=limit, threads=threads)
        assert (len(computed.threads) == 1) == (threads == 1) and (len(written) == 1) == (limit is None)
        content.append([path.read_bytes() for path in sorted(folder.iterdir())])
        assert all((open_checkpoint(folder)[name] == int(name[1:])).all() for name in computed)
    assert content[0] == content[1]


def test_a_tensor_that_cannot_be_computed_leaves_nothing(tmp_path: Path) -> None:
    layout = {f"t{i}": TensorInfo((3, 5), "F32") for i in range(40)}
    with pytest.raises(RuntimeError, match="cannot be computed"):
        write_safetensors(tmp_path / "w.safetensors", Computed(40, "t7"), layout=layout, threads=3)
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_where_the_system_has_no_positional_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_safetensors(tmp_path / "a.safetensors", tensors()).read_bytes()
    monkeypatch.delattr(os, "pwrite")
    assert write_safetensors(tmp_path / "b.safetensors", tensors(), threads=3).read_bytes() == expected


def test_only_a_large_new_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(files, "_LARGE", 1000)
    for size, waits in ((10, True), (1000, False), (1000, True)):  # the last replaces the one before
        flushed.clear()
        with files.atomic_file(tmp_path / f"of {size}", size, durable=False) as handle:
            handle.write(b"a" * size)
        assert (size in flushed) == waits
        flushed.clear()
        with files.atomic_folder(tmp_path / f"folder of {size}", overwrite=True, durable=False) as folder:
            (folder / "content").write_bytes(b"a" * size)
        assert (size in flushed) == waits
    # What cannot be made again is always waited for.
    flushed.clear()
    with files.atomic_file(tmp_path / "trained", 1000) as handle:
        handle.write(b"a" * 1000)
    with files.atomic_folder(tmp_path / "trained folder") as folder:
        (folder / "content").write_bytes(b"a" * 1001)
    assert {1000, 1001} <= set(flushed)


def test_no_thread_writes_after_an_error(tmp_path: Path) -> None:
    """The number of a closed file is given to the next one that is opened."""
    started = threading.Event()

    class Slow(dict):  # type: ignore[type-arg]
        def __getitem__(self, name: str) -> np.ndarray:
            if name != "a":
                started.wait(5)
                time.sleep(0.2)
            return super().__getitem__(name)

    values = Slow({name: np.ones(8, np.float32) for name in "abcdef"})
    layout = {name: TensorInfo((8,), "F32") for name in values}

    def progress(*line: object) -> None:
        started.set()
        raise KeyboardInterrupt

    clock = iter(range(0, 10_000, 10))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("simomerge.checkpoints.writing.time.monotonic", lambda: next(clock))
        with show_progress(progress):
            write_safetensors(tmp_path / "w.safetensors", values, layout=layout, threads=3)
    with (tmp_path / "other").open("wb") as other:
        other.write(bytes(200))
        other.flush()
        time.sleep(0.5)
    assert (tmp_path / "other").read_bytes() == bytes(200)
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = {f"t{number:03d}": np.full(4, number, np.float32) for number in range(soft if soft < 300 else 300)}
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 40, hard))
        files_written = write_sharded(tmp_path / "many", many, max_shard_size=16, threads=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(files_written) == len(many)
    opened = open_checkpoint(tmp_path / "many")
    assert all(np.array_equal(opened[name], value) for name, value in many.items())


def test_the_room_for_all_shards_is_looked_at_before_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(5000, 4000, 1000))
    with pytest.raises(InputError, match=r"\(4,000 bytes\): No space left .* 1,000 bytes are free"):
        write_sharded(tmp_path / "w", {str(n): np.zeros(100, np.float32) for n in range(10)}, max_shard_size=400)
    assert not list((tmp_path / "w").iterdir())
