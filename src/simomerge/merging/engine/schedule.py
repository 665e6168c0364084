"""Factors that change with depth and multiply the merged task vector. They combine with any merge method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.registry import settings
from simomerge.merging.engine.depth import Depth
from simomerge.merging.engine.stream import TaskVectorStream
from simomerge.merging.method import MergeMethod, get_method

Factor: TypeAlias = Callable[[str], float]
"""Canonical tensor name -> the factor of its merged task vector."""


@dataclass(frozen=True)
class LayerScales:
    """One factor per block, or a few factors that are interpolated linearly over the depth (mergekit's gradients).

    Embeddings take the first value, the final norm the last.

    Example:
        >>> schedule = LayerScales((0.2, 0.6))
        >>> names = [f"encoder.layer.{block}.norm1.weight" for block in range(3)]
        >>> [round(schedule.over(Depth(names))(name), 2) for name in names]
        [0.2, 0.4, 0.6]
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(np.isfinite(value) for value in self.values):
            raise InputError(f"schedule {self.values}: give at least one finite number.")

    def over(self, depth: Depth) -> Factor:
        places = np.linspace(0, max(depth.blocks - 1, 1), len(self.values))
        if len(self.values) == 1:
            return lambda name: self.values[0]
        return lambda name: float(np.interp(depth.position(name), places, self.values))

    def factors(self, method: MergeMethod, stream: TaskVectorStream, statistics: Any) -> Factor:
        depth = stream.depth
        if len(self.values) > 1:
            _check_has_blocks(depth)
        if len(self.values) > depth.blocks > 0:
            raise InputError(
                f"a schedule of {len(self.values)} values for {depth.blocks} blocks: give at most one per block."
            )
        return self.over(depth)

    def plain(self) -> list[float]:
        return list(_plain(self.values))


@dataclass(frozen=True)
class Lines:
    """LiNeS (Wang et al., 2025, arXiv 2410.17146): block l of L blocks is scaled by alpha + beta * l / (L - 1).

    Tensors outside the blocks get alpha, the final norm included. The default alpha is the paper's for merging several
    tasks, ``(||sum_t tau_t||_1 / ||tau_MTL||_1) / T``, where tau_MTL is the method's merged task vector: the shallow
    blocks, which the tasks share, are averaged. The paper chooses beta on validation data.

    Example:
        >>> names = [f"encoder.layer.{block}.norm1.weight" for block in range(3)] + ["layernorm.weight"]
        >>> [Lines(alpha=0.2, beta=0.4).over(Depth(names), 0.2)(name) for name in names]
        [0.2, 0.4, 0.6000000000000001, 0.2]
    """

    alpha: float | None = None
    beta: float = 0.5

    def __post_init__(self) -> None:
        for name in ("alpha", "beta") if self.alpha is not None else ("beta",):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and np.isfinite(value)):
                raise InputError(f"lines: {name} must be a finite number, got {value!r}.")

    def over(self, depth: Depth, alpha: float) -> Factor:
        steps = max(depth.blocks - 1, 1)
        return lambda name: alpha + self.beta * (depth.index(name) or 0) / steps

    def factors(self, method: MergeMethod, stream: TaskVectorStream, statistics: Any) -> Factor:
        _check_has_blocks(stream.depth)
        alpha = self.alpha if self.alpha is not None else _lines_alpha(method, stream, statistics)
        return self.over(stream.depth, alpha)

    def plain(self) -> str:
        alpha = "" if self.alpha is None else f"alpha={float(self.alpha)},"
        return f"lines:{alpha}beta={float(self.beta)}"


def _check_has_blocks(depth: Depth) -> None:
    if not depth.blocks:
        raise InputError(
            "a schedule over the depth needs blocks, and the tensors' names have no numbered ones; an encoder of your"
            " own can declare them (blocks)."
        )


def _lines_alpha(method: MergeMethod, stream: TaskVectorStream, statistics: Any) -> float:
    def norms(name: str) -> tuple[float, float]:
        base, task_vectors = stream.read(name)
        total = np.sum(list(task_vectors.values()), axis=0)
        merged = method.merge_tensor(name, base, task_vectors, statistics) - base
        return float(np.abs(total).sum(dtype=np.float64)), float(np.abs(merged).sum(dtype=np.float64))

    summed, merged = (sum(values) for values in zip(*(found for _, found in stream.map(norms)), strict=True))
    # If the merged task vector is zero, its factor has no effect.
    return summed / merged / len(stream.experts) if merged else 0.0


Schedule: TypeAlias = LayerScales | Lines

_NO_PARAMETERS = ("method", "schedule", "scale_chosen_on", "tried")
"""Entries of a description that are not parameters. The last two are notes of `simomerge.assembly` on the choice."""


def as_schedule(given: Schedule | Sequence[float] | str | None) -> Schedule | None:
    """A schedule from what a user writes: ``"lines"``, ``"lines:beta=0.3,alpha=0.2"``, ``"0.2,0.5,1"`` or numbers.

    Raises:
        InputError: The text is none of these, or a number is not finite.

    Example:
        >>> as_schedule("lines:beta=0.3"), as_schedule("0.2,1")
        (Lines(alpha=None, beta=0.3), LayerScales(values=(0.2, 1.0)))
    """
    if given is None or isinstance(given, (LayerScales, Lines)):
        return given
    try:
        if isinstance(given, str) and given.partition(":")[0] == "lines":
            pairs = (item.split("=") for item in given.partition(":")[2].split(",") if item)
            return Lines(**{key: float(value) for key, value in pairs})
        values = given.split(",") if isinstance(given, str) else given
        return LayerScales(tuple(float(value) for value in values))
    except InputError:  # A number that is not finite. The message names it.
        raise
    except (ValueError, TypeError):
        raise InputError(
            f"schedule {given!r}: give numbers over the depth as 0.2,0.5,1, or lines, or lines:alpha=0.3,beta=0.5."
        ) from None


def describe_method(method: MergeMethod, schedule: Schedule | None = None) -> dict[str, Any]:
    """A merge method as plain data, for provenance: its name, its parameters, and the schedule if there is one.

    Example:
        >>> from simomerge.merging import get_method
        >>> describe_method(get_method("ties", scale=0.4), Lines(beta=0.3))
        {'method': 'ties', 'density': 0.2, 'scale': 0.4, 'trim': 'global', 'schedule': 'lines:beta=0.3'}
    """
    described = {"method": method.name, **{spec.name: _plain(getattr(method, spec.name)) for spec in settings(method)}}
    return {**described, "schedule": schedule.plain()} if schedule else described


def _plain(value: Any) -> Any:
    """A parameter as JSON stores it, without numpy numbers, tuples and other kinds of mappings."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def described_method(described: Mapping[str, Any]) -> tuple[MergeMethod, Schedule | None]:
    """The method and the schedule that `describe_method` described, also after a round trip through JSON.

    Raises:
        InputError: This version does not know the method or a parameter.
    """
    parameters = {key: value for key, value in described.items() if key not in _NO_PARAMETERS}
    return get_method(described.get("method", ""), **parameters), as_schedule(described.get("schedule"))
