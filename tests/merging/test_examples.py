"""The examples in the docstrings run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["linear", "merge", "method", "stream", "ties"])
def test_examples(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"simomerge.merging.{name}"))
    assert outcome.attempted > 0 and outcome.failed == 0
