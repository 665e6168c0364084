"""Where sources are found: the disk first, then the cache of the hub; nothing waits for a missing network."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from simomerge.checkpoints import open_checkpoint
from simomerge.core.errors import InputError
from simomerge.core.hub import is_only_a_path, local_source, similar

COMMIT = "a" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with the model me/tiny; the current folder is empty."""
    folder = tmp_path / "hub" / "models--me--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "preprocessor_config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return snapshot


def test_the_cache_serves_an_id(cache: Path) -> None:
    assert Path(local_source("me/tiny")).resolve() == cache.resolve()


def test_the_disk_comes_first(cache: Path) -> None:
    Path("me/tiny").mkdir(parents=True)
    assert local_source("me/tiny") == "me/tiny"
    assert Path(local_source("rooms-base")).is_dir()


def test_a_copy_without_weights_does_not_count(cache: Path) -> None:
    (cache / "model.safetensors").unlink()
    with pytest.raises(InputError, match="me/tiny: no such folder, and as a hub id: cannot load"):
        local_source("me/tiny")


@pytest.mark.parametrize("absent", ["preprocessor_config.json", "model-2-of-2.safetensors"])
def test_a_copy_with_a_part_missing_is_completed_or_said(cache: Path, absent: str) -> None:
    (cache / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in index["weight_map"].values():
        (cache / name).write_bytes(b"")
    assert Path(local_source("me/tiny")).resolve() == cache.resolve()
    (cache / absent).unlink()
    with pytest.warns(UserWarning, match="no preprocessor_config.json for it or not all of its weights"):
        local_source("me/tiny")


@pytest.mark.parametrize(
    "source",
    [
        *("./tiny", "/no/such", "~/none", "a/b/c", "w.safetensors", "me/w.pt", "timm:resnet18"),
        *("me/last.ckpt", "me/best.pth.tar", "me/last.ckpt::state_dict_ema"),
    ],
)
def test_what_can_only_be_a_path_is_not_looked_up(cache: Path, source: str) -> None:
    assert local_source(source) == source
    assert is_only_a_path(source) == (source != "timm:resnet18")


def test_a_misspelt_path_fails_at_once_with_a_near_name(cache: Path) -> None:
    Path("runs/depth").mkdir(parents=True)
    began = time.monotonic()
    assert local_source("runs/dept") == "runs/dept" and similar("runs/dept") == " Did you mean 'runs/depth'?"
    with pytest.raises(InputError, match=r"runs/dept does not exist: check the path\. Did you mean 'runs/depth'\?"):
        open_checkpoint("runs/dept")
    with pytest.raises(InputError, match=r"rans: no such folder.* Did you mean 'runs'\?"):
        local_source("rans")
    assert local_source("rans", bare=False) == "rans"
    with pytest.raises(InputError, match="someone/something: no such folder"):
        local_source("someone/something")
    assert time.monotonic() - began < 5
    assert similar("something/else") == "" and similar("zzz") == ""
