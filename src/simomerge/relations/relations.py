"""`relate`: everything about how experts relate to each other, measured on one set of images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from simomerge.assembly.experts import check_experts
from simomerge.assembly.realign.teacher import matching_experts
from simomerge.core.errors import InputError
from simomerge.core.schema import nearest
from simomerge.datasets import DenseDataset
from simomerge.datasets.pictures import as_images
from simomerge.models.model import SimoModel
from simomerge.relations.alignment import TapAlignment, alignment
from simomerge.relations.geometry import Geometry, geometry
from simomerge.relations.grouping import Grouping, group_tasks
from simomerge.relations.judging import Judge
from simomerge.relations.similarity import BASE, Similarity, similarity
from simomerge.relations.sweep import KEPT, LAMBDAS, Sweeps, check_lambdas, sweep
from simomerge.relations.verdict import verdict

SECTIONS: dict[str, str] = {
    "groups": "which tasks to merge under a budget of encoders: pairs merged, folded and judged",
    "sweeps": "every task's performance along every task vector",
    "geometry": "task-vector norms, cosines and conflicts of sign; looks at no image",
    "cka": "how alike the experts' features are, tap by tap",
    "alignment": "how far a merged model's features are from the experts', and what a linear map repairs",
}
"""What `relate` can measure."""


@dataclass(frozen=True)
class Relations:
    """What `relate` found; a section that was not asked for is None.

    Attributes:
        tasks: in order.
        judged_by: "labels", "the experts' predictions", or "" where nothing was judged.
        images: how many were looked at.
        groups, sweeps, geometry, cka, alignment: the sections.
    """

    tasks: list[str]
    judged_by: str = ""
    images: int = 0
    groups: Grouping | None = None
    sweeps: Sweeps | None = None
    geometry: Geometry | None = None
    cka: Similarity | None = None
    alignment: list[TapAlignment] | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON, None where a number does not exist; docs/relations.md says what is in it."""
        found: dict[str, Any] = {"format": 1, "tasks": self.tasks, "judged_by": self.judged_by, "images": self.images}
        if self.groups is not None:
            found["groups"] = {
                "merges": [asdict(merge) for merge in self.groups.merges],
                "choices": [{**asdict(choice), "gain": choice.gain} for choice in self.groups.choices],
            }
        if self.sweeps is not None:
            found["sweeps"] = _sweeps(self.sweeps)
        if self.geometry is not None:
            found["geometry"] = [asdict(part) for part in self.geometry.parts]
        if self.cka is not None:
            found["cka"] = asdict(self.cka)
        if self.alignment is not None:
            found["alignment"] = [asdict(row) for row in self.alignment]
        plain: dict[str, Any] = _plain(found)
        return {**plain, "verdict": verdict(plain)}

    def verdict(self, budget: int | None = None) -> list[str]:
        """What it means, in sentences: whom to merge with whom, who helps, who is sensitive.

        Args:
            budget: encoders at most; by default what every budget costs is said.

        Raises:
            InputError: a budget that is none.
        """
        return verdict(self.to_dict(), budget)


def relate(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any = None,
    data: DenseDataset | None = None,
    merged: SimoModel | None = None,
    sections: Iterable[str] | None = None,
    count: int | None = 128,
    size: tuple[int, int] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
) -> Relations:
    """How experts of one base relate to each other, and which of them to merge.

    With ``data`` its labels say how well a task is done (normalised performance, Delta_MTL); with ``images`` the
    experts' own predictions do (agreement). Half of the images, every second one, is merged and folded on, without
    labels; the other half judges.

    Args:
        base: the foundation encoder all experts were fine-tuned from.
        experts: by task; the key names the task.
        images: without labels: a folder of pictures, a sequence of images, or a dataset whose labels are not read.
        data: a dataset with labels of every task; never the test split.
        merged: a model merged from these experts, for the section "alignment".
        sections: names of `SECTIONS`; by default all that what was given allows.
        count: of the images. With labels give more: an expert's own errors are in every score.
        size: (height, width) to make pictures of a folder or list.
        lambdas: of the sweeps; 0 and 1 must be among them.

    Returns:
        What was measured; ``.verdict()`` says it in sentences, ``.to_dict()`` as plain data.

    Raises:
        InputError: fewer than two experts, experts that do not fit, a section that is none or lacks what it needs,
            labels that are not there, or fewer than eight images.

    Example:
        >>> found = relate(base, experts, "photos/")                                         # doctest: +SKIP
        >>> print(*found.verdict(budget=2), sep="\\n")                                        # doctest: +SKIP
        2 encoders: segmentation + normals; depth + edges (agreement with the experts -3.1 %).
    """
    chosen = check_sections(sections, images is not None or data is not None, merged is not None)
    check_lambdas(lambdas)
    if len(experts) < 2:
        raise InputError(f"{len(experts)} expert: how tasks relate takes at least two; give each as TASK=EXPERT.")
    experts = check_experts(base, experts)
    if "cka" in chosen and BASE in experts:
        raise InputError(f"a task called {BASE!r} cannot be told from the base: give it another name.")
    if merged is not None and "alignment" in chosen:
        matching_experts(merged, experts)  # not only after all merges
    only_weights = set(chosen) == {"geometry"}
    source: Any = None if only_weights else _source(experts, images, data, count, size)
    found: dict[str, Any] = {}
    if "geometry" in chosen:
        found["geometry"] = geometry(base, experts)
    if only_weights:
        return Relations(list(experts), **found)
    here, there = Every(source, 0), Every(source, 1)
    if {"groups", "sweeps"} & set(chosen):
        judge = Judge(experts, there, data is not None)
        found["judged_by"] = "labels" if judge.labelled else "the experts' predictions"
        if "sweeps" in chosen:
            found["sweeps"] = sweep(base, experts, judge, lambdas)
        if "groups" in chosen:
            found["groups"] = group_tasks(base, experts, here, judge)
    if "cka" in chosen:
        found["cka"] = similarity(base, experts, there, None)
    if "alignment" in chosen:
        assert merged is not None
        found["alignment"] = alignment(merged, experts, source, None)
    return Relations(list(experts), images=len(source), **found)


def check_sections(sections: Iterable[str] | None, sees: bool, merged: bool) -> list[str]:
    """The sections to measure, in the order of `SECTIONS`.

    Args:
        sees: images are given.
        merged: a merged model is given.

    Raises:
        InputError: one that is none, or that lacks what it needs.
    """
    able = {"geometry": True, "groups": sees, "sweeps": sees, "cka": sees, "alignment": sees and merged}
    if sections is None:
        if not sees:
            raise InputError("relate looks at images: give images or labelled data, or ask for 'geometry' alone.")
        return [name for name in SECTIONS if able[name]]
    asked = [sections] if isinstance(sections, str) else list(sections)
    for name in asked:
        if name not in SECTIONS:
            near = nearest(name, SECTIONS)
            hint = f"; did you mean {near!r}" if near else ""
            raise InputError(f"no section {name!r}{hint}? There are: {', '.join(SECTIONS)}.")
        if not sees and name != "geometry":
            raise InputError(f"the section {name!r} looks at images: give images or labelled data.")
        if name == "alignment" and not merged:
            raise InputError("the section 'alignment' compares a merged model with its experts: give the merged one.")
    if not asked:
        raise InputError(f"no section asked for; there are: {', '.join(SECTIONS)}.")
    return [name for name in SECTIONS if name in asked]


def _source(
    experts: Mapping[str, SimoModel],
    images: Any,
    data: DenseDataset | None,
    count: int | None,
    size: tuple[int, int] | None,
) -> Any:
    """The images, with labels where there are."""
    if images is not None and data is not None:
        raise InputError("images and labelled data were given: give one of them.")
    if data is None:
        source: Any = as_images(images, count, size).readable()
    elif isinstance(data, (str, Path)):
        raise InputError(f"data {data}: give a dataset, such as simomerge.data({str(data)!r}, split='val').")
    else:
        if missing := [task for task in experts if task not in data.tasks]:
            raise InputError(f"the data has no labels of {', '.join(missing)}; give images without labels instead.")
        source = data.select(list(experts))
        source = source.take(min(count, len(source))) if count else source
        for task, expert in experts.items():
            ours, theirs = expert.tasks[task], source.tasks[task]
            if (ours.kind, ours.channels) != (theirs.kind, theirs.channels):
                raise InputError(
                    f"task {task!r} is {ours.kind} of {ours.channels} channels in the expert, {theirs.kind} of"
                    f" {theirs.channels} in the data."
                )
    if len(source) < 8:
        raise InputError(f"{len(source)} images: half of them judge what the others merge; give at least 8.")
    return source


class Every(DenseDataset):
    """Every second image of a dataset.

    Args:
        source: whatever has ``image(i)`` and a length, and ``targets`` where labels are read.
        start: 0 for the first, third and so on, 1 for the others.
    """

    def __init__(self, source: Any, start: int) -> None:
        super().__init__(getattr(source, "tasks", {}), len(range(start, len(source), 2)))
        self.source = source
        self.start = start

    def image(self, index: int) -> Any:
        return self.source.image(self.start + 2 * index)

    def targets(self, index: int, tasks: Iterable[str]) -> dict[str, Any]:
        found: dict[str, Any] = self.source.targets(self.start + 2 * index, tasks)
        return found


def _sweeps(found: Sweeps) -> dict[str, Any]:
    """With what is read off the curves."""
    effects = {a: {b: found.effect(a, b) for b in found.tasks if b != a} for a in found.tasks}
    return {
        **asdict(found),
        "kept": KEPT,
        "peaks": {task: found.peak(task) for task in found.tasks},
        "widths": {task: found.width(task) for task in found.tasks},
        "effects": effects,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
