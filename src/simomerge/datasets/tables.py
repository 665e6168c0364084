"""CSV files as spreadsheets and programs write them: other separators, marks of encoding, spaces, empty columns."""

from __future__ import annotations

import codecs
import csv
import io
import re
from pathlib import Path

from simomerge.core.errors import InputError

_SEPARATORS = (",", ";", "\t")


def read_table(path: Path, column: str) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its first line.

    Values are separated by commas, semicolons or tabs. Spaces around names and values, empty lines, columns without a
    name and values, and a first column of line numbers, as pandas writes it, do not count.

    Args:
        path: the file, in UTF-8, or in UTF-16 with a byte order mark.
        column: a column that it must have, by which the separator is recognised. Its case does not matter.

    Raises:
        InputError: the file is not a table, a line has more or fewer values than there are names, or a name occurs
            twice.
    """
    try:
        lines = _lines(_text(path), column)
    except (UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error}).") from error
    if not lines:
        return []
    (_, names), *rest = lines
    for number, line in rest:
        if len(line) < len(names) or any(line[len(names) :]):
            raise InputError(f"{path}: line {number} has more or fewer values than the first line has names.")
    kept = [at for at, name in enumerate(names) if name and not (at == 0 and name == "Unnamed: 0")]
    for at in sorted(set(range(1, len(names))) - set(kept)):
        if filled := [number for number, line in rest if line[at]]:
            raise InputError(f"{path}: column {at + 1} has no name, but line {filled[0]} has a value in it.")
    if twice := [names[at] for at in kept if names.count(names[at]) > 1]:
        raise InputError(f"{path}: two columns are named {twice[0]!r}; give each another name.")
    return [{names[at]: line[at] for at in kept} for _, line in rest]


def _text(path: Path) -> str:
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")


def _lines(text: str, column: str) -> list[tuple[int, list[str]]]:
    """The lines that are not empty with their numbers, split at the separator of the file."""
    first, *rest = re.split(r"\r\n|\r|\n", text, maxsplit=1)
    if re.fullmatch("sep=.", first):  # Excel's own line
        return _split("\n" + "".join(rest), first[-1])
    tables = [lines for separator in _SEPARATORS if (lines := _split(text, separator))]
    with_column = [lines for lines in tables if column in map(str.lower, lines[0][1])]
    return max(with_column or tables, key=lambda lines: len(lines[0][1]), default=[])


def _split(text: str, separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t")
    lines = [(reader.line_num, [value.strip() for value in line]) for line in reader]
    return [(number, line) for number, line in lines if any(line)]
