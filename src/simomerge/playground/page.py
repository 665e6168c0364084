"""The page in the browser. It shows what `Workshop` computes, and is the only module that knows gradio."""

from __future__ import annotations

import os
import tempfile
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from simomerge.core.errors import InputError
from simomerge.core.exclusive import remove
from simomerge.core.text import one_line
from simomerge.playground.downloads import model_file, onnx_file, results_file
from simomerge.playground.uploads import MAX_BYTES, MAX_PICTURES, read_photo, read_pictures
from simomerge.playground.view import LABELS, view_of
from simomerge.playground.workshop import HEADS, Choice, Look, Workshop, has_scale

QUEUE = 16
"""Requests that may wait; more are refused."""

CAN_EXPORT = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
"""Whether the packages of the extra "export" are installed."""

_VIEWER = """<div class="viewer"><div class="bar" hidden>
<label>Left column <select class="left"></select></label>
<label>Dividing line <input class="split" type="range" min="0" max="100" value="50"></label>
<label>Right column <select class="right"></select></label>
<label class="check"><input class="over-photo" type="checkbox"> over the photo</label>
</div><div class="cards"></div></div>"""


class Desk:
    """Answers the requests of the page.

    Args:
        workshop: What computes.
        samples: Photos to look at before a user gives one, uint8 RGB (H, W, 3).
        folder: Where files for download are written.
    """

    def __init__(self, workshop: Workshop, samples: Sequence[np.ndarray], folder: Path) -> None:
        self.workshop, self.samples, self.folder = workshop, samples, folder

    def look(self, *asked: Any) -> tuple[Any, Any, str]:
        """The viewer, the table of agreement and the notes. After a mistake the first two stay as they are."""
        import gradio

        try:
            look = self._look(*asked)
        except InputError as error:
            return gradio.skip(), gradio.skip(), notes([str(error)], error=True)
        if look is None:
            return gradio.skip(), "", notes(["Give a photo, or take one with the camera."])
        return view_of(look), agreement_table(look), notes([*look.notes, f"Computed in {look.seconds:.1f} s."])

    def results(self, *asked: Any) -> tuple[Any, str]:
        """A file with all predictions."""
        return self._file(lambda folder: results_file(self._needed(*asked), _choice(*asked), folder))

    def model(self, *asked: Any) -> tuple[Any, str]:
        """A file with the model of the choice."""
        pictures = asked[2]
        return self._file(
            lambda folder: model_file(self.workshop.result(_choice(*asked), read_pictures(pictures or [])), folder)
        )

    def exported(self, *asked: Any) -> tuple[Any, str]:
        """A file with the model of the choice as an ONNX file, which was compared with torch."""
        pictures = asked[2]

        def make(folder: Path) -> Path:
            model = self.workshop.result(_choice(*asked), read_pictures(pictures or []))
            return onnx_file(model, self.workshop.export_size, folder)

        return self._file(make)

    def next_sample(self, number: int) -> tuple[None, int]:
        """No photo, and the number of the next sample."""
        return None, (int(number) + 1) % max(1, len(self.samples))

    def _look(self, *asked: Any) -> Look | None:
        path, number, pictures, *_ = asked
        if path:
            photo = read_photo(path)
        elif self.samples:
            photo = self.samples[int(number) % len(self.samples)]
        else:
            return None
        return self.workshop.look(photo, _choice(*asked), read_pictures(pictures or []))

    def _needed(self, *asked: Any) -> Look:
        look = self._look(*asked)
        if look is None:
            raise InputError("there is no photo: give one, or take one with the camera.")
        return look

    def _file(self, make: Any) -> tuple[Any, str]:
        import gradio

        for earlier in self.folder.iterdir():  # gradio has copied what it serves
            remove(earlier)
        try:
            path = make(Path(tempfile.mkdtemp(dir=self.folder)))
        except InputError as error:
            return gradio.skip(), notes([str(error)], error=True)
        return gradio.update(value=str(path), visible=True), notes([f"{path.name} is ready below the buttons."])


DAY = 86_400
"""Seconds after which an upload is removed, also while the page still shows it. At the end all are removed."""


def make_page(desk: Desk) -> Any:
    """The page, as a `gradio.Blocks`."""
    import gradio as gr

    workshop, merging = desk.workshop, desk.workshop.can_merge
    with gr.Blocks(title="simomerge playground", analytics_enabled=False, delete_cache=(3600, DAY)) as page:
        gr.Markdown(f"# simomerge playground\n{_introduction(workshop)}")
        sample = gr.State(0)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photo = gr.Image(label="Photo", sources=["upload", "webcam", "clipboard"], type="filepath", height=240)
                photo.preprocess = _path_of  # simomerge's own reader opens the file, with its limits
                another = gr.Button("Show another sample", size="sm", visible=len(desk.samples) > 1)
                with gr.Group(visible=merging):
                    choices = _choices(workshop)
                with gr.Row():
                    save = gr.Button("Download predictions", size="sm", min_width=120)
                    keep = gr.Button("Download model", size="sm", min_width=120)
                    convert = gr.Button("Download ONNX", size="sm", min_width=120, visible=CAN_EXPORT)
                files = gr.File(label="Ready to download", interactive=False, visible=False)
            with gr.Column(scale=3, min_width=320):
                messages = gr.HTML(css_template=_asset("notes.css"))
                viewer = gr.HTML(
                    value={},
                    html_template=_VIEWER,
                    css_template=_asset("viewer.css"),
                    js_on_load=_asset("solid.js") + _asset("viewer.js"),
                    apply_default_css=False,
                )
                table = gr.HTML(css_template=_asset("notes.css"))
        asked = [photo, sample, *choices]
        common: dict[str, Any] = {"inputs": asked, "concurrency_id": "work", "api_visibility": "private"}
        shown: dict[str, Any] = {**common, "fn": desk.look, "outputs": [viewer, table, messages]}
        changes = [part.change for part in (photo, *choices)]
        gr.on([page.load, *changes], **shown, trigger_mode="always_last", show_progress="minimal")
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        another.click(desk.next_sample, sample, [photo, sample], **quick).then(**shown, show_progress="minimal")
        if merging:
            method, scale = choices[1], choices[2]
            method.change(lambda name: gr.update(interactive=has_scale(name)), method, scale, **quick)
        save.click(desk.results, outputs=[files, messages], **common)
        keep.click(desk.model, outputs=[files, messages], **common)
        convert.click(desk.exported, outputs=[files, messages], **common)
    _refuse_addresses(page)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)


def _refuse_addresses(page: Any) -> None:
    """Make a page refuse requests with a file at an http(s) address, which gradio downloads whatever its size."""
    from gradio.exceptions import InvalidPathError
    from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse

    preprocess = page.preprocess_data

    def check(file: dict[str, Any]) -> dict[str, Any]:
        if is_http_url_like(file["path"]):
            raise InvalidPathError("files are read from uploads only, not from the network.")
        return file

    async def checked(block_fn: Any, inputs: Any, *others: Any, **named: Any) -> Any:
        traverse(inputs, check, is_file_obj_with_meta)
        return await preprocess(block_fn, inputs, *others, **named)

    page.preprocess_data = checked


def _theme() -> Any:
    """gradio's colours with fonts of the system, and with greys that are dark enough to read."""
    import gradio as gr

    grey, light = "*neutral_600", "*neutral_300"
    fonts = ["system-ui", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    names = ("block_info_text_color", "block_label_text_color", "block_title_text_color", "body_text_color_subdued")
    return theme.set(**dict.fromkeys(names, grey), **{f"{name}_dark": light for name in names})


def _choices(workshop: Workshop) -> list[Any]:
    """The parts of the page for pictures, method, scale and heads, in the order of the requests' arguments."""
    import gradio as gr

    names = workshop.methods
    method = gr.Dropdown(names, value="task-arithmetic" if names else None, label="Merge method")
    info = "alpha: 0 is the unmerged base, 1 adds the experts' full changes."
    scale = gr.Slider(0, 1.5, Choice.scale, step=0.05, label="Scale", info=info)
    start = "folded" if workshop.samples else next(iter(HEADS))
    info = "A fold repairs the heads in closed form, on pictures without labels."
    heads = gr.Radio(list(HEADS), value=start, label="Heads", info=info)
    text = f"**Pictures for the fold:** 8 to {MAX_PICTURES} of different scenes; select the files of a folder together."
    if workshop.samples:
        text += f" Without them, {len(workshop.samples)} rooms are used."
    gr.Markdown(text, padding=True)
    pictures = gr.File(
        label="Pictures", file_count="multiple", file_types=["image"], type="filepath", height=140, show_label=False
    )
    return [pictures, method, scale, heads]


@contextmanager
def served(
    workshop: Workshop, samples: Sequence[np.ndarray] = (), host: str = "127.0.0.1", port: int | None = None
) -> Iterator[str]:
    """Serve the page until the block ends, and yield its address.

    Nothing leaves the machine: gradio's statistics, public links and history are off. Files that a browser sends go
    into a temporary folder, which is removed at the end.

    Raises:
        InputError: The port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="simomerge-app-") as temporary:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(temporary, "uploads"))
        Path(temporary, "downloads").mkdir()
        page = make_page(Desk(workshop, samples, Path(temporary, "downloads")))
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                footer_links=[],
                run_history=False,
                allowed_paths=[],
                max_file_size=MAX_BYTES,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                theme=_theme(),
            )
        except OSError as error:
            raise InputError(f"port {port or '7860 to 7959'} is taken; give another one with --port.") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def open_browser(address: str) -> None:
    """Open the page in the default browser."""
    webbrowser.open(address)


def notes(sentences: Sequence[str], error: bool = False) -> str:
    """Sentences as HTML that screen readers announce.

    Example:
        >>> notes(["a < b"])
        '<div role="status" class="notes"><p>a &lt; b</p></div>'
    """
    kind = 'role="alert" class="notes error"' if error else 'role="status" class="notes"'
    return f"<div {kind}>{''.join(f'<p>{escape(one_line(each))}</p>' for each in sentences)}</div>"


def agreement_table(look: Look) -> str:
    """The agreement with the experts as an HTML table; "" if it is not known."""
    if not look.agreement:
        return ""
    columns = list(look.agreement)
    tasks = list(look.agreement[columns[0]])
    head = "".join(f"<th scope='col'>{LABELS[column]}</th>" for column in columns)
    rows = "".join(
        f"<tr><th scope='row'>{escape(one_line(task))}</th>"
        + "".join(f"<td>{100 * look.agreement[column][task]:.0f} %</td>" for column in columns)
        + "</tr>"
        for task in tasks
    )
    means = [np.mean([look.agreement[column][task] for task in tasks]) for column in columns]
    foot = "".join(f"<td>{100 * mean:.0f} %</td>" for mean in means)
    caption = (
        "Agreement with the experts on held-out pictures: 100 % is the expert's own prediction, 0 % is no closer to it"
        " than its prediction for another picture."
    )
    return (
        f"<table class='agreement'><caption>{caption}</caption><thead><tr><th scope='col'>task</th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody><tfoot><tr><th scope='row'>mean</th>{foot}</tr></tfoot></table>"
    )


def _choice(*asked: Any) -> Choice:
    """The choice among the arguments of a request, which come from the browser and are checked here."""
    method, scale, heads = asked[3:6]
    if heads not in HEADS:
        raise InputError(f"heads {heads!r}: choose one of {', '.join(HEADS)}.")
    if not isinstance(scale, (int, float)) or not 0 <= scale <= 1.5:
        raise InputError(f"scale {scale!r}: give a number from 0 to 1.5.")
    return Choice(str(method), float(scale), heads)


def _path_of(payload: Any) -> str | None:
    """The path of an uploaded photo. Raises gradio's InvalidPathError for any other file of this machine.

    gradio checks only the paths of requests that call themselves a file, and a photo need not do that.
    """
    from gradio.exceptions import InvalidPathError

    if payload is None or not payload.path:
        return None
    path = Path(payload.path).resolve()
    if not path.is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()):
        raise InvalidPathError("photos are read from uploads only.")
    return str(path)


def _introduction(workshop: Workshop) -> str:
    tasks = ", ".join(workshop.tasks)
    what = f"Models: {workshop.opened.title}. Tasks: {tasks}. "
    if not workshop.can_merge:
        return f"{what}Give a photo to see what the model predicts. Nothing leaves this machine."
    return (
        f"{what}Give a photo, choose how the experts are merged, and compare any two columns: drag over a picture or"
        " move the dividing line. Nothing leaves this machine."
    )


def _asset(name: str) -> str:
    return resources.files("simomerge.playground").joinpath(name).read_text(encoding="utf-8")
