"""Files of torch.export with a description and a checksum, as `simomerge.runtime` knows them of other formats."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from simomerge.core.errors import InputError
from simomerge.core.text import first_line
from simomerge.runtime.scene import described

_DESCRIPTION = "simomerge.json"
_CHECKSUM = re.compile(rb', "sha256": "[0-9a-f]{64}"}$')


def describe_program(file: Path, description: dict[str, Any]) -> None:
    """Store the description in a file, and at its end the checksum of everything else in the file."""
    import torch

    program = torch.export.load(file)
    torch.export.save(program, file, extra_files={_DESCRIPTION: json.dumps(description)})
    text = json.dumps({**description, "sha256": _content(file)[0]})
    torch.export.save(program, file, extra_files={_DESCRIPTION: text})


def open_program(file: Path) -> tuple[Any, dict[str, Any]]:
    """The module in a file that `describe_program` has described, and the description.

    Raises:
        InputError: The file is missing, damaged, was changed after its export, or comes from a newer version or another
            program.
    """
    import torch

    if not file.is_file():
        raise InputError(f"{file}: no such file; `simomerge export` writes one.")
    try:
        checksum, text = _content(file)
    except Exception as error:  # zipfile raises many kinds of errors for damaged files
        raise InputError(f"{file}: cannot be loaded ({error}); export the model again.") from error
    info = described(file, text)
    if info.get("sha256") != checksum:
        raise InputError(
            f"{file}: was changed after its export, is incomplete, or has no checksum; export the model again."
        )
    try:
        return torch.export.load(file).module(), info
    except Exception as error:  # from another version of torch
        raise InputError(
            f"{file}: this torch cannot load it ({first_line(error)[:200]}); export the model again with this version."
        ) from error


def _content(file: Path) -> tuple[str, str | None]:
    """The checksum of all that a file holds but the checksum in its description, and the description.

    Raises:
        ValueError: Something in it is compressed, which torch never does, so it may be larger than the file.
    """
    digest, text = hashlib.sha256(), None
    with zipfile.ZipFile(file) as archive:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename[:100]} is compressed")
            content = archive.read(entry)
            if entry.filename.endswith(f"/{_DESCRIPTION}"):
                text, content = content.decode(), _CHECKSUM.sub(b"}", content)
            if not entry.filename.endswith(".data/serialization_id"):  # torch computes it from all others
                digest.update(f"{entry.filename} {len(content)}\0".encode() + content)
    return digest.hexdigest(), text
