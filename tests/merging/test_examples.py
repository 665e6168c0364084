"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import simomerge.merging

MODULES = sorted(
    found.name.removeprefix("simomerge.merging.")
    for found in pkgutil.walk_packages(simomerge.merging.__path__, "simomerge.merging.")
    if not found.ispkg and ".disk." not in found.name
)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "engine.checks"])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"simomerge.merging.{name}")
    outcome = doctest.testmod(module, extraglobs={"np": np})
    assert outcome.attempted > 0 and outcome.failed == 0
