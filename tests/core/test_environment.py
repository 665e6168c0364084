"""What the checks of the installation say."""

from __future__ import annotations

import sys

import pytest

from simomerge.cli.doctor import _import, _run


def test_doctor_names_the_extra_of_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    row = _run("torchmetrics", lambda: _import("torchmetrics"))
    wanted = "this needs torchmetrics, which is not installed: pip install 'simomerge[torch]'."
    assert row == {"name": "torchmetrics", "ok": False, "found": wanted}
