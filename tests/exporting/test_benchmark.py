"""simomerge benchmark: every target in a process of its own, with the difference from the first one."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from cli.conftest import Outcome, assert_mistake, simomerge
from simomerge.cli.benchmark import tables
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.exporting.benchmark import benchmark, evaluate_file
from simomerge.exporting.export import export
from simomerge.models.model import SimoModel
from simomerge.training.evaluate import evaluate

from .conftest import SIZE, Exported, frames_of


def test_a_file_beside_itself_differs_by_nothing(exported: Exported) -> None:
    done = simomerge(
        "benchmark", exported.file, exported.file, "--size", "30x42", "--batch", 1, "--batch", 2, "--runs", 5, "--json"
    )
    assert done.code == 0, done.err
    first, second = done.json["rows"]
    for row in (first, second):
        ms = row["milliseconds"]
        assert 0 < ms["low"] <= ms["median"] <= ms["high"] and set(row["per_second"]) == {"1", "2"}
        assert row["disk"] == exported.file.stat().st_size and 10e6 < row["memory"] < 400e6  # no torch in it
        assert {name: each["value"] for name, each in row["difference"].items()} == dict.fromkeys(
            ["parts", "parts_probabilities", "depth", "normals"], 0
        )
    assert first["difference"]["normals"]["measure"] == "angle"


def test_what_cannot_be_timed_is_named(exported: Exported, tmp_path: Path) -> None:
    done = simomerge("benchmark", tmp_path / "no.onnx", "--size", "30x42")
    assert_mistake(done, r"no\.onnx: no such file")
    done = simomerge("benchmark", exported.file, "--size", "30x42", "--provider", "tensorrt")
    assert_mistake(done, "provider 'tensorrt' is not in this onnxruntime")
    done = simomerge("benchmark", exported.file, "scene.pt2", "--size", "30x42", "--data", "rooms")
    assert_mistake(done, r"scene\.pt2: --data evaluates model folders, \.onnx and \.xml files")


def test_modules_in_the_current_folder_are_not_run(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "resource.py").write_text("raise RuntimeError('this code ran')")
    monkeypatch.chdir(tmp_path)
    (row,) = benchmark([str(exported.file)], SIZE, frames_of(SIZE, 1), runs=1)
    assert row["memory"] > 0


class Frames:
    """Frames with the model's own predictions, a little off, as labels."""

    def __init__(self, model: SimoModel) -> None:
        self.tasks = {name: model.tasks[name] for name in ("parts", "depth")}
        self.samples = []
        for frame in frames_of(SIZE, 3):
            found = model.predict(frame)
            labels = np.where(np.arange(SIZE[1]) < 4, 0, found["parts"])
            sample = {"image": torch.from_numpy(frame).permute(2, 0, 1).float() / 255}
            sample |= {"parts": torch.from_numpy(labels), "depth": torch.from_numpy(found["depth"])[None] * 1.1}
            self.samples.append(sample)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]

    def select(self, tasks: object) -> Frames:
        return self


def test_metrics_of_a_file_are_those_of_the_model(exported: Exported, float32: None) -> None:
    frames = Frames(exported.model)
    found = evaluate_file(exported.file, frames, threads=1)
    wanted = evaluate(exported.model, frames, batch_size=1)
    assert set(found) == {"parts", "depth"}
    for task, scores in found.items():
        assert scores == pytest.approx({name: wanted[task][name] for name in scores}, rel=1e-4)
    assert found["depth"]["rel_err"] == pytest.approx(100 * 0.1 / 1.1, rel=1e-4)
    frames.tasks = {}
    with pytest.raises(InputError, match=r"predicts parts, depth, normals, the dataset has"):
        evaluate_file(exported.file, frames)


def test_a_file_whose_tasks_differ_from_the_data_is_refused(exported: Exported, tmp_path: Path) -> None:
    frames = Frames(exported.model)
    parts = frames.tasks["parts"]
    frames.tasks["parts"] = Task("parts", "segmentation", classes=(*parts.classes, "lamp"))
    with pytest.raises(InputError, match=r"scene\.onnx: task 'parts' is segmentation of 3 channels .*of 4 in the data"):
        evaluate_file(exported.file, frames)
    frames.tasks = {"depth": Task("depth", "log_depth")}
    with pytest.raises(InputError, match="task 'depth' is depth of 1 channels in the model, but log_depth of 1 in"):
        evaluate_file(exported.file, frames)
    frames.tasks = {"depth": exported.model.tasks["depth"]}
    export(exported.model, tmp_path / "raw.onnx", SIZE, tasks="depth", images=frames_of(SIZE, 1), raw=True)
    with pytest.raises(InputError, match=r"raw\.onnx: gives no predictions of depth, only logits, .* without --raw"):
        evaluate_file(tmp_path / "raw.onnx", frames)


ROW = {
    "milliseconds": {"median": 1.0, "low": 1.0, "high": 1.0, "cpu": 1.0},
    "per_second": {"1": 1.0},
    "memory": 1,
    "disk": 1,
    "difference": {},
}


def scored(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *targets: str) -> list[Outcome]:
    """The benchmark of models of some tasks, joined by "_", as a table and as JSON; nothing is timed."""
    for target in targets:
        exported.model.select(target.split("_")).save_pretrained(tmp_path / target)
    rows = [{**ROW, "target": str(tmp_path / target)} for target in targets]
    monkeypatch.setattr("simomerge.exporting.benchmark.benchmark", lambda *_, **__: deepcopy(rows))
    call = ["benchmark", *(row["target"] for row in rows), "--size", "30x42", "--data", "rooms", "--count", 2]
    return [simomerge(*call), simomerge(*call, "--json")]


def test_targets_may_have_different_tasks(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float32: None
) -> None:
    table, found = scored(exported, tmp_path, monkeypatch, "depth", "normals", "depth_normals")
    assert table.code == 0, table.err
    depth, normals, both = found.json["rows"]
    assert (depth["delta_mtl"], normals["delta_mtl"]) == (0, None) and both["delta_mtl"] == pytest.approx(0, abs=1e-3)
    lines = table.out.split("depth abs_err")[1].splitlines()
    cells = [line.split()[1:] for line in lines[1:] if line.strip()]
    shown = f"{depth['scores']['depth']['abs_err']:.4g}", f"{normals['scores']['normals']['mean_angle']:.4g}"
    assert lines[0].split() == ["normals", "mean_angle", "Delta_MTL", "%"]
    assert cells == [[shown[0], "–", "+0.00"], ["–", shown[1], "–"], [*shown, cells[2][2]]]


def test_the_column_of_a_task_is_its_main_metric() -> None:
    task = Task("mask", "binary")
    scores = {"mask": {"f1": 60.0, "iou": 50.0}}  # torchmetrics sorts the names
    _, table = tables([{**ROW, "target": "a", "scores": scores, "delta_mtl": 0.0}], {"mask": task})
    assert (table.head, table.rows) == (["target", "mask iou", "Delta_MTL %"], [("a", "50", "+0.00")])


def test_what_cannot_be_evaluated_is_named_before_the_timing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*_: object, **__: object) -> None:
        pytest.fail("timed before the check")

    exported.model.select("parts").save_pretrained(tmp_path / "parts")
    monkeypatch.setattr("simomerge.exporting.benchmark.benchmark", timed)
    done = simomerge("benchmark", exported.file, tmp_path / "parts", "--size", "30x42", "--data", "rooms")
    assert_mistake(done, r"/parts: the model predicts parts, the dataset has .*: no task in common")


def test_a_baseline_of_nothing_costs_no_other_result(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"depth": {"abs_err": 0.0}}
    monkeypatch.setattr("simomerge.training.evaluate.evaluate", lambda *_: scores)
    table, found = scored(exported, tmp_path, monkeypatch, "depth")
    assert [row["delta_mtl"] for row in found.json["rows"]] == [None] and table.out.split()[-2:] == ["0", "–"]
    assert "no Delta_MTL, because task 'depth': the baseline's abs_err is 0.0" in table.err


@pytest.mark.slow
def test_experts_run_one_after_the_other_and_models_get_scores(exported: Exported, tmp_path: Path) -> None:
    exported.model.save_pretrained(tmp_path / "all")
    exported.model.select("depth").save_pretrained(tmp_path / "depth")
    exported.model.select("normals").save_pretrained(tmp_path / "normals")
    both = f"{tmp_path / 'depth'}+{tmp_path / 'normals'}"
    done = simomerge(
        "benchmark",
        both,
        tmp_path / "all",
        exported.file,
        "--size",
        "30x42",
        "--runs",
        3,
        "--data",
        "rooms",
        "--count",
        4,
    )
    assert done.code == 0, done.err
    table, scores = done.out.split("Delta_MTL %")
    assert len(table.strip().splitlines()) == 5 and "deg, mean" in table
    deltas = [line.split()[-1] for line in scores.strip().splitlines()]
    assert deltas[:2] == ["+0.00"] * 2 and abs(float(deltas[2])) < 50  # the file has another size than the rooms
