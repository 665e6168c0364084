"""The code blocks of a page, and a page as a shell script."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?"
    r"^```(?P<kind>\w+)(?: title=\"(?P<file>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A code block: its language, its content, the file to save it as, and why it is not run ("" if it is)."""

    kind: str
    code: str
    file: str = ""
    reason: str = ""


def blocks(page: Path) -> list[Block]:
    """All fenced code blocks of a page, in order."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["kind"], m["code"], m["file"] or "", m["reason"] or "") for m in found]


def script(page: Path) -> str:
    """The page as a shell script that stops at the first error: every block that is run, in order."""
    lines = ["set -eu"]
    for block in blocks(page):
        if block.reason:
            continue
        if block.kind == "python":
            target = f"cat > {block.file}" if block.file else "python -"
            lines.append(f"{target} <<'END_OF_BLOCK'\n{block.code}END_OF_BLOCK")
        elif block.kind == "bash":
            lines.append(block.code)
    return "\n".join(lines)
