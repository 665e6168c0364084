"""Print the tables of docs/benchmarks.md from finished runs; recipes/rooms-full.yaml lists the commands of these runs.

python benchmarks/tables.py runs/rooms-full runs/rooms-linear
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from simomerge.report import markdown_table

for folder in sys.argv[1:]:
    results = json.loads((Path(folder) / "results.json").read_text())
    recipe = results["recipe"]
    print(f"{results['machine']}\n")
    print(f"{len(recipe['tasks'])} tasks, {recipe['head']} heads, {len(recipe['seeds'])} seeds,")
    print(f"{recipe['train_images']} / {recipe['val_images']} / {recipe['test_images']} images\n")
    print(markdown_table(results), "\n")
