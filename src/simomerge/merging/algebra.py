"""Task-vector algebra: forget, interpolate, and add or remove an expert of a merged model afterwards.

Source: "Editing models with task arithmetic" (arXiv 2212.04089): negation and addition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simomerge.checkpoints import as_numpy, canonicalise, tensor_info
from simomerge.core.errors import InputError
from simomerge.merging.engine.checks import check_models
from simomerge.merging.engine.merge import like, merge_state_dicts, merge_tensors
from simomerge.merging.engine.stream import TaskVectorStream
from simomerge.merging.linear import LinearMethod, TaskArithmetic, WeightedAverage
from simomerge.merging.method import get_method, restricted

_MERGED = "the merged model"


def negate(base: Mapping[str, Any], expert: Mapping[str, Any], scale: float = 1.0) -> dict[str, Any]:
    """theta_0 - scale * tau: the base made worse at what the expert learned.

    Args:
        base, expert: name -> numpy array or torch tensor, or a Checkpoint.
        scale: how far, above 0.

    Returns:
        name -> tensor of the base's kind and dtype.

    Example:
        >>> negate({"w": np.zeros(1)}, {"w": np.ones(1)}, scale=0.5)
        {'w': array([-0.5])}
    """
    if not (np.isfinite(scale) and scale > 0):
        raise InputError(f"negate: scale must be a number above 0, got {scale!r}.")
    mirrored = dict(merge_tensors(base, {"expert": expert}, TaskArithmetic(scale=scale)))
    for name, value in mirrored.items():
        if tensor_info(base, name).is_float:
            mirrored[name] = np.asarray(2 * as_numpy(base[name], name) - value)
    return {name: like(value, base[name], name) for name, value in mirrored.items()}


def interpolate(first: Mapping[str, Any], second: Mapping[str, Any], weight: float = 0.5) -> dict[str, Any]:
    """(1 - weight) * first + weight * second, in float32; no base is needed.

    Args:
        first, second: two models of the same tensors.
        weight: 0 gives the first, 1 the second; beyond that it extrapolates.

    Example:
        >>> interpolate({"w": np.zeros(1)}, {"w": np.ones(1)}, weight=0.25)
        {'w': array([0.25])}
    """
    if not np.isfinite(weight):
        raise InputError(f"interpolate: weight must be a finite number, got {weight!r}.")
    if 0 <= weight <= 1:
        return merge_state_dicts(
            None, {"first": first, "second": second}, WeightedAverage(weight={"first": 1 - weight, "second": weight})
        )
    if weight > 1:
        return merge_state_dicts(first, {"second": second}, TaskArithmetic(scale=weight))
    return negate(first, second, -weight)


def with_experts(
    merged: Mapping[str, Any],
    base: Mapping[str, Any],
    method: LinearMethod | str,
    present: Sequence[str],
    add: Mapping[str, Mapping[str, Any]] | None = None,
    remove: Mapping[str, Mapping[str, Any]] | None = None,
    **parameters: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    """A merged model with experts added or removed, from these and the base alone: the others are not needed.

    It works for methods that are weighted sums of task vectors (average, weighted average, task arithmetic), whose
    weights of the experts that stay change by one common factor. It equals merging anew up to the rounding of
    the merged weights.

    Args:
        merged: what ``method`` made of ``base`` and the experts ``present``.
        present: names of the experts that are in it.
        add, remove: expert name -> its weights.
        **parameters: of the method, when it is given by name. Those that differ between experts, by expert name: of
            all that are in it, are added or are removed.

    Yields:
        ``(name, array)`` as `simomerge.merging.merge_tensors` does.

    Raises:
        InputError: another method, an expert that is there already or is not there, none left.

    Example:
        >>> base, expert, merged = {"w": np.zeros(1)}, {"w": np.ones(1)}, {"w": np.full(1, 0.5)}
        >>> dict(with_experts(merged, base, "task-arithmetic", ["a"], add={"b": expert}, scale=0.25))
        {'w': array([0.75], dtype=float32)}
    """
    chosen = get_method(method, **parameters) if isinstance(method, str) else method
    add, remove = dict(add or {}), dict(remove or {})
    if not isinstance(chosen, LinearMethod):
        raise InputError(f"'{chosen.name}' is no weighted sum of task vectors: merge all the experts anew.")
    if twice := [name for name in add if name in present]:
        raise InputError(f"the expert '{twice[0]}' is in the merged model already: remove it first.")
    if missing := [name for name in remove if name not in present]:
        raise InputError(f"the expert '{missing[0]}' is not in the merged model, which has {', '.join(present)}.")
    after = [name for name in present if name not in remove] + list(add)
    if not after:
        raise InputError("no expert would be left: use the base.")
    others = {_MERGED: merged, **add, **remove}
    check_models(chosen, base, others)
    old_method, new_method = (restricted(chosen, names).for_experts(names) for names in (list(present), after))
    assert isinstance(old_method, LinearMethod) and isinstance(new_method, LinearMethod)
    return _reweighted(old_method, new_method, base, others, sorted(present), sorted(after))


def _reweighted(
    old_method: LinearMethod,
    new_method: LinearMethod,
    base: Mapping[str, Any],
    others: Mapping[str, Any],
    before: list[str],
    after: list[str],
) -> Iterator[tuple[str, np.ndarray]]:
    stream = TaskVectorStream(base, others)
    old_depth, new_depth = old_method.prepare(stream), new_method.prepare(stream)

    def change(name: str) -> np.ndarray:
        old, new = old_method.weights(name, before, old_depth), new_method.weights(name, after, new_depth)
        kept = [expert for expert in before if expert in new]
        factors = {new[expert] / old[expert] for expert in kept if old[expert]} or {0.0}
        if max(factors) - min(factors) > 1e-9 * max(map(abs, factors)):
            raise InputError(
                f"'{new_method.name}' weighs the experts that stay anew, each differently: merge all anew."
            )
        factor = next(iter(factors))
        values, task_vectors = stream.read(name)
        changed = task_vectors[_MERGED] * np.float32(factor)
        for expert in others:
            if expert != _MERGED:
                weight = new[expert] if expert in new else -factor * old[expert]
                changed += np.float32(weight) * task_vectors[expert]
        return (values + changed).reshape(stream.shapes[name])

    changed = stream.map(change)
    for name, own_name in canonicalise(base).items():
        yield own_name, next(changed)[1] if name in stream.sizes else as_numpy(base[own_name], own_name).copy()
