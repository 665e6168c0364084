"""The exceptions for problems that the user can fix."""

from __future__ import annotations

from simomerge.core.text import one_line, shortened, without_secrets


class InputError(ValueError):
    """A user's input is wrong: a path, a key, a shape or a value.

    The message names the input and the remedy in at most three sentences. The command line prints it without a
    traceback and exits with status 2. In Python it is an ordinary ``ValueError``. Messages quote names and values from
    files, so their text is one line without control characters, of at most 2,000 characters, and URLs in it are without
    queries and passwords. A message of several lines, such as one with the end of a log, is given as one argument per
    line.
    """

    def __str__(self) -> str:
        return shortened(without_secrets("\n".join(map(one_line, self.args))))


class DivergedError(InputError):
    """The loss of a training became NaN or infinite, because the learning rate is too high.

    Attributes:
        step: The step at which this was found.
        kept: Whether the module has the weights of its best validation.
        best_step: The step of that validation.
    """

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step
        self.kept = False
        self.best_step = 0
