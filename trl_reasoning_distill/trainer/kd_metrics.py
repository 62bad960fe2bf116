"""What is logged of a distillation, offline or live."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trl_reasoning_distill.losses.fused import FusedLoss

_MEANS = {
    "kd_loss": "kd",
    "teacher_mass": "teacher_mass",
    "student_mass": "student_mass",
    "top1_agreement": "agreement",
}


def distillation_sums(outputs: FusedLoss) -> dict[str, Tensor]:
    """Sums over this rank's tokens that the metrics are made of; each scalar."""
    return {
        "targets": (outputs.teacher_mass > 0).sum(),
        "kd": outputs.kd.sum(),
        "teacher_mass": outputs.teacher_mass.sum(),
        "student_mass": outputs.student_mass.sum(),
        "agreement": outputs.top1_agreement.sum(),
    }


def distillation_means(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics from these sums over all ranks: per token with a target; nothing where there is none."""
    return {name: sums[key] / sums["targets"] for name, key in _MEANS.items()} if sums["targets"] else {}
