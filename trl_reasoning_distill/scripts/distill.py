"""Distil a teacher's stored Top-K log-probabilities into a student, beside fine-tuning on the text.

    accelerate launch recipes/distill.py --config recipes/quickstart/distill.yaml
    trl-distill distill --model_name_or_path Qwen/Qwen2.5-0.5B --teacher_logits runs/x/capture --output_dir runs/x/distill

Needs the store that `capture` wrote, and `align` if the student's vocabulary is another. Without `dataset_path` or
`dataset_name` all rows of the store are trained on; with one, its rows are found in the store by their tokens. With the same rows,
seed and schedule it takes the same steps and tokens as `sft`: the two are a fair comparison. Writes `final_model/`,
`trainer_state.json` and checkpoints; a killed run goes on from the newest.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trl_reasoning_distill.scripts.arguments import AccuracyArguments
from trl_reasoning_distill.scripts.stage import stage_main
from trl_reasoning_distill.scripts.training import TrainingDataArguments, TrainingStage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from trl import TrlParser

    from trl_reasoning_distill.data.row_sets import Rows
    from trl_reasoning_distill.teacher.store import TopKStore
    from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    from trl_reasoning_distill.trainer.config import StudentConfig, TopKDistillConfig

    types = (TrainingDataArguments, TopKDistillConfig, StudentConfig, AccuracyArguments)
    return TrlParser(types, prog=prog)  # type: ignore[arg-type]


class Distill(TrainingStage):
    """Distil a stored teacher."""

    name = "distill"

    def trainer_class(self) -> type[TopKDistillTrainer]:
        """The trainer."""
        from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

        return TopKDistillTrainer

    @functools.cached_property
    def store(self) -> TopKStore:
        """The teacher's store."""
        from trl_reasoning_distill.teacher.store import TopKStore

        return TopKStore.open(self.config.teacher_logits)  # type: ignore[attr-defined]

    def load_rows(self) -> Rows:
        """Those of the dataset, or of the whole store."""
        rows = self.data.load()
        return self.store.dataset() if rows is None else rows

    def further_inputs(self) -> Mapping[str, str | PathLike[str]]:
        """The store's manifest, which holds the checksums of all its parts: its hash stands for the whole."""
        return {"teacher_logits": self.store.path / "manifest.json"}


main = stage_main(Distill, make_parser)

if __name__ == "__main__":
    main()
