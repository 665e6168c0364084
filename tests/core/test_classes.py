"""Custom classes, by their path and settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from simomerge.core.classes import class_path, make, trusting
from simomerge.core.errors import InputError


class Plain(nn.Module):
    pass


def test_only_modules_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('at import')")
    (tmp_path / "wrong.py").write_text("def (")
    text = "import torch\nclass Thing(torch.nn.Module):\n    def __init__(self):\n        raise ValueError('never')\n"
    (tmp_path / "raising.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with trusting():
        assert isinstance(make(class_path(Plain()), {}, nn.Module), Plain)
    for path, message in (
        ("subprocess:run", "not a torch Module"),
        ("nowhere_at_all:Thing", "cannot be imported.*PYTHONPATH"),
        ("torch.nn:Nothing", "no such class in the module"),
        ("broken:Thing", "'broken' cannot be imported.*RuntimeError: at import.*fix the module"),
        ("wrong:Thing", "'wrong' cannot be imported.*SyntaxError.*fix the module"),
        ("raising:Thing", "cannot be created with.*ValueError: never"),
        ("__main__:Gone", "notebook or script"),
    ):
        with trusting(), pytest.raises(InputError, match=message):
            make(path, {}, nn.Module)
    with trusting(), pytest.raises(InputError, match=r"torch\.nn:Linear: cannot be created with"):
        make("torch.nn:Linear", {"width": 3}, nn.Module)
