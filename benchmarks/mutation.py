"""Change the code at random and count how many changes the tests find.

    nice python benchmarks/mutation.py --mutants 60 --seed 0 -o mutation.json

Each mutant is one small change of one module: another comparison, operator or constant, a condition that is negated,
a statement that is left out. It is made in a copy of the repository, in which the tests of that module run until the
first one fails. A mutant is killed if a test fails or takes too long. The survivors are printed with their change:
each is equivalent to the original, or a test is missing. ``--only FILE:LINE`` repeats the mutants of one place, and
``--tests`` runs other tests than those of the module's own room.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 300
"""Longest run of the tests of one mutant, in seconds of a core."""

LIBRARIES = ("torch", "numpy", "scipy.linalg", "transformers", "hypothesis.extra.numpy", "PIL.Image", "click", "peft")
FALLBACKS = {
    "checkpoints/description.py": ["checkpoints/test_experts.py", "hostile/test_outputs.py"],
    "merging/engine/schedule.py": ["merging/test_depth_and_schedule.py"],
    "merging/engine/": ["merging/test_merge.py"],
    "merging/disk/": ["merging/disk/test_merge.py"],
    "merging/": ["merging/test_invariants.py"],
    "assembly/realign/": ["assembly/realign/test_adapters.py", "assembly/realign/test_fold.py"],
    "models/heads/": ["models/heads/test_heads.py"],
    "checkpoints/": ["checkpoints/test_lora.py", "checkpoints/test_reading.py"],
    "training/evaluate.py": ["training/test_evaluate.py"],
    "training/metrics.py": ["training/test_metrics.py"],
}
"""The modules that are changed, by the start of their path, and their tests where no test file names them."""

SWAPS: dict[type[ast.AST], list[Any]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.Mult],
    ast.Pow: [ast.Mult],
    ast.MatMult: [ast.Add],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
    ast.BitXor: [ast.BitOr],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}


@dataclass(frozen=True)
class Mutant:
    """One change: the file, the line, and the text before and after."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {' '.join(self.before.split())}  ->  {' '.join(self.after.split())}"

    def tests(self) -> list[str]:
        """The test files that may find it: those of its room that have its name or import it, and the examples."""
        inner = Path(self.file).relative_to("src/simomerge")
        room = ROOT / "tests" / inner.parts[0]
        dotted = ".".join(("simomerge", *inner.with_suffix("").parts))
        pattern = re.compile(
            rf"{re.escape(dotted)}\b|from {re.escape(dotted.rpartition('.')[0])} import .*\b{inner.stem}\b"
        )
        files = sorted(room.rglob("test_*.py"))
        named = [file for file in files if file.stem.startswith(f"test_{inner.stem}")]
        importing = [file for file in files if pattern.search(file.read_text(encoding="utf-8"))]
        found = [str(file.relative_to(ROOT / "tests")) for file in [*named, *importing]]
        found += ["models/heads/test_heads.py"] if "models/heads/" in self.file else []  # the contract of every head
        found = found or next(names for start, names in FALLBACKS.items() if str(inner).startswith(start))
        examples = f"{inner.parts[0]}/test_examples.py"
        found = [*([examples] if (ROOT / "tests" / examples).exists() else []), *found]
        return [f"tests/{name}" for name in dict.fromkeys(found)]


def mutants_of(file: Path) -> Iterator[Mutant]:
    """All mutants of a module, in the order of its text."""
    text = file.read_text(encoding="utf-8")
    lines = [0]
    for line in text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    for node, after in _changes(ast.parse(text).body):
        start, end = lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset
        before = text.encode()[start:end].decode()
        yield Mutant(str(file.relative_to(ROOT)), node.lineno, start, end, before, after)


def _changes(nodes: Iterable[ast.AST]) -> Iterator[tuple[Any, str]]:
    """Nodes, and what to write in their place. Annotations, decorators, texts and messages stay."""
    for node in nodes:
        if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)) or _for_types_only(node):
            continue
        for after in _instead(node):
            yield node, after
        if isinstance(node, ast.AnnAssign):
            yield from _changes([node.value] if node.value else [])
        elif isinstance(node, ast.FunctionDef):
            yield from _changes([*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body])
        elif isinstance(node, ast.ClassDef):
            yield from _changes(node.body)
        else:
            yield from _changes(ast.iter_child_nodes(node))


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _instead(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in SWAPS.get(type(node.ops[0]), []):
            yield f"({ast.unparse(ast.Compare(node.left, [other()], node.comparators))})"
    elif isinstance(node, ast.BinOp) and not isinstance(node.left, ast.JoinedStr):
        for other in SWAPS.get(type(node.op), []):
            yield f"({ast.unparse(ast.BinOp(node.left, other(), node.right))})"
    elif isinstance(node, ast.BoolOp):
        yield f"({ast.unparse(ast.BoolOp(SWAPS[type(node.op)][0](), node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield repr(not node.value) if isinstance(node.value, bool) else f"({node.value!r} + 1)"
    elif isinstance(node, ast.IfExp):
        yield f"({ast.unparse(ast.IfExp(node.test, node.orelse, node.body))})"
    elif isinstance(node, ast.AugAssign):
        for other in SWAPS.get(type(node.op), []):
            yield ast.unparse(ast.AugAssign(node.target, other(), node.value))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass"


def sample(count: int, seed: int, only: str = "") -> list[Mutant]:
    """Mutants drawn at random from all modules that have tests here; with ``only``, all of one place."""
    modules = [file for file in sorted((ROOT / "src/simomerge").rglob("*.py")) if _start(file)]
    every = [mutant for file in modules for mutant in mutants_of(file)]
    if only:
        return [mutant for mutant in every if f"{mutant.file}:{mutant.line}".endswith(only)]
    return random.Random(seed).sample(every, min(count, len(every)))


def _start(file: Path) -> bool:
    return str(file.relative_to(ROOT / "src/simomerge")).startswith(tuple(FALLBACKS))


def run(mutant: Mutant, copy: Path, tests: Sequence[str]) -> tuple[str, float]:
    """What the tests say of a mutant: killed, timeout or survived; and the seconds of a core that they took."""
    file = copy / mutant.file
    good = file.read_bytes()
    file.write_bytes(good[: mutant.start] + mutant.after.encode() + good[mutant.end :])
    try:
        return forked(list(tests) or mutant.tests(), copy)
    finally:
        file.write_bytes(good)


def forked(files: list[str], copy: Path) -> tuple[str, float]:
    """Run test files in the copy until the first failure, in a fork that has the large libraries already."""
    before, ends = os.times(), time.monotonic() + 10 * SECONDS
    child = os.fork()
    if not child:
        os.setsid()
        os._exit(_tests_in(copy, files))
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < ends:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    status = ended[1] if ended[0] else os.waitpid(child, 0)[1]
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "killed", seconds
    if (code := os.WEXITSTATUS(status)) in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"{' '.join(files)}: pytest ran no test (exit code {code}); see {copy / 'said.log'}.")
    return "survived" if code == 0 else "killed", seconds


def _tests_in(copy: Path, files: list[str]) -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(copy / "src"))
    with (copy / "said.log").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        return int(pytest.main(["-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", *files]))


def main() -> int:
    """Run a sample, print every survivor and the share that was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="FILE:LINE", help="the mutants of one line")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="test files, in place of the module's")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    chosen, found = sample(given.mutants, given.seed, given.only), []
    if given.list:
        print(*chosen, sep="\n")
        return 0
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, names.decode().split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy / name)
        for tests in {tuple(given.tests or mutant.tests()) for mutant in chosen}:
            if forked(list(tests), copy)[0] != "survived":
                raise SystemExit(f"{' '.join(tests)}: fails without a mutant; see its output by pytest.")
        for mutant in chosen:
            what, seconds = run(mutant, copy, given.tests)
            found.append({"mutant": str(mutant), "found": what, "seconds": round(seconds, 1)})
            print(f"{what:9} {seconds:6.1f} s  {mutant}", flush=True)
            if given.output:
                given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    killed = sum(one["found"] != "survived" for one in found)
    print(f"{killed} of {len(found)} killed ({killed / max(len(found), 1):.0%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
