"""Re-alignment: repair the mismatch between merged features and the experts' heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from simomerge.assembly.realign.adapters import ADAPTER_SETTINGS, realign_adapters
from simomerge.assembly.realign.distill import DISTILL_SETTINGS, realign_distill
from simomerge.assembly.realign.fold import HELD_OUT, RIDGES, Fold, fold_heads, realign_fold, see
from simomerge.assembly.realign.heads import HEAD_SETTINGS, realign_heads
from simomerge.assembly.realign.lora import LORA_SETTINGS, realign_lora
from simomerge.core.errors import InputError
from simomerge.models.model import SimoModel

WITHOUT_LABELS: dict[str, Callable[..., SimoModel]] = {"fold": realign_fold, "distill": realign_distill}
"""Re-alignments that learn from the experts: ``(model, experts, images, ...)``."""

WITH_LABELS: dict[str, Callable[..., SimoModel]] = {
    "heads": realign_heads,
    "adapters": realign_adapters,
    "lora": realign_lora,
}
"""Re-alignments that learn from labels: ``(model, data, ...)``."""

REALIGNMENTS = {**WITHOUT_LABELS, **WITH_LABELS}
"""Every re-alignment by name; each gives a new model."""


def realign(
    model: SimoModel,
    experts: Mapping[str, SimoModel] | None = None,
    images: Any = None,
    data: Any = None,
    method: str = "fold",
    **options: Any,
) -> SimoModel:
    """Re-align a merged model; it stays as it is.

    ``"fold"`` (closed form) and ``"distill"`` need the experts and images without labels; ``"heads"`` and
    ``"adapters"`` (the paper's) and ``"lora"`` need labelled data. Each may start from what another one gave; those
    that put adapters or LoRA into an encoder, from one without adapters.

    Args:
        model: a merged model.
        experts: by task, those it was merged from.
        images: a folder of pictures, a sequence of images, or a dataset whose labels are not read.
        data: a dataset with the targets of every task.
        method: a key of `REALIGNMENTS`.
        **options: see `realign_fold`, `realign_distill`, `realign_heads`, `realign_adapters` and `realign_lora`.

    Raises:
        InputError: an unknown method, what it needs is not given, or what the method refuses.

    Example:
        >>> model = realign(model, experts, images="photos/")                                      # doctest: +SKIP
        >>> model = realign(model, data=load_data("rooms", split="val"), method="heads")           # doctest: +SKIP
    """
    if method not in REALIGNMENTS:
        raise InputError(f"unknown re-alignment {method!r}; choose one of: {', '.join(REALIGNMENTS)}.")
    if not model.tasks:
        raise InputError("the model has no heads to re-align; give a merged model.")
    if method in WITH_LABELS:
        if data is None:
            raise InputError(f"re-alignment by {method!r} learns from labels: give data=, a dataset with every task.")
        return WITH_LABELS[method](model, data, **options)
    if images is None:
        raise InputError(f"re-alignment by {method!r} looks at images without labels: give images=, such as a folder.")
    return WITHOUT_LABELS[method](model, experts or {}, images, **options)


__all__ = [
    "ADAPTER_SETTINGS",
    "DISTILL_SETTINGS",
    "HEAD_SETTINGS",
    "HELD_OUT",
    "LORA_SETTINGS",
    "REALIGNMENTS",
    "RIDGES",
    "WITHOUT_LABELS",
    "WITH_LABELS",
    "Fold",
    "fold_heads",
    "realign",
    "realign_adapters",
    "realign_distill",
    "realign_fold",
    "realign_heads",
    "realign_lora",
    "see",
]
