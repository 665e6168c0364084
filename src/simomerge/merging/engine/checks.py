"""Checks before any arithmetic: enough models, all different, with the same tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from simomerge.checkpoints import as_numpy, canonicalise, tensor_info
from simomerge.checkpoints.parts import separated
from simomerge.checkpoints.quantised import check_not_quantised
from simomerge.core.caution import warn
from simomerge.core.errors import InputError
from simomerge.merging.method import MergeMethod

_SHOWN = 3  # Number of mismatches that a message lists; it gives the total as well.


def check_models(method: MergeMethod, base: Mapping[str, Any] | None, experts: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the base and the experts against each other and against what the method needs.

    Only names, shapes and dtypes are checked here. `TaskVectorStream` checks the values when it reads them.

    Raises:
        InputError: The base is missing but needed; too few experts; the same expert twice; a missing or an extra
            float tensor; different shapes; a float tensor that is not a float in another model; quantised weights.
    """
    if base is None and method.needs_base:
        raise InputError(f"'{method.name}' needs the base that the experts were fine-tuned from: give it.")
    if len(experts) < method.minimum_experts:
        raise InputError(f"'{method.name}' needs at least {method.minimum_experts} expert(s), got {len(experts)}.")
    for (first, a), (second, b) in combinations(experts.items(), 2):
        path = getattr(a, "path", None)
        if a is b or (path is not None and path == getattr(b, "path", None)):
            raise InputError(f"The experts '{first}' and '{second}' are the same: give each expert once.")
    models = {f"the expert '{expert}'": tensors for expert, tensors in experts.items()}
    (reference, expected), *others = ([("the base", base)] if base is not None else []) + list(models.items())
    for name, tensors in ((reference, expected), *others):
        place = getattr(tensors, "path", None)
        check_not_quantised(tensors, _capital(name) + (f" ({place})" if place else ""))
    for other, given in others:
        _check_same_tensors(reference, expected, other, given)


def _check_same_tensors(reference: str, expected: Mapping[str, Any], other: str, given: Mapping[str, Any]) -> None:
    expected, given = separated(expected), separated(given)
    expected_names, given_names = canonicalise(expected), canonicalise(given)
    # Integers, such as the position_ids that only some versions save, are copied from the base and may be missing.
    if missing := _only_floats(expected, expected_names, given_names):
        which = _listed(missing, f" of {reference}")
        raise InputError(f"{_capital(other)} is missing {which}. Give experts fine-tuned from this base.")
    if extra := _only_floats(given, given_names, expected_names):
        which = _listed(extra, f" that {reference} does not have")
        raise InputError(f"{_capital(other)} has {which}. Give the encoder alone, without heads.")
    shapes, dtypes = [], []
    for name in (name for name in expected_names if name in given_names):
        a, b = tensor_info(expected, expected_names[name]), tensor_info(given, given_names[name])
        if a.shape != b.shape:
            shapes.append(f"{name} {a.shape} and {b.shape}")
        if a.is_float != b.is_float:
            dtypes.append(f"{name} {a.dtype} and {b.dtype}")
    for differing, what in ((shapes, "shapes"), (dtypes, "dtypes")):
        if differing:
            raise InputError(
                f"{_capital(reference)} and {other} differ in the {what} of {_listed(differing)}. "
                "Give experts fine-tuned from this base."
            )


def warn_of_other_tensors(base: Mapping[str, Any] | None, experts: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn of tensors that are not floats, and so are not merged, and differ in an expert.

    Single numbers, such as the counters of batch norms, do not count.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn_of_other_tensors({"ids": np.arange(3)}, {"a": {"ids": np.arange(3) + 1}})
        >>> print(caught[0].message)
        Only floats are merged, and the models differ in 1 tensor that holds no floats: ids. Those of the base are kept.
    """
    reference = experts[min(experts)] if base is None else base
    names = {expert: canonicalise(tensors) for expert, tensors in experts.items()}
    found = []
    for name, own in canonicalise(reference).items():
        info = tensor_info(reference, own)
        if info.is_float or info.size < 2:
            continue
        values = as_numpy(reference[own], own)
        others = (as_numpy(experts[expert][known[name]], name) for expert, known in names.items() if name in known)
        if not all(np.array_equal(values, other) for other in others):
            found.append(own)
    if found:
        kept = min(experts) if base is None else "the base"
        which = _listed(found, " that holds no floats" if len(found) == 1 else " that hold no floats")
        warn(f"Only floats are merged, and the models differ in {which}. Those of {kept} are kept.")


def _only_floats(tensors: Mapping[str, Any], names: Mapping[str, str], others: Mapping[str, str]) -> list[str]:
    """The canonical names of the float tensors that the other model does not have."""
    return [name for name, own in names.items() if name not in others and tensor_info(tensors, own).is_float]


def _listed(items: Sequence[str], which: str = "") -> str:
    """The number of tensors and the first of them, such as "5 tensors of the base: w0, w1, w2, ..."."""
    more = ", ..." if len(items) > _SHOWN else ""
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''}{which}: {', '.join(items[:_SHOWN])}{more}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
