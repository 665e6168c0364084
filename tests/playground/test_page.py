"""The page as a server: what it answers, what it refuses, and that nothing grows."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simomerge.playground.downloads import results_file
from simomerge.playground.opening import Opened
from simomerge.playground.workshop import Choice, Look, Workshop

gradio = pytest.importorskip("gradio")

from simomerge.playground.page import Desk, _path_of, agreement_table, notes, served  # noqa: E402

ASKED = (0, None, "task-arithmetic", 0.5, "folded")
"""A request without its photo: sample, pictures, method, scale, heads."""


@pytest.fixture
def desk(opened: Opened, pictures: list[np.ndarray], tmp_path: Path) -> Desk:
    return Desk(Workshop(opened, pictures), pictures[:3], tmp_path)


def test_a_request_gives_the_view_the_table_and_a_note(desk: Desk) -> None:
    view, table, note = desk.look(None, *ASKED)
    assert [task["name"] for task in view["tasks"]] == ["depth", "parts"]
    assert [each["key"] for each in view["columns"]] == ["photo", "experts", "merged", "repaired"]
    assert "<th scope='row'>depth</th>" in table and "Computed in" in note


def test_a_mistake_is_a_sentence_and_leaves_the_page(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "<b>x.png").write_bytes(b"<html>")
    view, table, note = desk.look(str(tmp_path / "<b>x.png"), *ASKED)
    assert view == table == gradio.skip()
    assert note.startswith('<div role="alert"') and "&lt;b&gt;x.png is not a JPEG" in note


@pytest.mark.parametrize(("scale", "heads"), [(-1, "folded"), (float("nan"), "folded"), ("1", "folded"), (1, "x")])
def test_values_outside_the_controls_are_refused(desk: Desk, scale: Any, heads: str) -> None:
    assert 'role="alert"' in desk.look(None, 0, None, "ties", scale, heads)[2]


def test_names_are_escaped_and_means_are_means() -> None:
    look = Look(np.zeros((1, 1, 3), np.uint8), {}, {}, agreement={"merged": {"a": 0.5, "<i>": 1.0}})
    table = agreement_table(look)
    assert "&lt;i&gt;" in table and "<i>" not in table and "<td>75 %</td></tr></tfoot>" in table
    assert notes([], error=True) == '<div role="alert" class="notes error"></div>'


def test_downloads_hold_what_was_shown(desk: Desk, opened: Opened) -> None:
    update, note = desk.results(None, *ASKED)
    with zipfile.ZipFile(update["value"]) as archive:
        names = set(archive.namelist())
        depth = np.load(io.BytesIO(archive.read("merged/depth.npy")))
    assert {"photo.png", "choice.json", "repaired/parts.png"} <= names and "predictions.zip is ready" in note
    shown = desk.workshop.look(desk.samples[0], Choice(scale=0.5)).columns["merged"]["depth"]
    np.testing.assert_array_equal(depth, shown)
    update, _ = desk.model(None, *ASKED)
    with zipfile.ZipFile(update["value"]) as archive:
        archive.extractall(desk.folder / "got")
    from simomerge.models.model import load

    again = load(desk.folder / "got" / "scene").predict(desk.samples[0])
    np.testing.assert_allclose(
        again["depth"],
        desk.workshop.look(desk.samples[0], Choice(scale=0.5)).columns["repaired"]["depth"],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(("method", "scale"), [("ties", {"scale": 0.5}), ("average", {})])
def test_the_choice_names_a_scale_only_for_methods_with_one(
    method: str, scale: dict[str, float], tmp_path: Path
) -> None:
    distances = {"merged": {"depth": float("nan"), "parts": 0.25}}
    look = Look(np.zeros((1, 1, 3), np.uint8), {}, {}, distances)
    with zipfile.ZipFile(results_file(look, Choice(method, 0.5), tmp_path)) as archive:
        found = json.loads(archive.read("choice.json"), parse_constant=lambda name: pytest.fail(name))
    given = {"method": method, **scale, "heads": "folded"}
    assert found == {**given, "distances": {"merged": {"depth": None, "parts": 0.25}}}


@pytest.mark.slow
def test_an_exported_file_gives_what_was_shown(desk: Desk) -> None:
    pytest.importorskip("onnxscript")
    from simomerge.runtime import Scene

    update, note = desk.exported(None, *ASKED)
    assert "scene-onnx.zip is ready" in note
    with zipfile.ZipFile(update["value"]) as archive:
        archive.extractall(desk.folder / "got")
    photo = desk.samples[0]
    shown = desk.workshop.look(photo, Choice(scale=0.5)).columns["repaired"]["depth"]
    np.testing.assert_allclose(Scene(desk.folder / "got" / "scene.onnx").predict(photo)["depth"], shown, atol=1e-2)


class Browser:
    """Requests as the page sends them."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.look = next(d["id"] for d in self._json("/config")["dependencies"] if d["api_name"] == "look")

    def get(self, path: str) -> tuple[int, Any, bytes]:
        try:
            with urllib.request.urlopen(self.address + path, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def upload(self, name: str, content: bytes) -> tuple[int, str]:
        mark = "boundary-0123456789"
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = head + content + f"\r\n--{mark}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.address}/gradio_api/upload", body, kind)) as got:
                return got.status, json.loads(got.read())[0]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, photo: Any, *asked: Any) -> dict[str, Any]:
        """The answer to one request for a look."""
        content = {"fn_index": self.look, "data": [photo, *(asked or ASKED)], "session_hash": "test"}
        self._json("/gradio_api/queue/join", content)
        with urllib.request.urlopen(f"{self.address}/gradio_api/queue/data?session_hash=test", timeout=60) as lines:
            for line in lines:
                if line.startswith(b"data:") and b'"process_completed"' in line:
                    return dict(json.loads(line[5:]))
        raise AssertionError("no answer")

    def _json(self, path: str, content: Any = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def browser(opened: Opened, pictures: list[np.ndarray]) -> Iterator[Browser]:
    with served(Workshop(opened, pictures), pictures[:3]) as address:
        yield Browser(address)


def given(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def photo_bytes(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


@pytest.mark.slow
def test_an_uploaded_photo_is_predicted_and_html_is_refused(browser: Browser) -> None:
    status, path = browser.upload("../../photo.png", photo_bytes(0))
    assert status == 200 and Path(path).name == "photo.png" and "simomerge-app-" in path
    view = browser.ask(given(path))["output"]["data"][0]
    assert view["size"] == [400, 300]
    _, path = browser.upload("page.png", b"<html><script>alert(1)</script></html>")
    assert "page.png is not a JPEG, PNG or WebP picture" in browser.ask(given(path))["output"]["data"][2]
    _, headers, _ = browser.get(f"/gradio_api/file={path}")
    assert headers.get_content_type() == "image/png"  # a browser does not run it


@pytest.mark.slow
def test_no_path_from_the_browser_is_opened(browser: Browser, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(photo_bytes(1))
    for path in ("/etc/passwd", str(secret), "../../../etc/passwd", "http://127.0.0.1:1/a.png"):
        for photo in (given(path), {"path": path}, {"path": path, "meta": {"_type": "other"}}):
            assert not browser.ask(photo)["success"], photo
        assert not browser.ask(None, 0, [given(path)], *ASKED[2:])["success"], path
        assert browser.get(f"/gradio_api/file={path}")[0] in (403, 404), path


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "other"}}, {"meta": {"_type": "gradio.FileData"}}])
def test_only_uploads_are_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meta: dict[str, Any]) -> None:
    """gradio checks the path only if the request says that it is one of a file."""
    from gradio.data_classes import ImageData
    from gradio.exceptions import InvalidPathError

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    for path in ("/etc/passwd", str(tmp_path / "a.png"), f"{tmp_path}/uploads/../a.png", "http://127.0.0.1:1/a.png"):
        with pytest.raises(InvalidPathError):
            _path_of(ImageData(**{"path": path, **meta}))
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(InvalidPathError):
        _path_of(ImageData(path=str(tmp_path / "uploads" / "link.png")))
    upload = str(tmp_path / "uploads" / "1" / "a.png")
    assert _path_of(ImageData(path=upload)) == upload and _path_of(None) is None and _path_of(ImageData()) is None


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_address_from_the_browser_is_downloaded(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    called: list[str] = []

    async def download(url: str, cache_dir: str) -> str:
        called.append(url)
        path = Path(cache_dir, "a.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo_bytes(2))
        return str(path)

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", download)
    file = given(f"{scheme}://example.org/a.png")
    assert not browser.ask(file)["success"]
    for place in range(len(ASKED)):  # gradio would download for controls without files, too
        for value in (file, [file], {"deeper": [file]}):
            assert not browser.ask(None, *ASKED[:place], value, *ASKED[place + 1 :])["success"], (place, value)
    assert called == []
    assert browser.ask(None)["success"]


@pytest.mark.slow
def test_large_uploads_are_cut_off(browser: Browser) -> None:
    status, message = browser.upload("large.png", bytes(21_000_000))
    assert (status, message) == (413, "File size exceeded maximum allowed size of 20000000 bytes.")


@pytest.mark.slow
def test_the_page_names_no_other_machine(browser: Browser) -> None:
    config = json.loads(browser.get("/config")[2])
    assert config["analytics_enabled"] is False and not config.get("share")
    assert config["max_file_size"] == 20_000_000 and browser.get("/monitoring")[0] == 403


@pytest.mark.slow
def test_uploads_in_a_row_leave_no_memory(browser: Browser) -> None:
    import psutil

    process, used = psutil.Process(), []
    for number in range(20):
        _, path = browser.upload(f"{number}.png", photo_bytes(number))
        assert browser.ask(given(path), *ASKED[:4], "the experts' heads")["success"]
        used.append(process.memory_info().rss)
    assert min(used[-3:]) - min(used[4:8]) < 40e6, [round(each / 1e6) for each in used]
