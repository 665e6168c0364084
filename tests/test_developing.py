"""docs/developing.md: its examples run, and a method that is added in one file is known everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "developing.md"

CHECKS = """
# The re-alignment of the page is known to Python, the command line, recipes, the schema, the table and the report.
import torch
from click.testing import CliRunner

from simomerge.assembly.realign import get_realignment, realign
from simomerge.assembly.realign.method import realignment_rows
from simomerge.datasets.tasks import Task
from simomerge.models.heads import build_head
from simomerge.recipes.file import recipe_schema
from simomerge.recipes.recipe import Recipe

assert get_realignment("shift", strength=0.5).strength == 0.5
assert "shift" in [row["name"] for row in realignment_rows()]
steps = recipe_schema()["properties"]["realign"]["properties"]
assert set(steps["shift"]["properties"]) == {"count", "strength"}
recipe = Recipe(realigned=("average+shift(strength=0.5)+heads",), merges=("average", "median"))
assert recipe.method(recipe.rows[0].before).strength == 0.5
from simomerge.cli.realign import command
from simomerge.cli import cli

shown = CliRunner().invoke(command, ["--help"]).output
assert "--strength" in shown and "Shift the output of each linear head" in shown
wrong = ["realign", "m", "a=b", "--images", "p", "--ridge", "1", "--method", "shift", "-o", "o"]
refused = CliRunner().invoke(cli, wrong)
assert "--ridge does nothing under --method shift" in str(refused.exception)


def model(seed):
    torch.manual_seed(seed)
    encoder = Encoder()
    head = build_head("linear", (4,), 1, {"cls": False})
    return SimoModel(encoder, {"depth": Task("depth")}, {"depth": head}).eval()


expert, merged = model(0), model(1)
merged.heads["depth"].load_state_dict(expert.heads["depth"].state_dict())
with torch.no_grad():
    expert.heads["depth"].output.weight.mul_(50)
    merged.heads["depth"].output.weight.mul_(50)
images = torch.rand(3, 3, 16, 24)
result = realign(merged, {"depth": expert}, list(images), method="shift")
before, after = ((m(images)["depth"] - expert(images)["depth"]).mean().abs() for m in (merged, result))
assert after < 1e-5 < before, (before, after)
record = result.provenance["realign"]
assert (record["method"], record["strength"], record["changes_encoder"]) == ("shift", 1.0, False)
print("all checks passed")
"""


def test_the_examples_run_and_what_they_add_is_known_everywhere(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    script = tmp_path / "examples.py"
    script.write_text("\n".join([*blocks, CHECKS]), encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all checks passed"
