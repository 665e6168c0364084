"""The design, checked: imports point downwards, starting is light, examples run, nothing large in the tree."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import simomerge
from simomerge.cli import COMMANDS
from simomerge.core.environment import install_command
from simomerge.datasets.rooms.render import render
from simomerge.datasets.rooms.scenes import sample_scenes

PACKAGE = Path(simomerge.__file__).parent
ROOT = PACKAGE.parent.parent

LAYERS = [
    {"core"},
    {"checkpoints", "report", "runtime"},
    {"datasets", "merging"},
    {"models"},
    {"training"},
    {"assembly", "exporting"},
    {"relations", "playground"},
    {"recipes"},
    {"cli"},
]
"""Lowest first. A room imports only from layers below its own; `simomerge/__init__.py` stands above all."""

HEIGHT = {unit: height for height, layer in enumerate(LAYERS) for unit in layer}
HEAVY = ("torch", "transformers", "matplotlib", "torchmetrics", "numpy", "accelerate", "peft", "PIL", "rich", "gradio")
FORBIDDEN = {
    "merging": ("torch", "transformers"),
    "report": ("torch", "transformers", "torchmetrics", "accelerate"),
    "checkpoints": ("torch.nn", "transformers"),
}
"""What a unit may not import anywhere, not even inside a function."""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The layer's name for a file: its folder, or its own name; `__init__` and `__main__` at the top."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, inside functions too; relative ones made absolute."""
    package = ("simomerge", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *((node.module,) if node.module else ())))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            text = node.args[0]
            if isinstance(text, ast.Constant):
                yield node.lineno, text.value


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


def starts_with(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


# Layers -------------------------------------------------------------------------------------------------


def test_every_file_belongs_to_a_layer() -> None:
    units = {unit_of(path) for path in sources()} - {"__init__", "__main__"}
    assert units == set(HEIGHT)


def test_imports_point_downwards_only() -> None:
    wrong = []
    for path in sources():
        unit = unit_of(path)
        if unit in ("__init__", "__main__"):
            continue
        for line, name in imports(path):
            if not starts_with(name, "simomerge"):
                continue
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 else ""
            if target in ("", "__version__", unit):  # the root itself: see the next test
                continue
            if HEIGHT.get(target, len(LAYERS)) >= HEIGHT[unit]:
                wrong.append(f"{place(path, line)}: {unit} may not import {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_inside_reads_the_lazy_names_of_the_root() -> None:
    wrong = []
    for path in sources():
        if path.parent == PACKAGE and path.stem == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            of_root = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "simomerge"
            if of_root and node.attr != "__version__":
                wrong.append(f"{place(path, node.lineno)}: simomerge.{node.attr}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("unit", FORBIDDEN)
def test_low_layers_know_no_framework(unit: str) -> None:
    wrong = [
        f"{place(path, line)}: {unit} may not import {name}"
        for path in sources()
        if unit_of(path) == unit
        for line, name in imports(path)
        if any(starts_with(name, module) for module in FORBIDDEN[unit])
    ]
    assert not wrong, "\n".join(wrong)


def test_checkpoints_import_torch_only_inside_functions() -> None:
    wrong = []
    for path in sources():
        if unit_of(path) == "checkpoints":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                wrong += [place(path, node.lineno) for name in names if starts_with(name, "torch")]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_torchvision_but_what_looks_for_it() -> None:
    wrong = [
        place(path, line)
        for path in sources()
        for line, name in imports(path)
        if starts_with(name, "torchvision") and path.name != "environment.py"
    ]
    assert not wrong, "\n".join(wrong)


def test_the_import_finder_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "c.py"
    file.write_text(
        "import os, torch.nn as nn\nfrom . import d\nfrom ..e import f\n"
        "def g():\n    from simomerge.cli import main\n    import_module('torchvision')\n"
    )
    assert sorted(imports(file)) == [
        (1, "os"),
        (1, "torch.nn"),
        (2, "simomerge.a.b.d"),
        (3, "simomerge.a.e.f"),
        (5, "simomerge.cli.main"),
        (6, "torchvision"),
    ]


# Size and shape -----------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    dotted = ".".join(("simomerge", *path.relative_to(PACKAGE).with_suffix("").parts))
    return dotted.removesuffix(".__init__")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def imported_files(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports when it runs, inside functions too, without those for types."""
    for_types = {
        line.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if is_type_checking(node)
        for line in ast.walk(node)
        if hasattr(line, "lineno")
    }
    found = set()
    for line, name in imports(path):
        if line not in for_types:
            found |= {name if name in known else name.rpartition(".")[0]} & known
    return found - {module_of(path)}


def circles(needs: dict[str, set[str]]) -> list[list[str]]:
    """Modules that need each other, each circle once: the strongly connected components with several members."""
    reach: dict[str, set[str]] = {}
    for start in needs:
        waiting, reached = [start], set()
        while waiting:
            for name in needs[waiting.pop()] - reached:
                reached.add(name)
                waiting.append(name)
        reach[start] = reached
    groups = {frozenset({one, *(other for other in reach[one] if one in reach[other])}) for one in needs}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]


def test_no_files_import_each_other() -> None:
    """Packages may import the registry of their methods; the root's `__init__` is lazy and stands above all."""
    files = {module_of(path): path for path in sources() if unit_of(path) not in ("__init__", "__main__")}
    needs = {name: imported_files(path, set(files)) for name, path in files.items()}
    assert "simomerge.models.model" not in needs["simomerge.assembly.realign.heads"]  # imported for types only
    assert "simomerge.assembly.realign.training" in needs["simomerge.assembly.realign.heads"]  # inside a function
    assert circles(needs) == []


def test_rooms_are_few_and_loosely_joined() -> None:
    joined = {
        (unit_of(path), name.split(".")[1])
        for path in sources()
        for _, name in imports(path)
        if unit_of(path) in HEIGHT and starts_with(name, "simomerge") and name.count(".") > 0
    }
    arrows = {(unit, target) for unit, target in joined if unit != target and target in HEIGHT}
    assert len(arrows) <= 64 and len(LAYERS) <= 9, sorted(arrows)


LINES, PARAMETERS, FILE_LINES = 60, 8, 400
ALLOWED = {
    "simomerge.assembly.merge.merge": "simomerge.merge: each parameter is an option that a user sets by name.",
    "simomerge.relations.relations.relate": "simomerge.relate: each parameter is an option that a user sets by name.",
    "simomerge.core.registry.parameter": "Declares one parameter of a method; each keyword is one property of it.",
}
"""Functions that may exceed a limit, with the reason."""


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """(dotted name, lines, number of parameters) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            parameters = len([name for name in given if name not in ("self", "cls")])
            yield f"{module_of(path)}.{node.name}", (node.end_lineno or 0) - node.lineno + 1, parameters


def test_functions_fit_a_screen() -> None:
    found = [each for path in sources() for each in functions(path)]
    large = {name: sizes for name, *sizes in found if sizes[0] > LINES or sizes[1] > PARAMETERS}
    assert {name: sizes for name, sizes in large.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) <= set(large), "an exception is no longer needed"


def test_files_stay_small() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {module_of(path): count for path, count in lengths.items() if count > FILE_LINES} == {}


# Starting -----------------------------------------------------------------------------------------------


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after a statement."""
    code = (
        f"import sys, json\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_importing_the_package_is_free() -> None:
    assert not modules_after("import simomerge") & {*HEAVY, "click"}


def test_help_imports_nothing_heavy() -> None:
    assert not modules_after("sys.argv[1:] = ['--help']; from simomerge.cli import main; main()") & set(HEAVY)


def test_the_modules_of_every_command_import_nothing_heavy() -> None:
    """What a command computes with is imported when it runs: its --help is as fast as that of the group."""
    loading = "import importlib, simomerge.cli as c; [importlib.import_module(c.module_of(name)) for name in %r]"
    assert not modules_after(loading % sorted(COMMANDS)) & set(HEAVY)


def test_report_and_merging_run_without_torch() -> None:
    loaded = modules_after("import simomerge.report, simomerge.merging, simomerge.checkpoints")
    assert not loaded & {"torch", "transformers", "torchmetrics", "accelerate"}


def test_a_public_name_that_needs_torch_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport simomerge as sm\nsm.merging\nsm.load"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    wanted = f"ImportError: simomerge.load: this needs torch, which is not installed: {install_command('torch')}."
    assert done.stderr.splitlines()[-1] == wanted


def test_every_public_name_resolves_and_nothing_else_does() -> None:
    assert set(simomerge.__all__) <= set(dir(simomerge))
    for name in simomerge.__all__:
        value = getattr(simomerge, name)
        assert getattr(value, "__module__", value.__name__).startswith("simomerge.") and inspect.getdoc(value)
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        simomerge.merg  # noqa: B018


# Examples and files -------------------------------------------------------------------------------------


def modules_with_examples() -> list[str]:
    """But for those of merging and checkpoints, which have tests of their own, and examples that need a run."""
    found = []
    for path in sources():
        lines = path.read_text(encoding="utf-8").splitlines()
        runnable = any(">>> " in line and "+SKIP" not in line for line in lines)
        if runnable and unit_of(path) not in ("merging", "checkpoints"):
            name = ".".join(("simomerge", *path.relative_to(PACKAGE).with_suffix("").parts))
            found.append(name.removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    outcome = doctest.testmod(module, extraglobs={"np": np, "sample_scenes": sample_scenes, "render": render})
    assert outcome.attempted > 0 and outcome.failed == 0


def test_no_large_file_is_in_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in listed if name and not name.startswith("src/simomerge/core/assets/")]
    assert [file.name for file in files if file.is_file() and file.stat().st_size > 2_000_000] == []
