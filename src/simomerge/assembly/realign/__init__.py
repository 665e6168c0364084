"""Re-alignment: repair the mismatch between merged features and the experts' heads.

- ``method.py``: the base classes and the registry.
- ``fold.py``, ``distill.py``, ``heads.py``, ``adapters.py``, ``lora.py``, ``finetune.py``, ``react.py``,
  ``surgery.py``, ``symerge.py``, ``prodistill.py``, ``calibrate.py``: one method each, registered by the imports.
- ``training.py``: what the methods that train have in common. ``encoder.py``: what those have that train the encoder.
  ``held_out.py``: training of a whole model that keeps the best weights on held-out images.
- ``blend.py``: weights as a function of merging coefficients. ``blocks.py``: distillation block by block.
- ``teacher.py``, ``predictions.py``: the experts as teachers: checks, features, stored predictions.
- ``sums.py``: the fold of a model. ``layout.py`` lists its linear systems, ``systems.py`` defines and solves one, and
  ``normal_equations.py`` is ridge regression from sums. ``layers.py``: the calibration of an encoder.
- ``work.py``: what a work folder was begun with.
- ``procrustes.py``: the maps of ReACT. ``corrections.py``: the training of representation surgery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simomerge.assembly.realign.adapters import Adapters
from simomerge.assembly.realign.calibrate import Calibrate
from simomerge.assembly.realign.distill import Distill
from simomerge.assembly.realign.finetune import Finetune
from simomerge.assembly.realign.fold import Fold
from simomerge.assembly.realign.heads import Heads
from simomerge.assembly.realign.lora import Lora
from simomerge.assembly.realign.method import (
    Inputs,
    Realignment,
    get_realignment,
    methods,
    preset,
    realignments,
    register,
    with_parameters,
)
from simomerge.assembly.realign.prodistill import ProDistill
from simomerge.assembly.realign.react import React
from simomerge.assembly.realign.surgery import Surgery
from simomerge.assembly.realign.symerge import SyMerge
from simomerge.core.errors import InputError

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel

preset("fold-cross", "fold", variant="cross-tap")
preset("distill-adapters", "distill", trains="adapters")
preset("distill-lora", "distill", trains="lora")
preset("distill-encoder", "distill", trains="encoder")


def realign(
    model: SimoModel | str | Path,
    experts: Mapping[str, SimoModel | str | Path] | None = None,
    images: Any = None,
    data: Any = None,
    method: str | Realignment = "fold",
    *,
    base: SimoModel | str | Path | None = None,
    work_folder: str | Path | None = None,
    workers: int = 1,
    **parameters: Any,
) -> SimoModel:
    """Re-align a merged model and return a new one; the given model stays as it is.

    All parameters of the new model require a gradient, also where those of the given one or of an expert are frozen.

    Some methods learn from the experts on images without labels, others from labels; `simomerge methods` says which.
    Methods that need the experts' own heads come right after the merge; all others may start from the result of another
    method. Methods that put adapters into the encoder or change its weights need a model without adapters.

    Args:
        model: A merged model, or its folder.
        experts: By task, the experts that the model was merged from, or their folders.
        images: A folder of pictures, a sequence of images, or a dataset whose labels are not read.
        data: A dataset with the targets of every task.
        method: A method or preset by name (`simomerge methods` lists them), or a `Realignment`.
        base: The foundation encoder, for methods that need it (`simomerge methods` says which).
        work_folder: Folder for features, predictions and the state of a killed run, which the same call resumes. It
            belongs to one re-alignment. The default is a temporary folder.
        workers: Number of heads that are trained at the same time, each in its own process.
        **parameters: Parameters of the method and, where it trains, of its `TrainSettings`; those of a `Realignment`
            that are not given stay as they are. ``size``, a height and a width in pixels, resizes the pictures of a
            folder or list; by default they get the experts' training size, and ``"own"`` keeps theirs.

    Raises:
        InputError: The method or a parameter is unknown, an input is missing, the model or the inputs do not fit the
            method, or the work in ``work_folder`` was begun with other parameters, images or models.

    Example:
        >>> model = realign(model, experts, images="photos/")                                      # doctest: +SKIP
        >>> model = realign(model, data=load_data("rooms", split="val"), method="heads", steps=60)  # doctest: +SKIP
    """
    from simomerge.assembly.realign.work import check_same_inputs
    from simomerge.core import distributed
    from simomerge.models.model import as_model

    size = parameters.pop("size", None)
    if not isinstance(method, (str, Realignment)):
        raise InputError(f"method is a {type(method).__name__}: give a re-alignment, or its name.")
    chosen = get_realignment(method, **parameters) if isinstance(method, str) else with_parameters(method, parameters)
    model = as_model(model)
    with distributed.temporary_folder() as temporary:
        given = {"experts": experts, "images": images, "data": data, "base": base}
        inputs = replace(prepared(chosen, model, Path(work_folder or temporary), size, **given), workers=workers)
        if work_folder:
            check_same_inputs(chosen, model, inputs)
        return chosen.apply(model, inputs)


def prepared(
    chosen: Realignment,
    model: SimoModel,
    folder: Path,
    size: Any = None,
    *,
    experts: Mapping[str, SimoModel | str | Path] | None = None,
    images: Any = None,
    data: Any = None,
    base: SimoModel | str | Path | None = None,
) -> Inputs:
    """What a re-alignment may use, checked: as `realign`, for a work folder that holds only the work of these inputs.

    Raises:
        InputError: An input is missing, or the model or the inputs do not fit the method.
    """
    from simomerge.models.model import as_model, as_models

    if not model.tasks:
        raise InputError("the model has no heads to re-align; give a merged model.")
    if model.encoder.describe().get("tree") and not chosen.takes_trees:
        fit = [name for name, each in realignments().items() if each.takes_trees and not each.needs_plain_heads]
        raise InputError(
            f"re-alignment by {chosen.name!r} does not work on a tree of shared blocks; use"
            f" {', '.join(fit[:-1])} or {fit[-1]}."
        )
    if chosen.teacher == "labels":
        return Inputs(folder, data=_labelled(chosen, model, data))
    found = _unlabelled(chosen, model, as_models(experts) if experts else {}, images, size)
    return Inputs(folder, **found, base=_foundation(chosen, model, None if base is None else as_model(base)))


def _labelled(method: Realignment, model: SimoModel, data: Any) -> Any:
    from simomerge.training.evaluate import shared_tasks

    if data is None:
        raise InputError(f"re-alignment by {method.name!r} learns from labels: give data=, a dataset with every task.")
    missing = [name for name in model.tasks if name not in data.tasks]
    if missing:
        raise InputError(
            f"re-alignment by {method.name!r} needs labels of every task; the data has none of {', '.join(missing)}."
        )
    data = data.select(shared_tasks(model.tasks, data.tasks))
    return data.up_to(method.count)


def _unlabelled(
    method: Realignment, model: SimoModel, experts: Mapping[str, SimoModel], images: Any, size: Any
) -> dict[str, Any]:
    from simomerge.assembly.images import prepare
    from simomerge.assembly.realign.teacher import matching_experts

    if images is None:
        raise InputError(f"re-alignment by {method.name!r} uses images without labels: give images=, such as a folder.")
    matching = matching_experts(model, experts)
    return {"experts": matching, "images": prepare(images, matching, method.count, size)}


def _foundation(method: Realignment, model: SimoModel, base: SimoModel | None) -> SimoModel | None:
    from simomerge.checkpoints.experts import check_merged_from

    if not method.needs_base:
        return None
    if base is None:
        raise InputError(f"re-alignment by {method.name!r} uses task vectors: give base=, the foundation encoder.")
    check_merged_from(model.provenance, {}, base)
    return base


__all__ = [
    "Adapters",
    "Calibrate",
    "Distill",
    "Finetune",
    "Fold",
    "Heads",
    "Inputs",
    "Lora",
    "ProDistill",
    "React",
    "Realignment",
    "Surgery",
    "SyMerge",
    "get_realignment",
    "methods",
    "realign",
    "realignments",
    "register",
]
