"""Three tiny experts for a first look: the embedded encoder, fine-tuned on rooms for three tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from simomerge.core.files import cache_folder
from simomerge.core.progress import labelled_progress
from simomerge.core.version import __version__
from simomerge.datasets.load import data_record, load_data
from simomerge.datasets.rooms import RENDER_VERSION
from simomerge.models.model import SimoModel, load
from simomerge.training.familiarity import training_images
from simomerge.training.lpft import fresh_head, lpft
from simomerge.training.settings import TrainSettings

TASKS = ("segmentation", "depth", "normals")
IMAGES = 192
PROBE = TrainSettings(steps=40, batch_size=32, lr=4e-3)
TUNE = TrainSettings(steps=50, batch_size=16, lr=2e-3, encoder_lr=4e-4)
"""Few steps: the experts are for looking at, not for numbers. `simomerge demo` trains better ones."""


def tiny_experts() -> dict[str, SimoModel]:
    """The experts by task, from the cache folder, or trained into it now, which takes about a minute."""
    folder = Path(cache_folder(None)) / f"tiny-experts-{__version__}-{RENDER_VERSION}"
    found = {}
    for number, task in enumerate(TASKS, start=1):
        if not (folder / task / "simo.json").is_file():
            with labelled_progress(f"{task}, tiny expert {number} of {len(TASKS)}"):
                _train(task).save_pretrained(folder / task, overwrite=True)
        found[task] = load(folder / task)
    return found


def _train(task: str) -> SimoModel:
    data = load_data("rooms", split="train", count=IMAGES, tasks=[task])
    encoder = load("rooms-base").encoder
    head = fresh_head(encoder, data.tasks[task], data, "linear", subpixels=4)
    model = SimoModel(encoder, data.tasks, {task: head})
    base = {"source": "rooms-base", "fingerprint": model.encoder_fingerprint()}
    lpft(model, data, PROBE, TUNE)
    training = {"method": "lp-ft", **data_record("rooms"), "probe": asdict(PROBE), "tune": asdict(TUNE)}
    model.provenance = {"base": base, "training": {**training, **training_images(model, data)}}
    return model.eval()
