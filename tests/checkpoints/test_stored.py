"""Weight files are mapped into memory, up to a number of them; the others are read by pieces, with the same values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simomerge.checkpoints import open_checkpoint, write_safetensors
from simomerge.checkpoints.stored import Pieces, WeightFile
from simomerge.core.errors import InputError

VALUES = np.arange(100_000, dtype=np.float32)


@pytest.mark.parametrize("most", [0, 2])
def test_mapped_files_and_pieces_have_the_same_values(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simomerge.checkpoints.stored._MOST_MAPPED", most)
    monkeypatch.setattr(WeightFile, "_mapped", 0)
    opened = []
    for number in range(4):
        path = write_safetensors(tmp_path / f"{number}.safetensors", {"v": VALUES[:3], "w": VALUES * (number + 1)})
        opened.append(open_checkpoint(path))
        assert WeightFile._mapped == min(number + 1, most)
    for number, checkpoint in enumerate(opened, start=1):
        np.testing.assert_array_equal(checkpoint["w"], VALUES * number)
        for part in (slice(5, 9), slice(None, None, 7), slice(99_990, None), slice(3, 3), slice(1, 90_000, 40_000)):
            np.testing.assert_array_equal(checkpoint.flat("w", part), VALUES[part] * number)
    # A float32 array of a mapped file is a view of it; of the others it is an array of its own.
    assert [not checkpoint["w"].flags.owndata for checkpoint in opened[:most]] == [True] * most
    del checkpoint, opened
    assert WeightFile._mapped == 0


def test_what_is_mapped_and_what_is_read_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VALUES.tofile(tmp_path / "w.bin")
    monkeypatch.setattr(WeightFile, "_mapped", 0)
    mapped = WeightFile(tmp_path / "w.bin").array(400, "<f4", 10)
    monkeypatch.setattr("simomerge.checkpoints.stored._MOST_MAPPED", 0)
    pieces = WeightFile(tmp_path / "w.bin").array(400, "<f4", 10)
    assert isinstance(mapped, np.ndarray) and isinstance(pieces, Pieces)
    assert mapped[2:5].tolist() == pieces[2:5].tolist() == [102, 103, 104]
    with (tmp_path / "w.bin").open("r+b") as file:
        file.truncate(420)
    assert pieces[:5].tolist() == [100, 101, 102, 103, 104]
    with pytest.raises(InputError, match="became shorter while it was read"):
        pieces[:6]
