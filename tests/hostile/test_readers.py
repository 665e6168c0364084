"""Readers of files from elsewhere: limits, types, and clear errors. A small part of benchmarks/hardening.py."""

from __future__ import annotations

import contextlib
import importlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simomerge.checkpoints.description import model_card
from simomerge.checkpoints.lora_config import _ends_with
from simomerge.core.documents import read_json, read_yaml
from simomerge.core.errors import InputError
from simomerge.core.text import markdown, printable, shortened, shown
from simomerge.datasets.stored import Stored, may_be_truncated
from simomerge.datasets.tasks import Task

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def hardening() -> Iterator[Any]:
    """The script that damages files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("hardening")


def test_damaged_files_give_one_clear_error_or_are_accepted(hardening: Any) -> None:
    found = list(hardening.fuzz(25, seed=7, share=False))
    for tally in found:
        assert tally.counts["tried"] == 25 and tally.bad() == 0, (tally.name, tally.counts, tally.examples)
        assert tally.counts["InputError"]
    assert len(found) == 18


@pytest.mark.parametrize(
    "name", ["a.safetensors", "shards/model.safetensors.index.json", "manifest.csv", "d.npy", "i.png"]
)
def test_a_reader_that_accepts_other_values_than_another_library_is_counted(
    hardening: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = hardening.PAIRS[name]
    (tally,) = hardening.fuzz(60, seed=3, only=[name], share=False)
    accepted = tally.counts["accepted"]
    assert accepted and tally.counts["wrong accept"] == tally.bad() == 0

    def other(file: Path) -> Any:
        """The smallest change of what our reader finds."""
        value = ours(file)
        if isinstance(value, list):
            return [*value[:-1], {**value[-1], "image": "other.png"}]
        if isinstance(value, dict):
            name = next(iter(value))
            return {**value, name: value[name] + np.float32(1e-6)}
        return value.astype(value.dtype.newbyteorder(">")) if value.dtype.itemsize > 1 else value ^ 1

    def refusing(file: Path) -> Any:
        raise OSError("no")

    for pair in ((other, theirs), (ours, refusing)):
        monkeypatch.setitem(hardening.PAIRS, name, pair)
        (tally,) = hardening.fuzz(60, seed=3, only=[name], share=False)
        assert tally.counts["wrong accept"] == tally.bad() == accepted and not tally.counts["accepted"]
        assert "wrong accept" in tally.examples


@pytest.mark.slow
def test_kills_full_disks_and_limits_lose_nothing(hardening: Any) -> None:
    writers = importlib.import_module("hardening_writers")
    found = list(writers.everything(14, seed=1))
    assert len(found) == 3 + 3 + 2 + 4 + 3
    for tally in found:
        assert tally.bad() == 0, (tally.name, tally.counts, tally.examples)


# JSON and YAML --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": ' * 60 + "1" + "}" * 60, "nested more than 50 levels deep"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ('{"a": 1e999}', "inf is not a finite number"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"a": 99999999999999999999999}', "more than 64 bits"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
        ("[1]", "the content is .*, not a mapping"),
        ("\xff", "not text in UTF-8"),
        ("", "cannot be read"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_json(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "a.json", "take it from its source again.")


def test_a_schema_names_the_place(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"tasks": {"depth": {"kind": 3}}, "taps": [1, True]}))
    for schema, message in (
        ({"tasks": {str: {"kind": str}}}, "tasks.depth.kind is 3, not text"),
        ({"taps": [int]}, r"taps\[1\] is True, not a whole number"),
        ({"heads": dict}, "entry 'heads' is missing"),
        ({"tasks": (list, type(None))}, "tasks is .*, not a list or null"),
    ):
        with pytest.raises(InputError, match=message):
            read_json(file, "write it again.", schema)
    assert read_json(file, "write it again.", {"taps": list, "heads?": dict})["taps"] == [1, True]


def test_yaml_that_stands_for_millions_of_values_ends_at_once(hardening: Any, tmp_path: Path) -> None:
    file, started = tmp_path / "a.yaml", time.process_time()
    merges = "a0: &a0 {k0: 1}\n" + "".join(
        f"a{i}: &a{i}\n  k{i}: 1\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    for text, message in (
        (f"tune: {hardening.laughs(9)}", "stands for more than 5,000,000 values"),
        (merges, "too many keys"),
        ("a: &a [*a]", "nested more than 50 levels deep|more than 5,000,000 values"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: 2001-02-03", "put it in quotes"),
        ("a: !!binary aGVsbG8=", "put it in quotes"),
        ("a: !!python/object/apply:os.system [x]", "not YAML"),
        ("a: 0x" + "f" * 5000, "more than 64 bits"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_yaml(file, "give a recipe.")
    assert time.process_time() - started < 20


def test_patterns_of_an_adapter_match_in_bounded_time() -> None:
    started = time.process_time()
    for key in (r"(([a-z.])+.)+[A-Z]([a-z])+$", "(.*.*)*x", ".*" * 50 + "x", "(a|aa)+$"):
        with contextlib.suppress(ValueError):  # it took too long
            assert not _ends_with("encoder.layer.0.attention.attention.query" * 3, key)
    assert time.process_time() - started < 2
    for key, expected in (("query", True), ("ery", False), (r"layer\.\d+\.query", True), ("layer.0.query", True)):
        assert _ends_with("encoder.layer.0.query", key) == expected


# Arrays, names and pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<U5', 'fortran_order': False, 'shape': (16, 20)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (16, 20)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 20)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000)}",
        "{'descr': '<f4', 'shape': (",
        "(" * 3000,
        "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000, 1000000)}",
    ],
)
def test_npy_headers(tmp_path: Path, header: str) -> None:
    file, text = tmp_path / "x.npy", (header + "\n").encode()
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(6400))
    may_be_truncated(file)
    with pytest.raises(InputError, match=r"x\.npy: "):
        Stored(Task("depth")).read(file, (8, 8))
    np.save(file, np.ones((16, 20), "f4"))
    assert Stored(Task("depth")).read(file, (8, 8)).shape == (1, 8, 8)


def test_names_from_files_are_escaped() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202eevil"
    assert printable(evil) == "]0;owned[2Jevil" and str(InputError(evil)) == "]0;owned[2Jevil"
    assert len(str(InputError("x" * 10**6))) <= 2000 and shortened("abc", 3) == "abc"
    assert len(shown([["y" * 10**6] * 10**4] * 10**4)) <= 300 and shown(10**5000) == "a int"
    assert markdown("</td><script>|`\n") == "\\</td\\>\\<script\\>\\|\\` "


def test_a_model_card_holds_no_markup_from_files() -> None:
    evil = "```\n<script>alert(1)</script>\x1b[2J|"
    description = {
        "tasks": {"depth": {"kind": evil}},
        "heads": {"depth": {"kind": evil, "settings": {}}},
        "encoder": {"taps": [1]},
        "provenance": {"base": {"source": evil}},
    }
    card = model_card(description)
    assert "<script>" not in card and "\x1b" not in card and card.count("```") == 6
    block = card.rpartition("```json\n")[2].partition("\n```")[0]
    assert json.loads(block) == description["provenance"]
