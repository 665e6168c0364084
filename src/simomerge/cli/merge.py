"""simomerge merge"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import judge_step, next_step, realign_step
from simomerge.cli.output import console, say
from simomerge.cli.parameters import MethodCommand, method_parameters
from simomerge.cli.trees import naming, read_share, stored_dtype
from simomerge.core.assets import EMBEDDED_BASE
from simomerge.core.errors import InputError
from simomerge.core.model_files import is_weight_file
from simomerge.core.text import plain

_WORDS = {
    "scale_chosen_on": "the scale was chosen on",
    "labelled_images": "images with labels:",
    "unlabelled_images": "images without labels:",
    "branch_rank": "own blocks of rank",
    "time": "cost in measured time",
}
"""What an entry of the record of a merge is called in the summary, where its key is no plain word."""


@click.command("merge", cls=MethodCommand)
@options.base
@options.experts
@click.option(
    "--method",
    default="task-arithmetic",
    show_default=True,
    help="See `simomerge methods`; 'auto' tries some on --images and folds the best.",
)
@method_parameters
@click.option(
    "--scale",
    help="Factor of the merged task vector: a number, TASK:NUMBER,... or, chosen on images, 'auto'"
    " or 'learned' (one per expert and block).",
)
@click.option("--schedule", help="Factors over the depth: 0.2,0.5,1 or lines or lines:beta=0.3.")
@click.option(
    "--dtype",
    help="Storage: float32, float16 or bfloat16."
    " [default: as the base; with images, half precision if all experts are]",
)
@options.size_in_bytes("--max-shard-size", "Split larger weights, such as 2GB. [default: one file]")
@options.pictures
@options.data
@options.split
@click.option(
    "--count",
    type=click.IntRange(1),
    help="Images to choose on. [default: 64 for a scale, else 256; auto with --minutes: 1,024]",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Time for --method auto: it distils the whole model after the fold for the rest of this time.",
)
@click.option("--branch", type=int, metavar="K", help="All tasks share K blocks, then each has its own.")
@click.option(
    "--share",
    metavar="TREE",
    help="Which tasks share which blocks, as '6: a+b, c | each' or a YAML file; see docs/sharing.md.",
)
@click.option("--budget", type=float, help="Choose what is shared for this cost: 1 is one encoder.")
@click.option(
    "--budget-of",
    type=click.Choice(("parameters", "time")),
    default="parameters",
    show_default=True,
    help="What --budget counts; time is measured on this machine.",
)
@click.option(
    "--branch-rank",
    type=click.IntRange(0),
    metavar="R",
    help="Store own blocks as differences of this rank to shared weights. [default: in full]",
)
@click.option("--labels", metavar="DATA", help="Choose for --budget by the labels of this dataset's validation split.")
@options.precision
@options.trust_code
@options.output()
def command(as_json: bool, **given: Any) -> None:
    """Merge the EXPERTs' encoders, fine-tuned from BASE, into one model with all their heads.

    BASE and EXPERTs are model folders, transformers folders, weight files (.safetensors, .pt, .bin, .ckpt) or,
    experts only, peft LoRA adapters. Where not every EXPERT is a model folder, or OUT ends in .safetensors, only
    weights are merged. FILE::KEY is one of several sets of weights in a training file.

    \b
    simomerge merge rooms-base depth=runs/depth normals=runs/normals --method ties --scale 0.4 -o runs/scene
    simomerge merge rooms-base depth=runs/depth normals=runs/normals --method auto --images photos/ -o runs/scene
    simomerge merge base.safetensors a=a.safetensors b=b.safetensors -o merged.safetensors
    """
    wanted = _Wanted(**given)
    wanted.check()
    made, tasks = wanted.merge_models() if wanted.in_memory else wanted.merge_files()
    unseen = ("method", "tried", "then", "tree", "groups", "stitches", "disagreement", "loss", "difference_kept")
    details = ", ".join(f"{_WORDS.get(key, key)} {_shown(value)}" for key, value in made.items() if key not in unseen)
    say(
        as_json,
        {"output": str(wanted.output), "tasks": list(tasks), "merge": made},
        *(f"  tried {_trial(trial)}" for trial in made.get("tried", [])),
        _what_was_done(made, wanted.experts) + (f" ({details})." if details else "."),
        *tree_lines(made),
        *(["The heads are folded."] if wanted.method == "auto" or wanted.shares_blocks else []),
        *([made["then"]] if "then" in made else []),
        f"{'Model' if tasks else 'Weights'}: {wanted.output}",
        wanted.next_step(bool(tasks)),
    )


@dataclass(frozen=True)
class _Wanted:
    """The arguments and options of the command, under their names."""

    base: str
    experts: dict[str, str]
    method: str
    parameters: dict[str, Any]
    scale: str | None
    schedule: str | None
    dtype: str | None
    max_shard_size: int | None
    images: str | None
    size: str | None
    data: str
    split: str | None
    count: int | None
    minutes: float | None
    branch: int | None
    share: str | None
    budget: float | None
    budget_of: str
    branch_rank: int | None
    labels: str | None
    output: Path
    overwrite: bool

    @property
    def shares_blocks(self) -> bool:
        """Whether tasks share blocks as a tree says."""
        return any(given is not None for given in (self.branch, self.share, self.budget))

    def tree(self) -> tuple[str, Any]:
        """Where the tree is given, and the tree as `simomerge.merge` takes it; None if it is chosen."""
        if self.share is not None:
            return read_share(self.share)
        return ("--budget", None) if self.branch is None else (f"--branch {self.branch}", self.branch)

    def check_tree(self) -> None:
        """Reject a tree or budget that can be rejected before a file is read."""
        from simomerge.merging.tree import check_sharing

        given = {"--branch": self.branch, "--share": self.share, "--budget": self.budget}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise InputError(f"{names[0]} and {names[1]} both say what is shared: give one of them.")
        if self.method == "auto" or self.scale == "learned":
            raise InputError(f"{names[0]} needs a merge method, and a number or 'auto' as --scale.")
        if options.is_given("data"):
            choice = f", and --labels {self.data} to choose by its labels" if self.budget is not None else ""
            raise InputError(
                f"{names[0]} fits the branches on images without labels, and --data gives labels: give --images"
                f" {self.images or self.data} instead{choice}."
            )
        if self.images is None:
            raise InputError(f"{names[0]} fits the branches on images without labels: give --images FOLDER.")
        place, tree = self.tree()
        with naming(place):
            check_sharing(tree, self.budget, list(self.experts))

    @property
    def searched(self) -> bool:
        """Whether the scale is chosen on images."""
        return self.scale in ("auto", "learned")

    @property
    def uses_images(self) -> bool:
        """Whether the merge computes with images."""
        from simomerge.merging import available

        if self.searched or self.shares_blocks or self.method == "auto":
            return True
        return available()[self.method].needs_data or available()[self.method].needs_labels

    @property
    def in_memory(self) -> bool:
        """Whether the models are loaded: if images are used, or if the base is no folder, file or hub id."""
        if self.uses_images:
            return True
        from simomerge.core.hub import local_source

        return not (is_weight_file(self.base) or Path(local_source(self.base)).exists())

    def given(self) -> dict[str, Any]:
        """The parameters of the method; they include the scale unless it is chosen on images."""
        if self.scale is None or self.searched:
            return self.parameters
        value = options.parse_value(self.scale)
        if isinstance(value, str):
            raise InputError(f"--scale {self.scale}: give a number, TASK:NUMBER,..., 'auto' or 'learned'.")
        return {**self.parameters, "scale": value}

    def check(self) -> None:
        """Reject everything that can be rejected before a file is read."""
        from simomerge.core.files import check_apart
        from simomerge.merging import as_schedule, get_method
        from simomerge.merging.disk.output import Output

        check_apart(self.output, [self.base, *self.experts.values()])
        given = self.given()
        if self.budget is None and options.is_given("budget_of"):
            raise InputError("--budget-of says what a --budget counts; give one, or leave it out.")
        if self.labels is not None and self.budget is None:
            raise InputError("--labels chooses what is shared for a --budget; give one, or leave it out.")
        if self.branch_rank is not None and not self.shares_blocks:
            raise InputError("--branch-rank is the rank of own blocks: give --branch, --share or --budget too.")
        if self.shares_blocks:
            self.check_tree()
        if (self.method == "auto" or self.scale == "learned") and self.images is None:
            what = "--method auto" if self.method == "auto" else "--scale learned"
            raise InputError(f"{what} uses images without labels: give --images FOLDER.")
        if self.minutes is not None and self.method != "auto":
            raise InputError("--minutes is the time of --method auto; leave it out, or give that method.")
        if self.method != "auto":
            get_method(self.method, **{**given, "scale": 1.0} if self.searched else given)
        as_schedule(self.schedule)
        self._check_unused()
        options.check_images(self.images)
        files = [path for path in (self.base, *self.experts.values()) if is_weight_file(path)]
        if self.uses_images and files:
            what = f"--scale {self.scale}" if self.searched else "a tree" if self.shares_blocks else self.method
            raise InputError(
                f"{files[0]} is a weight file, and {what} computes with images: give folders with config.json."
            )
        labelled = self.scale == "auto" and self.images is None
        if self.schedule and not self.shares_blocks and (self.method == "auto" or self.scale == "learned" or labelled):
            chosen = "--method auto" if self.method == "auto" else f"--scale {self.scale}"
            raise InputError(
                f"--schedule is not for {chosen}{' on labels' if labelled else ''}: leave it out, or give"
                f" {'a method' if self.method == 'auto' else 'a number as --scale'}."
            )
        if self.in_memory and (self.max_shard_size or self.output.suffix == ".safetensors"):
            name = "--max-shard-size" if self.max_shard_size else "a weight file as OUT"
            raise InputError(
                f"{name} works with a plain merge only: without images, and with a base on disk. Leave it out, or the"
                " options that use images."
            )
        Output(self.output, self.dtype)  # raises if it cannot be written like this

    def _check_unused(self) -> None:
        """Reject options that are for images if this merge uses none."""
        for name in ("images", "size", "data", "split", "count", "precision"):
            if options.is_given(name) and not self.uses_images:
                other = "--dtype for the stored weights" if name == "precision" else "--scale auto to choose on images"
                raise InputError(
                    f"--{name} is for merges that compute with images, and this one uses none. Give {other}, or leave"
                    " it out."
                )

    def merge_files(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Merge from disk to disk, without torch."""
        from simomerge.merging.disk.merge import merge_on_disk
        from simomerge.merging.disk.output import Output

        output = Output(self.output, self.dtype, self.max_shard_size, self.overwrite)
        with console():
            result = merge_on_disk(self.base, self.experts, output, self.method, self.schedule, **self.given())
        return result.merge, result.tasks

    def merge_models(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Merge models in memory."""
        from simomerge.assembly.experts import load_experts
        from simomerge.assembly.merge import merge
        from simomerge.models.model import load

        options.note_images(self.images, self.count)
        parameters = self.given()
        scale = self.scale if self.searched else parameters.pop("scale", None)
        place, tree = self.tree()
        with console():
            foundation, loaded = load(self.base), load_experts(**self.experts)
            inputs = {**(self._inputs() if self.uses_images else {}), "minutes": self.minutes}
            if self.shares_blocks:
                inputs |= {"share": tree, "budget": self.budget, "budget_of": self.budget_of}
                inputs |= {"branch_rank": self.branch_rank}
            with naming(place):
                model = merge(
                    foundation, loaded, self.method, scale=scale, schedule=self.schedule, **inputs, **parameters
                )
        model.save_pretrained(self.output, self.overwrite, self._stored_dtype())
        return {**model.provenance["merge"], **_chosen(model.provenance)}, tuple(model.tasks)

    def _stored_dtype(self) -> str | None:
        """The dtype of the stored encoder: as asked, or that of all experts; None if these differ."""
        from simomerge.merging.disk.sources import open_source

        return self.dtype or stored_dtype(open_source(path).weights for path in self.experts.values())

    def _inputs(self) -> dict[str, Any]:
        """The images to choose on, as keyword arguments of `simomerge.merge`."""
        from simomerge.datasets.load import load_data, load_images

        tasks = list(self.experts)
        if self.images is not None:
            labelled = None if self.labels is None else load_data(self.labels, split="val", count=256, tasks=tasks)
            images = load_images(self.images, self.split)
            return {"images": images, "size": self.size, "count": self.count, "validation": labelled}
        options.note_rooms(self.base == EMBEDDED_BASE)
        count = 256 if self.count is None else self.count
        data = load_data(self.data, split=self.split or "val", count=count, tasks=tasks)
        return {"validation": data}

    def next_step(self, model: bool) -> str:
        """The command that usually follows, as a line."""
        if not model:
            return next_step("diff", self.base, self.output, comment="how far it is from the base")
        if self.method == "auto" or self.shares_blocks:
            return judge_step(self.output, self.experts, self.images or self.data)
        return realign_step(
            self.output, self.experts, self.base, self.images or (self.data if self.uses_images else None)
        )


def _what_was_done(made: dict[str, Any], experts: dict[str, str]) -> str:
    tasks = ", ".join(experts)
    return (
        f"No block is shared: {tasks} keep their own"
        if made["method"] == "none"
        else f"Merged {tasks} by {made['method']}"
    )


def _chosen(provenance: dict[str, Any]) -> dict[str, Any]:
    """What auto did after the fold within its time."""
    choice = provenance.get("auto")
    if choice is None:
        return {}
    if choice["chosen"] == "fold-cross":
        return {"then": f"It stays at the fold: {choice['reason'].rstrip('.')}."}
    ratios = provenance["realign"]["distance_ratio"]
    shown = ", ".join(f"{task} {ratio:.2f}" for task, ratio in ratios.items())
    judged = f" The distances to the experts on held-out images are these times those of the fold: {shown}."
    return {"then": f"Then it was distilled for {choice['steps']} steps.{judged if shown else ''}"}


def tree_lines(made: dict[str, Any]) -> list[str]:
    """The tree of shared blocks, and how well its stitches fit."""
    if "tree" not in made:
        return []
    from simomerge.merging.tree import Tree

    kept = [
        f"  own blocks {name}: rank {made['branch_rank']} keeps {share:.1%} of the squared difference"
        for name, share in made.get("difference_kept", {}).items()
    ]
    fits = [
        f"  stitch {name}: R2 of the hidden states on held-out images {fit['r2_before']:.3f} -> {fit['r2']:.3f}"
        for name, fit in made.get("stitches", {}).items()
        if "r2" in fit
    ]
    losses = {"disagreement": "disagreement with the experts, relative to one encoder", "loss": "loss in %"}
    lines = [
        f"  {what}: {', '.join(f'{task} {_loss(value)}' for task, value in made[key].items())}"
        for key, what in losses.items()
        if key in made
    ]
    return [f"  {line}" for line in Tree.read(made["tree"]).drawing().splitlines()] + kept + fits + lines


def _loss(value: float | None) -> str:
    return "not judged" if value is None else f"{value:.2f}"


def _shown(value: Any) -> str:
    """A parameter of a merge, as text: many scales as their range for each expert."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {_shown(one)}" for name, one in value.items())
    if isinstance(value, list) and value and all(isinstance(one, (int, float)) for one in value):
        return f"{min(value):.3g} to {max(value):.3g} over {len(value)} blocks" if len(value) > 1 else f"{value[0]:.3g}"
    return plain(value)


def _trial(trial: dict[str, Any]) -> str:
    """One merge that was tried, as a line of text."""
    scale = trial.get("scale")
    shown = " scale learned" if isinstance(scale, dict) else f" scale {scale:g}" if scale is not None else ""
    schedule = f" {trial['schedule']}" if trial.get("schedule") else ""
    agreement = "none, because it predicts no numbers" if trial["agreement"] is None else f"{trial['agreement']:.3f}"
    return f"{trial['method']}{schedule}{shown}: agreement {agreement}"
