"""Docstrings call their section of examples "Example:", which the parser of the site knows as "Examples:"."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension


class ExampleSections(Extension):
    """Rename the sections before they are parsed."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
