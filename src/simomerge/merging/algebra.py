"""Task-vector algebra: forget, interpolate, and add experts to a merged model or remove them.

Source: "Editing models with task arithmetic" (arXiv 2212.04089), negation and addition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simomerge.checkpoints import as_numpy, canonicalise, tensor_info
from simomerge.checkpoints.names import is_running_statistic
from simomerge.checkpoints.parts import joined
from simomerge.core.errors import InputError
from simomerge.merging.engine.checks import check_models
from simomerge.merging.engine.merge import like, merge_state_dicts, merge_tensors
from simomerge.merging.engine.stream import TaskVectorStream
from simomerge.merging.linear import LinearMethod, TaskArithmetic, WeightedAverage
from simomerge.merging.method import get_method, restricted

_MERGED = "the merged model"


def negate(base: Mapping[str, Any], expert: Mapping[str, Any], scale: float = 1.0) -> dict[str, Any]:
    """theta_0 - scale * tau: make the base worse at what the expert learned.

    Args:
        base, expert: name -> numpy array or torch tensor, or a Checkpoint.
        scale: How far to go, above 0.

    Returns:
        name -> tensor with the base's kind and dtype.

    Example:
        >>> negate({"w": np.zeros(1)}, {"w": np.ones(1)}, scale=0.5)
        {'w': array([-0.5])}
    """
    if not (np.isfinite(scale) and scale > 0):
        raise InputError(f"negate: scale must be a number above 0, got {scale!r}.")
    mirrored = dict(merge_tensors(base, {"expert": expert}, TaskArithmetic(scale=scale)))
    for name, value in mirrored.items():
        if is_running_statistic(name):
            mirrored[name] = as_numpy(base[name], name)
        elif tensor_info(base, name).is_float:
            mirrored[name] = np.asarray(2 * as_numpy(base[name], name) - value)
    return {name: like(value, base[name], name) for name, value in mirrored.items()}


def interpolate(first: Mapping[str, Any], second: Mapping[str, Any], weight: float = 0.5) -> dict[str, Any]:
    """(1 - weight) * first + weight * second, in float32, without a base.

    Args:
        first, second: Two models with the same tensors.
        weight: 0 gives the first model, 1 the second. Values outside [0, 1] extrapolate.

    Example:
        >>> interpolate({"w": np.zeros(1)}, {"w": np.ones(1)}, weight=0.25)
        {'w': array([0.25])}
    """
    if not np.isfinite(weight):
        raise InputError(f"interpolate: weight must be a finite number, got {weight!r}.")
    if 0 <= weight <= 1:
        mean = WeightedAverage(weight={"first": 1 - weight, "second": weight})
        return merge_state_dicts(None, {"first": first, "second": second}, mean)
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
    blocks: Sequence[str] = (),
    **parameters: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    """Add experts to a merged model or remove them, given only these experts and the base.

    This works for methods that are weighted sums of task vectors (average, weighted average, task arithmetic) if the
    weights of the experts that stay change by one common factor. The result equals a new merge up to the rounding of
    the merged weights.

    Args:
        merged: The result of ``method`` for ``base`` and the experts ``present``.
        base: The base of all experts.
        method: The merge method, or its name.
        present: Names of the experts in the merged model.
        add, remove: Expert name -> its weights.
        blocks: See `merge_tensors`.
        **parameters: The method's parameters, if it is given by name. Give parameters that differ between experts by
            expert name, for all experts that are present, added or removed.

    Yields:
        ``(name, array)``, as `merge_tensors` does.

    Raises:
        InputError: The method is not such a sum, an expert to add is present, an expert to remove is not, or none
            would be left.

    Example:
        >>> base, expert, merged = {"w": np.zeros(1)}, {"w": np.ones(1)}, {"w": np.full(1, 0.5)}
        >>> dict(with_experts(merged, base, "task-arithmetic", ["a"], add={"b": expert}, scale=0.25))
        {'w': array([0.75], dtype=float32)}
    """
    chosen = get_method(method, **parameters) if isinstance(method, str) else method
    add, remove = dict(add or {}), dict(remove or {})
    if not isinstance(chosen, LinearMethod):
        raise InputError(f"'{chosen.name}' is not a weighted sum of task vectors: merge all the experts again.")
    if twice := [name for name in add if name in present]:
        raise InputError(f"the expert '{twice[0]}' is in the merged model already: remove it first.")
    if missing := [name for name in remove if name not in present]:
        raise InputError(f"the expert '{missing[0]}' is not in the merged model, which has {', '.join(present)}.")
    after = [name for name in present if name not in remove] + list(add)
    if not after:
        raise InputError("no expert would be left: use the base.")
    others = {_MERGED: merged, **add, **remove}
    check_models(chosen, base, others)
    old, new = (restricted(chosen, names).for_experts(names) for names in (list(present), after))
    assert isinstance(old, LinearMethod) and isinstance(new, LinearMethod)
    stream = TaskVectorStream(base, others, blocks=blocks)
    return _reweighted((old, sorted(present)), (new, sorted(after)), base, stream)


def _reweighted(
    old: tuple[LinearMethod, list[str]],
    new: tuple[LinearMethod, list[str]],
    base: Mapping[str, Any],
    stream: TaskVectorStream,
) -> Iterator[tuple[str, np.ndarray]]:
    """The merge of the old method and experts, changed to that of the new ones.

    The task vectors of the merged model, of the added and of the removed experts suffice for this.
    """
    depths = old[0].prepare(stream), new[0].prepare(stream)

    def change(name: str) -> np.ndarray:
        measured = name in stream.averaged
        before, after = (
            (method.shares if measured else method.weights)(name, experts, depth)
            for (method, experts), depth in zip((old, new), depths, strict=True)
        )
        factors = {after[e] / weight for e, weight in before.items() if e in after and weight} or {0.0}
        if max(factors) - min(factors) > 1e-9 * max(map(abs, factors)):
            raise InputError(
                f"'{new[0].name}' changes the weights of the experts that stay unequally: merge all again."
            )
        factor = next(iter(factors))
        values, task_vectors = stream.read(name)
        changed = task_vectors.pop(_MERGED) * np.float32(factor)
        for expert in stream.experts:
            if expert != _MERGED:
                weight = after[expert] if expert in after else -factor * before.get(expert, 0.0)
                changed += np.float32(weight) * task_vectors[expert]
        changed += values
        if name.endswith("running_var"):  # rounding must not make a variance negative
            np.maximum(changed, 0, out=changed)
        return changed.reshape(stream.shapes[name])

    changed = stream.map(change)

    def value(name: str) -> np.ndarray:
        return change(name) if name in stream.averaged else next(changed)[1]

    for name, own_name in canonicalise(base).items():
        is_float = tensor_info(base, own_name).is_float
        yield own_name, joined(name, value) if is_float else as_numpy(base[own_name], own_name).copy()
