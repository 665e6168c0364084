"""What mkdocs does in addition for the site: pages from files outside docs/, notebooks, and the generated reference.

The pages in docs/ also read well where no site is built, so their links lead to files of the repository. Here each such
file becomes a page of its own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
"""Files of the repository that are pages of the site."""

LINK = re.compile(r"(?<=\]\()(?P<path>(?!https?:|#|mailto:)[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cpp": "cpp", ".txt": "text", ".md": "markdown", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are generated."""
    for name, page in PAGES.items():
        _add(files, config, page, (ROOT / name).read_text(encoding="utf-8"))
    for notebook in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        _add(files, config, f"notebooks/{notebook.stem}.md", _notebook(notebook))
    _add(files, config, "reference/python.md", _python_reference())
    for path in _linked(files):
        _add(files, config, _source_page(path), _source(path))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    here = _place(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = _target(here, match["path"])
        if target is None:
            return match[0]
        depth = page.file.src_uri.count("/")
        return f"{'../' * depth}{target}{match['anchor'] or ''}"

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Options without a default have a mark of click in the generated tables; leave it out."""
    return html.replace("<code>Sentinel.UNSET</code>", "")


def _add(files: Files, config: Any, name: str, content: str) -> None:
    files.append(File.generated(config, name, content=content))


def _place(page: str) -> Path:
    """The folder in the repository that the links of a page start from."""
    original = {target: source for source, target in PAGES.items()}.get(page)
    if original:
        return ROOT
    if page.startswith("notebooks/"):
        return ROOT / "examples" / "notebooks"
    return (ROOT / "docs" / page).parent


def _target(here: Path, path: str) -> str | None:
    """The page of a linked file, relative to the root of the site; None if the link may stay."""
    file = (here / path).resolve()
    if not file.exists() or not file.is_relative_to(ROOT):
        return None
    name = file.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if name.startswith("examples/notebooks/"):
        return f"notebooks/{file.stem}.md"
    return _source_page(Path(name))


def _linked(files: Files) -> list[Path]:
    """The files outside docs/ that pages link to, relative to the repository."""
    found = set()
    texts = {file.src_uri: file.content_string for file in files if file.src_uri.endswith(".md")}
    for page, text in texts.items():
        here = _place(page)
        for match in LINK.finditer(text):
            file = (here / match["path"]).resolve()
            if file.exists() and file.is_relative_to(ROOT):
                name = file.relative_to(ROOT)
                outside = name.parts[0] != "docs" and name.as_posix() not in PAGES and name.parts[:2] != _NOTEBOOKS
                found |= {name} if outside else set()
    return sorted(found)


_NOTEBOOKS = ("examples", "notebooks")


def _source_page(path: Path) -> str:
    return f"files/{path.as_posix().rstrip('/')}.md"


def _source(path: Path) -> str:
    """A page that shows a file, or lists a folder."""
    full = ROOT / path
    head = f"---\nsearch:\n  exclude: true\n---\n# {path.as_posix()}\n\n"
    if full.is_dir():
        return head + "\n".join(f"- `{entry.name}`" for entry in sorted(full.iterdir())) + "\n"
    text = full.read_text(encoding="utf-8").rstrip()
    fence = "`" * (max([2, *(len(run) for run in re.findall(r"`+", text))]) + 1)
    return f"{head}{fence}{LANGUAGES.get(full.suffix, 'text')}\n{text}\n{fence}\n"


def _notebook(path: Path) -> str:
    """A notebook as a page: its text, its code, and its stored outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif html := "".join(output.get("data", {}).get("text/html", "")):
                parts.append(f'<div class="output">{html}</div>')
            elif text := "".join(output.get("data", {}).get("text/plain", "")):
                parts.append(f"```text\n{text}\n```")
    name = path.relative_to(ROOT).as_posix()
    return "\n\n".join([*parts, f"This page is the notebook `{name}`."]) + "\n"


def _python_reference() -> str:
    """A page with the docstrings of all public names."""
    import simomerge

    parts = ["# Python reference", "All public names of `import simomerge as sm`, from their docstrings."]
    for name in sorted(simomerge._WHERE, key=str.lower):
        module, _, attribute = simomerge._WHERE[name].partition(":")
        where = f"simomerge.{module}" if name == module else f"simomerge.{module}.{attribute or name}"
        options = {"heading": f"sm.{name}", "toc_label": f"sm.{name}", "heading_level": 2, "show_root_heading": True}
        lines = [
            f"::: {where}",
            "    options:",
            *(f"      {key}: {json.dumps(value)}" for key, value in options.items()),
        ]
        parts.append("\n".join([*lines, "      show_root_toc_entry: true"]))
    return "\n\n".join(parts) + "\n"
