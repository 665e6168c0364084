"""simomerge predict"""

from __future__ import annotations

from pathlib import Path

import click

from simomerge.cli import options
from simomerge.cli.output import console, say
from simomerge.core.errors import InputError


@click.command("predict")
@click.argument("model")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@options.folder(None, "Folder to write (OUT).", required=True)
@options.trust_code
@options.as_json
def command(model: str, images: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Predict every task of MODEL for each IMAGE. Writes a coloured PNG and the values as NPY for each task.

    All files are checked first, then each image is read when its turn comes.
    """
    import numpy as np
    from PIL import Image

    from simomerge.core.files import atomic_file
    from simomerge.core.images import check_image, read_image
    from simomerge.core.progress import progress
    from simomerge.datasets.stored import may_be_truncated
    from simomerge.datasets.tasks import colourise
    from simomerge.models.model import load

    for path in images:  # before anything is written
        check_image(path)
        if may_be_truncated(Path(path)):
            read_image(path)
    stems = [Path(path).stem for path in images]
    unique = len(set(stems)) == len(stems)
    names = stems if unique else [f"{stem}-{i}" for i, stem in enumerate(stems, start=1)]
    predictor = load(model)
    if not predictor.tasks:
        raise InputError(f"{model}: an encoder without heads predicts nothing; give an expert or a merged model.")
    output.mkdir(parents=True, exist_ok=True)
    written = []
    with console():
        for done, (name, path) in enumerate(zip(names, images, strict=True), start=1):
            for task, values in predictor.predict(path).items():
                with atomic_file(output / f"{name}-{task}.npy") as file:
                    np.save(file, values)
                picture = output / f"{name}-{task}.png"
                with atomic_file(picture) as file:
                    Image.fromarray(colourise(predictor.tasks[task], values)).save(file, "PNG")
                written.append(str(picture))
            progress("predict", done, len(names), "")
    say(as_json, {"written": written}, *written)
