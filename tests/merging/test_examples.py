"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import simomerge.merging

MODULES = sorted(found.name for found in pkgutil.iter_modules(simomerge.merging.__path__))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "checks"])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"simomerge.merging.{name}")
    outcome = doctest.testmod(module, extraglobs={"np": np})
    assert outcome.attempted > 0 and outcome.failed == 0
