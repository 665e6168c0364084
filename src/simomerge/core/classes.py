"""Custom classes in a model folder, stored as ``module:Class`` with the arguments that create them again."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from simomerge.core.errors import InputError


def class_path(thing: object) -> str:
    """``module:Class`` of an object's class.

    Raises:
        InputError: The class is defined inside a function, where it cannot be found again.

    Example:
        >>> from collections import OrderedDict
        >>> class_path(OrderedDict())
        'collections:OrderedDict'
    """
    cls = type(thing)
    if "<locals>" in cls.__qualname__:
        raise InputError(
            f"{cls.__qualname__} is defined inside a function, so a saved model could not find it. Move it to the top"
            " level of a module."
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def settings_of(thing: object) -> dict[str, Any]:
    """The keyword arguments that create an object again: its attribute ``settings``, empty by default.

    Raises:
        InputError: They are not plain data.
    """
    settings = dict(getattr(thing, "settings", {}))
    try:
        json.dumps(settings)
    except TypeError as error:
        raise InputError(f"{type(thing).__name__}.settings cannot be written to a model folder ({error}).") from error
    return settings


def make(path: str, settings: dict[str, Any], base: type) -> Any:
    """Create an object of the class ``module:Class``, a subclass of ``base``.

    The module is imported, which runs its code: load such folders only if you would run their code.

    Raises:
        InputError: The module or class does not exist here, the class is no subclass, or it rejects the arguments.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
    except Exception as error:  # a custom module may raise anything
        missing = isinstance(error, ModuleNotFoundError)
        remedy = "run where it can be imported (its folder in PYTHONPATH)" if missing else "fix the module"
        raise InputError(
            f"{path}: the module {module!r} cannot be imported ({type(error).__name__}: {error}); {remedy}."
        ) from error
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
        raise InputError(f"{path}: cannot be created with {settings} ({type(error).__name__}: {error}).") from error
