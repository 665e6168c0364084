"""What a re-alignment says of itself in a model's provenance."""

from __future__ import annotations

from typing import Any

from simomerge.models.model import SimoModel


def after(model: SimoModel, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a re-alignment, with that of an earlier one of the same model, which it started from."""
    earlier = model.provenance.get("realign")
    return {**record, "after": earlier} if earlier else record
