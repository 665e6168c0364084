"""The page: well formed, self-contained, escaped, and its pictures are the pictures given."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from report.sample import make_gallery, make_results
from simomerge.core.errors import InputError
from simomerge.report import write_report
from simomerge.report.headline import sentences
from simomerge.report.html import page
from simomerge.report.tables import columns

VOID = {"meta", "img", "source", "link", "br"}


class Reader(HTMLParser):
    """Collects elements and text, and fails on a tag that closes another."""

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
        return " ".join(self.words)

    def sources(self) -> list[str]:
        return [str(a[key]) for _, a in self.elements for key in ("src", "srcset", "href") if key in a]


def pixels_of(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))))


@pytest.fixture(scope="module")
def reader() -> Reader:
    results = make_results(3)
    return Reader(page(results, make_gallery([task["name"] for task in results["tasks"]])))


def test_everything_is_on_the_page(reader: Reader) -> None:
    results = make_results(3)
    for sentence in sentences(results):
        assert sentence in reader.text.replace("\xa0", " ")
    for column in columns(results):
        assert all(cell in reader.words for cell in (*column.head, *column.cells))
    for expected in ("Means over 3 seeds", "training.steps", "0, 1, 2", "a small one", *results["notes"]):
        assert expected in reader.text
    for head in ("How to read it", "Overview", "By task", "By scale", "Predictions", "Recipe and machine", "Notes"):
        assert head in reader.words


def test_nothing_is_fetched(reader: Reader) -> None:
    assert len(reader.sources()) > 20
    assert all(source.startswith("data:image/") for source in reader.sources())
    assert not {"link", "script", "iframe"} & {tag for tag, _ in reader.elements}
    assert all("alt" in attributes for tag, attributes in reader.elements if tag == "img")


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
    read = Reader(page({}, gallery))
    assert len([1 for source in read.sources() if source.startswith("data:image/png")]) == 4
    assert {"truth", "ties", "depth", "edges"} <= set(read.words)


@pytest.mark.parametrize("bad", [np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8)])
def test_a_picture_without_colours_is_an_error(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="colour it first"):
        page({"rows": []}, [{"image": bad, "predictions": {"depth": {}}}])


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
    content = page(results, gallery)
    assert "<script" not in content
    read = Reader(content)
    assert read.words.count(evil) >= 8 and "script" not in {tag for tag, _ in read.elements}


def test_little_is_known() -> None:
    read = Reader(page({}))
    assert "This run measured no merged model." in read.text and read.sources() == []
    assert "Notes" not in read.words and "Predictions" not in read.words


def test_written_whole(tmp_path: Path) -> None:
    path = write_report(tmp_path / "deep" / "report.html", {"rows": []})
    assert path == tmp_path / "deep" / "report.html"
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
