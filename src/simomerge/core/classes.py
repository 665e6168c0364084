"""Custom classes in a model folder, stored as ``module:Class`` with the arguments that create them again.

A model folder is data: it never runs code of its own. A class that it names is created only if the caller has
registered it (`register_encoder`, `register_head`), or trusts the folder's code (`trusting`); nothing is imported
otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, TypeVar

from simomerge.core.caution import warn
from simomerge.core.errors import InputError

_Class = TypeVar("_Class", bound=type)

_MAIN = "__main__:"
"""How the path of a class begins that is defined in a notebook, in a script or on the prompt."""

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


def warn_of_main(described: Mapping[str, Any]) -> None:
    """Warn of the classes in a description that are defined in a notebook or script, where no other program finds them.

    Args:
        described: What a model folder is about to say about its encoder and heads.

    Warns:
        UserWarning: There is such a class.
    """
    if names := sorted({path.removeprefix(_MAIN) for path in _paths_of_main(described)}):
        are, them, these = ("are", "them", "these classes") if len(names) > 1 else ("is", "it", "this class")
        warn(
            f"{' and '.join(names)} {are} defined in a notebook or script (__main__): only a program that defines and"
            f" registers {these} can load the model. Move {them} to a module, and import {them} from there."
        )


def _paths_of_main(described: Any) -> Iterator[str]:
    if isinstance(described, Mapping):
        for value in described.values():
            yield from _paths_of_main(value)
    elif isinstance(described, str) and described.startswith(_MAIN):
        yield described


def make(path: str, settings: Mapping[str, Any], base: type) -> Any:
    """Create an object of the class ``module:Class``, a subclass of ``base``.

    For a class of a notebook or script (``__main__:Class``), the one registered class of this name is taken, if it is
    not registered itself: it was moved to a module.

    Raises:
        InputError: The class is neither registered nor trusted, does not exist here, is no subclass, or rejects the
            arguments.
    """
    if not (_trusted.get() and path.startswith(_MAIN) and hasattr(sys.modules["__main__"], path.removeprefix(_MAIN))):
        path = _moved(path)
    if path not in _registered and not _trusted.get():
        if path.startswith(_MAIN):
            raise _of_main(path)
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


def _moved(path: str) -> str:
    """The path of the registered class that a path means. Raises InputError if it may mean several."""
    if path in _registered or not path.startswith(_MAIN):
        return path
    found = [known for known in _registered if known.partition(":")[2] == path.removeprefix(_MAIN)]
    if len(found) > 1:
        raise InputError(
            f"{path} was defined in a notebook or script (__main__), and {' and '.join(found)} are registered under its"
            " name. Register only the one that is meant."
        )
    return found[0] if found else path


def _of_main(path: str) -> InputError:
    """The error for a class of a notebook or script that this program does not define."""
    return InputError(
        f"{path} was defined in a notebook or script (__main__), where no other program finds it. In Python, define the"
        " class or import it from a module, and register it (sm.register_encoder or sm.register_head) before loading."
        " With the class of a module, save the model again: then the folder names that module."
    )


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found: Any = import_module(module)
    except Exception as error:  # a custom module may raise anything
        absent = isinstance(error, ModuleNotFoundError)
        remedy = "run where it can be imported (its folder in PYTHONPATH)" if absent else "fix the module"
        raise InputError(
            f"{path}: the module {module!r} cannot be imported ({type(error).__name__}: {error}); {remedy}."
        ) from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        missing = _of_main(path) if path.startswith(_MAIN) else InputError(f"{path}: no such class in the module.")
        raise missing from error
    return found
