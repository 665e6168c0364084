"""Merge weights alone, as arrays: no model class, no torch, no image.

    python examples/merge_weights.py

This suits checkpoints of any architecture, as long as all were fine-tuned from the same base.
"""

from __future__ import annotations

import numpy as np

from simomerge.merging import available, get_method, merge_state_dicts


def main() -> None:
    random = np.random.default_rng(0)
    base = {"layer.weight": random.normal(size=(64, 64)).astype(np.float32), "layer.bias": np.zeros(64, np.float32)}
    experts = {
        task: {name: value + 0.1 * random.normal(size=value.shape).astype(np.float32) for name, value in base.items()}
        for task in ("depth", "normals", "edges")
    }
    for method, parameters in (("average", {}), ("ties", {"density": 0.2, "scale": 0.4}), ("iso-c", {"scale": 0.5})):
        merged = merge_state_dicts(base, experts, get_method(method, **parameters))
        moved = np.linalg.norm(merged["layer.weight"] - base["layer.weight"])
        print(f"{method:<8} moved the weights by {moved:.2f}")
    print(f"There are {len(available())} methods: simomerge methods")


if __name__ == "__main__":
    main()
