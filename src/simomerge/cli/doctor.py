"""simomerge doctor"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import Table, say
from simomerge.core.environment import missing_extra, torchvision_version

PACKAGES = ("torch", "transformers", "accelerate", "torchmetrics", "safetensors", "numpy", "PIL", "matplotlib")


@click.command("doctor")
@options.as_json
def command(as_json: bool) -> None:
    """Check versions, the device, the disk, the cache and the embedded base, and say what to fix."""
    checks: dict[str, Callable[[], str]] = {
        "python": lambda: sys.version.split()[0],
        **{name: partial(_import, name) for name in PACKAGES},
        "torchvision": lambda: torchvision_version() or "not installed (not needed)",
        "device": _device,
        "cache folder": _cache,
        "embedded base": _base,
    }
    rows = [_run(name, check) for name, check in checks.items()]
    failed = [row["name"] for row in rows if not row["ok"]]
    cells = [("ok" if row["ok"] else "FAIL", row["name"], row["found"]) for row in rows]
    table = Table(("state", "check", "found"), cells, ["" if row["ok"] else "red" for row in rows])
    verdict = f"To fix: {', '.join(failed)}." if failed else "Everything works. Next: simomerge demo"
    say(as_json, {"checks": rows, "ok": not failed}, table, verdict)
    if failed:
        sys.exit(1)


def _run(name: str, check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "found": check()}
    except Exception as error:  # Whatever is broken, the other checks still run.
        missing = missing_extra(error) if isinstance(error, ImportError) else ""
        found = missing or " ".join(str(error).split())[:200] or type(error).__name__
        return {"name": name, "ok": False, "found": found}


def _import(name: str) -> str:
    return str(getattr(import_module(name), "__version__", "found"))


def _device() -> str:
    import torch

    from simomerge.core.machine import available_cores, mixed_precision

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {available_cores()} cores"
    return f"{device}, training in {'bfloat16' if mixed_precision() == 'bf16' else 'float32'}"


def _cache() -> str:
    import shutil
    import tempfile

    from simomerge.datasets.rooms.cache import cache_folder

    folder = Path(cache_folder(None))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free / 1e9
    return f"{folder}, {free:.0f} GB free"


def _base() -> str:
    from simomerge.models.model import load

    encoder = load("rooms-base").encoder
    return f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters"
