"""The one-cycle schedule of a training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from simomerge.training.optimizer import one_cycle
from simomerge.training.settings import TrainSettings


def rates(steps: int, warmup: float, peak: float = 1.0) -> list[float]:
    """The learning rate of each step, and the one after the last step."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule, found = one_cycle(optimizer, TrainSettings(steps, warmup=warmup)), []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(found) <= steps:
            schedule.step()
    return found


def closed_form(steps: int, warmup: float) -> list[float]:
    """Half a cosine from 1/25 up to 1 at the end of the rise, and another down to 1/250000 after the last step."""
    peak_at = max(warmup, 1e-3) * (steps + 1) - 1

    def between(start: float, end: float, part: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * part)) / 2

    def rate(step: int) -> float:
        if step <= peak_at:
            return between(1 / 25, 1, step / peak_at if step else 0)
        return between(1, 1 / 25 / 1e4, (step - peak_at) / (steps - peak_at))

    return [rate(step) for step in range(steps + 1)]


@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.05, 0.1, 0.2, 0.5])
def test_the_schedule_has_its_closed_form_for_every_number_of_steps(warmup: float) -> None:
    for steps in range(1, 101):
        assert rates(steps, warmup) == pytest.approx(closed_form(steps, warmup), rel=1e-6, abs=1e-9), steps


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.5), (4, 0.2), (9, 0.1), (19, 0.05), (99, 0.01), (999, 0.0)])
def test_a_rise_of_exactly_one_step_starts_low_and_has_its_peak_next(steps: int, warmup: float) -> None:
    found = rates(steps, warmup)
    assert found[0] == pytest.approx(1 / 25) and found[-1] == pytest.approx(1 / 25 / 1e4, rel=1e-3)
    if steps > 1:
        assert found[1] == pytest.approx((1 + math.cos(math.pi / steps)) / 2, rel=1e-4)


@pytest.mark.parametrize(("steps", "warmup"), [(18, 0.05), (20, 0.05), (39, 0.05), (30, 0.3), (100, 0.0)])
def test_other_schedules_are_those_of_torch(steps: int, warmup: float) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    plain = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, steps + 1, pct_start=max(warmup, 1e-3))
    expected = []
    for _ in range(steps + 1):
        expected.append(plain.get_last_lr()[0])
        optimizer.step()
        if len(expected) <= steps:
            plain.step()
    assert rates(steps, warmup) == expected
