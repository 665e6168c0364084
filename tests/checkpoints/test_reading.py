"""Reading checkpoints, against safetensors and torch as oracles."""

import argparse
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from simomerge.checkpoints import TensorInfo, open_checkpoint
from simomerge.checkpoints.tensors import value_info
from simomerge.core.errors import InputError


def state(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "encoder.weight": torch.randn(3, 5).to(dtype),
        "encoder.bias": torch.randn(5).to(dtype),
        "scalar": torch.tensor(0.25, dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "steps": torch.tensor(7, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
    }


def assert_reads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert set(checkpoint) == set(expected) and len(checkpoint) == len(expected)
    for name, tensor in expected.items():
        array = checkpoint[name]
        is_float = tensor.is_floating_point()
        wanted = (tensor.float() if is_float else tensor).numpy()
        assert name in checkpoint and isinstance(array, np.ndarray)
        assert checkpoint.info(name).shape == array.shape == tuple(tensor.shape)
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_every_float_dtype_reads_as_float32(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    tensors = state(dtype)
    file = tmp_path / f"weights{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    assert_reads(file, tensors)
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    assert open_checkpoint(file).info("encoder.weight") == TensorInfo((3, 5), names[dtype])
    assert open_checkpoint(file).info("steps").dtype == "I64"


def test_special_values_of_bfloat16(tmp_path: Path) -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3.3e38])
    save_file({"w": values.bfloat16()}, tmp_path / "w.safetensors")
    read = open_checkpoint(tmp_path / "w.safetensors")["w"]
    assert read.tobytes() == values.bfloat16().float().numpy().tobytes()


KEYS = ["state_dict", "model", "model_state_dict", "net", "network", "params", "student"]
AVERAGES = ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema", "teacher"]


def averaged() -> dict[str, torch.Tensor]:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state().items()}


def lightning(**more: Any) -> dict[str, Any]:
    """What PyTorch Lightning writes, as far as the names and types of its values matter."""
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "last": "a.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3, 5)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"last_epoch": 4, "_last_lr": [0.1]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "encoder": {"name": "dinov2"}, "sizes": (1, 2)},
        **more,
    }


@pytest.mark.parametrize("suffix", [".ckpt", ".pth.tar", ".pt"])
def test_training_files_with_other_values_than_weights(tmp_path: Path, suffix: str) -> None:
    best = torch.tensor(0.5)  # a tensor next to the state dict, as in PyTorch's example for ImageNet
    torch.save(lightning(best_acc1=best, state_dict_ema=None, params={"lr": 0.1}), tmp_path / f"last{suffix}")
    assert_reads(tmp_path / f"last{suffix}", state())
    assert_reads(Path(f"{tmp_path}/last{suffix}::state_dict"), state())


def test_a_training_file_with_classes_is_refused(tmp_path: Path) -> None:
    torch.save(lightning(hyper_parameters=argparse.Namespace(lr=0.1)), tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt was refused: it holds a argparse\.Namespace"):
        open_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("average", AVERAGES)
def test_trained_weights_or_their_average_are_chosen_knowingly(tmp_path: Path, average: str) -> None:
    file = tmp_path / "last.ckpt"
    for trained in KEYS:
        torch.save({average: averaged(), "epoch": 3, trained: state()}, file)
        message = rf"sets of weights: {trained}, {average} \(an average\)\. Choose .*last\.ckpt::{average}\."
        with pytest.raises(InputError, match=message):
            open_checkpoint(file)
        assert_reads(Path(f"{file}::{trained}"), state())
        assert_reads(Path(f"{file}::{average}"), averaged())
    torch.save({average: averaged(), "epoch": 3}, file)
    assert_reads(file, averaged())


def test_averages_under_other_keys_and_deeper(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    wrapped = {f"module.{name}": tensor for name, tensor in averaged().items()}
    for content, key in (
        (lightning(slow={"n_averaged": torch.tensor(3), **wrapped}), "slow"),
        (lightning(ema={"decay": 0.999, "module": averaged()}), "ema::module"),
        (lightning(ema={"decay": torch.tensor(0.999), "module": averaged()}), "ema::module"),
        (lightning(ema={"decay": 0.999, "shadow_params": list(averaged().values())}), "ema::shadow_params"),
        ({"model": state(), "net": averaged()}, "net"),
    ):
        torch.save(content, file)
        with pytest.raises(InputError, match=rf"several sets of weights: .*{key}.*last\.ckpt::") as refused:
            open_checkpoint(file)
        suggested = str(refused.value).rpartition("::")[2].rstrip(".")
        assert suggested == key.rpartition("::")[2] or key in ("slow", "ema::shadow_params")
        if key == "ema::shadow_params":
            assert suggested == "state_dict" and "ema::shadow_params (a list, which cannot be read)" in str(
                refused.value
            )
            with pytest.raises(InputError, match="holds a list, not a state dict"):
                open_checkpoint(f"{file}::{key}")
        else:
            read = open_checkpoint(f"{file}::{key}")
            own = "module.scalar" if key == "slow" else "scalar"
            np.testing.assert_array_equal(read[own], averaged()["scalar"].numpy())


def test_more_than_tensors_beside_weights_is_named(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    for extra in ({"scale": torch.ones(3)}, [torch.ones(3)]):
        torch.save({"state_dict": {"w": torch.ones(2), "_extra_state": extra}, "epoch": 3}, file)
        with pytest.raises(InputError, match=r"'_extra_state' is a (dict|list), not a tensor"):
            open_checkpoint(file)


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"encoder": state(), "decoder": {"w": torch.ones(2)}}, file)
    with pytest.raises(InputError, match=r"'encoder' is a dict.*: \S+last\.ckpt::encoder, \S+last\.ckpt::decoder\."):
        open_checkpoint(file)
    assert_reads(Path(f"{file}::encoder"), state())
    with pytest.raises(InputError, match=r"last\.ckpt has no weights under 'ema': there are encoder, decoder\."):
        open_checkpoint(f"{file}::ema")
    torch.save(state(), file)
    with pytest.raises(InputError, match="has no weights under 'ema': it has no sets of weights by keys"):
        open_checkpoint(f"{file}::ema")
    with pytest.raises(InputError, match="holds a Tensor, not a state dict"):
        open_checkpoint(f"{file}::encoder.bias")
    save_file(state(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors holds one set of weights: leave '::ema' out"):
        open_checkpoint(f"{tmp_path}/w.safetensors::ema")
    with pytest.raises(InputError, match=r"lost\.ckpt does not exist.*Did you mean '.*last\.ckpt'"):
        open_checkpoint(f"{tmp_path}/lost.ckpt::ema")


@pytest.mark.parametrize("key", KEYS)
def test_nested_and_legacy_torch_files(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: state()}, tmp_path / "nested.pth")
    assert_reads(tmp_path / "nested.pth", state())
    torch.save(state(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert_reads(tmp_path / "legacy.pt", state())


def test_folders(tmp_path: Path) -> None:
    model, encoder, old = tmp_path / "model", tmp_path / "model" / "encoder", tmp_path / "old"
    encoder.mkdir(parents=True)
    old.mkdir()
    save_file(state(), encoder / "model.safetensors")
    (model / "simo.json").write_text("{}")
    torch.save(state(), old / "pytorch_model.bin")
    for folder in (model, encoder, old):
        assert_reads(folder, state())
    assert open_checkpoint(model).path == encoder


def shards(folder: Path) -> Path:
    tensors = state()
    parts = {"a.safetensors": ["encoder.weight", "mask", "scalar"]}
    parts["b.safetensors"] = [name for name in tensors if name not in parts["a.safetensors"]]
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards(tmp_path: Path) -> None:
    assert_reads(shards(tmp_path), state())


def test_shard_errors(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors.*not next to it"):
        open_checkpoint(folder)
    save_file({"other": torch.zeros(1)}, folder / "b.safetensors")
    with pytest.raises(InputError, match=r"places 'encoder\.bias' in 'b\.safetensors'"):
        open_checkpoint(folder)
    save_file(state(), tmp_path.parent / "outside.safetensors")
    index_file.write_text(json.dumps({"weight_map": dict.fromkeys(state(), "../outside.safetensors")}))
    with pytest.raises(InputError, match=r"outside.*not next to it"):
        open_checkpoint(folder)
    for broken in ("{", "[]", json.dumps({"weight_map": 3}), json.dumps(index["weight_map"])):
        index_file.write_text(broken)
        with pytest.raises(InputError, match=r"index\.json: .*download it again"):
            open_checkpoint(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no weights.*model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="not a weight file"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(KeyError):
        save_file(state(), tmp_path / "w.safetensors")
        open_checkpoint(tmp_path / "w.safetensors")["unknown"]


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_files(tmp_path: Path, kept: int, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    save_file(state(), file) if suffix == ".safetensors" else torch.save(state(), file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"not a complete|refused") as caught:
        open_checkpoint(file)
    assert str(file) in str(caught.value) and "again" in str(caught.value)


def lying_headers() -> list[tuple[str, bytes]]:
    def file(header: object, content: bytes = b"\0" * 8) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content

    def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    return [
        ("shape larger than its bytes", file({"w": tensor([1000], 0, 8)})),
        ("offsets beyond the end", file({"w": tensor([1000], 0, 4000)})),
        ("overlap", file({"a": tensor([2], 0, 8), "b": tensor([1], 4, 8)})),
        ("negative", file({"w": tensor([-2], 0, 8)})),
        ("unknown dtype", file({"w": tensor([2], 0, 8, "F99")})),
        ("huge header length", (2**62).to_bytes(8, "little") + b"{}"),
        ("not JSON", (8).to_bytes(8, "little") + b"nonsense"),
        ("not an object", file([1, 2])),
    ]


@pytest.mark.parametrize(("case", "content"), lying_headers())
def test_lying_headers(tmp_path: Path, case: str, content: bytes) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not a complete safetensors file"):
        open_checkpoint(file)


def test_unsupported_float_width_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="'w' is stored as F8_E4M3"):
        open_checkpoint(tmp_path / "w.safetensors")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('pathlib').Path('executed').write_text('')",)


def test_pickles_that_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.pt").write_bytes(pickle.dumps({"w": Malicious()}, protocol=2))
    torch.save({"w": torch.zeros(1), "x": Malicious()}, "zipped.pt")
    for file in ("plain.pt", "zipped.pt"):
        with pytest.raises(InputError, match=f"{file} was refused: .*could run code"):
            open_checkpoint(file)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "a list, not a state dict"),
        (torch.zeros(3), "a Tensor, not a state dict"),
        ({}, "nothing, not a state dict"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({"w": torch.zeros(1), "config": {"a": 1}}, "'config' is a dict"),
        ({"state_dict": {1: torch.zeros(1)}}, "not a state dict: '1'"),
    ],
)
def test_not_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "w.pt")


def test_reading_safetensors_needs_no_torch(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    code = (
        "import sys, simomerge.merging\n"
        "from simomerge.checkpoints import fingerprint, open_checkpoint\n"
        "print(fingerprint(open_checkpoint(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "w.safetensors")], check=True)


def test_sparse_and_quantised_tensors_are_named(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
    for kind, tensor in (
        ("sparse", torch.eye(3).to_sparse()),
        ("sparse", torch.eye(3).to_sparse_csr()),
        ("quantised", quantised),
    ):
        torch.save({"w": tensor}, tmp_path / "w.pt")
        with pytest.raises(InputError, match=rf"w\.pt: 'w' is a {kind} tensor: save it dense"):
            open_checkpoint(tmp_path / "w.pt")
    with pytest.raises(InputError, match="'w' is a sparse tensor"):
        value_info(torch.eye(3).to_sparse(), "w")
