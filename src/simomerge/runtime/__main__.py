"""The command line on the device.

python -m simomerge.runtime check scene.onnx        # compare with scene.onnx.golden.npz
python -m simomerge.runtime info scene.onnx         # the description in the file
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from simomerge.core.errors import InputError
from simomerge.core.text import one_line
from simomerge.runtime.golden import check
from simomerge.runtime.scene import Scene


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 1 if a check failed, or 2 if the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m simomerge.runtime", description="Check an exported model.")
    parser.add_argument("command", choices=("check", "info"), help="compare with torch, or show the description")
    parser.add_argument("file", help="scene.onnx, scene.xml or scene.encoder.onnx")
    parser.add_argument("--provider", action="append", help="cpu, cuda, tensorrt, ...; may be repeated")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(arguments)
    try:
        if given.command == "info":
            print(json.dumps(Scene(given.file, given.provider, given.threads).info, indent=2))
            return 0
        result = check(given.file, given.provider, given.threads)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for row in result["rows"]:
        verdict = "ok" if row["ok"] else "DIFFERS"
        found = f"{row['difference']:.4g} (limit {row['limit']:g})"
        print(one_line(f"{row['output']:<20} {found} {row['measure']}  {verdict}"))
    print(f"{result['milliseconds']:.1f} ms per frame")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
