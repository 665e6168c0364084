"""What a run does, as plain data: the content of a recipe file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from simomerge.assembly.realign import Realignment, get_realignment, realignments
from simomerge.assembly.realign.method import TRAINING, TrainedRealignment
from simomerge.core.errors import InputError
from simomerge.core.schema import validation_problems
from simomerge.core.text import without_secrets
from simomerge.datasets.rows import known_split
from simomerge.recipes.problems import problems_of
from simomerge.recipes.row import AUTO, Row
from simomerge.recipes.space import SearchSettings
from simomerge.training.settings import TrainSettings

DEMO_TASKS = ("segmentation", "depth", "normals")
"""The tasks of NYUv2 in the paper."""

REALIGN: dict[str, dict[str, Any]] = {
    "heads": {"steps": 150, "lr": 3e-3},
    "adapters": {"steps": 100, "lr": 2e-3},
    "lora": {"steps": 100, "lr": 2e-3},
    "finetune": {"steps": 100, "lr": 1e-3},
    "fold": {"count": 64},
    "fold-cross": {"count": 256},
    "react": {"count": 64},
    "surgery": {"count": 256},
    "calibrate": {"count": 256},
    "distill": {"steps": 40, "lr": 1e-3, "count": 256},
    "distill-adapters": {"steps": 60, "lr": 1e-3, "count": 256},
    "distill-lora": {"steps": 60, "lr": 1e-3, "count": 256},
    "distill-encoder": {"steps": 100, "lr": 1e-3, "count": 640},
    "symerge": {"steps": 60, "lr": 1e-3, "count": 256},
    "prodistill": {"steps": 40, "count": 64},
}
# Fine-tuning keeps its settings after a fold: it trains all weights, wherever it starts.
REFINE: dict[str, dict[str, Any]] = {name: {"steps": 40, "lr": 1e-3} for name in ("heads", "adapters", "lora")}

_Class = TypeVar("_Class")
Count = Annotated[StrictInt, Field(ge=1)]
Names = tuple[StrictStr, ...]


def _with_spaces(names: tuple[str, ...]) -> tuple[str, ...]:
    """Rows in the form that names their stages; what is not a row stays, for a message about it."""

    def canonical(text: str) -> str:
        try:
            return str(Row.parse(text))
        except InputError:
            return text

    return tuple(map(canonical, names))


RowNames = Annotated[Names, AfterValidator(_with_spaces)]


def _complete_training(default: TrainSettings) -> BeforeValidator:
    """A mapping changes only the settings that it names."""

    def complete(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        if given.get("seed"):  # the default, 0, is in every training that was written by `to_dict`
            raise InputError("a recipe's seeds are those of `seeds`; leave seed out")
        for key, value in given.items():
            whole = isinstance(getattr(default, str(key), None), int)
            if isinstance(value, bool) or (whole and isinstance(value, float)):
                raise InputError(f"{key} is {value}; give a {'whole ' if whole else ''}number")
        return {**asdict(default), **given}

    return BeforeValidator(complete)


def _complete_steps(default: Mapping[str, Mapping[str, Any]]) -> BeforeValidator:
    """A mapping by step changes only the parameters that it names."""

    def complete(given: Any) -> Any:
        if not isinstance(given, Mapping) or any(not isinstance(each, Mapping) for each in given.values()):
            raise InputError("give a mapping by step, such as {heads: {steps: 100}}")
        return {name: {**default.get(name, {}), **given.get(name, {})} for name in (*default, *given)}

    return BeforeValidator(complete)


_PROBE = TrainSettings(steps=100, lr=2e-3)
_TUNE = TrainSettings(steps=100, lr=3e-3, encoder_lr=4e-4)
_Probe = Annotated[TrainSettings, _complete_training(_PROBE)]
_Tune = Annotated[TrainSettings, _complete_training(_TUNE)]
_Realign = Annotated[dict[str, dict[str, Any]], _complete_steps(REALIGN)]
_Refine = Annotated[dict[str, dict[str, Any]], _complete_steps(REFINE)]


def _known_keys(place: tuple[Any, ...]) -> list[str]:
    """The keys that a recipe knows at a place, for suggestions."""
    if not place:
        return [each.name for each in fields(Recipe)]
    if place[0] == "search":
        return [each.name for each in fields(SearchSettings)]
    return [*TRAINING, "epochs"]


def _moved(values: dict[str, Any]) -> Iterator[str]:
    """Take settings of re-alignments out of the top level, where they do not belong."""
    for key in [key for key in values if key.replace("_", "-").removeprefix("folded-") in realignments()]:
        values.pop(key)
        name = key.replace("_", "-")
        place = f"refine.{name.removeprefix('folded-')}" if name.startswith("folded-") else f"realign.{name}"
        yield f"{key} is no key of a recipe; give it as {place}"


class RecipeError(InputError):
    """All problems of a recipe, each a sentence without its full stop."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = [problem.rstrip(".?") for problem in problems]
        super().__init__(f"recipe: {'; '.join(self.problems)}.")


def _checked(kind: type[_Class]) -> type[_Class]:
    """Class decorator: what pydantic and `problems_of` find is raised as one RecipeError, before any training.

    Keys with a wrong value have their defaults while the others are checked.
    """
    validate = kind.__init__

    def __init__(self: Any, **values: Any) -> None:
        problems, wrong = list(_moved(values)), set[str]()
        try:
            validate(self, **values)
        except ValidationError as error:
            problems += validation_problems(error, _known_keys)
            wrong = {str(one["loc"][0]) for one in error.errors()}
            validate(self, **{key: value for key, value in values.items() if key not in wrong})
        problems += problems_of(self, wrong)
        if problems:
            raise RecipeError(problems)

    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


@_checked
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """Experts, joint MTL, merges, re-alignments and their evaluation on one dataset.

    Args:
        title: Title of the report.
        base: Folder or hub id of the foundation encoder, or rooms-base.
        data: As `simomerge.datasets.load.load_data` takes it: rooms, a manifest, NAME:ROOT, or the URL of one.
        data_options: Further keyword arguments of the dataset, such as ``size: [280, 378]``.
        output: The run folder, or its URL.
        search: What `simomerge search` varies.
        tasks: Names of the dataset's tasks.
        head: A key of `simomerge.models.heads.HEADS`.
        head_settings: Further settings of the heads.
        seeds: Everything but the data is repeated once per seed.
        train_images, val_images, test_images: Number of images of each split. The validation split is the paper's
            D_val: it chooses scales and re-aligns. The test split is used only for the reported figures.
        align_split: The split or splits (joined with +) whose images the rows without labels use, spread over all.
        align_images: A folder of pictures, or another dataset, that these rows use instead.
        scale_images: Number of validation images that choose a scale by their labels.
        choose_images: Number of these images that choose a scale without labels.
        auto_images: Number of these images that the merges "auto" and "learned" use.
        probe, tune: The two phases of LP-FT for each expert.
        joint: The second phase of joint MTL.
        joint_weightings: Weightings of the joint losses; "equal" is the row joint-mtl (the paper's), another one, such
            as "dwa", the row joint-mtl-dwa.
        augmentation: How images are augmented when experts and joint model are fine-tuned, a key of `AUGMENTATIONS`.
        merges: Merge methods by name; those with a scale get the best one on the validation split's labels, as in the
            paper.
        merge_settings: Parameters of merge methods by their names, such as ``{"ties": {"density": 0.1}}``; a scale that
            is given is not searched.
        realigned: Rows of the table, ``MERGE+STEP+STEP(KEY=VALUE)``. If the first step needs no labels, neither does
            the row's merge: its scale is the one whose folded model agrees best with the experts. "auto" is the merge
            and fold that `simomerge.merge` finds by itself, and "learned" is task arithmetic with a learned coefficient
            per expert and block; steps may follow both.
        realign: Parameters of the re-alignments by step name; ``count`` is the number of images of the validation
            split, or of the images of ``align_split`` for re-alignments without labels.
        refine: Further parameters of steps that start from a model that was re-aligned before.
        gallery: Rows that are shown as pictures, after the input and the ground truth.
        relate: Also measure how the experts relate to each other, per seed, on the validation split's labels.

    Raises:
        RecipeError: All problems of the recipe, in one message.
    """

    title: StrictStr = "simomerge run"
    base: StrictStr = "rooms-base"
    data: StrictStr = "rooms"
    data_options: dict[str, Any] = field(default_factory=dict)
    output: StrictStr = "runs/run"
    search: SearchSettings = SearchSettings()
    tasks: Names = DEMO_TASKS
    head: StrictStr = "linear"
    head_settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[StrictInt, ...] = (0,)
    train_images: Count = 800
    val_images: Count = 640
    test_images: Count = 256
    align_split: StrictStr = "train+val"
    align_images: StrictStr | None = None
    scale_images: Count = 128
    choose_images: Count = 64
    auto_images: Count = 256
    probe: _Probe = _PROBE
    tune: _Tune = _TUNE
    joint: _Tune = _TUNE
    joint_weightings: Names = ("equal",)
    augmentation: StrictStr = "flip"
    merges: Names = ("zero-shot", "average", "task-arithmetic", "ties")
    merge_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    realigned: RowNames = (
        "zero-shot+heads",
        "zero-shot+fold-cross",
        "task-arithmetic+heads",
        "task-arithmetic+adapters",
        "task-arithmetic+fold",
        "task-arithmetic+fold-cross",
        "task-arithmetic+distill",
        "task-arithmetic+fold+heads",
        "task-arithmetic+fold+adapters",
        "auto",
        "zero-shot+distill-encoder",
        "task-arithmetic+distill-encoder",
    )
    realign: _Realign = field(default_factory=lambda: dict(REALIGN))
    refine: _Refine = field(default_factory=lambda: dict(REFINE))
    gallery: RowNames = ("experts", "task-arithmetic", "task-arithmetic+fold-cross", "task-arithmetic+distill-encoder")
    relate: StrictBool = False

    @property
    def align_splits(self) -> tuple[str, ...]:
        """The names of the splits whose images the rows without labels use."""
        return tuple(map(known_split, self.align_split.split("+")))

    @property
    def rows(self) -> tuple[Row, ...]:
        """The re-aligned rows, parsed."""
        return tuple(map(Row.parse, self.realigned))

    def method(self, row: Row, seed: int | None = None) -> Realignment:
        """The re-alignment that is the last step of a row, with its parameters.

        Raises:
            InputError: A step or parameter that does not exist, or a value out of range.
        """
        step = row.steps[-1]
        parameters = {**self.realign.get(step.name, {})}
        before = [self.method(each) for each in row.before.prefixes()]
        if row.merge == AUTO or any(method.teacher == "experts" and method.changes_heads for method in before):
            parameters |= self.refine.get(step.name, {})
        parameters |= dict(step.parameters)
        made = get_realignment(step.name, **parameters)
        if seed is not None and isinstance(made, TrainedRealignment):
            made = replace(made, training=replace(made.training, seed=seed))
        return made

    def trainings(self) -> dict[str, TrainSettings]:
        """Every training of the recipe by its key."""
        found = {name: getattr(self, name) for name in ("probe", "tune", "joint")}
        for row in self.rows:
            for prefix in row.prefixes():
                if isinstance(made := self.method(prefix), TrainedRealignment):
                    found[str(prefix)] = made.training
        return found

    def to_dict(self) -> dict[str, Any]:
        """What decides the results, as plain data: everything but names and places of this machine."""
        places = ("title", "base", "data", "data_options", "output", "search")
        found = {key: value for key, value in asdict(self).items() if key not in places}
        return {**found, "align_images": without_secrets(self.align_images or "") or None}
