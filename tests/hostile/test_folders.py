"""A downloaded model folder is data: nothing in it runs, and it takes no more memory than its files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import simomerge as sm
from simomerge.core.classes import allow, allowed, trusting
from simomerge.core.errors import InputError

EVIL = "from pathlib import Path\nPath(__file__).with_name('RAN').touch()\nclass Thing: pass\n"

Change = Callable[[dict[str, Any]], object]


def head_of(**entry: Any) -> Change:
    return lambda description: description["heads"].update(depth={"settings": {}, **entry})


def encoder_of(**entries: Any) -> Change:
    return lambda description: description["encoder"].update(entries)


@pytest.fixture
def scene(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder next to which Python looks for modules, with a module of its own."""
    make_model([sm.Task("depth")]).save_pretrained(tmp_path / "scene")
    (tmp_path / "scene/evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "scene"


def edit(file: Path, change: Change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        head_of(kind="scene.evil:Thing"),
        head_of(kind="antigravity:X"),  # a module of Python that opens a browser
        head_of(kind="torch.nn:Linear", settings={"in_features": 60000, "out_features": 60000}),
        head_of(kind="surgery", settings={"inner": "scene.evil:Thing"}),
        encoder_of(**{"class": "scene.evil:Thing", "settings": {}}),
    ],
    ids=["head", "module of Python", "class of torch", "inner head", "encoder"],
)
def test_no_folder_runs_code_unasked(scene: Path, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(scene / "simo.json", change)
    monkeypatch.setattr("simomerge.core.classes.import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(InputError, match=r"scene/simo\.json.*runs no code unasked.*register_head.*--trust-code"):
        sm.load(scene)
    assert not (scene / "RAN").exists()


def test_the_command_line_runs_it_only_with_trust_code(scene: Path) -> None:
    edit(scene / "simo.json", encoder_of(**{"class": "scene.evil:Thing", "settings": {}}))
    Image.new("RGB", (32, 32)).save("photo.png")
    command = [sys.executable, "-m", "simomerge", "predict", "scene", "photo.png", "-o", "out"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "runs no code unasked" in refused.stderr and not (scene / "RAN").exists()
    trusted = subprocess.run([*command, "--trust-code"], capture_output=True, text=True)
    assert trusted.returncode == 2 and "not a torch Module" in trusted.stderr and (scene / "RAN").exists()


def test_trust_ends_with_the_call(scene: Path) -> None:
    edit(scene / "simo.json", head_of(kind="scene.evil:Thing"))
    with pytest.raises(InputError, match="not a torch Module"):
        sm.load(scene, trust_code=True)
    assert (scene / "RAN").exists()
    with pytest.raises(InputError, match="runs no code unasked"):
        sm.load(scene)
    with trusting():
        assert allowed()[0]
    assert not allowed()[0]


class Own(nn.Module):
    """A head of the caller's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.settings = {"width": width}
        self.layer = nn.Conv2d(32, width, 1)

    def forward(self, features: Any) -> torch.Tensor:
        return nn.functional.interpolate(self.layer(features.maps[0]), features.padded_size)


def test_a_registered_class_loads_and_fits_its_file(make_model: Any, tmp_path: Path) -> None:
    encoder = make_model([]).encoder
    sm.SimoModel(encoder, {"depth": sm.Task("depth")}, {"depth": Own(1)}).save_pretrained(tmp_path / "own")
    with pytest.raises(InputError, match="register_head"):
        sm.load(tmp_path / "own")
    assert sm.register_head(Own) is Own
    assert type(sm.load(tmp_path / "own").heads["depth"]) is Own
    edit(tmp_path / "own/simo.json", head_of(kind=f"{__name__}:Own", settings={"width": 10**12}))
    with pytest.raises(InputError, match=r"depth\.safetensors: does not fit simo\.json \('layer\.weight' has shape"):
        sm.load(tmp_path / "own")


def test_a_local_class_cannot_be_registered() -> None:
    class Local(nn.Module):
        pass

    with pytest.raises(InputError, match="inside a function"):
        sm.register_encoder(Local)


def test_workers_import_what_their_parent_registered(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simomerge.core.classes._registered", {})
    edit(scene / "simo.json", head_of(kind="scene.evil:Thing"))
    allow(False, ["scene.evil:Thing"])
    with pytest.raises(InputError, match="not a torch Module"):  # it was imported
        sm.load(scene)


# What transformers reads ----------------------------------------------------------------------------------


@pytest.fixture
def encoder(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "encoder"))


def test_transformers_never_asks_to_run_code(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("a prompt"))
    (encoder / "evil.py").write_text(EVIL)
    edit(encoder / "config.json", lambda c: c.update(auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"}))
    assert sm.load(encoder).encoder.channels == (32, 32, 32, 32)  # by the class of transformers
    edit(encoder / "config.json", lambda c: c.update(model_type="evil"))
    with pytest.raises(InputError, match="'evil' is no vision encoder"):
        sm.load(encoder)
    assert not list(encoder.parent.rglob("RAN"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_no_attention_is_fetched_from_the_hub(encoder: Path, key: str) -> None:
    edit(encoder / "config.json", lambda c: c.update({key: "attacker/kernels"}))
    assert sm.load(encoder).encoder.backbone.config._attn_implementation in ("eager", "sdpa")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "dpt", "backbone": "attacker/model"}, "backbone is 'attacker/model'"),
        ({"backbone_config": {"inner": [{"backbone": "attacker/model"}]}}, "backbone is 'attacker/model'"),
        ({"model_type": "dpt", "use_pretrained_backbone": True}, "use_pretrained_backbone is True"),
        ({"model_type": "timm_wrapper", "architecture": "hf-hub:attacker/model"}, "model_type is 'timm_wrapper'"),
        ({"model_type": "dpt", "backbone_config": {"model_type": "timm_backbone"}}, "model_type is 'timm_backbone'"),
        ({"model_type": "detr"}, "(backbone|model_type|use_pretrained_backbone) is"),  # its default
    ],
    ids=str,
)
def test_no_other_model_is_fetched(
    encoder: Path, change: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: pytest.fail("a connection"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    edit(encoder / "config.json", lambda c: c.update(architectures=["DPTForDepthEstimation"], **change))
    for read in (sm.load, lambda folder: sm.import_expert(folder, "depth")):
        with pytest.raises(InputError, match=rf"encoder/config\.json: {key}.*another model would be fetched"):
            read(encoder)


def test_a_head_names_no_other_model(scene: Path) -> None:
    config = {"neck_hidden_sizes": [8] * 4, "backbone": "attacker/model"}
    settings = {"architecture": "DPTForDepthEstimation", "config": config}
    edit(scene / "simo.json", head_of(kind="transformers", settings=settings))
    with pytest.raises(InputError, match=r"simo\.json.*backbone is 'attacker/model', so another model"):
        sm.load(scene)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "conv", "pretrained": True}, "'pretrained'"),
        ({"name": "hf-hub:attacker/model"}, "'hf-hub:attacker/model': a model folder can only name an architecture"),
        ({"name": "local-dir:../other"}, "can only name an architecture"),
        ({"name": "attacker/model"}, "can only name an architecture"),
        ({"name": None}, "can only name an architecture"),
    ],
    ids=str,
)
def test_timm_fetches_nothing_for_a_folder(
    scene: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("timm")
    fake.create_model = lambda *a, **k: pytest.fail("timm was asked")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    edit(scene / "simo.json", encoder_of(**{"class": "simomerge.models.encoders.timm:TimmEncoder"}, settings=settings))
    with pytest.raises(InputError, match=rf"scene/simo\.json.*{message}"):
        sm.load(scene)


def test_an_adapter_in_an_encoder_leads_nowhere(encoder: Path) -> None:
    (encoder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "attacker/other"}')
    with pytest.raises(InputError, match=r"a peft adapter, not an encoder.*simomerge merge"):
        sm.load(encoder)


def test_other_weights_than_those_of_the_folder_are_not_read(encoder: Path, tmp_path: Path) -> None:
    shutil.copy(encoder / "model.safetensors", tmp_path / "other.safetensors")
    edit(encoder / "config.json", lambda c: c.update(transformers_weights="../other.safetensors"))
    assert sm.load(encoder).encoder.channels == (32, 32, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 2**18, "num_attention_heads": 1}, r"million parameters, but the weights hold 0\.0 million"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, which no encoder has"),
        ({"num_hidden_layers": 200_000}, "num_hidden_layers is 200000, which no encoder has"),
        ({"image_size": 900_000}, "million parameters"),
        ({"image_size": 10**7}, "image_size is 10000000"),
        ({"mlp_ratio": 10**5}, "million parameters"),
        ({"patch_size": 10**5}, "million parameters"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"quantization_config": {"quant_method": "custom"}}, "quantised"),
    ],
    ids=str,
)
def test_absurd_configurations_are_refused_before_they_are_built(
    encoder: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(encoder / "config.json", lambda c: c.update(change))
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda *a, **k: pytest.fail("built"))
    with pytest.raises(InputError, match=message):
        sm.load(encoder)


def test_a_head_larger_than_its_file_is_never_allocated(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(scene / "simo.json", head_of(kind="dpt", settings={"fusion_channels": 100_000}))
    monkeypatch.setattr("safetensors.torch.load_file", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(InputError, match=r"depth\.safetensors: does not fit simo\.json"):
        sm.load(scene)
