"""What a re-alignment is, and the registry of re-alignments.

A re-alignment is a frozen dataclass: its fields are its parameters, its class attributes say what it learns from and
where it comes from, and ``apply`` does the work. The options of the command line, the steps of a recipe and the tables
in the documentation are generated from it. A new re-alignment is one file with one class and ``@register`` in front,
imported in `simomerge.assembly.realign`.

The command line reads the registry for its ``--help``, so the module of a method imports torch inside its functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from simomerge.core.errors import InputError
from simomerge.core.registry import Registry, check_parameters, parameter, range_text, settings, suggestion, summary
from simomerge.training.settings import TrainSettings

if TYPE_CHECKING:
    from simomerge.models.model import SimoModel


@dataclass(frozen=True)
class Inputs:
    """What a re-alignment may use besides the model.

    Attributes:
        experts: By task, checked against the model; empty for a method that learns from labels.
        images: Unlabelled images for a method that learns from the experts, as `as_images` gives them.
        data: A dataset with labels of every task for a method that learns from labels.
        work_folder: Where features, predictions and the state of a killed run are kept, for this very re-alignment and
            no other; None keeps them in a temporary folder.
        workers: Number of heads that are trained at the same time, each in its own process.
    """

    experts: Mapping[str, SimoModel] = field(default_factory=dict)
    images: Any = None
    data: Any = None
    work_folder: Path | None = None
    workers: int = 1


@dataclass(frozen=True)
class Realignment(ABC):
    """Base of all re-alignments.

    Class attributes: ``name`` (what the user types), ``teacher`` ("experts": the experts' behaviour on unlabelled
    images; "labels": a labelled dataset), ``paper`` and ``link`` (its source), ``default_count`` (images that the
    command line uses), ``needs_plain_heads`` (the model's heads must still be the experts').
    """

    name: ClassVar[str]
    teacher: ClassVar[str]
    paper: ClassVar[str]
    link: ClassVar[str]
    default_count: ClassVar[int] = 256
    needs_plain_heads: ClassVar[bool] = False

    count: int | None = parameter(None, kind=int, low=1, help="Images to use, spread evenly; all by default.")

    def __post_init__(self) -> None:
        """Check every parameter. Raises InputError that names the parameter, its range and the value."""
        check_parameters(self.name, self)

    @property
    @abstractmethod
    def phrase(self) -> str:
        """What it does, for sentences such as "Merging cost 10 points; folding its heads recovered 60 % of that."."""

    @property
    def trains_heads_apart(self) -> bool:
        """Whether heads are trained independently of each other, so that several workers help."""
        return False

    @property
    def adds_adapters(self) -> bool:
        """Whether the result has adapters next to its blocks."""
        return False

    @property
    def changes_encoder(self) -> bool:
        """Whether the result's encoder is no longer the plain merge of its experts."""
        return self.adds_adapters

    @abstractmethod
    def apply(self, model: SimoModel, inputs: Inputs) -> SimoModel:
        """Re-align a model and return a new one; the given model stays as it is.

        Raises:
            InputError: What the method cannot work with; the message says what.
        """

    def record(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """What provenance holds: the name, the parameters, and what was measured."""
        parameters: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, TrainSettings):
                parameters |= asdict(value)
            elif spec.name != "count" and value is not None and is_used(self, spec):
                parameters[spec.name] = list(value) if isinstance(value, tuple) else value
        return {"method": self.name, **parameters, "changes_encoder": self.changes_encoder, **measured}


@dataclass(frozen=True)
class TrainedRealignment(Realignment):
    """Base of the re-alignments that train something by gradient descent."""

    training: TrainSettings = TrainSettings(steps=200, batch_size=32, lr=1e-3)


_REGISTRY: Registry[Realignment] = Registry("re-alignment")
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {}
_Class = TypeVar("_Class", bound=type[Realignment])


def register(method: _Class) -> _Class:
    """Class decorator: make a re-alignment available under its ``name``. Raises ValueError if the name is taken."""
    registered: _Class = _REGISTRY.register(method)
    return registered


def preset(name: str, method: str, **parameters: Any) -> None:
    """Make a re-alignment with some parameters available under a name of its own."""
    _PRESETS[name] = (method, parameters)


def methods() -> dict[str, type[Realignment]]:
    """All re-alignments, name -> class, without the presets."""
    return _REGISTRY.available()


def realignments() -> dict[str, Realignment]:
    """Everything that can be named: the methods with their defaults, then the presets.

    Example:
        >>> realignments()["fold-cross"].variant
        'cross-tap'
    """
    return {name: get_realignment(name) for name in (*methods(), *_PRESETS)}


def get_realignment(name: str, **parameters: Any) -> Realignment:
    """The re-alignment or preset ``name`` with its parameters checked.

    Args:
        **parameters: Those of the method; the fields of `TrainSettings` may be given one by one, next to or instead of
            ``training``.

    Raises:
        InputError: An unknown method or parameter (the nearest name is suggested), a value out of range, or a parameter
            that has no effect with the others.

    Example:
        >>> get_realignment("heads", steps=60).training.steps
        60
    """
    if name not in _PRESETS and name not in methods():
        raise InputError(f"There is no re-alignment '{name}'{suggestion(name, [*methods(), *_PRESETS])}")
    method, given = _PRESETS.get(name, (name, {}))
    kind = methods()[method]
    given = {**given, **parameters}
    trained = kind if issubclass(kind, TrainedRealignment) else None
    known = [*(spec.name for spec in fields(kind)), *(TRAINING if trained else ())]
    if unknown := [key for key in given if key not in known]:
        raise InputError(f"The re-alignment '{name}' has no parameter '{unknown[0]}'{suggestion(unknown[0], known)}")
    if trained:
        training = given.pop("training", None) or trained.training
        single = {key: given.pop(key) for key in list(given) if key in TRAINING}
        given["training"] = replace(training, **single)
    made = kind(**given)
    for spec in settings(made):
        if spec.name in parameters and not is_used(made, spec):
            needed, values = next(iter(spec.metadata["when"].items()))
            raise InputError(
                f"{name}: {spec.name} does nothing unless {needed} is {' or '.join(values)}; leave it out."
            )
    return made


TRAINING = tuple(spec.name for spec in fields(TrainSettings))
"""The names of the training's settings, which may be given as parameters of a re-alignment that trains."""


def is_used(method: Realignment, spec: Any) -> bool:
    """Whether a parameter has an effect with the other parameters of a method."""
    conditions = spec.metadata.get("when", {})
    return all(getattr(method, name) in values for name, values in conditions.items())


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
                "needs": "labelled images" if method.teacher == "labels" else "experts, unlabelled images",
                "changes_encoder": method.changes_encoder,
                "parameters": parameters,
                "paper": method.paper,
                "link": method.link,
            }
        )
    return rows
