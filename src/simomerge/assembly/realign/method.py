"""What a re-alignment is, and the registry of re-alignments.

A re-alignment is a frozen dataclass: its fields are its parameters, its class attributes say what it learns from and
where it comes from, and ``change`` does the work. The options of the command line, the steps of a recipe and the tables
in the documentation are generated from it. A new re-alignment is one file with one class and ``@register`` in front,
imported in `simomerge.assembly.realign`.

The command line reads the registry for its ``--help``, so the module of a method imports torch inside its functions.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from simomerge.core.errors import InputError
from simomerge.core.registry import (
    Registry,
    check_known,
    check_parameters,
    parameter,
    range_text,
    settings,
    suggestion,
    summary,
)
from simomerge.training.choices import AUGMENTATIONS
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from simomerge.models.encoders import Encoder
    from simomerge.models.model import SimoModel


@dataclass(frozen=True)
class Inputs:
    """What a re-alignment may use in addition to the model.

    Attributes:
        work_folder: Folder for features, predictions and the state of a killed run, used by this re-alignment only.
        experts: By task, checked against the model; empty for a method that learns from labels.
        images: Unlabelled images for a method that learns from the experts, as `as_images` gives them.
        base: The foundation encoder, for a method that needs it.
        data: A dataset with labels of every task for a method that learns from labels.
        workers: Number of heads that are trained at the same time, each in its own process.
    """

    work_folder: Path
    experts: Mapping[str, SimoModel] = field(default_factory=dict)
    images: Any = None
    base: SimoModel | None = None
    data: Any = None
    workers: int = 1


@dataclass(frozen=True)
class Realignment(ABC):
    """Base of all re-alignments.

    Class attributes: ``name``, ``paper`` and ``link`` (set by `register`), ``teacher`` ("experts": the experts'
    behaviour on unlabelled images; "labels": a labelled dataset), ``default_count`` (images that the command line
    uses), ``changes_heads`` (whether the result's heads differ), ``needs_plain_heads`` (the model's heads must still be
    the experts'), ``needs_base`` (it also needs the foundation encoder).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    link: ClassVar[str]
    teacher: ClassVar[str]
    default_count: ClassVar[int] = 256
    changes_heads: ClassVar[bool] = True
    needs_plain_heads: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False

    count: int | None = parameter(None, kind=int, low=1, help="Images to use, spread evenly; all by default.")

    def __post_init__(self) -> None:
        """Check every parameter. Raises InputError that names the parameter, its range and the value."""
        check_parameters(self.name, self)

    @property
    @abstractmethod
    def phrase(self) -> str:
        """What it does, for sentences such as "Merging cost 10 points; folding its heads recovered 60 % of that."."""

    @property
    def encoder_change(self) -> str:
        """What happens to the encoder, in a word such as "adapters" or "coefficients", or "" (nothing)."""
        return ""

    @property
    def adds_adapters(self) -> bool:
        """Whether the result has adapters next to its blocks."""
        return self.encoder_change == "adapters"

    @property
    def changes_encoder(self) -> bool:
        """Whether the result's encoder is no longer the plain merge of its experts."""
        return bool(self.encoder_change)

    @property
    def takes_trees(self) -> bool:
        """Whether the model's encoder may be a tree of shared blocks."""
        return False

    @property
    def trains_heads_apart(self) -> bool:
        """Whether heads are trained independently of each other, so that several workers help."""
        return False

    def check_encoder(self, encoder: Encoder) -> None:  # noqa: B027 - most methods fit every encoder
        """Check, before any work, that the method can change this encoder. Raises InputError."""

    @abstractmethod
    def change(self, model: SimoModel, inputs: Inputs) -> Mapping[str, Any]:
        """Re-align a model in place.

        Returns:
            What was measured, for the provenance. It may replace the entries that `apply` writes.

        Raises:
            InputError: The model or the inputs do not fit the method; the message says why.
        """

    def apply(self, model: SimoModel, inputs: Inputs) -> SimoModel:
        """Re-align a copy of a model, and record the method in the copy's provenance.

        All parameters of the result require a gradient, whatever the method or the given model had frozen.
        """
        began = time.monotonic()
        self.check_encoder(model.encoder)
        result = copy.deepcopy(model)
        measured = self.change(result, inputs)
        earlier = result.provenance.get("realign")
        record = {
            "method": self.name,
            "labelled_images": len(inputs.data) if self.teacher == "labels" else 0,
            "unlabelled_images": len(inputs.images) if self.teacher == "experts" else 0,
            "trained_parameters": 0,
            "steps": 0,
            "seconds": round(time.monotonic() - began, 2),
            "changes_encoder": self.changes_encoder,
            **self.used_parameters(),
            **measured,
            **({"after": earlier} if earlier else {}),
        }
        result.provenance = {**result.provenance, "realign": record}
        for weight in result.parameters():
            weight.requires_grad_(weight.is_floating_point())
        return result.eval()

    def used_parameters(self) -> dict[str, Any]:
        """The parameters that have an effect, as plain data."""
        found: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, TrainSettings):
                found |= asdict(value)
            elif spec.name != "count" and value is not None and is_used(self, spec) and not spec.metadata["resource"]:
                found[spec.name] = list(value) if isinstance(value, tuple) else value
        return found


@dataclass(frozen=True)
class TrainedRealignment(Realignment):
    """Base of the re-alignments that train something by gradient descent."""

    training: TrainSettings = TrainSettings(steps=200, batch_size=32, lr=1e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training.encoder_lr is not None and not self.uses_encoder_lr:
            raise InputError(f"{self.name}: encoder_lr does nothing, because the encoder's weights do not learn.")
        if self.training.layer_decay != 1 and not self.uses_layer_decay:
            raise InputError(f"{self.name}: layer_decay does nothing, because the encoder's weights do not learn.")

    def check_encoder(self, encoder: Encoder) -> None:
        from simomerge.training.loop import check_shares
        from simomerge.training.optimizer import check_layer_decay

        check_layer_decay(encoder, self.training)
        check_shares(self.training, self.name)

    @property
    def uses_encoder_lr(self) -> bool:
        """Whether something in the encoder has a learning rate of its own."""
        return False

    @property
    def uses_layer_decay(self) -> bool:
        """Whether weights of the encoder's blocks learn."""
        return self.uses_encoder_lr

    @property
    def trains_heads_apart(self) -> bool:
        return not self.changes_encoder


def checkpointing_parameter() -> Any:
    """The field of a re-alignment that trains in the encoder and can save memory there."""
    text = "Compute blocks again in the backward pass: the same gradients in less memory, slower."
    return parameter(False, resource=True, help=text)


def hold_out_parameter() -> Any:
    """The field of a re-alignment that keeps what is best on held-out images."""
    text = "Share of the images that is held out, as whole folders or runs, to keep what is best on them."
    return parameter(0.125, low=0, high=0.5, help=text)


def retry_parameter(**more: Any) -> Any:
    """The field of a re-alignment that may train a second time."""
    text = "If no step is better than the start on held-out images, train again at a quarter of the learning rate."
    return parameter(True, help=text, **more)


def augmentation_parameter(**more: Any) -> Any:
    """The field of a re-alignment that trains in the encoder on augmented images."""
    return parameter("flip", choices=tuple(AUGMENTATIONS), help="Augmentation of the images.", **more)


_REGISTRY: Registry[Realignment] = Registry("re-alignment")
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {}
register = _REGISTRY.register


def preset(name: str, method: str, **parameters: Any) -> None:
    """Make a re-alignment with some parameters available under a second name."""
    _PRESETS[name] = (method, parameters)


def methods() -> dict[str, type[Realignment]]:
    """All re-alignments, name -> class, without the presets."""
    return _REGISTRY.available()


def realignments() -> dict[str, Realignment]:
    """The methods with their default parameters, then the presets, by name.

    Example:
        >>> realignments()["fold-cross"].variant
        'cross-tap'
    """
    return {name: get_realignment(name) for name in (*methods(), *_PRESETS)}


def get_realignment(name: str, **parameters: Any) -> Realignment:
    """The re-alignment or preset ``name`` with its parameters checked.

    Args:
        **parameters: Parameters of the method. The fields of `TrainSettings` may be given one by one, in addition to or
            instead of ``training``.

    Raises:
        InputError: The method or a parameter is unknown (the nearest name is suggested), a value is out of range, or a
            parameter has no effect together with the others.

    Example:
        >>> get_realignment("heads", steps=60).training.steps
        60
    """
    if name not in _PRESETS and name not in methods():
        raise InputError(f"There is no re-alignment '{name}'{suggestion(name, [*methods(), *_PRESETS])}")
    method, given = _PRESETS.get(name, (name, {}))
    kind = methods()[method]
    if fixed := [key for key in given if parameters.get(key, given[key]) != given[key]]:
        raise InputError(f"{name} stands for {method} with {fixed[0]}={given[fixed[0]]}; give {method!r} another.")
    return with_parameters(kind(), {**given, **parameters}, name)


def with_parameters(method: Realignment, parameters: Mapping[str, Any], name: str = "") -> Realignment:
    """A re-alignment with other parameters, checked as in `get_realignment`; ``name`` is that for messages.

    Example:
        >>> with_parameters(get_realignment("heads", steps=60), {"lr": 0.01}).training.steps
        60
    """
    name, given = name or method.name, dict(parameters)
    trained = method if isinstance(method, TrainedRealignment) else None
    known = [*(spec.name for spec in fields(method)), *(TRAINING if trained else ())]
    check_known(f"The re-alignment '{name}'", given, known)
    if trained:
        training = given.pop("training", None) or trained.training
        if not isinstance(training, TrainSettings):
            raise InputError(f"{name}: training is {training!r}; give its settings one by one, such as steps and lr.")
        single = {key: given.pop(key) for key in list(given) if key in TRAINING}
        given["training"] = replace(training, **single)
    made = replace(method, **given)
    for spec in settings(made):
        if spec.name in parameters and not is_used(made, spec):
            needed, values = next(iter(spec.metadata["when"].items()))
            raise InputError(
                f"{name}: {spec.name} does nothing unless {needed} is {' or '.join(values)}; leave it out."
            )
    return made


def heads_were_changed(provenance: Mapping[str, Any]) -> bool:
    """Whether a re-alignment in a model's provenance changed its heads."""
    record = provenance.get("realign")
    while record:
        method = methods().get(str(record.get("method")))
        if method is None or method.changes_heads:
            return True
        record = record.get("after")
    return False


def rounded(value: float) -> float | None:
    """A figure for the record, with four decimals; None if it is not finite."""
    return round(value, 4) if math.isfinite(value) else None


def distance_ratio(before: float, after: float, least: float) -> float:
    """A distance to an expert relative to that at the start; 1 if both are rounding, that is below ``least``."""
    if max(before, after) < least:
        return 1.0
    return round(after / max(before, least), 4)


TRAINING = tuple(spec.name for spec in fields(TrainSettings))
"""The fields of `TrainSettings`, which a re-alignment that trains also takes as parameters."""


def is_used(method: Realignment, spec: Any) -> bool:
    """Whether a parameter has an effect, given the other parameters of a method."""
    conditions = spec.metadata.get("when", {})
    return all(getattr(method, name) in values for name, values in conditions.items())


def _needs(method: Realignment) -> str:
    needed = "labelled images" if method.teacher == "labels" else "experts, unlabelled images"
    return f"{needed}, base" if method.needs_base else needed


def realignment_rows() -> list[dict[str, Any]]:
    """One row per re-alignment and preset, for tables: name, summary, needs, parameters, paper and link.

    Example:
        >>> next(row for row in realignment_rows() if row["name"] == "heads")["needs"]
        'labelled images'
    """
    rows = []
    for name, method in realignments().items():
        base, given = _PRESETS.get(name, (name, {}))
        what = ", ".join(f"{key}={value}" for key, value in given.items())
        parameters = {} if given else {spec.name: range_text(spec) for spec in settings(method)}
        if isinstance(method, TrainedRealignment) and not given:
            shown = ("steps", "batch_size", "lr", "seed")
            parameters |= {key: f"{getattr(method.training, key)}" for key in shown}
        rows.append(
            {
                "name": name,
                "summary": f"Short for {base}({what})." if given else summary(type(method)),
                "needs": _needs(method),
                "changes_encoder": method.changes_encoder,
                "parameters": parameters,
                "paper": method.paper,
                "link": method.link,
            }
        )
    return rows
