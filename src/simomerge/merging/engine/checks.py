"""What must hold before any arithmetic: enough models, all different, with the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from simomerge.checkpoints import canonicalise, tensor_info
from simomerge.core.errors import InputError
from simomerge.merging.method import MergeMethod

_SHOWN = 3  # of a list of mismatches; the count is given as well


def check_models(method: MergeMethod, base: Mapping[str, Any] | None, experts: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the base and the experts against each other and against what the method needs.

    Only names, shapes and dtypes are looked at; values are checked where they are read, in
    ``TaskVectorStream``.

    Raises:
        InputError: no base where one is needed, too few experts, one expert given twice, a missing or an
            extra tensor, two shapes that differ, a float tensor that is not a float elsewhere.
    """
    if base is None and method.needs_base:
        raise InputError(f"'{method.name}' needs the base that the experts were fine-tuned from: give it.")
    if len(experts) < method.minimum_experts:
        raise InputError(f"'{method.name}' needs at least {method.minimum_experts} expert(s), got {len(experts)}.")
    for (first, a), (second, b) in combinations(experts.items(), 2):
        path = getattr(a, "path", None)
        if a is b or (path is not None and path == getattr(b, "path", None)):
            raise InputError(f"The experts '{first}' and '{second}' are the same: give each expert once.")
    if base is not None:
        for expert in experts:
            _check_same_tensors("the base", base, f"the expert '{expert}'", experts[expert])
    else:
        reference, *others = experts
        for expert in others:
            _check_same_tensors(
                f"the expert '{reference}'", experts[reference], f"the expert '{expert}'", experts[expert]
            )


def _check_same_tensors(reference: str, expected: Mapping[str, Any], other: str, given: Mapping[str, Any]) -> None:
    expected_names, given_names = canonicalise(expected), canonicalise(given)
    if missing := [name for name in expected_names if name not in given_names]:
        raise InputError(
            f"{_capital(other)} lacks {_count(missing)} of {reference}: {_first(missing)}. "
            "Give experts fine-tuned from this base."
        )
    if extra := [name for name in given_names if name not in expected_names]:
        raise InputError(
            f"{_capital(other)} has {_count(extra)} that {reference} lacks: {_first(extra)}. "
            "Give the encoder alone, without heads."
        )
    shapes, kinds = [], []
    for name in expected_names:
        a, b = tensor_info(expected, expected_names[name]), tensor_info(given, given_names[name])
        if a.shape != b.shape:
            shapes.append(f"{name} {a.shape} and {b.shape}")
        if a.is_float != b.is_float:
            kinds.append(f"{name} {a.dtype} and {b.dtype}")
    for differing, what in ((shapes, "shapes"), (kinds, "dtypes")):
        if differing:
            raise InputError(
                f"{_capital(reference)} and {other} differ in the {what} of {_count(differing)}: "
                f"{_first(differing)}. Give experts fine-tuned from this base."
            )


def _first(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def _count(items: list[str]) -> str:
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
