"""Every re-alignment keeps the contract."""

from __future__ import annotations

from typing import Any, ClassVar

from simomerge.assembly.realign import realignments

from .contract import RealignmentContract

LORA = 3 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
"""Weights in LoRA of rank 3: the factors of six linear layers in each of four blocks."""

ADAPTERS = 4 * 2 * 32 * 3
"""Weights in adapters of rank 3, one for each of four blocks."""


class TestHeads(RealignmentContract):
    name = "heads"
    given: ClassVar[dict[str, Any]] = {"cache_budget": "1GB"}
    recorded: ClassVar[dict[str, Any]] = {}  # disk space decides no result


class TestAdapters(RealignmentContract):
    name = "adapters"
    given: ClassVar[dict[str, Any]] = {"rank": 3, "activation": "relu"}
    recorded: ClassVar[dict[str, Any]] = {**given, "last_blocks": 0}
    added = ADAPTERS


class TestLora(RealignmentContract):
    name = "lora"
    given: ClassVar[dict[str, Any]] = {"rank": 3}
    recorded: ClassVar[dict[str, Any]] = {"rank": 3, "alpha": 3, "targets": "all-linear"}
    added = LORA


class TestFold(RealignmentContract):
    name = "fold"
    given: ClassVar[dict[str, Any]] = {"images_at_once": 3}
    recorded: ClassVar[dict[str, Any]] = {"variant": "per-tap"}


class TestFoldCross(RealignmentContract):
    name = "fold-cross"
    recorded: ClassVar[dict[str, Any]] = {"variant": "cross-tap"}


class TestDistill(RealignmentContract):
    name = "distill"
    given: ClassVar[dict[str, Any]] = {"variant": "per-tap"}
    recorded: ClassVar[dict[str, Any]] = {**given, "trains": "heads"}


class TestDistillAdapters(RealignmentContract):
    name = "distill-adapters"
    given: ClassVar[dict[str, Any]] = {"rank": 3, "activation": "relu"}
    recorded: ClassVar[dict[str, Any]] = {**given, "trains": "adapters", "variant": "cross-tap"}
    added = ADAPTERS


class TestDistillLora(RealignmentContract):
    name = "distill-lora"
    given: ClassVar[dict[str, Any]] = {"rank": 3}
    recorded: ClassVar[dict[str, Any]] = {
        **{"rank": 3, "alpha": 3, "targets": "all-linear"},
        **{"trains": "lora", "variant": "cross-tap"},
    }
    added = LORA


class TestCalibrate(RealignmentContract):
    name = "calibrate"
    given: ClassVar[dict[str, Any]] = {"mix": 0.5, "images_at_once": 3}
    recorded: ClassVar[dict[str, Any]] = {"mix": 0.5, "ridge": "auto"}


def test_every_re_alignment_is_here() -> None:
    assert {each.name for each in RealignmentContract.__subclasses__()} == set(realignments())
