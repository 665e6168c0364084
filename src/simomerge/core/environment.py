"""Checks of the installation."""

from __future__ import annotations

import json
import platform
from importlib import import_module, metadata
from urllib.parse import urlparse
from urllib.request import url2pathname

from simomerge.core.version import __version__


def torchvision_version() -> str:
    """The version of torchvision, which is optional; empty if it is not installed.

    Raises:
        RuntimeError: It is installed but cannot be imported; the message names the remedy.
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
    """The message about a torchvision that cannot be imported, which causes errors elsewhere; empty if it can."""
    try:
        torchvision_version()
    except RuntimeError as error:
        return str(error)
    return ""


_OF_TORCH = ("accelerate", "loky", "matplotlib", "PIL", "pydantic", "torch", "torchmetrics", "transformers")
_EXTRAS = {**dict.fromkeys(_OF_TORCH, "torch"), "gradio": "app"}
"""Package -> the extra that installs it. The core is installed without them."""


def install_command(extra: str) -> str:
    """The command that adds an extra to this installation: from its clone or its file, if it came from one.

    pip records where a package came from in ``direct_url.json`` (PEP 610).

    Example:
        >>> install_command("torch").endswith('[torch]"')
        True
    """
    try:
        recorded = json.loads(metadata.distribution("simomerge").read_text("direct_url.json") or "{}")
        source = urlparse(recorded.get("url", ""))
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        recorded, source = {}, urlparse("")
    if source.scheme != "file":
        return f'pip install "simomerge[{extra}]"'
    editable = "-e " if recorded.get("dir_info", {}).get("editable") else ""
    return f'pip install {editable}"{url2pathname(source.path)}[{extra}]"'


def missing_extra(error: ImportError) -> str:
    """The message about a package of an extra that is not installed; empty for any other error.

    Example:
        >>> missing_extra(ModuleNotFoundError("No module named 'torch'", name="torch")).partition(":")[0]
        'this needs torch, which is not installed'
    """
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return ""
    return f"this needs {package}, which is not installed: {install_command(_EXTRAS[package])}."


def versions() -> dict[str, str]:
    """The versions on which results depend, on this machine."""
    found = {"python": platform.python_version(), "simomerge": __version__}
    for package in ("torch", "transformers", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found
