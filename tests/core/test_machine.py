"""Hardware: processes that read images."""

from __future__ import annotations

import pytest

from simomerge.core import machine as devices


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
