"""Tensors that are one on disk and several in memory, and every family's names in both places."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from simomerge.checkpoints import canonicalise, fingerprint, open_checkpoint, write_safetensors
from simomerge.checkpoints.parts import joined, parts_of, separated
from simomerge.merging import available, get_method, merge_state_dicts
from simomerge.merging.disk.compress import compress, restore
from simomerge.merging.disk.diff import diff_on_disk
from simomerge.merging.disk.edit import edit_on_disk
from simomerge.merging.disk.merge import merge_on_disk

PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WINDOWS = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "use_absolute_embeddings": True,
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SWIGLU = {**PLAIN, "mlp_ratio": 2, "use_swiglu_ffn": True}
WIDE = {**PLAIN, "intermediate_size": 24}
MASK = {"use_mask_token": True}

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dinov2": ("Dinov2", {**PLAIN, "mlp_ratio": 2}, {}),
    "dinov2 giant": ("Dinov2", SWIGLU, {}),
    "dinov2 with registers, giant": ("Dinov2WithRegisters", SWIGLU, {}),
    "beit": ("Beit", {**WIDE, "use_relative_position_bias": True}, {}),
    "beit, absolute positions": ("Beit", {**WIDE, "use_absolute_position_embeddings": True}, {}),
    "beit, shared bias": ("Beit", {**WIDE, "use_shared_relative_position_bias": True, **MASK}, {}),
    "beit, both biases": (
        "Beit",
        {**WIDE, "use_relative_position_bias": True, "use_shared_relative_position_bias": True},
        {},
    ),
    "dinov3, gated": ("DINOv3ViT", {**WIDE, "use_gated_mlp": True, "query_bias": True, "key_bias": True}, {}),
    "dinov3 convnext": ("DINOv3ConvNext", STAGES, {}),
    "vit": ("ViT", WIDE, MASK),
    "deit": ("DeiT", WIDE, MASK),
    "clip": ("CLIPVision", WIDE, {}),
    "siglip": ("SiglipVision", WIDE, {}),
    "swin": ("Swin", WINDOWS, MASK),
    "swinv2": ("Swinv2", WINDOWS, MASK),
    "convnext": ("ConvNext", STAGES, {}),
    "convnextv2": ("ConvNextV2", STAGES, {}),
    "resnet": ("ResNet", {**STAGES, "embedding_size": 8}, {}),
    "pvt v2": ("PvtV2", {**STAGES, "num_attention_heads": [1, 1, 2, 2], "linear_attention": True}, {}),
}


def made(variant: str) -> Any:
    family, settings, arguments = VARIANTS[variant]
    torch.manual_seed(0)
    return getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**settings), **arguments)


def tuned(base: Any, seed: int) -> Any:
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_var", "running_mean")):
                buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_tensors_on_disk_and_in_memory(tmp_path: Path, variant: str) -> None:
    base = made(variant)
    experts = {task: tuned(base, seed) for seed, task in enumerate(("a", "b"), start=1)}
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(tmp_path / name)
        stored = open_checkpoint(tmp_path / name)
        assert set(canonicalise(separated(stored))) == set(canonicalise(model.state_dict()))
        assert fingerprint(stored) == fingerprint(model.state_dict())
    folders = {task: tmp_path / task for task in experts}
    states = {task: expert.state_dict() for task, expert in experts.items()}
    for method in ("task-arithmetic", "iso-c"):
        merge_on_disk(tmp_path / "base", folders, tmp_path / method, method)
        expected = merge_state_dicts(base.state_dict(), states, method)
        assert set(open_checkpoint(tmp_path / method)) == set(open_checkpoint(tmp_path / "base"))
        loaded = type(base).from_pretrained(tmp_path / method).state_dict()
        assert expected.keys() - loaded.keys() <= {"embeddings.mask_token"}  # which loading leaves out
        for name, values in loaded.items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-6)


# One and several ----------------------------------------------------------------------------------------

WHOLE = "backbone.encoder.layer.1.mlp.weights_in"
GATE, UP = "backbone.encoder.layer.1.mlp.gate_proj", "backbone.encoder.layer.1.mlp.up_proj"


def whole(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    shapes = {f"{WHOLE}.weight": (6, 4), f"{WHOLE}.bias": (6,), "norm.weight": (5,)}
    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}


def in_parts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    weight, bias = tensors[f"{WHOLE}.weight"], tensors[f"{WHOLE}.bias"]
    return {
        f"{GATE}.weight": weight[:3],
        f"{UP}.weight": weight[3:],
        f"{GATE}.bias": bias[:3],
        f"{UP}.bias": bias[3:],
        "norm.weight": tensors["norm.weight"],
    }


def test_the_view(tmp_path: Path) -> None:
    tensors = whole(0)
    expected = in_parts(tensors)
    stored = open_checkpoint(write_safetensors(tmp_path / "w.safetensors", tensors, "F16"))
    assert separated(expected) is expected
    for given, tolerance in ((tensors, 0.0), (stored, 1e-2)):
        view = separated(given)
        assert set(view) == set(expected) and len(view) == 5 and separated(view) is view
        for name, values in expected.items():
            np.testing.assert_allclose(view[name], values, atol=tolerance)
            assert view.info(name).shape == values.shape
            for part in (slice(None), slice(1, 3), slice(2, 99), slice(0, None, 2), slice(1, None, 3)):
                found = view.flat(name, part)
                np.testing.assert_allclose(found, values.reshape(-1)[part], atol=tolerance)
        for name in tensors:
            np.testing.assert_array_equal(joined(name, view.__getitem__), given[name])
    assert separated(stored).path == tmp_path / "w.safetensors"
    assert parts_of("layers.0.mlp.weights_in.weight") == ("layers.0.mlp.weights_in.weight",)


@pytest.mark.parametrize("method", [name for name, method in available().items() if not method.needs_data])
@pytest.mark.parametrize("sample", [250_000, 5], ids=["all entries", "a sample of them"])
def test_every_method_merges_both_forms_alike(method: str, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simomerge.merging.engine.ranks._SAMPLE", sample)
    base, experts = whole(0), {"a": whole(1), "b": whole(2)}
    chosen = get_method(method)
    mixed = {"a": experts["a"], "b": in_parts(experts["b"])}
    expected = merge_state_dicts(in_parts(base), {task: in_parts(given) for task, given in experts.items()}, chosen)
    for given in (experts, mixed):
        merged = merge_state_dicts(base, given, chosen)
        assert list(merged) == list(base)
        for name, values in in_parts(merged).items():
            np.testing.assert_array_equal(values, expected[name])


def test_files_keep_the_form_of_the_base(tmp_path: Path) -> None:
    files = {
        name: write_safetensors(tmp_path / f"{name}.safetensors", whole(seed))
        for seed, name in enumerate(("base", "a", "b"))
    }
    split = write_safetensors(tmp_path / "split.safetensors", in_parts(whole(1)))
    assert diff_on_disk(files["a"], split)[0].distance == 0
    compress(files["base"], {"a": split, "b": files["b"]}, tmp_path / "compressed", dtype="F32")
    compress(files["base"], {"a": files["a"], "b": files["b"]}, tmp_path / "compressed-2", dtype="F32")
    for number, folder in enumerate(("compressed", "compressed-2")):
        restore(tmp_path / folder, "a", tmp_path / f"{number}.safetensors")
    first, second = (open_checkpoint(tmp_path / f"{number}.safetensors") for number in range(2))
    assert set(first) == set(whole(0))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.filterwarnings("ignore")
def test_an_edit_of_a_giant(tmp_path: Path) -> None:
    from simomerge.datasets.tasks import Task
    from simomerge.models.heads import head_for
    from simomerge.models.model import SimoModel, load

    base = made("dinov2 giant")
    base.save_pretrained(tmp_path / "base")
    foundation = load(tmp_path / "base")
    origin = {"base": {"source": "base", "fingerprint": foundation.encoder_fingerprint()}}
    paths = {}
    for seed, task in enumerate(("depth", "normals"), start=1):
        encoder = copy.deepcopy(foundation.encoder)
        with torch.no_grad():
            for parameter in encoder.backbone.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        head = head_for(encoder, "linear", 1 if task == "depth" else 3)
        paths[task] = SimoModel(encoder, {task: Task(task)}, {task: head}, origin).save_pretrained(tmp_path / task)
    merge_on_disk(tmp_path / "base", paths, tmp_path / "both", "average")
    merge_on_disk(tmp_path / "base", {"depth": paths["depth"]}, tmp_path / "one", "average")
    edit_on_disk(tmp_path / "both", tmp_path / "base", tmp_path / "edited", remove={"normals": paths["normals"]})
    edited, expected = open_checkpoint(tmp_path / "edited"), open_checkpoint(tmp_path / "one")
    assert set(edited) == set(expected)
    for name in expected:
        np.testing.assert_allclose(edited[name], expected[name], rtol=0, atol=1e-6)
