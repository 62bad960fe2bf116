"""TRL's GKD, and the only file that imports it: TRL may drop an experimental module in any release.

Read in TRL 1.16.0 (`trl/experimental/gkd/`). Where it is gone, `GKDConfig` is `SFTConfig` and `GKDTrainer` is `SFTTrainer`; the options,
attributes and generation of GKD are those of `TopKGKDConfig` and `TopKGKDTrainer` in either case.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import SFTConfig, SFTTrainer

try:
    from trl.import_utils import suppress_experimental_warning

    with suppress_experimental_warning():  # our pages say it once
        from trl.experimental.gkd import GKDConfig, GKDTrainer
except ImportError:
    GKDConfig, GKDTrainer = SFTConfig, SFTTrainer  # type: ignore[misc, assignment]

__all__ = ["ARGUMENTS", "BridgedGKDTrainer", "GKDConfig", "GKDTrainer", "refuse_unused_overrides"]

ARGUMENTS = (
    *("model", "teacher_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"),
    *("compute_metrics", "callbacks", "optimizers", "preprocess_logits_for_metrics", "peft_config", "formatting_func"),
)
"""What `GKDTrainer` takes by position, in its order."""

_UNUSED = {
    "generalized_jsd_loss",
    *(name for name, member in vars(GKDTrainer).items() if callable(member) or isinstance(member, staticmethod)),
} - {"generate_on_policy_outputs", *dir(SFTTrainer)}


class BridgedGKDTrainer(GKDTrainer):
    """TRL's GKDTrainer without its constructor and its step.

    TRL 1.16's constructor loads the teacher, reads its `config` and refuses another `vocab_size`, replaces the data preparation by a
    collator that raises on a completion as long as `max_length`, and passes on fewer arguments than SFTTrainer takes. Its step
    generates after the labels of the batch have been counted.
    """

    def __init__(self, model: Any, args: GKDConfig, **kwargs: Any) -> None:
        SFTTrainer.__init__(self, model, args=args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A step of SFTTrainer's: the batch has its completions already."""
        return SFTTrainer.training_step(self, *args, **kwargs)


def refuse_unused_overrides(trainer: type, base: type) -> None:
    """Refuse a subclass of `base` that overrides a method of TRL's GKDTrainer which `base` never calls.

    Raises:
        ValueError: With the method, and what to override instead.
    """
    for name in sorted(_UNUSED):
        if getattr(trainer, name, None) is not getattr(base, name, None):
            raise ValueError(
                f"{trainer.__name__} overrides `{name}`, which {base.__name__} never calls: its loss is computed tile by tile, without the "
                "logits of the whole vocabulary that TRL's method takes. Override `loss_arguments` (weights, temperature, divergence) or "
                "`compute_loss` instead, or use TRL's GKDTrainer."
            )
