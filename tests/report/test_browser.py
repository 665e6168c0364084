"""The report in a real Chromium: nothing is too wide, too pale or without alt text, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import audit, chromium, page_of
from report.sample import make_gallery, make_results
from simomerge.report import write_report

pytestmark = pytest.mark.slow

_SCROLLED = """() => [...document.querySelectorAll('*')].filter((node) => node.checkVisibility()
  && ['auto', 'scroll'].includes(getComputedStyle(node).overflowX) && node.scrollWidth > node.clientWidth + 1)
  .map((node) => `${node.tagName} ${node.className} ${node.scrollWidth} > ${node.clientWidth}`)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module", params=[1, 3], ids=["one seed", "three seeds"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = make_results(request.param)
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "report.html", results, make_gallery([task["name"] for task in results["tasks"]]))
    return folder / "report.html"


@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (1300, "dark"), (390, "light"), (390, "dark")])
def test_nothing_is_wrong_with_the_report(browser: Any, report: Path, width: int, scheme: str) -> None:
    requests: list[str] = []
    with page_of(browser, width, scheme) as (page, errors):
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        assert audit(page) == [] and errors == []
        if width == 1300:
            assert page.evaluate(_SCROLLED) == [], "tables and gallery fit without scrolling"
        page.screenshot(path=report.with_suffix(f".{width}.{scheme}.png"), full_page=True)
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
