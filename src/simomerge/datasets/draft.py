"""Draft a manifest from folders of images and targets: pairs files by name, makes splits, guesses kinds and units.

Every guess is a sentence, so that its reader can correct the manifest; `simomerge.datasets.check` confirms the rest.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.files import atomic_write_text, check_absent
from simomerge.core.task_names import check_task_name
from simomerge.datasets.groups import evenly
from simomerge.datasets.pictures import SUFFIXES, files_of
from simomerge.datasets.rows import SPLITS, known_split
from simomerge.datasets.stored import read_array
from simomerge.datasets.tasks import KINDS

TARGET_SUFFIXES = (*SUFFIXES, ".npy", ".pfm", ".exr", ".flo")
SAMPLES = 24
"""Targets of each task that are read to guess how they are stored."""
MANY_LABELS, MANY_COLOURS = 256, 64
"""Pictures with more different values, or colours, hold no labels."""
SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
"""Shares of the images in each split, if the folders have no splits."""
_WORDS = {
    "segmentation": ("mask", "seg", "label", "semantic", "class", "parts"),
    "depth": ("depth", "distance", "zbuffer"),
    "disparity": ("disp",),
    "normals": ("normal",),
    "edges": ("edge", "boundar", "contour"),
    "flow": ("flow",),
    "albedo": ("albedo", "reflectance"),
}
"""Parts of folders' names that tell the kind of their targets."""


@dataclass
class Draft:
    """A manifest in the making.

    Attributes:
        tasks: name -> its entry in the manifest.
        rows: the images, with ``image``, ``split`` and a target for each task that has one; paths relative to ``root``.
        root: the folder that the manifest is written to.
        notes: what was guessed and what should be looked at, a sentence each.
    """

    root: Path
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draft_manifest(
    images: Path, targets: Mapping[str, Path], root: Path, kinds: Mapping[str, str] | None = None
) -> Draft:
    """Pair the files of folders and guess how the targets are stored.

    Args:
        images: the folder of the images; its subfolders and linked folders count.
        targets: task -> the folder of its targets. A target belongs to the image of the same name, in the same
            subfolder; a beginning or end that all names of the folder share, such as ``_depth``, does not count.
        root: the folder of the manifest, to which its paths are relative.
        kinds: the kinds of some tasks; the others are guessed.

    Raises:
        InputError: a task cannot have its name, a folder has no files, no target belongs to an image, or a kind cannot
            be guessed.
    """
    kinds = dict(kinds or {})
    if wrong := [task for task in kinds if task not in targets]:
        raise InputError(f"kind of {wrong[0]!r}: there is no folder of that task; it has {', '.join(targets)}.")
    for task in targets:
        try:
            check_task_name(task)
        except InputError as error:
            raise InputError(f"{targets[task]}: {error} Give it as TASK=FOLDER.") from error
    draft, pictures = Draft(root), files_of(images, SUFFIXES)
    draft.rows = [{"image": _relative(path, root)} for path in pictures]
    keys = [_key(path, images) for path in pictures]
    if twice := [key for key, number in Counter(keys).items() if number > 1]:
        raise InputError(f"{images}: two images are named {twice[0]!r} (with other suffixes); keep one of them.")
    for task, folder in targets.items():
        files = files_of(folder, TARGET_SUFFIXES)
        paired = _paired(keys, {_key(path, folder): path for path in files})
        if not paired:
            raise InputError(
                f"{folder}: none of its {len(files)} files is named like an image (first {files[0].name}, and"
                f" {pictures[0].name}); give targets the names of their images."
            )
        for row, key in zip(draft.rows, keys, strict=True):
            row |= {task: _relative(paired[key], root)} if key in paired else {}
        if len(paired) < len(keys):
            draft.notes.append(f"{task}: {len(keys) - len(paired)} of {len(keys)} images have no target; left out.")
        if len(paired) < len(files):
            draft.notes.append(f"{task}: {len(files) - len(paired)} of {len(files)} files belong to no image.")
        chosen = [path for _, path in sorted(paired.items())]
        draft.tasks[task], said = _guess(task, folder, chosen, kinds.get(task, ""))
        draft.notes += [f"{task}: {sentence}" for sentence in said]
    draft.rows = [row for row in draft.rows if len(row) == 1 + len(targets)]
    if not draft.rows:
        raise InputError("no image has a target of every task; draft a manifest for each task.")
    _split(draft)
    return draft


def write_draft(draft: Draft, path: Path, overwrite: bool = False) -> None:
    """Write the manifest ``path`` and, next to it, the table of its images. Raises InputError if one exists."""
    import csv
    import io

    import yaml

    table = path.with_suffix(".csv")
    for file in (path, table):
        check_absent(file, overwrite)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["image", "split", *draft.tasks], lineterminator="\n")
    writer.writeheader()
    writer.writerows(draft.rows)
    notes = "".join(f"# {note}\n" for note in draft.notes)
    content = {"images": table.name, "tasks": draft.tasks}
    body = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110)
    atomic_write_text(table, text.getvalue())
    atomic_write_text(path, f"# Drafted by `simomerge data init`. What it guessed:\n{notes}{body}")


# Pairing and splits -------------------------------------------------------------------------------------


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _key(path: Path, folder: Path) -> str:
    """A file's name without suffix, with its subfolders."""
    return path.relative_to(folder).with_suffix("").as_posix()


def _paired(keys: Sequence[str], files: Mapping[str, Path]) -> dict[str, Path]:
    """Image -> target: by equal names, or by names without the beginning and end that all targets share."""
    equal = {key: files[key] for key in keys if key in files}
    if equal or len(files) < 2:
        return equal
    names = [Path(name).name for name in files]
    start, end = _common_start(names), _common_start([name[::-1] for name in names])[::-1]
    # Digits may be a part of the name: 0001 and 0002 begin with the same zeros.
    start, end = re.sub(r"\d*$", "", start), re.sub(r"^\d*", "", end)
    bare: dict[str, Path] = {}
    for name, path in files.items():
        folder, last = Path(name).parent, Path(name).name
        for cut in (last.removesuffix(end), last.removeprefix(start), last.removeprefix(start).removesuffix(end)):
            bare.setdefault((folder / cut).as_posix(), path)
    return {key: bare[key] for key in keys if key in bare}


def _common_start(names: Sequence[str]) -> str:
    """The letters with which all names begin."""
    first, last = min(names), max(names)
    different = (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return first[: next(different, min(len(first), len(last)))]


def _split(draft: Draft) -> None:
    """Give every row a split: that of its folder, or by whole folders or runs of images, so that neighbours stay."""
    parts = [[known_split(part) for part in Path(row["image"]).parts[:-1]] for row in draft.rows]
    named = [next((part for part in reversed(one) if part in SPLITS), "") for one in parts]
    if all(named):
        draft.notes.append("splits: those of the folders' names.")
        splits = named
    else:
        groups = [str(Path(row["image"]).parent) for row in draft.rows]
        many = len(set(groups)) >= 6
        splits = _shares(groups if many else [str(place) for place in range(len(draft.rows))])
        what = "whole folders" if many else "runs of the images in the order of their names"
        draft.notes.append(f"splits: {what}, because neighbours show one scene; check that no scene is in two splits.")
    for row, split in zip(draft.rows, splits, strict=True):
        row["split"] = split
    counts = ", ".join(f"{splits.count(split)} {split}" for split in SPLITS)
    draft.notes.append(f"splits: {counts}.")


def _shares(groups: Sequence[str]) -> list[str]:
    """The split of each image: groups in order fill train, val and test up to their shares."""
    ends = np.cumsum(list(SHARES.values()))
    split_of: dict[str, str] = {}
    for place, group in enumerate(groups):
        reached = (place + 0.5) / len(groups)
        split_of.setdefault(group, SPLITS[min(int(np.searchsorted(ends, reached)), len(SPLITS) - 1)])
    return [split_of[group] for group in groups]


# Guessing -----------------------------------------------------------------------------------------------


def _guess(task: str, folder: Path, files: Sequence[Path], kind: str) -> tuple[dict[str, Any], list[str]]:
    """The manifest's entry of a task, and what to say about it."""
    arrays = [read_array(file) for file in evenly(files, SAMPLES)]
    named = task if task in KINDS else _named_kind(f"{task} {folder.name}")
    asked, kind = kind, kind or named or _kind_of(arrays)
    if not kind:
        raise InputError(
            f"{folder}: cannot guess what {task!r} is (values {arrays[0].shape} of {arrays[0].dtype}); say it as"
            f" --kind {task}=KIND, one of {', '.join(KINDS)}."
        )
    if kind not in KINDS:
        raise InputError(f"kind {kind!r} of {task}: choose one of {', '.join(KINDS)}.")
    if kind == "segmentation":
        entry, said = _labels(arrays, folder, may_be_mask=not asked)
        kind = entry.pop("kind")
    else:
        entry, said = _map(kind, arrays)
    return ({"kind": kind} if kind != task else {}) | entry, [f"kind {kind}.", *said]


def _named_kind(words: str) -> str:
    return next((kind for kind, parts in _WORDS.items() if any(part in words.lower() for part in parts)), "")


def _kind_of(arrays: Sequence[np.ndarray]) -> str:
    """The kind of some arrays, from their shape and values; "" if they could be several."""
    first = arrays[0]
    if first.ndim == 3 and first.shape[2] == 2:
        return "flow"
    if first.ndim == 3 and first.shape[2] >= 3:
        length = np.concatenate([_lengths(array) for array in arrays])
        if length.size and float(np.mean(np.abs(length - 1) < 0.1)) > 0.9:
            return "normals"
        return "segmentation" if len(_colours_of(arrays)) <= MANY_COLOURS else ""
    if first.dtype.kind in "uib" and len(_values(arrays)) <= min(MANY_LABELS, 64) and _values(arrays).max() <= 255:
        return "segmentation"
    return "depth" if first.dtype.itemsize > 1 else ""


def _lengths(array: np.ndarray) -> np.ndarray:
    """Lengths of vectors as normals are stored; black does not count."""
    values = array[..., :3].astype(np.float64)
    if array.dtype.kind == "u":
        values = 2 * values / np.iinfo(array.dtype).max - 1
    lengths: np.ndarray = np.linalg.norm(values, axis=-1)
    return lengths[array[..., :3].any(-1)]


def _values(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.unique(array) for array in arrays]))


def _colours_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The different colours, the most frequent one first."""
    pixels = np.concatenate([array[..., :3].reshape(-1, 3) for array in arrays])
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return found[np.argsort(-counts, kind="stable")]


def _labels(arrays: Sequence[np.ndarray], folder: Path, may_be_mask: bool) -> tuple[dict[str, Any], list[str]]:
    """A segmentation, or a mask if it may be one, by its labels or colours."""
    if arrays[0].ndim == 3 and any((a[..., :1] != a[..., :3]).any() for a in arrays):
        colours = [tuple(colour) for colour in _colours_of(arrays).tolist()]
        if len(colours) > MANY_COLOURS:
            raise InputError(f"{len(colours)} different colours in the masks; save labels without compression by JPEG.")
        # Next to a single colour, black is the other class.
        ignored = [list(c) for c in colours if c == (0, 0, 0)] if len(colours) > 2 else []
        kept = [list(c) for c in colours if list(c) not in ignored]
        if len(kept) < 2:
            raise InputError(f"all masks have the one colour {kept[0]}, but a segmentation has two classes or more.")
        names = ["colour_{:02x}{:02x}{:02x}".format(*colour) for colour in kept]
        entry = {"kind": "segmentation", "classes": names, "colours": kept}
        said = [f"{len(kept)} classes by their colours, in the order of their frequency; name them."]
        if ignored:
            said.append("black is ignored; if it is a class, add it to classes and colours, and remove ignore.")
        return entry | ({"ignore": ignored} if ignored else {}), said
    flat = [array[..., 0] if array.ndim == 3 else array for array in arrays]
    if flat[0].dtype.kind not in "uib":
        raise InputError(f"labels of dtype {flat[0].dtype}; save them as integers.")
    labels = _values(flat).astype(np.int64).tolist()
    if may_be_mask and len(labels) <= 2 and set(labels) <= {0, 1, 255}:
        if set(labels) != {0, 1}:
            return {"kind": "binary"}, ["a mask of 0 and 255."]
        return {"kind": "binary"}, ["a mask of 0 and 1; for two classes, use kind segmentation."]
    if 255 in labels and set(labels) <= {0, 255}:
        raise InputError(
            f"{folder}: the masks hold only 0 and 255, but the labels of a segmentation count from 0; use kind binary,"
            " or save 255 as 1."
        )
    void = [255] if labels[-1] == 255 and (len(labels) < 2 or labels[-2] < 254) else []
    last = max(1, *labels[: len(labels) - len(void)])  # two classes or more
    if last >= MANY_LABELS:
        raise InputError(f"labels up to {last}; a segmentation has fewer than {MANY_LABELS}. Give another kind.")
    entry = {"kind": "segmentation", "classes": [f"class_{label}" for label in range(last + 1)]}
    said = [f"labels 0 to {last} in {len(arrays)} files; name the classes, and add those that are rarer."]
    return entry | ({"ignore": void} if void else {}), [*said, *(["255 is ignored."] if void else [])]


def _map(kind: str, arrays: Sequence[np.ndarray]) -> tuple[dict[str, Any], list[str]]:
    """Another kind: units of depth, and the largest value as a mark of pixels without a value."""
    first, entry, said = arrays[0], dict[str, Any](), list[str]()
    if kind in ("depth", "disparity") and first.dtype.kind in "ui":
        largest = np.iinfo(first.dtype).max
        if any((array == largest).mean() > 0.001 for array in arrays) and first.dtype.itemsize > 1:
            entry["ignore"] = [int(largest)]
            said.append(f"{largest} is ignored.")
    if kind == "depth":
        values = np.concatenate([array[np.isfinite(array) & (array > 0)].reshape(-1) for array in arrays])
        values = values[values != entry.get("ignore", [-1])[0]]
        median = float(np.median(values)) if values.size else 0.0
        if first.dtype.itemsize == 1:
            said.append("8 bits have no usual unit: set scale to metres per step.")
        elif median > 200:
            entry["scale"] = 0.001
            said.append(f"median {median:,.0f}, read as millimetres (scale 0.001); KITTI stores 1/256 m (0.00390625).")
        else:
            said.append(f"median {median:.3g}, read as metres.")
    if kind in ("edges", "texture", "keypoints") and first.dtype.kind in "ui" and _values(arrays).max() <= 1:
        entry["scale"] = 1
        said.append("0 and 1 are stored (scale 1).")
    return entry, said
