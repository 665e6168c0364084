"""A base and experts of it, in every form that a merge takes them in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simomerge.checkpoints import fingerprint, open_checkpoint, write_safetensors

TASKS = ("depth", "normals", "edges")
Tensors = dict[str, np.ndarray]


def weights(seed: int = 0, spread: float = 0.05) -> Tensors:
    """An encoder of two blocks with a counter; of another seed, a fine-tuning of it."""
    rng = np.random.default_rng(0)
    shapes = {"embeddings.cls_token": (1, 1, 6), "layernorm.weight": (6,), "scalar": ()}
    for block in range(2):
        shapes |= {f"encoder.layer.{block}.mlp.fc1.weight": (9, 6), f"encoder.layer.{block}.norm1.bias": (6,)}
    made = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    if seed:
        rng = np.random.default_rng(seed)
        changes = {name: spread * rng.standard_normal(array.shape) for name, array in made.items()}
        made = {name: np.asarray(array + changes[name], np.float32) for name, array in made.items()}
    return made | {"steps": np.array([7 + seed])}


def content(folder: Path) -> dict[str, bytes]:
    """Everything in it, hidden files too: what is not there is not left behind."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors_of(path: Path) -> Tensors:
    checkpoint = open_checkpoint(path)
    return {name: np.array(checkpoint[name]) for name in checkpoint}


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 0.0) -> None:
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Bare files: base.safetensors and one for every task."""
    made = {task: weights(seed) for seed, task in enumerate(("base", *TASKS))}
    return {name: write_safetensors(tmp_path / f"{name}.safetensors", tensors) for name, tensors in made.items()}


@pytest.fixture(scope="session")
def shared_models(tiny_base: Path, make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders, fine-tuned by dice from the tiny base, as they record. Do not write into them."""
    from simomerge.datasets.tasks import Task

    folder = tmp_path_factory.mktemp("experts")
    origin = {"source": "base", "fingerprint": fingerprint(open_checkpoint(tiny_base))}
    paths = {}
    for seed, task in enumerate(TASKS, start=1):
        model = make_model([Task(task, task)], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.encoder.backbone.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        model.provenance = {"base": origin}
        paths[task] = model.save_pretrained(folder / task)
    return paths


@pytest.fixture
def models(shared_models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the model folders of two tasks, to be damaged."""
    return {task: Path(shutil.copytree(shared_models[task], tmp_path / task)) for task in TASKS[:2]}


@pytest.fixture
def folder_of(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """``folder_of(name, seed)``: a transformers folder of a model fine-tuned from the tiny base."""

    def make(name: str, seed: int) -> Path:
        rng = np.random.default_rng(seed)
        base = open_checkpoint(tiny_base)
        changed = {n: base[n] + 0.01 * rng.standard_normal(base[n].shape).astype(np.float32) for n in base}
        write_safetensors(tmp_path / name / "model.safetensors", changed)
        for file in ("config.json", "preprocessor_config.json"):
            shutil.copyfile(tiny_base / file, tmp_path / name / file)
        return tmp_path / name

    return make


@pytest.fixture
def adapter_of(tmp_path: Path) -> Callable[..., tuple[Path, np.ndarray]]:
    """``adapter_of(name, tensor, shape)``: a peft LoRA folder, and what it adds to the tensor ``tensor``.weight."""

    def make(name: str, module: str, shape: tuple[int, int], rank: int = 2) -> tuple[Path, np.ndarray]:
        rng = np.random.default_rng(rank)
        b, a = (0.2 * rng.standard_normal(size, np.float32) for size in ((shape[0], rank), (rank, shape[1])))
        factors = {"A": a, "B": b}
        write_safetensors(
            tmp_path / name / "adapter_model.safetensors",
            {f"base_model.model.{module}.lora_{side}.weight": factor for side, factor in factors.items()},
        )
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 3 * rank}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        return tmp_path / name, 3 * b @ a

    return make
