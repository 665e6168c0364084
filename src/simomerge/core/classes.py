"""Custom classes in a model folder, stored as ``module:Class`` with the arguments that create them again.

A model folder is data: it never runs code of its own. A class that it names is created only if the caller has
registered it (`register_encoder`, `register_head`), or trusts the folder's code (`trusting`); nothing is imported
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, TypeVar

from simomerge.core.errors import InputError

_Class = TypeVar("_Class", bound=type)

_registered: dict[str, type | None] = {}
"""The registered classes by their path; None if the class was registered in the process that started this one."""
_trusted: ContextVar[bool] = ContextVar("simomerge_trusted", default=False)


def register_encoder(cls: _Class) -> _Class:
    """Let model folders name this class as their encoder; use it as a decorator, or call it before `simomerge.load`.

    Args:
        cls: An `nn.Module` as `simomerge.models.encoders.ImageEncoder` describes it. Folders hold its ``module:Class``
            and its ``settings``, the keyword arguments that create it again.

    Raises:
        InputError: The class is defined inside a function, where no other process can find it.

    Example:
        >>> import simomerge as sm
        >>> from torch import nn
        >>> @sm.register_encoder
        ... class Stem(nn.Conv2d):
        ...     channels, strides = (8,), (4,)
    """
    _registered[_path_of(cls)] = cls
    return cls


def register_head(cls: _Class) -> _Class:
    """Let model folders name this class as a head; use it as a decorator, or call it before `simomerge.load`.

    Args:
        cls: An `nn.Module` as `simomerge.models.heads.DenseHead` describes it, with ``settings`` as in
            `register_encoder`.

    Raises:
        InputError: The class is defined inside a function, where no other process can find it.
    """
    _registered[_path_of(cls)] = cls
    return cls


@contextmanager
def trusting(code: bool = True) -> Iterator[None]:
    """Inside the block, model folders may name classes that are not registered: their modules are imported and run.

    With ``code=False`` nothing changes: what a caller higher up has allowed stays allowed.
    """
    token = _trusted.set(code or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def trust() -> None:
    """Trust the code that model folders name, for the rest of this process (the option ``--trust-code``)."""
    _trusted.set(True)


def allowed() -> tuple[bool, tuple[str, ...]]:
    """Whether all code is trusted here, and the paths of the registered classes; see `allow`."""
    return _trusted.get(), tuple(_registered)


def allow(trusted: bool, registered: Iterable[str]) -> None:
    """Allow in a worker process what is `allowed` in the process that started it."""
    _trusted.set(trusted)
    for path in registered:
        _registered.setdefault(path, None)


def class_path(thing: object) -> str:
    """``module:Class`` of an object's class.

    Raises:
        InputError: The class is defined inside a function, where it cannot be found again.

    Example:
        >>> from collections import OrderedDict
        >>> class_path(OrderedDict())
        'collections:OrderedDict'
    """
    return _path_of(type(thing))


def _path_of(cls: type) -> str:
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


def make(path: str, settings: Mapping[str, Any], base: type) -> Any:
    """Create an object of the class ``module:Class``, a subclass of ``base``.

    Raises:
        InputError: The class is neither registered nor trusted, does not exist here, is no subclass, or rejects the
            arguments.
    """
    if path not in _registered and not _trusted.get():
        raise InputError(
            f"{path} is a class outside simomerge, and a model folder runs no code unasked. Import the class and"
            " register it (sm.register_encoder or sm.register_head), or load with trust_code=True (--trust-code)"
            " if you trust its code."
        )
    found = _registered.get(path) or _imported(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{path}: not a {base.__module__.split('.')[0]} {base.__name__}.")
    try:
        return found(**settings)
    except Exception as error:
        raise InputError(f"{path}: cannot be created with {settings} ({type(error).__name__}: {error}).") from error


def _imported(path: str) -> Any:
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
    return found
