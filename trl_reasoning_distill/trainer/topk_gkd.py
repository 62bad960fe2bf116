"""`trainer.gkd.trainer` by its name in 0.1.0; goes with 0.3."""

import warnings

from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer

__all__ = ["TopKGKDTrainer"]

warnings.warn("trl_reasoning_distill.trainer.topk_gkd is now trainer.gkd.trainer.", DeprecationWarning, stacklevel=2)
