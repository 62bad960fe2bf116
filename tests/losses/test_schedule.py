"""The warm-up of the distillation weight."""

from __future__ import annotations

import pytest

from trl_reasoning_distill.losses.schedule import kd_weight_at


def test_it_rises_linearly_from_zero_and_stays():
    assert [kd_weight_at(step, 0.4, 4) for step in range(6)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_without_warm_up_it_is_constant():
    assert kd_weight_at(0, 0.35, 0) == kd_weight_at(10, 0.35, 0) == 0.35


@pytest.mark.parametrize("arguments", [(-1, 0.1, 1), (0, -0.1, 1), (0, 0.1, -1)])
def test_negative_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must be ≥ 0"):
        kd_weight_at(*arguments)
