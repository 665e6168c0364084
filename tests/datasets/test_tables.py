"""CSV manifests as spreadsheets write them, and the names of splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.datasets import load_data
from simomerge.datasets.manifest import read_manifest
from simomerge.datasets.tables import read_table

ROWS = [["image", "split", "depth"], ["0.png", "train", "d 0.png"], ["1.png", "val", "d1.png"]]


def text(separator: str = ",", end: str = "\n", rows: list[list[str]] = ROWS) -> bytes:
    return (end.join(separator.join(row) for row in rows) + end).encode()


QUOTED = [[f'"{value}"' for value in row] for row in ROWS]
DIALECTS = {
    "plain": text(),
    "BOM and Windows line ends": b"\xef\xbb\xbf" + text(end="\r\n"),
    "old Mac line ends": text(end="\r"),
    "semicolons": text(";"),
    "tabs": text("\t"),
    "UTF-16 with tabs, as Excel's Unicode text": text("\t", "\r\n").decode().encode("utf-16"),
    "sep= line": b"sep=,\n" + text(),
    "sep= line with semicolons and BOM": b"\xef\xbb\xbfsep=;\r\n" + text(";", "\r\n"),
    "space after the comma": text(", "),
    "spaces around": text(" ; "),
    "quoted": text(rows=QUOTED),
    "quoted after a space": text(", ", rows=QUOTED),
    "quoted with semicolons": text(";", rows=QUOTED),
    "index column": text(rows=[["", *ROWS[0]], ["0", *ROWS[1]], ["1", *ROWS[2]]]),
    "index column read again": text(rows=[["Unnamed: 0", *ROWS[0]], ["0", *ROWS[1]], ["1", *ROWS[2]]]),
    "empty last column": text(rows=[[*row, ""] for row in ROWS]),
    "empty cells behind the values": text(rows=[ROWS[0], *([*row, "", ""] for row in ROWS[1:])]),
    "empty lines": b"\n" + text() + b"\n;;\n,,\n".replace(b";;\n", b""),
    "capitals": text(rows=[["Image", "SPLIT", "Depth"], *ROWS[1:]]),
    "no last line end": text().rstrip(b"\n"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_give_the_same_rows(dialect: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(DIALECTS[dialect])
    manifest = read_manifest(path)
    assert list(manifest.stored) == ["depth"]
    found = {
        split: [(row.image.name, row.targets["depth"].name) for row in rows] for split, rows in manifest.rows.items()
    }
    assert found == {"train": [("0.png", "d 0.png")], "val": [("1.png", "d1.png")]}


@pytest.mark.parametrize("dialect", ["semicolons", "BOM and Windows line ends"])
def test_a_yaml_may_name_them(dialect: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(DIALECTS[dialect])
    (tmp_path / "data.yaml").write_text("images: x.csv\ntasks: {depth: {scale: 0.001}}\n")
    assert list(read_manifest(tmp_path / "data.yaml").rows) == ["train", "val"]


def test_a_comma_within_quotes_is_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('image,depth\n"a, b.png","c;d.png"\n')
    assert read_table(tmp_path / "x.csv", "image") == [{"image": "a, b.png", "depth": "c;d.png"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,depth\na.png\n", "line 2 has more or fewer values than the first line"),
        (b"image;depth\na.png;b.png\nc.png;d.png;e\n", "line 3 has more or fewer values"),
        (b"image,,depth\na.png,x,b.png\n", "column 2 has no name, but line 2 has a value in it"),
        (b"image,depth,depth\na.png,b.png,c.png\n", "two columns are named 'depth'; give each another name"),
        (b"imgae;depth\na.png;b.png\n", "unknown kind 'imgae'"),
        (b"image,\xff\n", "not a CSV file in UTF-8"),
        (b"", "neither a CSV file nor a list of at least one image"),
        (b"image,depth\n", "neither a CSV file nor a list of at least one image"),
    ],
)
def test_what_is_no_table_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("limit", "most", "message"),
    [
        ("MOST_BYTES", 89, r"x\.csv: 90 bytes, but a file of this kind has at most 89; remove columns and lines"),
        ("MOST_VALUES", 12, r"x\.csv: more than 12 values and line ends; remove columns and lines"),
        ("MOST_COLUMNS", 2, r"x\.csv: its first line has 3 names, but a table has at most 2\."),
    ],
)
@pytest.mark.parametrize("separator", [",", ";"])
def test_tables_have_limits(
    limit: str, most: int, message: str, separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes((text(separator, rows=[*ROWS, ["2.png", "test", "d2.png"]]) + b"\n").ljust(90))
    assert [row["split"] for row in read_table(path, "image")] == ["train", "val", "test"]
    monkeypatch.setattr(f"simomerge.datasets.tables.{limit}", most)
    with pytest.raises(InputError, match=message):
        read_table(path, "image")
    monkeypatch.setattr(f"simomerge.datasets.tables.{limit}", {89: 90, 12: 13, 2: 3}[most])
    assert len(read_table(path, "image")) == 3


def test_millions_of_empty_values_are_refused_before_they_are_split(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for sign in (b",", b";", b"\n", b"\r"):
        path.write_bytes(b"image,depth\n" + sign * 21_000_000)
        with pytest.raises(InputError, match="more than 20,000,000 values"):
            read_table(path, "image")


@pytest.mark.slow
def test_a_million_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"image,split,depth\n" + b"a.png,train,a.npy\n" * 1_000_000)
    rows = read_table(path, "image")
    assert len(rows) == 1_000_000 and rows[-1] == {"image": "a.png", "split": "train", "depth": "a.npy"}


def test_only_a_file_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(InputError, match=r"x\.csv is no file but a folder"):
        read_table(tmp_path / "x.csv", "image")


# Splits -------------------------------------------------------------------------------------------------


def of_splits(folder: Path, *splits: str) -> Path:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "a.png")
    (folder / "x.csv").write_text("image,split\n" + "".join(f"a.png,{split}\n" for split in splits))
    return folder / "x.csv"


@pytest.mark.parametrize(
    ("word", "split"),
    [
        *((word, "val") for word in ("val", "valid", "validation", "dev", "Validation", "VAL")),
        *((word, "train") for word in ("train", "training", "Train")),
        *((word, "test") for word in ("test", "testing", "TEST", "")),
        ("night", "night"),
        ("0", "0"),
    ],
)
def test_other_names_of_splits_are_understood(word: str, split: str, tmp_path: Path) -> None:
    path = of_splits(tmp_path, word)
    assert list(read_manifest(path).rows) == [split]
    assert len(load_data(path, split)) == len(load_data(path, word or split)) == 1


@pytest.mark.parametrize("word", ["train2017", "val2017", "trainval", "minival", "testdev", "rain", "night", "rest"])
def test_other_names_are_splits_of_their_own(word: str, tmp_path: Path) -> None:
    assert list(read_manifest(of_splits(tmp_path, "train", word)).rows) == ["train", word]


@pytest.mark.parametrize(
    ("word", "near"),
    [("trian", "train"), ("tets", "test"), ("vall", "val"), ("validatoin", "val"), ("trainings", "train")],
)
def test_names_that_are_nearly_a_split_are_refused(word: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"image 2 is in split '{word}'; did you mean '{near}'\?"):
        read_manifest(of_splits(tmp_path, "train", word))
