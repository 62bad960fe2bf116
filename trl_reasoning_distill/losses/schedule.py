"""How the weight of the distillation term grows over training."""

from __future__ import annotations


def kd_weight_at(step: int, max_weight: float, warmup_steps: int) -> float:
    """Weight of the distillation loss at an optimizer step: linear from 0, then constant.

    A fresh student's distribution is far from the teacher's, so the first gradients of the divergence are large and
    say little; the warm-up lets cross-entropy move the student near the data first.

    Args:
        step: optimizer steps done so far; the first step is 0 and, with a warm-up, has weight 0.
        max_weight: weight after the warm-up, ≥ 0.
        warmup_steps: length of the ramp; 0 for none.

    Returns:
        `max_weight * min(1, step / warmup_steps)`.

    Raises:
        ValueError: if an argument is negative.
    """
    for name, value in (("step", step), ("max_weight", max_weight), ("warmup_steps", warmup_steps)):
        if value < 0:
            raise ValueError(f"`{name}` must be ≥ 0, but is {value}.")
    if step >= warmup_steps:
        return max_weight
    return max_weight * step / warmup_steps
