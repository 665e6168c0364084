"""`relate`: everything about how experts relate to each other, measured on one set of images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from simomerge.assembly.experts import check_experts
from simomerge.assembly.images import prepare
from simomerge.assembly.judging import Judge
from simomerge.assembly.realign.teacher import matching_experts
from simomerge.core.errors import InputError
from simomerge.core.registry import suggestion
from simomerge.core.text import html_table, one_line
from simomerge.datasets import DenseDataset, groups
from simomerge.datasets.comparison import check_same_task
from simomerge.models.model import SimoModel, as_model, as_models
from simomerge.relations.features import Similarity, TapAlignment, alignment, check_names, similarity
from simomerge.relations.geometry import Geometry, geometry
from simomerge.relations.grouping import Grouping, group_tasks
from simomerge.relations.sharing import SharedBlocks, sharing_curve
from simomerge.relations.sweep import LAMBDAS, Sweeps, check_lambdas, sweep
from simomerge.relations.verdict import verdict

SECTIONS = ("groups", "sweeps", "geometry", "cka", "alignment")
"""What `relate` measures by default; docs/relations.md describes the numbers of each section."""

ON_REQUEST = ("sharing",)
"""Sections that take longer and are measured only if they are named."""


@dataclass(frozen=True)
class Relations:
    """What `relate` measured; a section that was not requested is None.

    Attributes:
        tasks: the tasks in order.
        judged_by: "labels", "the experts' predictions", or "" if nothing was judged.
        images: number of images.
        judged_images: number of the images that judge; the others are used to merge and fold.
        groups, sweeps, geometry, cka, alignment, sharing: the sections.
    """

    tasks: list[str]
    judged_by: str = ""
    images: int = 0
    judged_images: int = 0
    groups: Grouping | None = None
    sweeps: Sweeps | None = None
    geometry: Geometry | None = None
    cka: Similarity | None = None
    alignment: list[TapAlignment] | None = None
    sharing: list[SharedBlocks] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with None for numbers that do not exist; docs/relations.md explains the content."""
        groups = self.groups and {
            "merges": [asdict(merge) for merge in self.groups.merges],
            "choices": [{**asdict(choice), "gain": choice.gain} for choice in self.groups.choices],
        }
        sections = {
            "groups": groups,
            "sweeps": self.sweeps and self.sweeps.to_dict(),
            "geometry": self.geometry and [asdict(part) for part in self.geometry.parts],
            "cka": self.cka and asdict(self.cka),
            "alignment": None if self.alignment is None else [asdict(row) for row in self.alignment],
            "sharing": [{**asdict(each), "gain": each.gain} for each in self.sharing or ()] or None,
        }
        given = {key: getattr(self, key) for key in ("tasks", "judged_by", "images", "judged_images")}
        found = {"format": 1, **given, **sections}
        plain = {key: _plain(value) for key, value in found.items() if value is not None}
        return {**plain, "verdict": verdict(plain)}

    def verdict(self, budget: int | None = None) -> list[str]:
        """The result in sentences: which tasks to merge, which help each other, which are sensitive.

        Args:
            budget: maximum number of encoders; by default all budgets are described.

        Raises:
            InputError: a budget out of range.
        """
        return verdict(self.to_dict(), budget)

    def _repr_html_(self) -> str:
        """The verdict and the tables, for notebooks."""
        from simomerge.relations.page import relation_tables

        found = self.to_dict()
        sentences = "".join(f"<p>{escape(one_line(sentence))}</p>" for sentence in found["verdict"])
        tables = (
            (f"<h4>{escape(heading)}</h4>" if heading else "") + html_table(table)
            for heading, table in relation_tables(found)
        )
        return sentences + "".join(tables)


def relate(
    base: SimoModel | str | Path,
    experts: Mapping[str, SimoModel | str | Path],
    images: Any = None,
    data: DenseDataset | None = None,
    merged: SimoModel | None = None,
    sections: Iterable[str] | None = None,
    count: int | None = 128,
    size: tuple[int, int] | str | None = None,
    lambdas: Sequence[float] = LAMBDAS,
) -> Relations:
    """How experts of one base relate to each other, and which of them to merge.

    With ``data``, its labels judge the models (normalised performance, Delta_MTL). With ``images``, the experts' own
    predictions do (agreement). Half of the images, in whole folders or runs, is used to merge and fold,
    without labels; the other half is used to judge and to choose groups by and, with labels, also trees.

    Args:
        base: the foundation encoder that all experts were fine-tuned from, or its folder or hub id.
        experts: experts, or their folders, by task; the key names the task.
        images: images without labels: a folder of pictures, a sequence of images, or a dataset whose labels are not
            read.
        data: a dataset with labels of every task; never the test split.
        merged: a model merged from these experts, for the section "alignment".
        sections: names of `SECTIONS` or `ON_REQUEST`; by default all of `SECTIONS` that the other arguments allow.
        count: number of images. With labels use more, since every score contains the expert's own errors.
        size: (height, width) that the pictures of a folder or list are resized to, or "own"; see `simomerge.merge`.
        lambdas: values of lambda in the sweeps; must contain 0 and 1.

    Returns:
        The measurements; ``.verdict()`` puts them into sentences, ``.to_dict()`` into plain data.

    Raises:
        InputError: fewer than two experts, experts that do not fit, an unknown section or one without its inputs,
            missing labels, or fewer than eight images.

    Example:
        >>> found = relate(base, experts, "photos/")                                         # doctest: +SKIP
        >>> print(*found.verdict(budget=2), sep="\\n")                                        # doctest: +SKIP
        2 encoders: segmentation + normals; depth + edges (agreement with the experts -3.1 %).
    """
    chosen = check_sections(sections, images is not None or data is not None, merged is not None)
    check_lambdas(lambdas)
    base, experts = as_model(base), as_models(experts)
    experts = _check_experts(base, experts, merged if "alignment" in chosen else None, chosen)
    if chosen == ["geometry"]:
        return Relations(list(experts), geometry=geometry(base, experts))
    source = _images(experts, images, data, count, size)
    return _measure(base, experts, source, merged, chosen, data is not None, lambdas)


def _measure(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    source: Any,
    merged: SimoModel | None,
    chosen: Sequence[str],
    labelled: bool,
    lambdas: Sequence[float],
) -> Relations:
    """The chosen sections, the fast ones first."""
    found: dict[str, Any] = {}
    if "geometry" in chosen:
        found["geometry"] = geometry(base, experts)
    fold_images, judge_images = halves(source)
    if {"groups", "sweeps", "sharing"} & set(chosen):
        judge = Judge(experts, judge_images, labelled)
        found["judged_by"] = "labels" if labelled else "the experts' predictions"
        found["judged_images"] = len(judge_images)
        if "sweeps" in chosen:
            found["sweeps"] = sweep(base, experts, judge, lambdas)
        if "groups" in chosen:
            found["groups"] = group_tasks(base, experts, fold_images, judge)
        if "sharing" in chosen:
            found["sharing"] = sharing_curve(base, experts, fold_images, judge)
    if "cka" in chosen:
        found["cka"] = similarity(base, experts, judge_images, None)
    if "alignment" in chosen and merged is not None:
        found["alignment"] = alignment(merged, experts, source, None)
    return Relations(list(experts), images=len(source), **found)


def check_sections(sections: Iterable[str] | None, has_images: bool, has_merged: bool) -> list[str]:
    """The sections to measure, in the order of `SECTIONS`, then `ON_REQUEST`.

    Args:
        sections: requested names; None for all that are possible.
        has_images: images or labelled data are given.
        has_merged: a merged model is given.

    Raises:
        InputError: an unknown section, or one without its inputs.
    """
    if sections is None:
        if not has_images:
            raise InputError("relate looks at images: give images or labelled data, or ask for 'geometry' alone.")
        return [name for name in SECTIONS if has_merged or name != "alignment"]
    asked = [sections] if isinstance(sections, str) else list(sections)
    known = (*SECTIONS, *ON_REQUEST)
    for name in asked:
        if name not in known:
            raise InputError(f"no section {name!r}{suggestion(name, known)}")
        if not has_images and name != "geometry":
            raise InputError(f"the section {name!r} looks at images: give images or labelled data.")
        if name == "alignment" and not has_merged:
            raise InputError("the section 'alignment' compares a merged model with its experts: give the merged model.")
    if not asked:
        raise InputError(f"no section requested; choose from {', '.join(known)}.")
    return [name for name in known if name in asked]


def _check_experts(
    base: SimoModel, experts: Mapping[str, SimoModel], merged: SimoModel | None, chosen: Sequence[str]
) -> dict[str, SimoModel]:
    """The experts, after all checks that would otherwise fail only after the merges."""
    if len(experts) < 2:
        raise InputError(f"{len(experts)} expert: how tasks relate takes at least two; give each as TASK=EXPERT.")
    checked = check_experts(base, experts)
    if "cka" in chosen:
        check_names(checked)
    if merged is not None:
        matching_experts(merged, checked)
    return checked


def _images(
    experts: Mapping[str, SimoModel],
    images: Any,
    data: DenseDataset | None,
    count: int | None,
    size: tuple[int, int] | str | None,
) -> Any:
    """The images, with labels if ``data`` is given."""
    if images is not None and data is not None:
        raise InputError("images and labelled data were given: give one of them.")
    if data is None:
        source: Any = prepare(images, experts, count, size).readable()
    elif isinstance(data, (str, Path)):
        raise InputError(f"data {data}: give a dataset, such as simomerge.data({str(data)!r}, split='val').")
    else:
        if missing := [task for task in experts if task not in data.tasks]:
            raise InputError(f"the data has no labels of {', '.join(missing)}; give images without labels instead.")
        source = data.select(list(experts))
        source = source.up_to(count)
        for task, expert in experts.items():
            check_same_task(expert.tasks[task], source.tasks[task], "expert", "data")
    if len(source) < 16:
        raise InputError(f"{len(source)} images: one half is for merging, the other for judging; give at least 16.")
    return source


def halves(source: Any) -> tuple[Any, Any]:
    """Images to merge and fold on, and images to judge on, in whole folders or runs of neighbours."""
    return source._subset(groups.training_images(source, 0.5)), source._subset(groups.held_out(source, 0.5))


def _plain(value: Any) -> Any:
    """Lists in place of tuples, None in place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
