"""simomerge inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from simomerge.cli import options
from simomerge.cli.output import say
from simomerge.core.text import plain


@click.command("inspect")
@click.argument("path", type=options.place)
@options.as_json
def command(path: str, as_json: bool) -> None:
    """Describe PATH, a model folder, an encoder folder or a checkpoint file, without loading the model."""
    from simomerge.checkpoints import fingerprint, open_checkpoint
    from simomerge.core.hub import local_source

    source = local_source(path, bare=False)
    checkpoint = open_checkpoint(source)
    infos = [checkpoint.info(name) for name in checkpoint]
    found: dict[str, Any] = {
        "path": path,
        "tensors": len(infos),
        "parameters": sum(info.size for info in infos if info.is_float),
        "dtypes": sorted({info.dtype for info in infos}),
        "fingerprint": fingerprint(checkpoint),
    }
    if (Path(source) / "simo.json").is_file():
        from simomerge.checkpoints import read_description

        found["model"] = read_description(Path(source))
        files = [*Path(source).glob("branches/*.safetensors"), *Path(source).glob("stitches.safetensors")]
        parts = list(map(open_checkpoint, sorted(files)))
        found["branch_parameters"] = sum(part.info(name).size for part in parts for name in part)
    say(as_json, found, *_lines(found))


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['path']}: encoder of {found['parameters'] / 1e6:.2f} M parameters in {found['tensors']} tensors"
        f" ({', '.join(found['dtypes'])})",
        f"  fingerprint  {found['fingerprint']}",
    ]
    model = found.get("model")
    if not model:
        return lines
    for name, task in model["tasks"].items():
        head = model["heads"][name]["kind"]
        lines.append(f"  task {name}: {task.get('kind', name)}, {head} head")
    encoder = model["encoder"]
    if encoder.get("taps"):
        norm = "on" if encoder.get("apply_layernorm") else "off"
        lines.append(f"  taps {', '.join(map(str, encoder['taps']))}, final layer norm {norm}")
    if encoder.get("tree"):
        lines += _tree(encoder, model["provenance"].get("merge", {}).get("cost"), found["branch_parameters"])
    if model["adapters"]:
        lines.append(f"  adapters of rank {model['adapters']['rank']}")
    for key, value in model["provenance"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in value.items())
        lines.append(f"  {key}: {plain(value)}")
    return [*lines, *_measured(model.get("evaluation"))]


def _tree(encoder: dict[str, Any], recorded: float | None, parameters: int) -> list[str]:
    """The tree of shared blocks, and its cost as the merge recorded it, which is that with all tasks."""
    from simomerge.merging.tree import Tree

    tree, rank = Tree.read(encoder["tree"]), encoder.get("branch_rank")
    cost = "" if recorded is None else f"cost {plain(recorded)}"
    if "kept" in encoder or not cost:
        tree = tree.without([task for task in tree.tasks if task not in encoder.get("kept", tree.tasks)])
        cost = f"{tree.cost():.2f} encoders if all blocks cost the same" + (f" (all tasks: {cost})" if cost else "")
    return [
        f"  shared blocks, {cost}; {parameters / 1e6:.2f} M parameters more in branches and stitches"
        + (":" if rank is None else f"; own blocks are differences of rank {rank} to shared weights:"),
        *(f"    {line}" for line in tree.drawing().splitlines()),
    ]


def _measured(evaluation: dict[str, Any] | None) -> list[str]:
    """The figures that the folder records."""
    if not evaluation:
        return []
    shown = [
        f"{row['task']} {row['metric']} {row['value']:.4g} {row['unit']}".rstrip() for row in evaluation["metrics"]
    ]
    delta = evaluation.get("delta_mtl")
    shown += [] if delta is None else [f"Delta_MTL {delta:+.2f} %"]
    where = f"{evaluation['images']} images of {evaluation['data']} ({evaluation['split']})"
    return [f"  measured on {where}: {', '.join(shown)}"]


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):  # The merges that were tried.
        return f"{len(value)} merges"
    if isinstance(value, dict):
        return str(value.get("source") or value.get("fingerprint", "")[:12] or value.get("method") or plain(value))
    return value[:12] if isinstance(value, str) and len(value) == 64 else plain(value)
