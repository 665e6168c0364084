"""The page in a real Chromium: it works with a pointer, by keyboard, on a phone and in the dark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chromium import audit, chromium, page_of
from simomerge.playground.opening import Opened
from simomerge.playground.workshop import Workshop

pytest.importorskip("gradio")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(opened: Opened, pictures: list[np.ndarray]) -> Iterator[str]:
    from simomerge.playground.page import served

    with served(Workshop(opened, pictures), pictures[:3]) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with page_of(browser, 1300, "light") as (found, errors):
        found.goto(address)
        found.wait_for_selector(".viewer .card")
        yield found
        assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 390])
def test_nothing_is_wrong_with_the_page(browser: Any, address: str, width: int, scheme: str) -> None:
    requests: list[str] = []
    with page_of(browser, width, scheme) as (page, errors):
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector(".viewer .card")
        assert audit(page) == [] and errors == []
    assert not [url for url in requests if not url.startswith((address, "data:", "blob:"))]


def test_a_photo_is_predicted_in_time_and_html_is_refused(page: Any, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(photo)
    began = time.monotonic()
    page.locator("input[type=file]").first.set_input_files(photo)
    page.wait_for_function("document.querySelector('.stage').style.aspectRatio.startsWith('640')")
    assert time.monotonic() - began < 10  # on a machine that does other things, too
    wrong = tmp_path / "page.png"
    wrong.write_bytes(b"<html><script>document.title = 'taken'</script></html>")
    page.locator("[aria-label*='emove']").first.click()
    page.locator("input[type=file]").first.set_input_files(wrong)
    page.wait_for_selector("[role=alert] >> text=page.png is not a JPEG, PNG or WebP picture")
    assert page.title() == "simomerge playground"


def test_the_scale_changes_the_merge(page: Any) -> None:
    before = page.locator("[data-task=depth] .over").get_attribute("src")
    page.locator("input[type=range]:not(.split)").first.focus()
    page.keyboard.press("End")
    page.wait_for_function("old => document.querySelector('[data-task=depth] .over').src !== old", arg=before)


def test_the_pointer_shows_values_and_moves_the_line(page: Any) -> None:
    stage = page.locator("[data-task=depth] .stage")
    box = stage.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    assert " m" in page.locator("[data-task=depth] .readout dd").first.inner_text()
    assert page.locator("[data-task=parts] .readout dd").first.inner_text() in ("wall", "floor", "<b>rug</b>")
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert page.locator(".split").input_value() == "75"


def test_everything_works_by_keyboard(page: Any) -> None:
    page.locator("select.left").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.locator(".split").input_value() == "51"
    page.keyboard.press("Tab")
    page.locator("select.right").select_option("merged")
    assert "right: merged" in page.locator("[data-task=depth] .sides").inner_text()
    page.locator("[data-task=depth] .stage").focus()
    page.keyboard.press("ArrowDown")
    assert " m" in page.locator("[data-task=depth] .readout dd").first.inner_text()


def test_depth_is_shown_as_points_that_turn(page: Any) -> None:
    page.locator("[data-task=depth] button.solid").click()
    drawn = "() => document.querySelector('.cloud').toDataURL().length"
    page.wait_for_function(f"({drawn})() > 5000")
    before = page.evaluate("document.querySelector('.cloud').toDataURL()")
    page.locator(".cloud").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("old => document.querySelector('.cloud').toDataURL() !== old", arg=before)


def test_the_model_is_offered_for_download(page: Any) -> None:
    page.get_by_role("button", name="Download model").click()
    page.wait_for_selector("text=model.zip is ready below the buttons")
    with page.expect_download() as started:
        page.locator("a[download]", has_text="").first.click()
    assert started.value.suggested_filename == "model.zip"
