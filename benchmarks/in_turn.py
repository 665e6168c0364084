"""Compare the time of two checkouts of simomerge: help, loading a model, and merging.

    git worktree add /tmp/before COMMIT
    python benchmarks/in_turn.py /tmp/before --work FOLDER --repeats 9

The two take turns, and the order changes from turn to turn, so that a drift of the machine's speed, or other work on
it, affects both equally. Prints the time of the cores (user and system) of each, in seconds, and the ratio, as the
median over the turns. FOLDER is that of `merge_speed.py`: a base and three experts of ViT-B size.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from merge_speed import make, ours

LOAD = "import simomerge as sm; sm.load('rooms-base')"


def seconds(command: Sequence[str], checkout: Path) -> float:
    """The seconds of a core that a command takes with the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, cwd="/", check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run the commands in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="the commands that have this in their name")
    given = parser.parse_args()
    here, work = Path(__file__).parents[1], given.work.resolve()
    paths, output = make(work / "B", "B", 3), work / "out.safetensors"
    commands = {
        "--help": [sys.executable, "-m", "simomerge", "--help"],
        "load": [sys.executable, "-c", LOAD],
        "merge, task arithmetic": ours(paths, output, "task-arithmetic"),
        "merge, ties": ours(paths, output, "ties"),
    }
    print("| command | before | now | ratio |\n| --- | --: | --: | --: |")
    for name, command in ((name, command) for name, command in commands.items() if given.only in name):
        turns: list[dict[Path, float]] = []
        for turn in range(given.repeats + 1):  # the first one fills the caches
            order = (given.before, here) if turn % 2 else (here, given.before)
            turns.append({})
            for checkout in order:
                output.unlink(missing_ok=True)
                turns[-1][checkout] = seconds(command, checkout)
        before, now = ([turn[checkout] for turn in turns[1:]] for checkout in (given.before, here))
        ratio = statistics.median(new / old for old, new in zip(before, now, strict=True))
        print(f"| {name} | {statistics.median(before):.3f} | {statistics.median(now):.3f} | {ratio:.2f} |", flush=True)
    output.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
