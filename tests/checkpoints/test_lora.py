"""LoRA adapters as experts: against peft's own merge, and against files written by hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simomerge.checkpoints import as_numpy, canonicalise, fingerprint, open_checkpoint, write_safetensors
from simomerge.checkpoints.lora import LoraExpert, is_lora_folder, open_lora
from simomerge.core.errors import InputError
from simomerge.merging.disk.merge import merge_on_disk

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}


# Against peft -------------------------------------------------------------------------------------------


def dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(mlp_ratio=2, **SIZE))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(intermediate_size=64, **SIZE), add_pooling_layer=False)


class Odd(nn.Module):
    """Layers that no encoder above has: an embedding, two convolutions, a linear layer stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(10, 4)
        self.patches = nn.Conv2d(3, 6, kernel_size=(2, 3))
        self.pointwise = nn.Conv2d(6, 5, kernel_size=1)
        self.conv1d = Conv1D(7, 4)
        self.square = Conv1D(4, 4)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.backbone = dinov2()


LINEAR = ["q_proj", "v_proj", "fc1"]
VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (dinov2, {"target_modules": LINEAR, "lora_alpha": 16}),
    "vit": (vit, {"target_modules": LINEAR}),
    "rslora": (dinov2, {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        dinov2,
        {
            "target_modules": LINEAR,
            "rank_pattern": {r"layer\.1\..*q_proj": 2, "q_proj": 5, "proj": 7, r"encoder.layer.0.mlp.fc1": 3},
            "alpha_pattern": {r"^encoder.layer.0.attention.v_proj": 3, r"\d.mlp.fc1": 1.5},
        },
    ),
    "modules to save": (dinov2, {"target_modules": ["q_proj"], "modules_to_save": ["layernorm", "fc2"]}),
    "biases": (vit, {"target_modules": ["q_proj", "projection"], "bias": "all"}),
    "biases and modules": (dinov2, {"target_modules": LINEAR, "bias": "all", "modules_to_save": ["layernorm"]}),
    "biases of lora": (vit, {"target_modules": LINEAR, "bias": "lora_only"}),
    "bias of B": (dinov2, {"target_modules": LINEAR, "lora_bias": True, "use_rslora": True}),
    "patch embedding": (dinov2, {"target_modules": ["projection", "fc2"]}),
    "embedding and convolutions": (Odd, {"target_modules": ["embedding", "patches", "pointwise"]}),
    "fan_in_fan_out": (Odd, {"target_modules": ["conv1d", "square", "patches"], "fan_in_fan_out": True}),
    "wrapped": (Wrapped, {"target_modules": LINEAR, "rank_pattern": {r"encoder.backbone.encoder.layer.0.*": 2}}),
}


@pytest.fixture(params=VARIANTS)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder that peft wrote, the base's state dict, and the state dict that peft merges."""
    peft = pytest.importorskip("peft")
    build, settings = VARIANTS[request.param]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", base, adapted.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore")
def test_every_tensor_is_what_peft_merges(trained: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, base, merged = trained
    expert = open_lora(folder, base)
    assert is_lora_folder(folder) and expert.path == folder
    assert list(expert) == list(base) and len(expert) == len(base)
    changed = 0
    for name, original in base.items():
        expected, delta = merged[name].numpy(), expert.task_vector(name)
        assert expert[name].dtype == np.float32 and expert.info(name).shape == expected.shape
        np.testing.assert_allclose(expert[name], expected, rtol=0, atol=1e-6)
        if delta is None:
            np.testing.assert_array_equal(expected, original.numpy())
            continue
        changed += 1
        assert delta.dtype == np.float32
        np.testing.assert_allclose(delta, expected - original.numpy(), rtol=0, atol=1e-6)
    assert 0 < changed < len(base)
    assert f"{changed} of {len(base)} tensors changed" in repr(expert)


def test_a_base_with_the_names_on_disk(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for number, build in enumerate((dinov2, vit)):
        model = build()
        model.save_pretrained(tmp_path / f"base{number}")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / f"adapter{number}")
        base = open_checkpoint(tmp_path / f"base{number}")
        expert = open_lora(tmp_path / f"adapter{number}", base)
        assert "encoder.layer.0.attention.attention.query.weight" in expert
        merged = {name: tensor.numpy() for name, tensor in adapted.merge_and_unload().state_dict().items()}
        for canonical, name in canonicalise(merged).items():
            np.testing.assert_allclose(expert[canonicalise(base)[canonical]], merged[name], atol=1e-6)
        assert fingerprint(expert) != fingerprint(base)


def test_what_peft_has_changed_the_base_for_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for start, message in (("pissa", "began as 'pissa', which also changes the base"), ("dora", "uses DoRA")):
        settings = {"use_dora": True} if start == "dora" else {"init_lora_weights": start}
        peft.get_peft_model(dinov2(), peft.LoraConfig(r=2, target_modules=["q_proj"], **settings)).save_pretrained(
            tmp_path / start
        )
        with pytest.raises(InputError, match=message):
            open_lora(tmp_path / start, dinov2().state_dict())


class Part(nn.Module):
    """A model with an encoder under a given name, and a head."""

    def __init__(self, name: str, encoder: nn.Module) -> None:
        super().__init__()
        self.add_module(name, encoder)
        self.decode_head = nn.Conv2d(32, 3, 1)


def giant() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(mlp_ratio=2, use_swiglu_ffn=True, **SIZE))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)


class Squares(nn.Module):
    """Linear and Conv1D layers, which peft stores with one fan_in_fan_out for all."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        for name in names:
            size = (8, 12) if name.startswith("wide") else (8, 8)
            self.add_module(name, Conv1D(*size) if name.endswith(("conv1d", "c_proj")) else nn.Linear(*size))


MORE: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "gate and up": (giant, "", {"target_modules": ["gate_proj", "up_proj", "down_proj"], "bias": "all"}),
    "gate saved": (giant, "", {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}),
    "attention": (Attention, "", {"target_modules": ["attn"], "rank_pattern": {"attn": 2}, "use_rslora": True}),
    "head saved": (dinov2, "backbone", {"target_modules": ["q_proj"], "modules_to_save": ["decode_head"]}),
    "a part called net": (dinov2, "net", {"target_modules": LINEAR}),
    "net and head": (dinov2, "net", {"target_modules": ["q_proj"], "modules_to_save": ["decode_head"]}),
    "linear first": (lambda: Squares("lin", "conv1d"), "", {"target_modules": ["lin", "conv1d"]}),
    "linear last": (lambda: Squares("conv1d", "lin", "wide"), "", {"target_modules": ["conv1d", "lin", "wide"]}),
    "shapes decide": (lambda: Squares("wide_conv1d", "wide"), "", {"target_modules": ["wide_conv1d", "wide"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MORE)
def test_more_layers_and_places(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft")
    build, place, settings = MORE[case]
    torch.manual_seed(0)
    encoder = build()
    base: Any = {name: value.clone() for name, value in encoder.state_dict().items()}
    if hasattr(encoder, "save_pretrained"):
        encoder.save_pretrained(tmp_path / "base")
        base = open_checkpoint(tmp_path / "base")
    fan = {"fan_in_fan_out": True} if build not in (giant, Attention, dinov2) else {}
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **fan, **settings)
    adapted = peft.get_peft_model(Part(place, encoder) if place else encoder, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    expected = {
        name: tensor.numpy() for name, tensor in (getattr(merged, place) if place else merged).state_dict().items()
    }
    expert = open_lora(tmp_path / "adapter", base)
    own = canonicalise(expert)
    for canonical, name in canonicalise(expected).items():
        np.testing.assert_allclose(expert[own[canonical]], expected[name], rtol=0, atol=1e-6)
        assert expert.info(own[canonical]).shape == expected[name].shape


def test_a_head_is_apart_and_a_merge_warns_of_it(tmp_path: Path) -> None:
    head = {
        "base_model.model.decode_head.weight": np.full((2, 3), 5.0),
        "base_model.model.decode_head.bias": np.ones(2),
    }
    folder = adapter(tmp_path / "adapter", {**FACTORS, **head}, modules_to_save=["decode_head"])
    expert = open_lora(folder, BASE)
    np.testing.assert_array_equal(expert.task_vector(f"{QUERY}.weight"), 3 * B @ A)
    assert set(expert.head) == {"decode_head.weight", "decode_head.bias"} and set(expert) == set(BASE)
    np.testing.assert_array_equal(expert.head["decode_head.weight"], np.full((2, 3), 5.0))
    write_safetensors(tmp_path / "base.safetensors", BASE)
    message = (
        rf"{folder}: left out 2 tensors of decode_head, which the base does not have\. .*: simomerge import {folder}"
        r" --task TASK --encoder BASE --head HEAD --head-prefix decode_head\."
    )
    with pytest.warns(UserWarning, match=message):
        merge_on_disk(tmp_path / "base.safetensors", {"a": folder}, tmp_path / "merged.safetensors", "average")
    merged = open_checkpoint(tmp_path / "merged.safetensors")[f"{QUERY}.weight"]
    np.testing.assert_allclose(merged, BASE[f"{QUERY}.weight"] + 3 * B @ A, rtol=1e-3)


def test_a_head_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    """As peft writes it with bias="all": the biases of modules that are not in modules_to_save."""
    folder = adapter(tmp_path, {**FACTORS, "base_model.model.model.decode_head.bias": np.ones(2)})
    with pytest.raises(InputError, match=rf"1 tensor that .*: simomerge import {folder} .*--head-prefix decode_head\."):
        open_lora(folder, BASE)
    assert list(open_lora(folder, BASE, ["model.decode_head."]).head) == ["model.decode_head.bias"]
    blocks = {name.replace("layer.0", "layer.7"): value for name, value in FACTORS.items()}
    with pytest.raises(InputError, match=r"Give the base that the adapter was trained on\.$"):
        open_lora(adapter(tmp_path, blocks), BASE)


def test_a_pooler_that_the_base_does_not_have_never_decides(tmp_path: Path) -> None:
    """As target_modules="all-linear" and bias="all" change it, while encoders are loaded without it."""
    pooler = {name.replace(QUERY, "pooler.dense"): value for name, value in FACTORS.items()}
    bias = {"base_model.model.pooler.dense.bias": np.full(4, 7.0)}
    folder = adapter(tmp_path, {**FACTORS, **pooler, **bias})
    expert = open_lora(folder, BASE)
    assert set(expert) == set(BASE) and not expert.head
    np.testing.assert_array_equal(expert.task_vector(f"{QUERY}.weight"), 3 * B @ A)
    with_pooler = {**BASE, "pooler.dense.weight": np.ones((4, 3)), "pooler.dense.bias": np.zeros(4)}
    expert = open_lora(folder, with_pooler)
    np.testing.assert_array_equal(expert.task_vector("pooler.dense.weight"), 3 * B @ A)
    np.testing.assert_array_equal(expert["pooler.dense.bias"], np.full(4, 7.0))


def test_factors_of_other_modules_are_left_out_by_their_prefix(tmp_path: Path) -> None:
    factors = {name.replace(QUERY, "auxiliary.0"): value for name, value in FACTORS.items()}
    folder = adapter(tmp_path, {**FACTORS, **factors})
    with pytest.raises(InputError, match=r"1 tensor that the base does not have: auxiliary\.0\.weight"):
        open_lora(folder, BASE)
    expert = open_lora(folder, BASE, ["auxiliary.", "encoder."])
    np.testing.assert_array_equal(expert.task_vector(f"{QUERY}.weight"), 3 * B @ A)
    assert not expert.head


def test_two_encoders_in_one_adapter_are_refused(tmp_path: Path) -> None:
    def of(*parts: str) -> dict[str, Any]:
        return {f"base_model.model.{part}.{name[17:]}": value for name, value in FACTORS.items() for part in parts}

    assert open_lora(adapter(tmp_path, of("student")), BASE).task_vector(f"{QUERY}.weight") is not None
    for parts, message in (
        (("student", "teacher"), "2 tensors that the base does not have"),
        (("model", "encoder"), "both"),
    ):
        with pytest.raises(InputError, match=message):
            open_lora(adapter(tmp_path, of(*parts)), BASE)


def test_a_linear_layer_is_not_transposed_by_the_configuration(tmp_path: Path) -> None:
    expert = open_lora(adapter(tmp_path, fan_in_fan_out=True), BASE)
    np.testing.assert_array_equal(expert.task_vector(f"{QUERY}.weight"), 3 * B @ A)
    square = {"base_model.model.mixer.lora_A.weight": A[:, :2], "base_model.model.mixer.lora_B.weight": B[:2]}
    with pytest.raises(InputError, match="'mixer' is square, so it may be stored either way: call merge_and_unload"):
        open_lora(adapter(tmp_path, square, fan_in_fan_out=True), {"mixer.weight": np.ones((2, 2))})


def test_gate_and_up_projection_as_one_layer(tmp_path: Path) -> None:
    """Adapters of transformers 4, in which they are one layer, for bases in either form."""
    stem = "encoder.layer.0.mlp"
    whole, bias = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(4, dtype=np.float32)
    factors = {name.replace(QUERY, f"{stem}.weights_in"): value for name, value in FACTORS.items()}
    folder = adapter(tmp_path, {**factors, f"base_model.model.{stem}.weights_in.bias": bias + 1})
    apart = {
        f"{stem}.{part}.{kind}": value[rows]
        for part, rows in (("gate_proj", slice(0, 2)), ("up_proj", slice(2, 4)))
        for kind, value in (("weight", whole), ("bias", bias))
    }
    for base in ({f"{stem}.weights_in.weight": whole, f"{stem}.weights_in.bias": bias}, apart):
        expert = open_lora(folder, base)
        assert set(expert) == set(apart)
        for part, rows in (("gate_proj", slice(0, 2)), ("up_proj", slice(2, 4))):
            np.testing.assert_array_equal(expert.task_vector(f"{stem}.{part}.weight"), (3 * B @ A)[rows])
            np.testing.assert_array_equal(expert[f"{stem}.{part}.bias"], bias[rows] + 1)


def test_a_grouped_convolution(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4))
    base = dict(model.state_dict())
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'0' is a grouped convolution, which peft cannot merge either"):
        open_lora(tmp_path, base)


# By hand ------------------------------------------------------------------------------------------------

QUERY = "encoder.layer.0.attention.attention.query"
BASE = {
    f"{QUERY}.weight": np.arange(12, dtype=np.float16).reshape(4, 3),
    f"{QUERY}.bias": np.zeros(4, np.float16),
    "layernorm.weight": np.ones(3, np.float16),
    "steps": np.array(3),
}
A = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
B = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32) / 1024
FACTORS = {f"base_model.model.{QUERY}.lora_A.weight": A, f"base_model.model.{QUERY}.lora_B.weight": B}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


def adapter(folder: Path, tensors: Mapping[str, Any] = FACTORS, **changes: Any) -> Path:
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def test_by_hand(tmp_path: Path) -> None:
    tensors = {**FACTORS, "base_model.model.layernorm.weight": np.full(3, 2, np.float16)}
    expert = open_lora(adapter(tmp_path, tensors), BASE)
    assert isinstance(expert, LoraExpert) and list(expert) == list(BASE)
    delta = 3 * B @ A
    np.testing.assert_array_equal(expert.task_vector(f"{QUERY}.weight"), delta)
    np.testing.assert_array_equal(expert[f"{QUERY}.weight"], BASE[f"{QUERY}.weight"].astype(np.float32) + delta)
    np.testing.assert_array_equal(expert["layernorm.weight"], np.full(3, 2, np.float32))
    np.testing.assert_array_equal(expert.task_vector("layernorm.weight"), np.ones(3, np.float32))
    assert expert.task_vector(f"{QUERY}.bias") is None and expert.task_vector("steps") is None
    assert expert["steps"] == 3 and expert["steps"].dtype == np.int64
    assert [expert.info(name).dtype for name in expert] == ["F32", "F16", "F16", "I64"]
    for name in ("unknown", "steps.weight"):
        assert name not in expert
        for ask in (expert.__getitem__, expert.info, expert.task_vector):
            with pytest.raises(KeyError):
                ask(name)


def test_the_task_vector_is_not_rounded_by_the_base(tmp_path: Path) -> None:
    base = {**BASE, f"{QUERY}.weight": np.full((4, 3), 1e6, np.float32)}
    expert = open_lora(adapter(tmp_path), base)
    exact = expert.task_vector(f"{QUERY}.weight")
    np.testing.assert_array_equal(exact, 3 * B @ A)
    assert np.abs(expert[f"{QUERY}.weight"] - base[f"{QUERY}.weight"] - exact).max() > 1e-3


@pytest.mark.parametrize("name", [QUERY, QUERY.replace("attention.query", "q_proj")])
@pytest.mark.parametrize(
    "prefix", ["", "base_model.model.", "base_model.model.backbone.", "base_model.model.encoder.backbone.", "model."]
)
def test_names_in_memory_and_wrappers(tmp_path: Path, name: str, prefix: str) -> None:
    tensors = {f"{prefix}{name}.lora_A.weight": A, f"{prefix}{name}.lora_B.weight": B}
    delta = open_lora(adapter(tmp_path, tensors), BASE).task_vector(f"{QUERY}.weight")
    np.testing.assert_array_equal(delta, 3 * B @ A)


def test_torch_file_and_half_precision(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(
        {name: torch.from_numpy(value).bfloat16() for name, value in FACTORS.items()}, folder / "adapter_model.bin"
    )
    base = {name: torch.from_numpy(value.copy()) for name, value in BASE.items()}
    expert = open_lora(folder, base)
    np.testing.assert_array_equal(expert.task_vector(f"{QUERY}.weight"), 3 * B @ A)
    np.testing.assert_array_equal(expert["layernorm.weight"], as_numpy(base["layernorm.weight"]))


def rename(old: str, new: str) -> dict[str, Any]:
    return {name.replace(old, new): value for name, value in FACTORS.items()}


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "other type": (FACTORS, {"peft_type": "IA3"}, "holds an adapter of type IA3, not LORA: "),
    "dora": (FACTORS, {"use_dora": True}, r"adapter_config\.json: the adapter uses DoRA.*merge_and_unload"),
    "dora in the file": (
        {**FACTORS, f"{QUERY}.lora_magnitude_vector": np.ones(4)},
        {},
        r"adapter_model\.safetensors: the adapter uses DoRA",
    ),
    "bare parameters": (FACTORS, {"target_parameters": ["x"]}, "LoRA on bare parameters"),
    "olora": (FACTORS, {"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "no rank": (FACTORS, {"r": None}, "r is None, not a whole number"),
    "rank 0": (FACTORS, {"r": 0}, "no rank and alpha"),
    "broken pattern": (FACTORS, {"rank_pattern": {"(": 2}}, "no rank and alpha"),
    "patterns of another kind": (FACTORS, {"alpha_pattern": [1]}, r"alpha_pattern is \[1\], not a mapping or null"),
    "other rank": (FACTORS, {"r": 4}, r"shapes \(2, 3\) and \(4, 2\), which do not fit the rank 4"),
    "one factor": (dict(list(FACTORS.items())[:1]), {}, "has lora_A but no lora_B"),
    "other factor": (dict(list(FACTORS.items())[1:]), {}, "has lora_B but no lora_A"),
    "flat factor": (FACTORS | {f"base_model.model.{QUERY}.lora_A.weight": np.ones(2)}, {}, "do not fit"),
    "unknown part": ({**FACTORS, f"{QUERY}.lora_E": np.ones(2)}, {}, "is not a tensor of a plain LoRA adapter"),
    "other module": (rename("layer.0", "layer.7"), {}, r"1 tensor that the base does not have: .*layer\.7.*query"),
    "heads": (
        {**FACTORS, **{f"base_model.model.head{n}.weight": np.ones(2) for n in range(5)}},
        {},
        r"5 tensors that the base does not have: head0\.weight, head1\.weight, head2\.weight, \.\.\.\. Give",
    ),
    "other shape": (
        {name: value[:, :2] for name, value in FACTORS.items()},
        {},
        r"of shape \(4, 2\), .*has \(4, 3\)",
    ),
    "other norm": ({"layernorm.weight": np.ones(5)}, {}, r"'layernorm\.weight' by a tensor of shape \(5,\).* \(3,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(tmp_path: Path, case: str) -> None:
    tensors, changes, message = MISTAKES[case]
    with pytest.raises(InputError, match=message) as caught:
        open_lora(adapter(tmp_path, tensors, **changes), BASE)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 600


def test_files_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json does not exist"):
        open_lora(tmp_path, BASE)
    assert not is_lora_folder(tmp_path) and not is_lora_folder(tmp_path / "nowhere")
    config = tmp_path / "adapter_config.json"
    for text, message in (("{", "Expecting property name"), ("[]", "not a mapping"), ("{}", "'peft_type' is missing")):
        config.write_text(text)
        with pytest.raises(InputError, match=message):
            open_lora(tmp_path, BASE)
    config.write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match=r"no adapter weights \(looked for adapter_model\.safetensors, adapter_model"):
        open_lora(tmp_path, BASE)
    write_safetensors(tmp_path / "adapter_model.safetensors", {})
    with pytest.raises(InputError, match="holds no tensors"):
        open_lora(tmp_path, BASE)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="not a complete safetensors file"):
        open_lora(tmp_path, BASE)
