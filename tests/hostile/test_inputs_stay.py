"""No command replaces what it reads, and an output that replaces nothing is allowed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import simomerge as sm
from simomerge.cli import cli
from simomerge.core.errors import InputError
from simomerge.core.files import check_apart
from simomerge.merging.disk.compress import compress
from simomerge.models.model import SimoModel


def test_commands_replace_no_input(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that work in memory, before they load a model; the model that is edited may be replaced."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "depth", "small"):
        make_model([sm.Task("depth")] if name == "depth" else []).save_pretrained(name)
    compress("base", {"depth": "depth"}, "packed")
    shutil.copytree("depth", "tree")
    description = json.loads(Path("tree/simo.json").read_text())
    description["encoder"]["tree"] = "(depth)"
    Path("tree/simo.json").write_text(json.dumps(description))
    Path("mine").mkdir()
    Path("mine/data.yaml").write_text("images: images.csv")
    Path("mine/images.csv").write_text("image,depth\nphoto.png,depth.png\n")
    for name in ("photo", "depth"):
        Path(f"mine/{name}.png").write_bytes(b"a picture")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # Not `load` itself: modules that are imported during this test would keep the replacement.
    monkeypatch.setattr(SimoModel, "from_pretrained", lambda *given: pytest.fail("loaded"))
    for given in (
        "merge base depth=depth --images photos -o depth",
        "merge base depth=depth -o base",
        "compress base depth=depth -o depth",
        "realign small depth=depth --images photos -o depth",
        "realign small depth=depth --method symerge --images photos --base base -o base",
        "train --base base --task depth -o base",
        "import depth --task depth -o depth",
        "edit tree --base base --images photos --add edges=small --remove depth=depth -o depth",
        "restore packed depth -o packed",
        "data check mine -o mine/data.yaml",
        "data check mine -o mine/images.csv",
        "data check mine -o mine/photo.png",
        "data check mine/data.yaml -o mine/depth.png",
    ):
        result = CliRunner().invoke(cli, [*given.split(), "--overwrite"])
        assert re.search("is the input .* would be replaced", str(result.exception)), (given, result.output)
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_replaces_no_input_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in a source that is no model, names that no file can have, and a folder named like the embedded base."""
    monkeypatch.chdir(tmp_path)
    Path("rooms-base/part").mkdir(parents=True)
    for output in ("rooms-base", "rooms-base/part", "rooms-base/new"):
        check_apart(Path(output), ["rooms-base", "~nobody-of-this-name/x", "a" * 300, "someone/model"])
    check_apart(Path("rooms-base/new"), [".", "./rooms-base"], inside=False)
    for output, how in (("rooms-base/new", "lies inside"), ("rooms-base", "is")):
        with pytest.raises(InputError, match=rf"{how} the input \./rooms-base"):
            check_apart(Path(output), ["a" * 300, "./rooms-base"])
    Path("hf").mkdir()
    for given in (
        "import hf --task depth -o hf/expert",
        "import . --task depth -o o",
        "train --base hf --task depth -o hf/x",
    ):
        result = CliRunner().invoke(cli, given.split())
        assert re.search("hf|config", str(result.exception)) and "input" not in str(result.exception), given
    result = CliRunner().invoke(cli, ["merge", "rooms-base", "depth=~nobody-of-this-name/x", "-o", "out"])
    assert "~nobody-of-this-name/x does not exist" in str(result.exception)
