"""An adaptive coefficient that holds the KL divergence to the reference near a budget."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_reasoning_distill.trainer.callbacks import SavedNumbers

GAIN = 0.1
LARGEST_ERROR = 0.2


class KLController(SavedNumbers):
    """Raises the coefficient while the measured KL is above its target, and lowers it while it is below.

    After each optimizer step, with `error = clip(KL / target − 1, ±0.2)`: `coefficient ← coefficient · (1 + 0.1 · error)`, so at most
    2 % per step. The KL is the mean per token over the step's whole global batch, so every rank computes the same coefficient. It is
    kept in `trainer_state.json` and goes on from there when training resumes.

    Args:
        coefficient: Before the first step.
        target: Nats per supervised token.

    Attributes:
        coefficient: What the KL term is multiplied by now.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    saved = ("coefficient",)

    def __init__(self, coefficient: float, target: float) -> None:
        self.coefficient, self.target = coefficient, target
        self._kl = self._tokens = 0.0

    def add(self, kl: float, tokens: float) -> None:
        """Count one micro-batch: the sum of its KL over all ranks, in nats, and its tokens with a reference."""
        self._kl += kl
        self._tokens += tokens

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adapt to the step that has just ended."""
        kl = self._kl / self._tokens if self._tokens else math.nan
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
            self.coefficient *= 1 + GAIN * error
        self._kl = self._tokens = 0.0
