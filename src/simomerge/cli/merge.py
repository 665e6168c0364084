"""simomerge merge"""

from __future__ import annotations

from pathlib import Path

import click

from simomerge.cli.options import (
    check_output,
    console,
    data_option,
    json_option,
    output_option,
    overwrite_option,
    parse_pairs,
    parse_parameters,
    say,
)
from simomerge.errors import InputError


@click.command("merge")
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="TASK=EXPERT...")
@click.option("--method", default="task-arithmetic", show_default=True, help="Merge method, such as average or ties.")
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="KEY=VALUE", help="Parameter of the method.")
@click.option("--scale", help="Of the merged task vector: a number, or 'auto' (needs labelled validation data).")
@data_option
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="Images for --scale auto.")
@output_option()
@overwrite_option
@json_option
def command(
    base: str,
    experts: tuple[str, ...],
    method: str,
    parameters: tuple[str, ...],
    scale: str | None,
    data: str,
    count: int,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge the EXPERTs' encoders, fine-tuned from BASE, into one model with all their heads.

    \b
    simomerge merge rooms-base depth=runs/depth normals=runs/normals --method ties --scale 0.4 -o runs/scene
    """
    check_output(output, overwrite)
    named = parse_pairs(experts)
    chosen = parse_parameters(parameters)
    from simomerge.assemble import load_experts, merge
    from simomerge.datasets import load_data
    from simomerge.merging import get_method
    from simomerge.model import load

    wanted: float | str | None = scale
    if scale is not None and scale != "auto":
        try:
            wanted = float(scale)
        except ValueError:
            raise InputError(f"--scale {scale}: give a number, or 'auto'.") from None
    given = chosen if wanted is None else {**chosen, "scale": 1.0 if wanted == "auto" else wanted}
    get_method(method, **given)  # a misspelt name or parameter is told before anything is read
    validation = load_data(data, split="val", count=count, tasks=list(named)) if wanted == "auto" else None
    with console() as progress:
        model = merge(
            load(base), load_experts(**named), method, scale=wanted, validation=validation, progress=progress, **chosen
        )
    model.save_pretrained(output, overwrite)
    made = model.provenance["merge"]
    settings = ", ".join(f"{key} {value}" for key, value in made.items() if key != "method")
    say(
        as_json,
        {"output": str(output), "tasks": list(model.tasks), "merge": made},
        f"Merged {', '.join(model.tasks)} by {made['method']}" + (f" ({settings})." if settings else "."),
        f"Model: {output}",
        f"Next: simomerge realign {output} --data {data} -o {output}-realigned   (the heads no longer fit)",
    )
