"""The command that usually follows, as a line that can be pasted into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from simomerge.core.assets import EMBEDDED_BASE, expanded
from simomerge.core.classes import allowed
from simomerge.core.errors import InputError
from simomerge.core.remote import is_url

MARK = "Next: "
_WITHOUT_CODE = ("inspect", "demo", "data", "methods")
"""Commands that load no model, and have no --trust-code."""


def next_step(*words: object, comment: str = "") -> str:
    """The line of a command; names with spaces are quoted, so that a shell reads them as one.

    If this command was allowed to run the code of model folders, the next one is, too.

    Example:
        >>> next_step("inspect", "runs/my scene", comment="what it is")
        "Next: simomerge inspect 'runs/my scene'   # what it is"
    """
    code = ["--trust-code"] if allowed()[0] and words[0] not in _WITHOUT_CODE else []
    line = MARK + shlex.join(["simomerge", *map(str, words), *code])
    return f"{line}   # {comment}" if comment else line


def pairs(experts: Mapping[str, object]) -> list[str]:
    """Experts as a command takes them.

    Example:
        >>> pairs({"depth": "runs/depth"})
        ['depth=runs/depth']
    """
    return [f"{task}={expert}" for task, expert in experts.items()]


def realign_step(model: Path, experts: Mapping[str, object], base: str, images: str | None) -> str:
    """The repair of a merge, on the images that were given, on rooms, or on a folder that the reader has to fill."""
    chosen = images or ("rooms" if base == EMBEDDED_BASE else "photos/")
    where = "; photos/ stands for a folder of your images" if chosen == "photos/" else ""
    words = ("realign", model, *pairs(experts), "--images", chosen, "-o", f"{model}-folded")
    return next_step(*words, comment=f"the heads no longer fit{where}")


def judge_step(model: Path, experts: Mapping[str, object], data: str) -> str:
    """Compare a model with its experts on a dataset; or look at its predictions for pictures, which have no labels."""
    from simomerge.datasets.load import is_dataset
    from simomerge.datasets.pictures import picture_files

    data = data if is_url(data) or not data.startswith("~") else str(expanded(data))
    if is_dataset(data):
        split, labelled = _labels(data, experts)
        if experts and not labelled:
            return next_step("inspect", model)
        return next_step("evaluate", model, *pairs(labelled), "--data", data, "--split", split)
    try:
        readable = not is_url(data) and not data.lower().endswith(".tar") and bool(picture_files(Path(data)))
    except InputError:  # such as tar files, which predict does not read
        readable = False
    if not readable:
        return next_step("inspect", model)
    return next_step("predict", model, data, "-o", f"{model}-predictions", comment="look at what it predicts")


def _labels(data: str, experts: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    """The split to judge on, which is "test" if the dataset has it, and the experts whose tasks have labels."""
    from simomerge.datasets.load import find_manifest

    try:
        manifest = find_manifest(data)
    except InputError:  # such as rooms, which have no manifest, but all splits
        return "test", experts
    split = "test" if "test" in manifest.rows else list(manifest.rows)[-1]
    return split, {task: expert for task, expert in experts.items() if task in manifest.stored}


def recorded_experts(
    model: str, tasks: Iterable[str], recorded: Mapping[str, Mapping[str, str]], known: Mapping[str, str]
) -> dict[str, str]:
    """Where the experts of a merged model are: as given, or by the name that the model records, in its folder.

    Those that are in neither place are left out.
    """
    found = {}
    for task in tasks:
        source = recorded.get(task, {}).get("source", "")
        beside = Path(model).parent / source
        if task in known:
            found[task] = known[task]
        elif source and (beside / "simo.json").is_file():
            found[task] = str(beside)
        elif "/" in source:  # a hub id
            found[task] = source
    return found
