"""What may be wrong with an installation."""

from __future__ import annotations

from importlib import import_module, metadata


def torchvision_version() -> str:
    """The version of torchvision, which need not be there; empty where it is not.

    Raises:
        RuntimeError: it is there and does not import; the message says what to do.
    """
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return ""
    try:
        import_module("torchvision")
    except Exception as error:
        raise RuntimeError(
            f"torchvision {version} is broken ({error}) and breaks transformers and torchmetrics:"
            " `pip uninstall torchvision`; simomerge does not need it."
        ) from error
    return version


def broken_torchvision() -> str:
    """What to say of a torchvision that does not import, for errors that it causes elsewhere; empty where it does."""
    try:
        torchvision_version()
    except RuntimeError as error:
        return str(error)
    return ""
