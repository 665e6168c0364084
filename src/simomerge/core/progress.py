"""Progress of long work, without a callback that travels from function to function.

Library code calls `progress`. Nothing is shown unless a caller higher up has installed a sink with `show_progress`,
as the command line does. The sink is kept in a context variable, so a thread or another process starts without one;
`simomerge.training.pool.WorkerPool` forwards the reports of its worker processes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

from simomerge.core.text import one_line

Sink = Callable[[str, int, int, str], None]
"""``sink(label, done, total, note)``: `done` of `total` steps of `label` are done; `note` holds losses, images/s."""

_sink: ContextVar[Sink | None] = ContextVar("simomerge_progress", default=None)


def progress(label: str, done: int, total: int, note: str = "") -> None:
    """Report that ``done`` of ``total`` steps of ``label`` are done."""
    sink = _sink.get()
    if sink is not None:
        sink(label, done, total, note)


def current_sink() -> Sink | None:
    """The sink that `progress` reports to, for code that must report from another thread."""
    return _sink.get()


@contextmanager
def show_progress(sink: Sink | None) -> Iterator[None]:
    """Send all reports made inside the block to ``sink``; None hides them.

    Example:
        >>> with show_progress(lambda label, done, total, note: print(label, done, total)):
        ...     progress("depth", 10, 400)
        depth 10 400
    """
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


@contextmanager
def labelled_progress(label: str, keep: bool = False) -> Iterator[None]:
    """Give all reports made inside the block one label; with ``keep``, their own label follows it.

    Example:
        >>> with show_progress(lambda label, done, total, note: print(label)), labelled_progress("seed 0", keep=True):
        ...     progress("depth", 10, 400)
        seed 0 depth
    """

    def relabelled(inner: str, done: int, total: int, note: str) -> None:
        if sink is not None:
            sink(f"{label} {inner}" if keep else label, done, total, note)

    sink = current_sink()
    with show_progress(relabelled if sink is not None else None):
        yield


def has_rich() -> bool:
    """Whether rich is installed, which draws bars and tables. An installation without torch does not need it."""
    return find_spec("rich") is not None


class Starting:
    """A line on the terminal while nothing else is shown yet: loading torch alone takes seconds.

    It appears after a moment, so that quick commands do not show it, and disappears before the next output.
    """

    def __init__(self, text: str = "  starting ...", after: float = 0.4) -> None:
        self.text, self.after = text, after
        self._timer: threading.Timer | None = None
        self._lock, self._shown = threading.Lock(), False

    def begin(self) -> None:
        """Show the line in a moment, if standard error is a terminal."""
        if sys.stderr.isatty():
            self._timer = threading.Timer(self.after, self._show)
            self._timer.daemon = True
            self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._shown = True
                print(self.text, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Remove the line, before something else is shown."""
        if self._timer is None:
            return
        with self._lock:
            self._timer.cancel()
            self._timer = None
            if self._shown:
                print("\r" + " " * len(self.text) + "\r", end="", file=sys.stderr, flush=True)
                self._shown = False


starting = Starting()
"""The line of this process."""


class Console:
    """A sink that draws on standard error: bars on a terminal, a plain line every few seconds elsewhere.

    The last report of a label stays on the screen as a line of text.

    Args:
        every_seconds: Time between two plain lines of one label.

    Example:
        >>> console = Console()
        >>> console("depth", 10, 400, "loss 0.31")
        >>> console.close()
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.every_seconds = every_seconds
        self._last_line: dict[str, float] = {}
        self._bars: Any = None  # rich.progress.Progress, on a terminal
        self._tasks: dict[str, Any] = {}
        self._closed = False

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None:
        if self._closed:
            return
        starting.end()
        if sys.stderr.isatty() and has_rich():
            self._bar(label, done, total, note)
        else:
            self._line(label, done, total, note)

    def _bar(self, label: str, done: int, total: int, note: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total, note="")
        self._bars.update(self._tasks[label], completed=done, total=total, note=note)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(label))
            self._bars.console.print(_text(label, done, total, note), markup=False, highlight=False)

    def _line(self, label: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done >= total or now - self._last_line.get(label, now - 1e9) >= self.every_seconds:
            self._last_line[label] = now
            print(_text(label, done, total, note), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bars that are still drawn; later reports are ignored."""
        self._closed = True
        if self._bars is not None:
            for task in self._tasks.values():
                self._bars.remove_task(task)
            self._bars.stop()
            self._bars = None
        self._tasks.clear()


def _text(label: str, done: int, total: int, note: str) -> str:
    return one_line(f"  {label}  {done}/{total}  {note}").rstrip()


def _bars() -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    return Progress(*columns, console=RichConsole(stderr=True), transient=True)
