"""What every re-alignment with labels asks of its data."""

from __future__ import annotations

from typing import Any

from simomerge.core.errors import InputError
from simomerge.models.model import SimoModel


def check_labels(model: SimoModel, data: Any, needs: str) -> None:
    """Refuse data without the labels of every task; ``needs`` begins the sentence, such as "adapters need"."""
    missing = [name for name in model.tasks if name not in data.tasks]
    if missing:
        raise InputError(f"{needs} labels of every task; the data has none of {', '.join(missing)}.")
