"""Hardware: processes that read images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simomerge.core import machine as devices
from simomerge.core.errors import InputError


@pytest.mark.parametrize(("cores", "processes", "workers"), [(16, 1, 8), (16, 4, 4), (2, 1, 2), (2, 4, 0)])
def test_worker_processes_read_images_for_a_gpu_only(
    cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert devices.loader_workers("cuda:1") == workers and devices.loader_workers("cpu") == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(devices, "_pool_workers", processes)  # workers of a pool share the cores too
    assert devices.loader_workers("cuda:1") == workers


@pytest.mark.parametrize(("chosen", "precision"), [("fp32", "no"), ("bf16", "bf16")])
def test_a_precision_that_is_chosen_holds(chosen: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.PRECISION, chosen)
    assert devices.mixed_precision("cpu") == precision and devices.autocast("cpu")._enabled == (precision == "bf16")


def test_an_unknown_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.PRECISION, "fp8")
    with pytest.raises(InputError, match="SIMOMERGE_PRECISION is 'fp8'; use auto, fp32 or bf16"):
        devices.mixed_precision("cpu")


def test_depthwise_convolutions_train_in_single_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(devices.PRECISION, raising=False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True, raising=False)
    plain, depthwise = nn.Sequential(nn.Conv2d(4, 8, 3)), nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
    assert [devices.mixed_precision("cpu", each) for each in (plain, depthwise)] == ["bf16", "no"]
    assert devices.mixed_precision("cpu", depthwise.requires_grad_(False)) == devices.mixed_precision("cpu") == "bf16"


def test_depthwise_convolutions_get_channels_last_and_others_do_not() -> None:
    plain, depthwise = (
        nn.Sequential(nn.Conv2d(4, 8, 3)),
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8)),
    )
    images = torch.rand(2, 4, 6, 5)
    before = depthwise(images)
    assert devices.arrange_convolutions(plain)[0].weight.is_contiguous()
    assert devices.arrange_convolutions(depthwise) is depthwise
    assert depthwise[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(depthwise(images), before)
