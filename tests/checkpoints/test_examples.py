"""The examples in the docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["experts", "fingerprint", "names", "lora", "reading", "tensors", "writing"])
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testmod(importlib.import_module(f"simomerge.checkpoints.{name}"))
    assert outcome.attempted > 0 and outcome.failed == 0
