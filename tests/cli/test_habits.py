"""Habits of the command line: quiet, a sign of life, completion, a doctor that knows the installation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simomerge.cli import COMMANDS, cli
from simomerge.cli.doctor import extras
from simomerge.cli.next_step import next_step, recorded_experts
from simomerge.cli.output import Table
from simomerge.core import progress
from simomerge.core.progress import Starting

from .conftest import Story, assert_next_steps_parse, simomerge
from .test_output import Terminal

# Quiet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_leaves_the_result_only(flag: str, story: Story, tiny_base: Path, tmp_path: Path) -> None:
    given = ("merge", tiny_base, f"depth={story / 'depth'}", "--scale", "auto", "--count", 16, "--data", "rooms")
    loud = simomerge(*given, "-o", tmp_path / "loud")
    quiet = simomerge(*given, "-o", tmp_path / "quiet", flag)
    assert "scale  11/11" in loud.err and "Next: simomerge realign" in loud.out
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out == "\n".join(loud.out.replace("loud", "quiet").splitlines()[:-1]) + "\n"
    assert "Next:" in simomerge(*given, "-o", tmp_path / "again").out  # it does not stay quiet


def test_quiet_still_shows_warnings_and_errors(story: Story, tmp_path: Path) -> None:
    assert simomerge("inspect", tmp_path / "nothing", "-q").err.startswith("Error: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_quiet(command: str) -> None:
    inner = {"data": ("check",)}.get(command, ())
    assert simomerge(command, *inner, "--help").out.count("--quiet") == 1


# A sign of life -----------------------------------------------------------------------------------------


def test_a_line_appears_while_nothing_else_does_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    line = Starting("  starting ...", after=0.01)
    line.begin()
    for _ in range(500):
        if shown.getvalue():
            break
        time.sleep(0.01)
    assert shown.getvalue() == "  starting ..."
    line.end()
    line.end()
    assert shown.getvalue() == "  starting ...\r              \r"[
        : len(shown.getvalue())
    ] and shown.getvalue().endswith("\r")


def test_it_does_not_appear_for_quick_commands_nor_outside_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    line = Starting(after=60)
    line.begin()
    line.end()
    assert shown.getvalue() == ""
    monkeypatch.setattr(shown, "isatty", lambda: False)
    Starting(after=0).begin()
    time.sleep(0.05)
    assert shown.getvalue() == ""


# Without rich -------------------------------------------------------------------------------------------


def test_a_terminal_without_rich_gets_plain_lines_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from simomerge.cli import output

    shown = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, shown)
    for module in (progress, output):
        monkeypatch.setattr(module, "has_rich", lambda: False)
    monkeypatch.setitem(sys.modules, "rich", None)  # an import would fail
    output.say(False, {}, Table(("task", "value"), [("depth", "1.5")]))
    progress.Console()("depth", 1, 2, "loss 0.3")
    assert shown.getvalue() == "task   value\ndepth    1.5\n  depth  1/2  loss 0.3\n"


# Next steps ---------------------------------------------------------------------------------------------


def test_names_with_spaces_are_quoted_and_placeholders_are_found() -> None:
    line = next_step("inspect", "my runs/a scene's", comment="what it is")
    assert line == "Next: simomerge inspect 'my runs/a scene'\"'\"'s'   # what it is"
    assert_next_steps_parse(line)
    with pytest.raises(AssertionError):
        assert_next_steps_parse("Next: simomerge realign runs/scene depth=EXPERT --images photos/ -o out")
    with pytest.raises(Exception, match="No such option"):
        assert_next_steps_parse("Next: simomerge inspect runs/scene --frobnicate")


def test_experts_are_found_by_the_names_that_a_model_records(tmp_path: Path) -> None:
    (tmp_path / "normals").mkdir()
    (tmp_path / "normals" / "simo.json").write_text("{}")
    recorded = {task: {"source": task} for task in ("depth", "normals", "edges")} | {"seg": {"source": "me/seg"}}
    found = recorded_experts(str(tmp_path / "scene"), recorded, recorded, {"depth": "runs/depth"})
    assert found == {"depth": "runs/depth", "normals": str(tmp_path / "normals"), "seg": "me/seg"}


# Completion and doctor ----------------------------------------------------------------------------------


def completed(words: str, at: int) -> list[str]:
    """What bash would be given for a line, as ``type,value``."""
    environment = {"_SIMOMERGE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'simomerge'; from simomerge.cli import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return done.stdout.splitlines()


def test_the_shell_completes_commands_options_and_files() -> None:
    assert completed("simomerge re", 1) == ["plain,restore", "plain,realign", "plain,relate"]
    assert "plain,--method" in completed("simomerge merge --me", 2)
    assert completed("simomerge inspect runs/", 2) == ["file,runs/"]


def test_experts_are_completed_after_the_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "depth").mkdir(parents=True)
    command = cli.get_command(None, "merge")  # type: ignore[arg-type]
    experts = next(each for each in command.params if each.name == "experts")  # type: ignore[union-attr]
    assert [item.value for item in experts.shell_complete(None, "depth=runs/de")] == ["depth=runs/depth"]  # type: ignore[arg-type]
    assert [item.value for item in experts.shell_complete(None, "depth=ru")] == ["depth=runs"]  # type: ignore[arg-type]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str) -> None:
    done = simomerge("completion", shell)
    assert done.code == 0 and "_SIMOMERGE_COMPLETE" in done.out and f"{shell}_complete" in done.out


def test_doctor_knows_extras_the_build_and_the_hub() -> None:
    done = simomerge("doctor", "--json")
    found = {row["name"]: row["found"] for row in done.json["checks"]}
    assert {"simomerge", "torch build", "device", "hub", "extra torch", "extra export"} <= set(found)
    assert found["extra torch"] == "installed" and "HF_HUB_OFFLINE is set" in found["hub"]
    assert "dev" not in extras() and extras()["lora"] == ["peft"]
