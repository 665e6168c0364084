"""Compressed folders: the arithmetic, what is restored, and the reported errors."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from simomerge.checkpoints import fingerprint, open_checkpoint, write_safetensors
from simomerge.cli import cli
from simomerge.core.errors import InputError
from simomerge.merging.compression import THRESHOLDS, least_squares_scale, masked_by, pack_mask, squared_errors
from simomerge.merging.consensus import tall_mask
from simomerge.merging.disk.compress import Compression, compress, restore

TASKS = ("depth", "normals", "edges")


def save(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> Path:
    return write_safetensors(path, tensors, dtype)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"b.weight": (40, 37), "a.weight": (9, 11), "a.bias": (9,), "scalar": (), "patch": (5, 3, 2, 2)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors | {"steps": np.array([7])}


def task_vector(task: str) -> dict[str, np.ndarray]:
    """Like a fine-tuning's: many small entries, a few large ones, and some tensors left alone."""
    rng = np.random.default_rng(TASKS.index(task) + 1)
    tau = {}
    for name, array in weights().items():
        values = 0.01 * rng.standard_t(3, array.shape) * (rng.random(array.shape) < 0.4)
        tau[name] = np.zeros_like(array) if name in ("steps", "a.bias") else values.astype(np.float32)
    return tau


def expert(task: str) -> dict[str, np.ndarray]:
    tau = task_vector(task)
    return {name: array + tau[name] for name, array in weights().items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {task: save(tmp_path / f"{task}.safetensors", expert(task)) for task in TASKS}
    return {"base": save(tmp_path / "base.safetensors", weights()), **made}


def experts(files: dict[str, Path]) -> dict[str, Path]:
    return {task: files[task] for task in TASKS}


def norm(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(tensors[name], dtype=np.float64).sum() for name in tensors if name != "steps")))


def difference(a: Any, b: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(a[name], np.float64) - b[name] for name in a if name != "steps"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Arithmetic ---------------------------------------------------------------------------------------------


def test_squared_errors_are_those_of_every_mask_with_its_best_scale() -> None:
    rng = np.random.default_rng(0)
    tau, others = rng.standard_normal((2, 300, 251)).astype(np.float32)
    found = squared_errors(tau, tau + others)
    for threshold, error in zip(THRESHOLDS, found, strict=True):
        masked = np.where(tall_mask(tau, tau + others, threshold), tau + others, 0).astype(np.float64)
        best = np.linalg.lstsq(masked.reshape(-1, 1), tau.reshape(-1).astype(np.float64), rcond=None)[0][0]
        assert error == pytest.approx(np.square(tau - best * masked).sum(), rel=1e-5)
        assert least_squares_scale(tau, masked.astype(np.float32)) == pytest.approx(best, rel=1e-5)
    np.testing.assert_array_equal(squared_errors(np.zeros(3), np.ones(3)), np.zeros(len(THRESHOLDS)))
    assert least_squares_scale(np.ones(2), np.zeros(2)) == 0 and squared_errors(np.ones(2), np.zeros(2), [1]) == 2


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (2, 3, 2, 2), (0, 4)])
def test_masks_are_packed_and_back(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    mask, values = rng.random(shape) < 0.5, rng.random(shape, np.float32) + 1
    mask, values = np.asarray(mask), np.asarray(values)
    packed = pack_mask(mask)
    assert packed.shape == ((mask.size + 7) // 8,) and packed.dtype == np.uint8
    np.testing.assert_array_equal(masked_by(packed, values), np.where(mask, values, 0))


# On disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("threshold", ["auto", 0.5])
def test_the_reported_errors_are_the_errors(files: dict[str, Path], tmp_path: Path, dtype: str, threshold: Any) -> None:
    done = compress(files["base"], experts(files), tmp_path / "out", threshold, dtype)
    assert list(done.tasks) == list(TASKS)
    for task, fit in done.tasks.items():
        path = tmp_path / f"again-{task}.safetensors"
        assert restore(tmp_path / "out", task, path).tasks == {task: fit}
        restored = open_checkpoint(path)
        assert set(restored) == set(weights()) and restored["steps"] == 7
        np.testing.assert_array_equal(restored["a.bias"], weights()["a.bias"])
        error = norm(difference(restored, expert(task)))
        assert fit.weights_error == pytest.approx(error / norm(expert(task)), rel=1e-3)
        assert fit.task_vector_error == pytest.approx(error / norm(task_vector(task)), rel=1e-3)
        assert 0.2 < fit.task_vector_error < 0.8 and 0.1 < fit.density < 0.5
        assert fit.threshold in THRESHOLDS if threshold == "auto" else fit.threshold == threshold


def test_what_lies_on_the_disk(files: dict[str, Path], tmp_path: Path) -> None:
    done = compress(files["base"], experts(files), tmp_path / "out", dtype="F32")
    assert set(content(tmp_path / "out")) == {
        "base.safetensors",
        "merged.safetensors",
        "compressed.json",
        *(f"masks/{task}.safetensors" for task in TASKS),
    }
    merged = open_checkpoint(tmp_path / "out" / "merged.safetensors")
    assert set(merged) == set(weights()) - {"steps"}
    base = open_checkpoint(files["base"])
    taus = {task: difference(open_checkpoint(files[task]), base) for task in TASKS}
    for name in merged:
        np.testing.assert_allclose(merged[name], sum(taus[task][name] for task in TASKS), atol=1e-6)
        for task in TASKS:
            masks = open_checkpoint(tmp_path / "out" / "masks" / f"{task}.safetensors")
            tau = taus[task][name].astype(np.float32)
            mask = tall_mask(tau, merged[name], done.tasks[task].threshold)
            np.testing.assert_array_equal(masks[name], np.packbits(mask))
            best = least_squares_scale(tau, np.where(mask, merged[name], 0))
            assert masks["simomerge.scales"][sorted(merged).index(name)] == pytest.approx(best, rel=1e-6)
    recorded = json.loads((tmp_path / "out" / "compressed.json").read_text())
    assert recorded["format"] == 1 and recorded["base"] == {
        "source": "base.safetensors",
        "fingerprint": fingerprint(base),
    }
    assert recorded["tasks"]["depth"]["fingerprint"] == fingerprint(open_checkpoint(files["depth"]))
    assert str(tmp_path) not in json.dumps(recorded)


def test_auto_takes_the_best_threshold_and_the_scale_helps(files: dict[str, Path], tmp_path: Path) -> None:
    best = compress(files["base"], experts(files), tmp_path / "auto", dtype="F32").tasks
    merged = {name: sum(task_vector(task)[name] for task in TASKS) for name in weights()}
    for threshold in THRESHOLDS:
        fixed = compress(files["base"], experts(files), tmp_path / "fixed", threshold, "F32", overwrite=True).tasks
        for task in TASKS:
            assert best[task].task_vector_error <= fixed[task].task_vector_error * (1 + 1e-5)
            tau = task_vector(task)
            plain = {n: np.where(tall_mask(tau[n], merged[n], threshold), merged[n], 0) - tau[n] for n in tau}
            assert fixed[task].task_vector_error < norm(plain) / norm(tau)


def test_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((500, 400)).astype(np.float32)
    paths = {}
    for task in ("base", *TASKS):
        paths[task] = save(
            tmp_path / f"{task}.safetensors", {"w": base + (task != "base") * rng.standard_normal(base.shape)}
        )
    done = compress(paths["base"], experts(paths), tmp_path / "out")
    assert done.bytes_before == 3 * base.nbytes
    assert done.bytes_after == sum(map(len, content(tmp_path / "out").values()))
    assert done.ratio == done.bytes_before / done.bytes_after == pytest.approx(12 / (4 + 2 + 3 / 8), rel=0.01)
    assert restore(tmp_path / "out", "depth", tmp_path / "x.safetensors") == Compression(
        done.bytes_before, done.bytes_after, {"depth": done.tasks["depth"]}
    )


def test_one_expert_and_an_expert_that_is_the_base(files: dict[str, Path], tmp_path: Path) -> None:
    done = compress(files["base"], {"depth": files["depth"]}, tmp_path / "one", dtype="F32")
    assert done.tasks["depth"].task_vector_error < 1e-6
    same = save(tmp_path / "same.safetensors", weights())
    done = compress(files["base"], {"depth": files["depth"], "none": same}, tmp_path / "two", dtype="F32")
    assert done.tasks["none"].density == done.tasks["none"].task_vector_error == done.tasks["none"].weights_error == 0
    restore(tmp_path / "two", "none", tmp_path / "again.safetensors")
    assert fingerprint(open_checkpoint(tmp_path / "again.safetensors")) == fingerprint(open_checkpoint(same))


def test_the_dtypes_are_the_base_s_and_the_bytes_depend_on_the_content_only(tmp_path: Path) -> None:
    mixed = {name: "BF16" if name == "a.weight" else "F16" for name in weights()}
    base = write_safetensors(tmp_path / "base.safetensors", weights(), mixed)
    paths = {task: save(tmp_path / f"{task}.safetensors", expert(task)) for task in TASKS}
    for output in ("1", "2"):
        compress(base, paths, tmp_path / output)
        restore(tmp_path / output, "edges", tmp_path / f"edges{output}")
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert content(tmp_path / "edges1") == content(tmp_path / "edges2")
    restored = open_checkpoint(tmp_path / "edges1")
    assert {name: restored.info(name).dtype for name in restored} == {**mixed, "steps": "I64"}


def test_one_tensor_of_each_model_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simomerge.core.parallel.available_cores", lambda: 1)
    rng = np.random.default_rng(0)
    base = {f"t{number}": rng.standard_normal(2**18).astype(np.float32) for number in range(24)}
    paths = {"base": save(tmp_path / "base.safetensors", base)}
    for task in TASKS:
        changed = {name: array + 0.01 * rng.standard_normal(2**18, np.float32) for name, array in base.items()}
        paths[task] = save(tmp_path / f"{task}.safetensors", changed)
    del base, changed
    tracemalloc.start()
    try:
        compress(paths["base"], experts(paths), tmp_path / "out")
        restore(tmp_path / "out", "depth", tmp_path / "again.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 14 * 2**20  # a tensor has 1 MiB; one model has 24


def test_no_torch_is_imported(files: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom simomerge.merging.disk.compress import compress, restore\n"
        "compress('base.safetensors', {'depth': 'depth.safetensors'}, 'out')\nrestore('out', 'depth', 'again')\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# Kinds of experts ---------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, make_model: Any, tiny_base: Path) -> dict[str, Path]:
    """Two model folders, fine-tuned from the tiny base as they say themselves."""
    from simomerge.datasets.tasks import Task

    paths = {}
    for seed, task in enumerate((Task("depth", "depth"), Task("normals", "normals"))):
        model = make_model([task], seed=seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.encoder.backbone.parameters():
                parameter += 0.01 * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.3)
        model.provenance = {"base": {"source": "tiny", "fingerprint": fingerprint(open_checkpoint(tiny_base))}}
        paths[task.name] = model.save_pretrained(tmp_path / task.name)
    return paths


def test_model_folders_come_back_as_model_folders(models: dict[str, Path], tiny_base: Path, tmp_path: Path) -> None:
    from simomerge.models.model import SimoModel

    done = compress(tiny_base, models, tmp_path / "out")
    restore(tmp_path / "out", "depth", tmp_path / "again")
    before, after = content(models["depth"]), content(tmp_path / "again")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {
        "encoder/model.safetensors",
        "simo.json",
        "README.md",
    }
    old, new = SimoModel.from_pretrained(models["depth"]), SimoModel.from_pretrained(tmp_path / "again")
    fit = done.tasks["depth"]
    assert new.provenance == {**old.provenance, "compression": vars(fit)}
    distance = norm(difference(open_checkpoint(tmp_path / "again"), open_checkpoint(models["depth"])))
    assert fit.weights_error == pytest.approx(distance / norm(dict(open_checkpoint(models["depth"]))), rel=1e-3)
    picture = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(old(picture)["depth"], new(picture)["depth"], atol=0.2)
    assert f'"task_vector_error": {fit.task_vector_error}' in (tmp_path / "again" / "README.md").read_text()


def test_transformers_folders_and_adapters(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    folder, adapter = tmp_path / "folder", tmp_path / "adapter"
    base = open_checkpoint(tiny_base)
    write_safetensors(folder / "model.safetensors", {name: base[name] * np.float32(1.01) for name in base})
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((tiny_base / name).read_bytes())
    factors = {"A": np.ones((1, 32), np.float32), "B": np.ones((32, 1), np.float32)}
    write_safetensors(
        adapter / "adapter_model.safetensors",
        {f"base_model.model.encoder.layer.0.attention.q_proj.lora_{s}.weight": f for s, f in factors.items()},
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 0.1}))
    done = compress(tiny_base, {"depth": folder, "edges": adapter}, tmp_path / "out", dtype="F32")
    for task in ("depth", "edges"):
        restore(tmp_path / "out", task, tmp_path / f"again-{task}")
    assert set(content(tmp_path / "again-depth")) == {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert set(content(tmp_path / "again-edges")) == {"model.safetensors"}
    loaded, report = Dinov2Model.from_pretrained(tmp_path / "again-depth", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and loaded is not None
    query = "encoder.layer.0.attention.attention.query.weight"
    delta = open_checkpoint(tmp_path / "again-edges")[query] - base[query]
    np.testing.assert_allclose(delta, np.full((32, 32), 0.1), atol=0.01)
    assert done.tasks["edges"].task_vector_error < 0.1


# Mistakes -----------------------------------------------------------------------------------------------


def test_outputs_that_exist(files: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        compress(files["base"], experts(files), tmp_path / "out", overwrite=True)
        restore(tmp_path / "out", "depth", tmp_path / "folder", overwrite=True)
        restore(tmp_path / "out", "depth", tmp_path / "file.safetensors", overwrite=True)
    with pytest.raises(InputError, match="out already exists"):
        compress(files["base"], experts(files), tmp_path / "out")
    for output in ("folder", "file.safetensors"):
        with pytest.raises(InputError, match=f"{output} already exists"):
            restore(tmp_path / "out", "depth", tmp_path / output)


def test_mistakes_in_what_is_compressed(
    files: dict[str, Path], models: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    other = save(tmp_path / "other.safetensors", {**weights(), "a.bias": np.ones(3, np.float32)})
    broken = save(tmp_path / "broken.safetensors", {**expert("depth"), "a.bias": np.full(9, np.nan, np.float32)})
    before = set(tmp_path.rglob("*"))
    for given, settings, message in (
        ({"depth": files["depth"]}, {"threshold": "best"}, "threshold is 'best': give a number above 0, or 'auto'"),
        ({"depth": files["depth"]}, {"threshold": 0}, "threshold is 0"),
        ({"depth": files["depth"]}, {"threshold": float("nan")}, "threshold is nan"),
        ({"depth": files["depth"]}, {"dtype": "I8"}, "cannot be stored as 'I8': use one of F16"),
        ({"a/b": files["depth"]}, {}, "'a/b' cannot be the name of a task"),
        ({"depth": files["depth"], "edges": files["depth"]}, {}, "are the same"),
        ({"depth": tmp_path / "nowhere"}, {}, "nowhere does not exist"),
        ({"depth": other}, {}, "differ in the shapes of 1 tensor: a.bias"),
        ({"depth": broken}, {}, "'a.bias' of the expert 'depth' .* NaN"),
        ({}, {}, "at least 1 expert"),
    ):
        with pytest.raises(InputError, match=message):
            compress(files["base"], given, tmp_path / "out", **settings)
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match=r"expert 'depth' .* was fine-tuned from another base"):
        compress(models["normals"] / "encoder", {"depth": models["depth"]}, tmp_path / "out")
    (models["depth"] / "heads" / "depth.safetensors").unlink()
    with pytest.raises(InputError, match=r"depth\.safetensors: missing"):
        compress(tiny_base, {"depth": models["depth"]}, tmp_path / "out")


def test_mistakes_in_what_is_restored(files: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    compress(files["base"], experts(files), folder)
    with pytest.raises(InputError, match="holds no task 'deth': choose from depth, normals, edges"):
        restore(folder, "deth", tmp_path / "again")
    with pytest.raises(InputError, match=r"not a compressed folder \(no compressed\.json"):
        restore(tmp_path, "depth", tmp_path / "again")
    recorded = json.loads((folder / "compressed.json").read_text())
    masks = folder / "masks" / "depth.safetensors"
    kept = masks.read_bytes()
    for name in ("scalar", "simomerge.scales"):
        tensors = dict(open_checkpoint(masks))
        save(masks, {**tensors, name: np.zeros(99, tensors[name].dtype)})
        with pytest.raises(InputError, match=r"depth\.safetensors does not fit .*merged\.safetensors"):
            restore(folder, "depth", tmp_path / "again")
        masks.write_bytes(kept)
    masks.unlink()
    with pytest.raises(InputError, match=r"depth\.safetensors does not exist"):
        restore(folder, "depth", tmp_path / "again")
    save(folder / "base.safetensors", {"a.bias": np.zeros(9, np.float32)})
    masks.write_bytes(kept)
    with pytest.raises(InputError, match=r"merged\.safetensors does not fit .*base\.safetensors"):
        restore(folder, "depth", tmp_path / "again")
    for changed, message in (
        ("{", "is damaged|cannot be read"),
        ("[]", "is damaged|cannot be read"),
        (json.dumps({**recorded, "format": 2}), "format 2 is newer"),
        (json.dumps({**recorded, "tasks": {"depth": {}}}), "is damaged|cannot be read"),
        (json.dumps({**recorded, "tasks": {"../depth": recorded["tasks"]["depth"]}}), "is damaged|cannot be read"),
    ):
        (folder / "compressed.json").write_text(changed)
        with pytest.raises(InputError, match=message):
            restore(folder, "depth", tmp_path / "again")
    assert not (tmp_path / "again").exists()


# Commands -----------------------------------------------------------------------------------------------


def run(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_commands(files: dict[str, Path], tmp_path: Path) -> None:
    named = [f"{task}={files[task]}" for task in TASKS]
    text = run("compress", files["base"], *named, "-o", tmp_path / "out")
    assert "Compressed depth, normals, edges: " in text and "times smaller" in text
    assert f"Next: simomerge restore {tmp_path / 'out'} depth" in text
    assert all(any(line.split()[:1] == [task] for line in text.splitlines()) for task in TASKS)
    recorded = json.loads(
        run(
            "compress",
            files["base"],
            *named,
            "-o",
            tmp_path / "out",
            "--overwrite",
            "--json",
            "--threshold",
            "0.4",
        )
    )
    assert (
        recorded["tasks"]["depth"]["threshold"] == 0.4
        and recorded["ratio"] == recorded["bytes_before"] / recorded["bytes_after"]
    )
    assert "Restored depth: " in run("restore", tmp_path / "out", "depth", "-o", tmp_path / "again")
    again = json.loads(run("restore", tmp_path / "out", "edges", "-o", tmp_path / "again2", "--json"))
    assert again == {"output": str(tmp_path / "again2"), "task": "edges", **recorded["tasks"]["edges"]}
    for output, threshold, message in (
        ("out", "auto", "out exists"),
        ("new", "best", "--threshold best: give a number"),
    ):
        with pytest.raises(InputError, match=message):
            run("compress", files["base"], *named, "-o", tmp_path / output, "--threshold", threshold)
    with pytest.raises(InputError, match="again exists"):
        run("restore", tmp_path / "out", "depth", "-o", tmp_path / "again")
