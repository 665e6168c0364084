"""The site: built strictly, with every link checked, and looked at in a real Chromium."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chromium import audit, chromium, page_of

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site. A link that leads nowhere is a warning, and the strict build fails."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_every_page_of_the_docs_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page
    for page in ("readme", "changelog", "security", "reference/python", "notebooks/rooms"):
        assert (site / f"{page}.html").is_file(), page


def test_the_reference_has_every_public_name_and_command(site: Path) -> None:
    import simomerge
    from simomerge.cli import COMMANDS

    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert [name for name in simomerge.__all__ if f"sm.{name}" not in python] == []
    cli = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f'id="simomerge-{name}"' not in cli] == []
    assert "Sentinel" not in cli


@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (390, "light"), (390, "dark")])
def test_nothing_is_wrong_with_any_page(browser: Any, address: str, site: Path, width: int, scheme: str) -> None:
    wrong, requests = {}, []
    pages = [page.relative_to(site).as_posix() for page in sorted(site.rglob("*.html"))]
    with page_of(browser, width, scheme) as (page, errors):
        page.on("request", lambda request: requests.append(request.url))
        for name in (name for name in pages if not name.startswith("files/") and name != "404.html"):
            page.goto(f"{address}/{name}")
            if found := [*audit(page), *errors]:
                wrong[name] = found[:5]
            errors.clear()
    assert wrong == {}
    assert [url for url in requests if not url.startswith((address, "data:"))] == []


def test_search_works_from_the_disk(browser: Any, site: Path) -> None:
    with page_of(browser, 1300, "light") as (page, errors):
        page.goto((site / "index.html").as_uri())
        page.locator("input[name=query]").first.click()
        page.keyboard.type("fold")
        page.wait_for_selector(".md-search-result__item")
        assert page.locator(".md-search-result__item").count() > 3 and errors == []
