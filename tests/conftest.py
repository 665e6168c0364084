"""Fixtures shared by all tests: no network, one thread, one tiny base encoder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import copy
import itertools
import json
import re
from contextlib import contextmanager

import pytest
import torch

from simomerge.core.errors import InputError

torch.set_num_threads(1)

NORMALISATION = {"image_mean": [0.5, 0.45, 0.4], "image_std": [0.25, 0.24, 0.23]}
"""Normalisation of the tiny base. It differs from ImageNet's, so that a test notices whether the file was read."""

ABBREVIATIONS = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|al)\.|\.{2,}|…")


def sentences(message):
    """The sentences of a message. Each ends with ``.``, ``!`` or ``?`` before a space; file names have no such dot.

    Example:
        >>> sentences("a.pt holds 0.5, e.g. a number. Give text, number, ...")
        ['a.pt holds 0.5,  a number', ' Give text, number, ']
    """
    return [part for part in re.split(r"[.!?](?=\s|$)", ABBREVIATIONS.sub("", message)) if part.strip()]


@pytest.fixture(autouse=True)
def short_messages(monkeypatch):
    """Fail every test that provokes an InputError whose message has more than three sentences."""
    messages = []

    def recorded(self, *arguments):
        ValueError.__init__(self, *arguments)
        messages.append(str(self))

    monkeypatch.setattr(InputError, "__init__", recorded)
    yield
    assert [message for message in messages if len(sentences(message)) > 3] == []


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """An empty cache of this session's own, as SIMOMERGE_CACHE."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMOMERGE_CACHE", str(folder))
        yield folder


@pytest.fixture
def interrupted():
    """A context in which a training is interrupted, as by Ctrl-C, in the step of the given number from its start."""
    from simomerge.training.loop import _Trainer

    @contextmanager
    def context(number):
        step, calls = _Trainer._step, itertools.count(1)

        def replaced(*arguments):
            if next(calls) == number:
                raise KeyboardInterrupt
            return step(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Trainer, "_step", replaced)
            yield

    return context


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """The folder of a random Dinov2Model: 32 channels, 4 blocks, patches of 8 pixels. Do not write into it."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("tiny") / "base"
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        patch_size=8,
        image_size=80,
        mlp_ratio=2,
        layerscale_value=1.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(NORMALISATION))
    return folder


@pytest.fixture(scope="session")
def make_model(tiny_base):
    """``make_model(tasks, head="linear", seed=0)``: a SimoModel on the tiny base.

    ``tasks`` is a mapping of names to Tasks, or an iterable of Tasks. Heads differ with the seed.
    """
    from simomerge.models.encoders import load_encoder
    from simomerge.models.heads import build_head
    from simomerge.models.model import SimoModel

    loaded = load_encoder(tiny_base)

    def make(tasks, head="linear", seed=0):
        tasks = dict(tasks) if hasattr(tasks, "keys") else {task.name: task for task in tasks}
        encoder = copy.deepcopy(loaded)  # far quicker than to load it again
        settings = {"dpt": {"fusion_channels": 8}}.get(head)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = {name: build_head(head, encoder.channels, t.channels, settings) for name, t in tasks.items()}
        return SimoModel(encoder, tasks, heads).eval()

    return make


@pytest.fixture(scope="session")
def nudged():
    """Add noise to the weights of a model's backbone, as fine-tuning would; returns the generator for further noise."""
    import torch

    def nudge(model, seed, size):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.encoder.backbone.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        return generator

    return nudge


@pytest.fixture(scope="session")
def experts_by_dice(make_model, nudged):
    """``experts_by_dice(tasks, base, size)``: an expert per task, with noise of this size in the backbone.

    Their linear heads have something to say, and they record the base, which is called the-base.
    """
    import torch

    def make(tasks, base, size):
        found = {}
        for seed, (name, task) in enumerate(tasks.items(), start=1):
            expert = make_model({name: task}, seed=seed)
            generator = nudged(expert, seed, size)
            with torch.no_grad():
                expert.heads[name].output.weight.normal_(generator=generator).mul_(0.3)
            expert.provenance = {"base": {"source": "the-base", "fingerprint": base.encoder_fingerprint()}}
            found[name] = expert
        return found

    return make


@pytest.fixture
def float32(monkeypatch):
    """Training and inference in float32: comparisons to the last bit must not depend on the machine."""
    from accelerate.state import AcceleratorState

    from simomerge.core.machine import PRECISION

    monkeypatch.setenv(PRECISION, "fp32")
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision it was made with
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
