"""simomerge methods"""

from __future__ import annotations

import click

from simomerge.cli.options import json_option, say


@click.command("methods")
@click.argument("names", nargs=-1)
@click.option("--markdown", is_flag=True, help="Print the list as docs/methods.md.")
@json_option
def command(names: tuple[str, ...], markdown: bool, as_json: bool) -> None:
    """List the merge methods with their parameters: all of them, or those in NAMES."""
    from simomerge.merging import get_method
    from simomerge.merging.table import method_rows, methods_markdown

    if markdown:
        click.echo(methods_markdown(), nl=False)
        return
    for name in names:
        get_method(name)  # Raises an error for an unknown name.
    rows = [row for row in method_rows() if not names or row["name"] in names]
    lines = []
    for row in rows:
        lines += [f"{row['name']}  (needs {row['needs']})", f"    {row['summary']}"]
        lines += [f"    -p {name}={text}" for name, text in row["parameters"].items()]
        lines.append(f"    {row['paper']}, {row['link']}")
    say(as_json, {"methods": rows}, *lines)
