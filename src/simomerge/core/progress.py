"""Progress of long work: a callable that libraries call and the command line draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""``progress(label, done, total, note)``: `done` of `total` steps of `label`; `note` holds losses, images/s."""


def silent(label: str, done: int, total: int, note: str = "") -> None:
    """Says nothing: the default everywhere in the library."""


class Console:
    """Progress on standard error: bars on a terminal, one plain line in a while elsewhere.

    Example:
        >>> console = Console()
        >>> console("depth", 10, 400, "loss 0.31")
        >>> console.close()
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.bars: dict[str, object] = {}
        self.every_seconds = every_seconds
        self.last_line: dict[str, float] = {}

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None:
        if sys.stderr.isatty():
            self._bar(label, done, total, note)
        else:
            self._line(label, done, total, note)

    def _bar(self, label: str, done: int, total: int, note: str) -> None:
        from tqdm import tqdm

        bar = self.bars.get(label)
        if bar is None:
            bar = self.bars[label] = tqdm(total=total, desc=label, leave=False, file=sys.stderr)
        bar.total = total  # type: ignore[attr-defined]
        bar.set_postfix_str(note, refresh=False)  # type: ignore[attr-defined]
        bar.update(done - bar.n)  # type: ignore[attr-defined]
        if done >= total:
            bar.close()  # type: ignore[attr-defined]
            del self.bars[label]

    def _line(self, label: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done >= total or now - self.last_line.get(label, now - 1e9) >= self.every_seconds:
            self.last_line[label] = now
            print(f"  {label}  {done}/{total}  {note}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()  # type: ignore[attr-defined]
        self.bars.clear()
