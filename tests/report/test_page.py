"""The page: well formed, self-contained, escaped, with the given pictures."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from report.sample import make_gallery, make_results
from simomerge.core.errors import InputError
from simomerge.report import write_report
from simomerge.report.facts import sentences
from simomerge.report.page import report_page
from simomerge.report.table import columns

VOID = {"meta", "img", "source", "link", "br"}


class Reader(HTMLParser):
    """Collects elements and text, and fails on tags that are not closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def sources(self) -> list[str]:
        return [str(a[key]) for _, a in self.elements for key in ("src", "srcset", "href") if key in a]


def pixels_of(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))))


@pytest.fixture(scope="module")
def reader() -> Reader:
    results = make_results(3)
    return Reader(report_page(results, make_gallery([task["name"] for task in results["tasks"]])))


def test_everything_is_on_the_page(reader: Reader) -> None:
    results = make_results(3)
    for sentence in sentences(results):
        assert sentence in reader.text.replace("\xa0", " ")
    for column in columns(results):
        assert all(cell in reader.text for cell in (*column.head, *column.cells))
    for expected in ("Means over 3 seeds", "training.steps", "0, 1, 2", "a small one", *results["notes"]):
        assert expected in reader.text
    for head in ("How to read it", "Overview", "By task", "By scale", "Predictions", "Recipe and machine", "Notes"):
        assert head in reader.words


def test_nothing_is_fetched(reader: Reader) -> None:
    assert len(reader.sources()) > 20
    ids = [str(attributes["id"]) for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    places = {f"#{name}" for name in ids}
    assert all(source.startswith("data:image/") or source in places for source in reader.sources())
    assert not {"link", "script", "iframe"} & {tag for tag, _ in reader.elements}
    assert all("alt" in attributes for tag, attributes in reader.elements if tag == "img")
    figures = [attributes for tag, attributes in reader.elements if tag == "svg"]
    assert len(figures) == 3 and all(figure["role"] == "img" and figure["aria-label"] for figure in figures)


def test_the_page_follows_the_readers_theme(reader: Reader) -> None:
    content = report_page(make_results())
    assert "prefers-color-scheme: dark" in content and "color-scheme: light dark" in content
    defined = set(re.findall(r"--([a-z-]+):", content))
    assert set(re.findall(r"var\(--([a-z-]+)\)", content)) <= defined


def test_steps_that_the_run_used_are_explained(reader: Reader) -> None:
    assert "+heads" in reader.words and "(with labels): the heads are tuned" in reader.text
    assert "+fold" not in reader.words  # not in this run's realignments
    assert "re-align" in Reader(report_page({})).words


def test_further_sections_follow_the_figures_and_plain_text_is_escaped() -> None:
    content = report_page(make_results(), (), [("Mine", Markup("<b>bold</b>")), ("Text", "<i>"), ("None", "")])
    assert "<h2>Mine</h2>\n<b>bold</b>" in content and "&lt;i&gt;" in content and "<h2>None</h2>" not in content


def test_pictures_decode_to_the_given_pixels(reader: Reader) -> None:
    given = []
    for entry in make_gallery(["segmentation", "depth", "normals"]):
        given.append(entry["image"])
        given += [picture for maps in entry["predictions"].values() for picture in maps.values()]
    found = [pixels_of(source) for source in reader.sources() if source.startswith("data:image/png")]
    assert len(found) == len(given) == 2 * (1 + 3 * 4)
    assert all(np.array_equal(a, b) for a, b in zip(found, given, strict=True))


def test_gallery_with_columns_that_differ() -> None:
    grey = np.full((2, 3, 3), 128, np.uint8)
    gallery = [{"image": grey, "predictions": {"depth": {"truth": grey}, "edges": {"truth": grey, "ties": grey}}}]
    read = Reader(report_page({}, gallery))
    assert len([1 for source in read.sources() if source.startswith("data:image/png")]) == 4
    assert {"truth", "ties", "depth", "edges"} <= set(read.words)


@pytest.mark.parametrize("bad", [np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8)])
def test_a_picture_without_colours_is_an_error(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="colour it first"):
        report_page({"rows": []}, [{"image": bad, "predictions": {"depth": {}}}])


def test_everything_is_escaped() -> None:
    evil = '"><script>alert(1)</script>&amp;'
    results = make_results(task_count=1)
    results |= {
        "title": evil,
        "created": evil,
        "notes": [evil],
        "recipe": {evil: [evil]},
        "machine": {evil: {evil: evil}},
    }
    results["tasks"][0] |= {"metric": evil, "unit": evil}
    results["rows"] = results["rows"][3:5]
    results["rows"][1]["method"] = evil
    results["scale_curves"][evil] = results["scale_curves"].pop("ties")
    gallery = make_gallery([evil], images=1)
    gallery[0]["predictions"][evil][evil] = gallery[0]["image"]
    content = report_page(results, gallery)
    assert "<script" not in content
    read = Reader(content)
    assert read.words.count(evil) >= 8 and "script" not in {tag for tag, _ in read.elements}


def test_empty_results_give_a_short_page() -> None:
    read = Reader(report_page({}))
    assert "This run measured no merged model." in read.text and read.sources() == []
    assert "Notes" not in read.words and "Predictions" not in read.words


def test_the_file_is_written_as_a_whole(tmp_path: Path) -> None:
    path = write_report(tmp_path / "deep" / "report.html", {"rows": []})
    assert path == tmp_path / "deep" / "report.html"
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
