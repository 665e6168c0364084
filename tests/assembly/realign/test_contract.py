"""Every re-alignment keeps the contract."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from simomerge.assembly.realign import get_realignment, realign, realignments
from simomerge.assembly.realign.method import with_parameters
from simomerge.core.errors import InputError
from simomerge.core.registry import settings

from .contract import SETTINGS, RealignmentContract

LORA = 3 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
"""Weights in LoRA of rank 3: the factors of six linear layers in each of four blocks."""

LAST_BLOCKS = 2 * (4 * (32 * 32 + 32) + 2 * 32 * 64 + (64 + 32) + 6 * 32) + 2 * 32
"""Weights of the last two blocks (attention, MLP, norms and layer scales) and of the final norm."""

ADAPTERS = 4 * 2 * 32 * 3
"""Weights in adapters of rank 3, one for each of four blocks."""

CORRECTIONS = 2 * 4 * 2 * (32 * 3 + 3 * 32)
"""Weights in corrections of rank 3 for two tasks, of the patches and of the CLS token of four taps."""


BLOCKS = 4 * (4 * 32 * 33 + 32 * 65 + 64 * 33 + 4 * 32 + 2 * 32)
"""Weights in the four blocks: attention, the two layers of the MLP, two norms, two layer scales."""


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


class TestFinetune(RealignmentContract):
    name = "finetune"
    given: ClassVar[dict[str, Any]] = {"last_blocks": 2, "hold_out": 0}
    recorded: ClassVar[dict[str, Any]] = {
        **{**given, "weighting": "equal", "retry": True, "augmentation": "flip"},
        **{"encoder_lr": 0.4 * SETTINGS.lr, "held_out_images": 0},
    }
    added = LAST_BLOCKS


class TestFold(RealignmentContract):
    name = "fold"
    given: ClassVar[dict[str, Any]] = {"images_at_once": 3}
    recorded: ClassVar[dict[str, Any]] = {"variant": "per-tap"}


class TestFoldCross(RealignmentContract):
    name = "fold-cross"
    recorded: ClassVar[dict[str, Any]] = {"variant": "cross-tap"}


class TestDistill(RealignmentContract):
    name = "distill"
    given: ClassVar[dict[str, Any]] = {"variant": "per-tap", "hold_out": 0}
    recorded: ClassVar[dict[str, Any]] = {**given, "trains": "heads", "held_out_images": 0}


DISTILLED: dict[str, Any] = {
    **{
        "variant": "cross-tap",
        "hold_out": 0,
        "retry": True,
        "features": 0.0,
        "augmentation": "flip",
        "held_out_images": 0,
    }
}


class TestDistillAdapters(RealignmentContract):
    name = "distill-adapters"
    given: ClassVar[dict[str, Any]] = {"rank": 3, "activation": "relu", "hold_out": 0}
    recorded: ClassVar[dict[str, Any]] = {**given, "trains": "adapters", **DISTILLED}
    added = ADAPTERS


class TestDistillLora(RealignmentContract):
    name = "distill-lora"
    given: ClassVar[dict[str, Any]] = {"rank": 3, "hold_out": 0}
    recorded: ClassVar[dict[str, Any]] = {
        **{"rank": 3, "alpha": 3, "targets": "all-linear"},
        **{"trains": "lora", **DISTILLED},
    }
    added = LORA


class TestDistillEncoder(RealignmentContract):
    name = "distill-encoder"
    given: ClassVar[dict[str, Any]] = {"last_blocks": 2, "hold_out": 0}
    recorded: ClassVar[dict[str, Any]] = {**given, "trains": "encoder", "encoder_lr": 0.4 * SETTINGS.lr, **DISTILLED}
    added = LAST_BLOCKS


class TestReact(RealignmentContract):
    name = "react"
    given: ClassVar[dict[str, Any]] = {"images_at_once": 3}
    recorded: ClassVar[dict[str, Any]] = {}


class TestSurgery(RealignmentContract):
    name = "surgery"
    given: ClassVar[dict[str, Any]] = {"rank": 3}
    recorded: ClassVar[dict[str, Any]] = {"rank": 3, "weight_decay": 0.0}
    added = CORRECTIONS
    keeps_heads = True


class TestSyMerge(RealignmentContract):
    name = "symerge"
    recorded: ClassVar[dict[str, Any]] = {"encoder_lr": 0.03}
    added = 2 * 4  # experts, blocks


class TestProDistill(RealignmentContract):
    name = "prodistill"
    recorded: ClassVar[dict[str, Any]] = {"weight_decay": 0.0}
    added = 2 * BLOCKS
    trainings = 4


class TestCalibrate(RealignmentContract):
    name = "calibrate"
    given: ClassVar[dict[str, Any]] = {"mix": 0.5, "images_at_once": 3}
    recorded: ClassVar[dict[str, Any]] = {"mix": 0.5, "ridge": "auto"}


def test_every_re_alignment_is_here() -> None:
    assert {each.name for each in RealignmentContract.__subclasses__()} == set(realignments())


def test_a_method_takes_settings_of_its_training_one_by_one_and_no_parameter_without_effect() -> None:
    made = get_realignment("distill", steps=60, lr=0.5)
    assert with_parameters(made, {"lr": 0.25, "hold_out": 0}) == get_realignment(
        "distill", steps=60, lr=0.25, hold_out=0
    )
    with pytest.raises(InputError, match="distill: rank does nothing unless trains is adapters or lora; leave it out"):
        with_parameters(made, {"rank": 4})


def test_what_is_no_method_is_named() -> None:
    with pytest.raises(InputError, match="method is a int: give a re-alignment, or its name"):
        realign("scene", method=5)  # type: ignore[arg-type]


def test_what_decides_memory_or_disk_only_is_not_recorded() -> None:
    only = {"images_at_once", "cache_budget", "checkpointing"}
    found = {
        (name, spec.name): spec.metadata["resource"]
        for name in realignments()
        for spec in settings(get_realignment(name))
    }
    about = {pair: resource for pair, resource in found.items() if pair[1] in only}
    assert ("react", "images_at_once") in about and ("fold", "images_at_once") in about and all(about.values())
