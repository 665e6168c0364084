"""CSV files as spreadsheets and programs write them: other separators, marks of encoding, spaces, empty columns."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator
from pathlib import Path

from simomerge.core.documents import read_bytes
from simomerge.core.errors import InputError

MOST_BYTES = 400_000_000
"""A million images with five columns of long paths have half of it."""
MOST_VALUES = 20_000_000
"""In all lines together, with the empty ones."""
MOST_COLUMNS = 1000
_SEPARATORS = (",", ";", "\t")
_SMALLER = "remove columns and lines that are not needed, or divide the table."


def read_table(path: Path, column: str) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its first line.

    Values are separated by commas, semicolons or tabs. Spaces around names and values, empty lines, columns without a
    name and values, and a first column of line numbers, as pandas writes it, do not count.

    Args:
        path: the file, in UTF-8, or in UTF-16 with a byte order mark.
        column: a column that it must have, by which the separator is recognised. Its case does not matter.

    Raises:
        InputError: the file is not a table or too large, a line has more or fewer values than there are names, or a
            name occurs twice.
    """
    try:
        lines = _lines(path, _text(path), column)
    except (UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error}).") from error
    if not lines:
        return []
    (_, names), *rest = lines
    if len(names) > MOST_COLUMNS:
        raise InputError(f"{path}: its first line has {len(names):,} names, but a table has at most {MOST_COLUMNS:,}.")
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
    content = read_bytes(path, "give a CSV file.", MOST_BYTES, _SMALLER)
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")


def _lines(path: Path, text: str, column: str) -> list[tuple[int, list[str]]]:
    """The lines that are not empty with their numbers, split at the separator of the file."""
    first, *rest = re.split(r"\r\n|\r|\n", text, maxsplit=1)
    if re.fullmatch("sep=.", first):  # Excel's own line
        return list(_split(path, "\n" + "".join(rest), first[-1]))
    firsts = {separator: next(_split(path, text, separator), (0, []))[1] for separator in _SEPARATORS}
    with_column = [separator for separator, names in firsts.items() if column in map(str.lower, names)]
    return list(_split(path, text, max(with_column or firsts, key=lambda separator: len(firsts[separator]))))


def _split(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    if sum(map(text.count, (separator, "\r", "\n"))) > MOST_VALUES:
        raise InputError(f"{path}: more than {MOST_VALUES:,} values and line ends; {_SMALLER}")
    lines = (found[0] for found in re.finditer(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text))
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator != "\t")
    for line in reader:
        values = [value.strip() for value in line]
        if any(values):
            yield reader.line_num, values
