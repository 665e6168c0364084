"""What a run does, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from simomerge.core.errors import InputError
from simomerge.recipes.problems import WITHOUT_LABELS, problems
from simomerge.training.settings import TrainSettings

DEMO_TASKS = ("segmentation", "depth", "normals")
"""The tasks of NYUv2 in the paper."""

ROOMS_HEADS: dict[str, dict[str, Any]] = {"linear": {"subpixels": 4}, "dpt": {"fusion_channels": 32}}
"""Head settings that fit rooms: images of 8 x 10 patches need more than one logit per patch, and no 128 channels."""

ALL_TASKS = (*DEMO_TASKS, "edges", "texture")


@dataclass(frozen=True)
class Recipe:
    """Experts, joint MTL, merges, re-alignments and their evaluation on one dataset.

    Args:
        tasks: names of the dataset's tasks.
        head: a key of `simomerge.models.heads.HEADS`.
        head_settings: further settings of the heads.
        seeds: one repetition of everything but the data per seed.
        train_images, val_images, test_images: how many images of each split. The validation split is the
            paper's D_val: it chooses scales and re-aligns. The test split is only reported on.
        scale_images: how many of the validation images choose the scale.
        probe, tune: the two phases of LP-FT for each expert; joint: the second phase of joint MTL.
        joint_weightings: of the losses of joint MTL; "equal" is the row joint-mtl (the paper's), another, as "dwa",
            the row joint-mtl-dwa.
        heads, adapters: the paper's two re-alignments.
        folded_heads, folded_adapters: the same, starting from a fold.
        distill, distill_adapters: training on the experts' predictions, of heads alone and of adapters with them.
        rank, activation: of the adapters.
        fold_images, fold_cross_images, distill_images: how many images of the validation split, without their labels,
            the fold per tap (and the choice of a scale without labels), the fold cross tap (and auto) and distillation
            look at.
        augmentation: of the images that experts and joint model are fine-tuned on, a key of `AUGMENTATIONS`.
        merges: merge methods, by name; those with a scale get the best one on the validation split's labels, as
            in the paper.
        merge_settings: parameters of merge methods by their names, such as ``{"ties": {"density": 0.1}}``; a scale
            that is given is not searched for.
        realigned: rows of a merge's name followed by steps of `STEPS`, each after a plus. Where the first step needs no
            labels, neither does the row's merge: its scale is the one that can be folded best. "auto" is the merge
            and fold that `simomerge.merge` finds by itself, and may be followed by steps too.
        gallery: rows shown as pictures, after the input and the ground truth.
        relate: also measure how the experts relate to each other, per seed, on the validation split's labels.
    """

    tasks: tuple[str, ...] = DEMO_TASKS
    head: str = "linear"
    head_settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    train_images: int = 800
    val_images: int = 640
    test_images: int = 256
    scale_images: int = 128
    probe: TrainSettings = TrainSettings(steps=100, lr=2e-3)
    tune: TrainSettings = TrainSettings(steps=100, lr=3e-3, encoder_lr=4e-4)
    joint: TrainSettings = TrainSettings(steps=100, lr=3e-3, encoder_lr=4e-4)
    joint_weightings: tuple[str, ...] = ("equal",)
    heads: TrainSettings = TrainSettings(steps=150, lr=3e-3)
    adapters: TrainSettings = TrainSettings(steps=100, lr=2e-3)
    folded_heads: TrainSettings = TrainSettings(steps=40, lr=1e-3)
    folded_adapters: TrainSettings = TrainSettings(steps=40, lr=1e-3)
    distill: TrainSettings = TrainSettings(steps=40, lr=1e-3)
    distill_adapters: TrainSettings = TrainSettings(steps=60, lr=1e-3)
    rank: int = 16
    activation: str = "none"
    fold_images: int = 64
    fold_cross_images: int = 256
    distill_images: int = 256
    augmentation: str = "flip"
    merges: tuple[str, ...] = ("zero-shot", "average", "task-arithmetic", "ties")
    merge_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    realigned: tuple[str, ...] = (
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
    )
    gallery: tuple[str, ...] = (
        "experts",
        "task-arithmetic",
        "task-arithmetic+fold-cross",
        "task-arithmetic+heads",
    )
    relate: bool = False

    def __post_init__(self) -> None:
        if found := problems(self, Recipe.gallery):  # what cannot be is told now, not after the training
            raise InputError(f"recipe: {'; '.join(found)}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def settings(self, row: Sequence[str]) -> TrainSettings:
        """Of the last step of a row (merge, steps...): fewer steps where a fold came before it."""
        *before, step = row
        name = step.replace("-", "_")
        folded = step in ("heads", "adapters") and any(part == "auto" or part in WITHOUT_LABELS for part in before)
        found: TrainSettings = getattr(self, f"folded_{name}" if folded else name)
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote, also after a way through JSON.

        Example:
            >>> Recipe.from_dict(Recipe().to_dict()) == Recipe()
            True
        """
        values: dict[str, Any] = {}
        for name, value in data.items():
            trains = isinstance(getattr(cls, name, None), TrainSettings)
            values[name] = TrainSettings(**value) if trains else tuple(value) if isinstance(value, list) else value
        return cls(**values)


def demo_recipe(
    tasks: tuple[str, ...] = DEMO_TASKS, head: str = "linear", seeds: int = 1, full: bool = False
) -> Recipe:
    """The demo's recipe, or with ``full`` the benchmark's: more images and steps, for figures worth quoting."""
    if seeds < 1:
        raise InputError(f"seeds {seeds}: use at least 1.")
    recipe = Recipe(tasks=tasks, head=head, head_settings=ROOMS_HEADS.get(head, {}), seeds=tuple(range(seeds)))
    return full_size(recipe) if full else recipe


def full_size(recipe: Recipe) -> Recipe:
    """A recipe with the benchmark's numbers of images and steps."""
    return replace(
        recipe,
        train_images=4000,
        val_images=512,
        test_images=512,
        scale_images=256,
        distill_images=512,
        probe=replace(recipe.probe, steps=120),
        tune=replace(recipe.tune, steps=400, encoder_lr=3e-4, validate_every=100),
        joint=replace(recipe.joint, steps=400, encoder_lr=3e-4, validate_every=100),
        heads=replace(recipe.heads, steps=120, lr=1e-3),
        adapters=replace(recipe.adapters, steps=150, lr=1e-3),
        folded_heads=replace(recipe.folded_heads, steps=120),
        folded_adapters=replace(recipe.folded_adapters, steps=80),
        distill=replace(recipe.distill, steps=200),
        distill_adapters=replace(recipe.distill_adapters, steps=120),
        realigned=(
            *recipe.realigned,
            "ties+heads",
            "auto+distill",
            "auto+distill-adapters",
            "task-arithmetic+fold-cross+adapters",
        ),
    )
