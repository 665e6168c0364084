"""Classes of the user's own in a model folder: written as ``module:Class`` with the arguments that make them again."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from simomerge.core.errors import InputError


def class_path(thing: object) -> str:
    """``module:Class`` of an object's class.

    Raises:
        InputError: a class defined inside a function, which cannot be found again.

    Example:
        >>> from collections import OrderedDict
        >>> class_path(OrderedDict())
        'collections:OrderedDict'
    """
    cls = type(thing)
    if "<locals>" in cls.__qualname__:
        raise InputError(
            f"{cls.__qualname__} is defined inside a function, so a saved model could not find it: move it to the top"
            " of a module."
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def settings_of(thing: object) -> dict[str, Any]:
    """The keyword arguments that make an object of the user's again: its ``settings``, none by default.

    Raises:
        InputError: they are no plain data.
    """
    settings = dict(getattr(thing, "settings", {}))
    try:
        json.dumps(settings)
    except TypeError as error:
        raise InputError(f"{type(thing).__name__}.settings cannot be written to a model folder ({error}).") from error
    return settings


def make(path: str, settings: dict[str, Any], base: type) -> Any:
    """An object of the class ``module:Class``, which must be one of ``base``.

    The module is imported, as any import runs it: load folders of this kind only where you would run their code.

    Raises:
        InputError: no such module or class here, a class of another sort, or arguments that it does not take.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
    except Exception as error:  # a module of the user's may raise anything
        hint = "run where it can be imported (its folder in PYTHONPATH)"
        if not isinstance(error, ModuleNotFoundError):
            hint = "fix the module"
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: the module {module!r} cannot be imported ({said}); {hint}.") from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        hint = "" if module != "__main__" else "; it was defined in a script or notebook: move it to a module"
        raise InputError(f"{path}: no such class in the module{hint}.") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{path}: not a {base.__module__.split('.')[0]} {base.__name__}.")
    try:
        return found(**settings)
    except Exception as error:
        raise InputError(f"{path}: cannot be made with {settings} ({type(error).__name__}: {error}).") from error
