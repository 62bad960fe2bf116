"""Teach a small language model to reason like a large one: verified chains of thought, Top-K logit distillation, honest evaluation.

The public names are those of `__all__`. Each is imported when it is first asked for, so that `import trl_reasoning_distill` costs
next to nothing and a data tool never loads torch.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.data.mixture import load_mixture, worked_rows
    from trl_reasoning_distill.data.sources import load_problems
    from trl_reasoning_distill.data.tokenization import tokenize_example
    from trl_reasoning_distill.evaluation.compare import compare_models
    from trl_reasoning_distill.evaluation.evaluate import evaluate_models
    from trl_reasoning_distill.evaluation.report import write_report
    from trl_reasoning_distill.losses.divergence import TopKTargets, topk_divergence
    from trl_reasoning_distill.losses.fused import LinearTeacher, fused_linear_distillation_loss
    from trl_reasoning_distill.teacher.store import TopKStore
    from trl_reasoning_distill.teacher.store.alignment import align_store
    from trl_reasoning_distill.trainer.accuracy import AccuracyCallback, HeldOutProblem
    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
    from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
    from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
    from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer
    from trl_reasoning_distill.verification.extract import extract_answer
    from trl_reasoning_distill.verification.verify import verify_answer, verify_answers

__all__ = [
    "AccuracyCallback",
    "HeldOutProblem",
    "LinearTeacher",
    "ReasoningFormat",
    "ReasoningSFTConfig",
    "ReasoningSFTTrainer",
    "TopKDistillConfig",
    "TopKDistillTrainer",
    "TopKGKDConfig",
    "TopKGKDTrainer",
    "TopKStore",
    "TopKTargets",
    "align_store",
    "compare_models",
    "evaluate_models",
    "extract_answer",
    "fused_linear_distillation_loss",
    "load_mixture",
    "load_problems",
    "tokenize_example",
    "topk_divergence",
    "verify_answer",
    "verify_answers",
    "worked_rows",
    "write_report",
]

# Where each public name lives, as the imports above have it for type checkers; a test compares the two.
_HOMES = {
    "AccuracyCallback": "trainer.accuracy",
    "HeldOutProblem": "trainer.accuracy",
    "LinearTeacher": "losses.fused",
    "ReasoningFormat": "data.formatting",
    "ReasoningSFTConfig": "trainer.config",
    "ReasoningSFTTrainer": "trainer.reasoning_sft",
    "TopKDistillConfig": "trainer.config",
    "TopKDistillTrainer": "trainer.topk_distill",
    "TopKGKDConfig": "trainer.gkd.config",
    "TopKGKDTrainer": "trainer.gkd.trainer",
    "TopKStore": "teacher.store",
    "TopKTargets": "losses.divergence",
    "align_store": "teacher.store.alignment",
    "compare_models": "evaluation.compare",
    "evaluate_models": "evaluation.evaluate",
    "extract_answer": "verification.extract",
    "fused_linear_distillation_loss": "losses.fused",
    "load_mixture": "data.mixture",
    "load_problems": "data.sources",
    "tokenize_example": "data.tokenization",
    "topk_divergence": "losses.divergence",
    "verify_answer": "verification.verify",
    "verify_answers": "verification.verify",
    "worked_rows": "data.mixture",
    "write_report": "evaluation.report",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = metadata.version("trl-reasoning-distill")
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # asked for once, found at once from then on
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
