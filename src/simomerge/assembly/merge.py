"""`merge`: the experts' encoders in one; what is not given is chosen on images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simomerge.assembly.alignment import Aligner
from simomerge.assembly.coefficients import learn_coefficients
from simomerge.assembly.experts import assemble, check_experts, merge_models, with_parameters, with_statistics
from simomerge.assembly.realign import realign
from simomerge.assembly.scale import search_scale
from simomerge.core.errors import InputError
from simomerge.datasets.pictures import as_images
from simomerge.merging import Lines, MergeMethod, Schedule, TaskArithmetic, as_schedule, get_method
from simomerge.models.model import SimoModel

AUTO_METHODS: tuple[tuple[str, Schedule | None], ...] = (
    ("task-arithmetic", None),
    ("task-arithmetic", Lines()),
    ("ties", None),
)
"""What ``method="auto"`` tries, each with its best scale; then coefficients are learned from plain task arithmetic."""


def merge(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    method: str | MergeMethod = "task-arithmetic",
    scale: float | Mapping[str, Any] | str | None = None,
    validation: Any = None,
    images: Any = None,
    schedule: Schedule | Sequence[float] | str | None = None,
    count: int | None = None,
    size: tuple[int, int] | None = None,
    **parameters: Any,
) -> SimoModel:
    """Merge the experts' encoders into one model that has all their heads, unmerged.

    Args:
        base: The foundation encoder that all experts were fine-tuned from.
        experts: One model per task; the key names the task.
        method: A name of `simomerge.merging.available()`, a method, or ``"auto"``, which tries several on ``images``,
            folds each, and returns the best one, folded.
        scale: The factor of the merged task vector. ``"auto"`` chooses it: after a fold on the labels of ``validation``
            where that is given, else on ``images`` by how well the merge can be folded. ``"learned"`` learns one factor
            per expert and block on ``images`` (task arithmetic only).
        validation: A dataset with labels of every task, for ``scale="auto"``, and for ``"fisher"`` where its statistics
            are not given as a parameter.
        images: Images without labels: a folder of pictures, a sequence of images, or a dataset; also for ``"regmean"``.
        schedule: Factors over the depth, such as ``"lines"``; see `simomerge.merging.as_schedule`.
        count: Number of images to use; by default 64 for the choice of a scale, 256 for everything else.
        size: (height, width) to which pictures of a folder or list are resized; learning needs images of one size.
        **parameters: Further parameters of the method.

    Returns:
        A new model; base and experts stay as they are. Its provenance records what it was made of and what was tried.

    Raises:
        InputError: Experts that do not fit the base or each other (the message says how), a base that is not the
            experts' base, or a choice without the data to choose on.

    Warns:
        UserWarning: An expert records no base; the warning says how far its weights are from the given base.

    Example:
        >>> model = merge(base, experts, "ties", density=0.2, scale=0.4)          # doctest: +SKIP
        >>> model = merge(base, experts, "auto", images="photos/")                # doctest: +SKIP
    """
    plan = as_schedule(schedule)
    pictures = None if images is None else as_images(images, size=size)
    if method == "auto":
        given = {**parameters, "scale": scale, "schedule": schedule, "validation": validation}
        return _auto(base, experts, pictures, count, given)
    if not isinstance(scale, str):
        chosen = with_parameters(method, {**parameters, "scale": scale} if scale is not None else parameters)
        data = as_images(pictures, count or 256) if validation is None and pictures is not None else validation
        return merge_models(base, experts, chosen, plan, data)
    if scale == "learned":
        with_parameters(method, parameters)  # raises for a misspelt parameter
        return _learned(base, experts, method, pictures, count, plan)
    if scale != "auto":
        raise InputError(f"scale {scale!r}: give a number, 'auto' or 'learned'.")
    if validation is not None or pictures is None:
        if schedule is not None:
            raise InputError("scale='auto' on labels and a schedule do not go together: give a number as scale.")
        return search_scale(base, experts, method, validation, **parameters).model
    aligner = Aligner(base, experts, pictures, count or 64)
    searched = with_parameters(method, {**parameters, "scale": 1.0})
    searched = with_statistics(searched, aligner.experts, aligner.images)
    model = assemble(base, aligner.experts, aligner.best_scale(searched, plan).method, plan)
    _record_choice(model, aligner)
    return model


def _learned(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    method: str | MergeMethod,
    images: Any,
    count: int | None,
    schedule: Schedule | None,
) -> SimoModel:
    name = method if isinstance(method, str) else method.name
    if name != "task-arithmetic" or schedule is not None:
        raise InputError(
            "scale='learned' works with task arithmetic without a schedule: leave method and schedule out."
        )
    if images is None:
        raise InputError("scale='learned' needs images without labels: give images=, such as a folder.")
    aligner = Aligner(base, experts, images, 64)
    start = aligner.best_scale(TaskArithmetic()).method
    assert isinstance(start, TaskArithmetic) and isinstance(start.scale, float)
    learned = learn_coefficients(base, experts, images, start.scale, count=count or 256)
    model = assemble(base, aligner.experts, learned)
    model.provenance["merge"]["scale_chosen_on"] = "unlabelled images, by matching the experts' predictions"
    return model


def _auto(
    base: SimoModel,
    experts: Mapping[str, SimoModel],
    images: Any,
    count: int | None,
    given: Mapping[str, Any],
) -> SimoModel:
    """Try `AUTO_METHODS` and learned coefficients, take the best by alignment, and fold it cross tap."""
    if images is None:
        raise InputError("method='auto' needs images without labels: give images=, such as a folder.")
    if wrong := [name for name, value in given.items() if value is not None]:
        raise InputError(f"method='auto' chooses {wrong[0]!r} itself; leave it out, or name a method.")
    experts, count = check_experts(base, experts), count or 256
    images = as_images(images, count).readable(one_size=True)
    aligner = Aligner(base, experts, images, min(count, 64))
    for name, schedule in AUTO_METHODS:
        aligner.best_scale(get_method(name), schedule)
    plain = max(
        (trial for trial in aligner.trials if trial.method.name == "task-arithmetic" and trial.schedule is None),
        key=lambda trial: trial.alignment,
    )
    assert isinstance(plain.method, TaskArithmetic) and isinstance(plain.method.scale, float)
    aligner.try_out(learn_coefficients(base, experts, images, plain.method.scale, rounds=1))
    best = aligner.best
    model = assemble(base, experts, best.method, best.schedule)
    _record_choice(model, aligner)
    return realign(model, experts, images, variant="cross-tap")


def _record_choice(model: SimoModel, aligner: Aligner) -> None:
    model.provenance["merge"]["scale_chosen_on"] = f"{len(aligner.images)} unlabelled images, by alignment"
    model.provenance["merge"]["tried"] = [trial.describe() for trial in aligner.trials]
