"""A fold over many images goes on where it was interrupted."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simomerge.assembly.realign import predictions, realign
from simomerge.assembly.realign.agreement import Agreement, judging
from simomerge.assembly.realign.layout import FoldLayout
from simomerge.assembly.realign.predictions import TeacherPredictions
from simomerge.assembly.realign.restart import SavedSums
from simomerge.assembly.realign.sums import HeadSums
from simomerge.assembly.realign.teacher import observe
from simomerge.core import distributed
from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.datasets import DenseDataset
from simomerge.datasets.groups import held_out
from simomerge.datasets.pictures import as_images
from simomerge.models.model import SimoModel

from .contract import FEW_IMAGES, Killed


@pytest.mark.filterwarnings(FEW_IMAGES)
def test_an_interrupted_fold_ends_like_one_that_was_left_alone(
    merged: SimoModel,
    experts: dict[str, SimoModel],
    rooms: DenseDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"method": "fold-cross", "images_at_once": 2, "count": len(rooms)}
    expected = realign(merged, experts, rooms, **given)
    seen: list[int] = []

    def note(saved: SavedSums, following: int) -> None:
        seen.append(following)
        if len(seen) == 3:
            saved.save(following)
            raise Killed

    monkeypatch.setattr(SavedSums, "save_once_in_a_while", note)
    with pytest.raises(Killed):
        realign(merged, experts, rooms, work_folder=tmp_path, **given)
    assert {path.name for path in tmp_path.iterdir()} == {"inputs.json", "sums-0-of-1.safetensors"}
    resumed = realign(merged, experts, rooms, work_folder=tmp_path, **given)
    assert seen == list(range(2, len(rooms) + 1, 2))  # no batch was seen twice
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.json"]
    for name, value in expected.heads.state_dict().items():
        torch.testing.assert_close(resumed.heads.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)
    records = [model.provenance["realign"] for model in (expected, resumed)]
    assert records[0]["r2"] == records[1]["r2"]
    assert records[0]["unlabelled_images"] == records[1]["unlabelled_images"] == len(rooms)


def test_the_predictions_that_judge_a_fold_are_kept_too(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, tmp_path: Path
) -> None:
    images = as_images(rooms)
    agreement, sums = Agreement(experts, judging(images)), HeadSums(FoldLayout(merged, "cross-tap"))
    for batch in observe(experts, images, check=False):
        agreement.add(batch)
    assert sum(map(len, agreement.images)) == len(held_out(rooms)) > 0
    SavedSums(tmp_path, sums, agreement).save(3)
    again = Agreement(experts, judging(images))
    assert SavedSums(tmp_path, HeadSums(FoldLayout(merged, "cross-tap")), again).resume() == 3
    assert len(again.images) == len(agreement.images)
    for kept, found in zip(agreement.images, again.images, strict=True):
        assert torch.equal(kept, found)
    assert again.distances(merged) == agreement.distances(merged)


@pytest.mark.usefixtures("float32")
def test_a_fold_is_judged_on_images_spread_over_all_held_out_ones(
    experts: dict[str, SimoModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also under torchrun, where each process keeps those of its share."""
    monkeypatch.setattr("simomerge.assembly.realign.agreement.MOST_IMAGES", 6)
    pictures = torch.rand((80, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = as_images(pictures)
    out = held_out(images)
    assert out == [*range(30, 40), *range(70, 80)]  # two clips
    assert judging(images) == [30, 34, 38, 71, 75, 79]
    kept = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "processes", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        agreement = Agreement(experts, judging(images))
        for batch in observe(experts, images, batch_size=8, shared=True, check=False):
            agreement.add(batch)
        kept.append(torch.cat(agreement.images))
        for task, expert in experts.items():
            logits = torch.cat([each[task] for each in agreement.logits])
            with torch.no_grad():
                expected = predictions.as_stored(expert(kept[-1])[task], expert.tasks[task])
                torch.testing.assert_close(logits, expected, rtol=2e-3, atol=1e-3)
    assert torch.equal(kept[0], pictures[[30, 34, 38]]) and torch.equal(kept[1], pictures[[71, 75, 79]])


def test_interrupted_predictions_go_on(
    experts: dict[str, SimoModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = as_images(torch.rand((70, 3, 24, 32), generator=torch.Generator().manual_seed(0)))
    whole = TeacherPredictions(images, experts, tmp_path / "whole")
    monkeypatch.setattr(predictions, "EVERY", 0.0)

    def killed(label: str, done: int, total: int, note: str) -> None:
        if done >= 64:
            raise Killed

    with pytest.raises(Killed), show_progress(killed):
        TeacherPredictions(images, experts, tmp_path / "parts")
    assert int((tmp_path / "parts" / "next-0-of-1").read_text()) == 64
    seen: list[int] = []
    with show_progress(lambda label, done, total, note: seen.append(done)):
        parts = TeacherPredictions(images, experts, tmp_path / "parts")
    assert seen[-1] == 6  # the images that were left
    for index in (0, 40, 69):
        for task, value in whole.targets(index, experts).items():
            assert torch.equal(parts.targets(index, [task])[task], value)
    left = {path.name for path in (tmp_path / "parts").iterdir()}
    assert left == {"done", *(f"{task}.npy" for task in experts)}


def test_damaged_predictions_are_made_again_or_named(experts: dict[str, SimoModel], tmp_path: Path) -> None:
    images = as_images(torch.rand((6, 3, 24, 32), generator=torch.Generator().manual_seed(0)))
    whole = TeacherPredictions(images, experts, tmp_path)
    expected = whole.targets(5, experts)
    (tmp_path / "done").unlink()  # as after an interruption
    (tmp_path / "next-0-of-1").write_text("4")
    os.truncate(tmp_path / "depth.npy", 300)
    again = TeacherPredictions(images, experts, tmp_path)
    for task, values in again.targets(5, experts).items():
        assert torch.equal(values, expected[task])
    os.truncate(tmp_path / "depth.npy", 300)
    with pytest.raises(InputError, match=rf"depth\.npy: cannot be read .*; remove the folder {tmp_path}, and repeat"):
        TeacherPredictions(images, experts, tmp_path).targets(0, ["depth"])


def test_predictions_that_are_made_again_may_use_the_space_of_the_old_ones(
    experts: dict[str, SimoModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = as_images(torch.rand((6, 3, 24, 32), generator=torch.Generator().manual_seed(0)))
    needed = TeacherPredictions(images, experts, tmp_path).bytes_of_predictions
    (tmp_path / "done").unlink()  # as after an interruption
    os.truncate(tmp_path / "depth.npy", 300)
    disk = needed + 100

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=disk - sum(each.stat().st_size for each in folder.glob("*.npy")))

    monkeypatch.setattr(predictions, "shutil", SimpleNamespace(disk_usage=usage))
    again = TeacherPredictions(images, experts, tmp_path)
    assert (tmp_path / "done").exists() and again.targets(5, ["depth"])["depth"].abs().sum() > 0


def test_a_damaged_file_is_named(
    merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, tmp_path: Path
) -> None:
    (tmp_path / "sums-0-of-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"sums-0-of-1.safetensors: cannot resume .* remove it to start again"):
        realign(merged, experts, rooms, method="fold", work_folder=tmp_path)
