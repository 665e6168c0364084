"""Does agreement with the experts rank merges as labels do?

    python benchmarks/choice.py rooms-base segmentation=runs/seg depth=runs/depth --data rooms --images-split val

Merges at several scales are folded per tap on unlabelled images. Two measures without labels are compared with
Delta_MTL on the test split: the agreement with the experts on held-out images, by which simomerge chooses, and the fit
of the heads' first layers (one minus the geometric mean of 1 - R^2). Printed are Spearman's rank correlation and the
regret: Delta_MTL of the best merge minus that of the merge that the measure prefers.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from simomerge.assembly.alignment import Aligner
from simomerge.assembly.experts import load_experts, with_merged_encoder
from simomerge.assembly.realign.sums import head_sums, with_heads
from simomerge.core.classes import trust
from simomerge.core.machine import limit_threads
from simomerge.datasets import load_data
from simomerge.merging import MergeMethod, get_method
from simomerge.models.model import load
from simomerge.training.evaluate import delta_mtl, evaluate

METHODS: tuple[MergeMethod, ...] = (
    *(get_method("task-arithmetic", scale=scale / 10) for scale in range(1, 11)),
    *(get_method("ties", scale=scale / 10) for scale in (2, 4, 6, 8, 10)),
)


def measure(base: Any, experts: Any, images: Any, test: Any, count: int) -> list[dict[str, Any]]:
    """One row per merge: Delta_MTL on the test split, agreement and fit without labels."""
    aligner = Aligner(base, experts, images, count)
    baseline = {task: evaluate(expert, test)[task] for task, expert in aligner.experts.items()}
    rows = []
    for method in METHODS:
        trial = aligner.try_out(method)
        model = with_merged_encoder(base, aligner.experts, method)
        sums = head_sums(model, aligner._targets)
        fits = sums.choose()
        folded = with_heads(model, sums.heads({task: fit.ridge for task, fit in fits.items()}))
        left = [math.log(max(1 - fit.r2, 1e-9)) for fit in fits.values()]
        delta = delta_mtl(evaluate(folded, test), baseline, folded.tasks)
        fit = 1 - math.exp(sum(left) / len(left))
        rows.append({"merge": f"{method.name} {method.scale}", "delta": delta, "agreement": trial.score, "fit": fit})
        print("  ".join(f"{value:8.3f}" if isinstance(value, float) else f"{value:22}" for value in rows[-1].values()))
    return rows


def quality(rows: Sequence[dict[str, Any]], measure: str) -> tuple[float, float]:
    """Rank correlation of a measure with Delta_MTL, and its regret in points."""
    delta, values = (np.array([row[key] for row in rows]) for key in ("delta", measure))
    return float(spearmanr(values, delta).statistic), float(delta.max() - delta[values.argmax()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("experts", nargs="+", metavar="TASK=EXPERT")
    parser.add_argument("--data", default="rooms")
    parser.add_argument("--images-split", default="train+val")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--test-images", type=int, default=256)
    parser.add_argument("--trust-code", action="store_true", help="Import the class of an encoder of one's own.")
    parser.add_argument("-o", "--output", help="Write the rows as JSON.")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    limit_threads(1)
    if given.trust_code:
        trust()
    experts = load_experts(**dict(pair.split("=", 1) for pair in given.experts))
    images = load_data(given.data, given.images_split, tasks=[])
    test = load_data(given.data, "test", given.test_images, list(experts))
    rows = measure(load(given.base), experts, images, test, given.count)
    for name, chosen in (("all", rows), ("task arithmetic", [row for row in rows if row["merge"].startswith("task")])):
        for key in ("agreement", "fit"):
            correlation, regret = quality(chosen, key)
            print(f"{name}, {key}: rank correlation {correlation:.2f}, regret {regret:.2f} points")
    print(f"{given.count} images, {len(test)} test images, one thread, {platform.processor() or platform.machine()}")
    if given.output:
        Path(given.output).write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
