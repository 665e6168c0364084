"""What a run does, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from simomerge.errors import InputError
from simomerge.heads import HEADS
from simomerge.merging import get_method
from simomerge.training import TrainSettings

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
        head: a key of `simomerge.heads.HEADS`.
        head_settings: further settings of the heads.
        seeds: one repetition of everything but the data per seed.
        train_images, val_images, test_images: how many images of each split. The validation split is the
            paper's D_val: it chooses scales and re-aligns. The test split is only reported on.
        scale_images: how many of the validation images choose the scale.
        probe, tune: the two phases of LP-FT for each expert; joint: the second phase of joint MTL.
        heads, adapters: the paper's two re-alignments.
        rank, activation: of the adapters.
        merges: merge methods, by name; those with a scale get ``scale="auto"`` on the validation split.
        realigned: rows of a merge's name followed by ``+heads`` or ``+adapters``.
        gallery: rows shown as pictures, after the input and the ground truth.
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
    tune: TrainSettings = TrainSettings(steps=120, lr=3e-3, encoder_lr=4e-4, validate_every=60)
    joint: TrainSettings = TrainSettings(steps=120, lr=3e-3, encoder_lr=4e-4, validate_every=60)
    heads: TrainSettings = TrainSettings(steps=150, lr=3e-3)
    adapters: TrainSettings = TrainSettings(steps=120, lr=1e-3)
    rank: int = 16
    activation: str = "none"
    merges: tuple[str, ...] = ("zero-shot", "average", "task-arithmetic", "ties")
    realigned: tuple[str, ...] = (
        "zero-shot+heads",
        "task-arithmetic+heads",
        "ties+heads",
        "task-arithmetic+adapters",
    )
    gallery: tuple[str, ...] = (
        "experts",
        "task-arithmetic",
        "task-arithmetic+heads",
        "task-arithmetic+adapters",
    )

    def __post_init__(self) -> None:
        for name in self.merges:
            get_method(name)  # a misspelt name is told now, not after the training
        if self.head not in HEADS:
            raise InputError(f"recipe: unknown head {self.head!r}; choose one of: {', '.join(HEADS)}.")
        for row in self.realigned:
            merge, _, how = row.partition("+")
            if merge not in self.merges or how not in ("heads", "adapters"):
                raise InputError(f"recipe: row {row!r} is not one of its merges followed by +heads or +adapters.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError("recipe: give at least one seed, and each once.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote, also after a way through JSON.

        Example:
            >>> Recipe.from_dict(Recipe().to_dict()) == Recipe()
            True
        """
        values: dict[str, Any] = {}
        for name, value in data.items():
            trains = name in ("probe", "tune", "joint", "heads", "adapters")
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
        probe=replace(recipe.probe, steps=120),
        tune=replace(recipe.tune, steps=400, encoder_lr=3e-4, validate_every=100),
        joint=replace(recipe.joint, steps=400, encoder_lr=3e-4, validate_every=100),
        heads=replace(recipe.heads, steps=120, lr=1e-3),
        adapters=replace(recipe.adapters, steps=150),
    )
