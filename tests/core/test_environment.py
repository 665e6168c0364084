"""What the checks of the installation say."""

from __future__ import annotations

import json
import sys

import pytest

from simomerge.cli.doctor import _import, _run, checks
from simomerge.core import environment
from simomerge.core.environment import install_command


def test_doctor_names_the_extra_of_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    row = _run("torchmetrics", lambda: _import("torchmetrics"))
    wanted = f"this needs torchmetrics, which is not installed: {install_command('torch')}."
    assert row == {"name": "torchmetrics", "ok": False, "found": wanted}


@pytest.mark.parametrize(
    ("recorded", "wanted"),
    [
        ({"url": "file:///code/sim%20o", "dir_info": {"editable": True}}, 'pip install -e "/code/sim o[app]"'),
        ({"url": "file:///d/simomerge-1.whl", "archive_info": {}}, 'pip install "/d/simomerge-1.whl[app]"'),
        ({"url": "https://example.org/simomerge-1.whl", "archive_info": {}}, 'pip install "simomerge[app]"'),
        (None, 'pip install "simomerge[app]"'),
    ],
)
def test_extras_are_added_from_where_simomerge_came_from(
    recorded: dict[str, object] | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return json.dumps(recorded) if recorded else None

    monkeypatch.setattr(environment.metadata, "distribution", lambda name: Installed())
    assert install_command("app") == wanted


def test_doctor_checks_only_what_an_installation_without_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"torch", "device", "embedded base"} <= checks().keys()
    monkeypatch.setitem(sys.modules, "torch", None)
    without = checks()
    assert not {"torch", "transformers", "PIL", "device", "embedded base"} & without.keys()
    assert all(_run(name, check)["ok"] for name, check in without.items())
