"""simomerge doctor"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.next_step import next_step
from simomerge.cli.output import Table, say
from simomerge.core.environment import install_command, missing_extra, torchvision_version
from simomerge.core.version import __version__

PACKAGES = ("safetensors", "numpy")
WITH_TORCH = ("torch", "transformers", "accelerate", "torchmetrics", "PIL", "matplotlib")


@click.command("doctor")
@options.as_json
def command(as_json: bool) -> None:
    """Check versions, torch's build, the GPU, caches, the embedded base and the extras, and say what to fix."""
    rows = [_run(name, check) for name, check in checks().items()]
    failed = [row["name"] for row in rows if not row["ok"]]
    cells = [("ok" if row["ok"] else "FAIL", row["name"], row["found"]) for row in rows]
    table = Table(("state", "check", "found"), cells, ["" if row["ok"] else "red" for row in rows])
    verdict = f"To fix: {', '.join(failed)}." if failed else "Everything works."
    if not failed and not _has_torch():
        verdict = f"Everything works that needs no torch. To train, predict or export: {install_command('torch')}."
    hint = [] if failed or not _has_torch() else [next_step("demo")]
    say(as_json, {"checks": rows, "ok": not failed}, table, verdict, *hint)
    if failed:
        sys.exit(1)


def checks() -> dict[str, Callable[[], str]]:
    """The checks by name. Without torch, which merging and the runtime do not need, those that need it are left out."""
    found: dict[str, Callable[[], str]] = {
        "simomerge": lambda: f"{__version__} in {Path(__file__).parents[1]}",
        "python": lambda: sys.version.split()[0],
        **{name: partial(_import, name) for name in PACKAGES},
    }
    if _has_torch():
        found |= {
            **{name: partial(_import, name) for name in WITH_TORCH},
            "torchvision": lambda: torchvision_version() or "not installed (not needed)",
            "torch build": _build,
            "device": _device,
        }
    found |= {"cache folder": _cache, "hub": _hub} | ({"embedded base": _base} if _has_torch() else {})
    return found | {f"extra {name}": partial(_extra, packages) for name, packages in extras().items()}


def _has_torch() -> bool:
    try:
        return find_spec("torch") is not None
    except ValueError:  # it was set to None among the imported modules
        return False


def _run(name: str, check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "found": check()}
    except Exception as error:  # Whatever is broken, the other checks still run.
        missing = missing_extra(error) if isinstance(error, ImportError) else ""
        found = missing or " ".join(str(error).split())[:200] or type(error).__name__
        return {"name": name, "ok": False, "found": found}


def _import(name: str) -> str:
    return str(getattr(import_module(name), "__version__", "found"))


def extras() -> dict[str, list[str]]:
    """The extras of the installed distribution -> the packages that each needs; none if it is not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("simomerge") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line)
        if match and match[1] != "simomerge" and match[2] != "dev":
            found.setdefault(match[2], []).append(match[1])
    return found


def _extra(packages: Sequence[str]) -> str:
    """An extra that is not installed is no fault."""
    from importlib.metadata import PackageNotFoundError, version

    for name in packages:
        try:
            version(name)
        except PackageNotFoundError:
            return f"not installed ({name} is missing)"
    return "installed"


def _build() -> str:
    """What torch was built for, and the GPUs that it sees."""
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if not torch.cuda.is_available():
        return f"{cuda}, no GPU is usable"
    names = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    return f"{cuda}, " + ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in names)


def _hub() -> str:
    """The cache of the hub, whether it may be asked, and whether a token is known; never the token itself."""
    from huggingface_hub import constants, get_token

    folder = Path(constants.HF_HUB_CACHE)
    models = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "online when needed"
    return f"{folder}, {models} models, {state}, {'a' if get_token() else 'no'} token"


def _device() -> str:
    import torch

    from simomerge.core.machine import available_cores, mixed_precision

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {available_cores()} cores"
    return f"{device}, training in {'bfloat16' if mixed_precision() == 'bf16' else 'float32'}"


def _cache() -> str:
    import shutil
    import tempfile

    from simomerge.core.files import cache_folder

    folder = Path(cache_folder(None))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free / 1e9
    return f"{folder}, {free:.0f} GB free"


def _base() -> str:
    from simomerge.models.model import load

    encoder = load("rooms-base").encoder
    return f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters"
