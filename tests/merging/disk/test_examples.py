"""The examples in the docstrings run."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.parametrize("name", ["compress", "diff", "merge"])
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"simomerge.merging.disk.{name}")
    outcome = doctest.testmod(module, extraglobs={"np": np})
    assert outcome.attempted > 0 and outcome.failed == 0
