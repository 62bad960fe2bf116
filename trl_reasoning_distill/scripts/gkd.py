"""Distil a live teacher into a student, on the dataset's completions and on the student's own (GKD), or from a better prompt.

    accelerate launch recipes/gkd.py --config recipes/quickstart_gkd/gkd.yaml
    trl-distill gkd --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher Qwen/Qwen2.5-7B-Instruct \\
        --dataset_path runs/x/verify --output_dir runs/x/gkd

`lmbda` is the share of micro-batches that the student writes, `beta` leads from KL(teacher ‖ student) at 0 to KL(student ‖ teacher) at
1. Without `teacher` the teacher is the student as it was; with `teacher_context` it reads more than the student:
context distillation. The teacher may be loaded in 4 bit, sharded with the student, or asked at `teacher_server_url`. It needs the
student's token ids; for another tokenizer run `capture`, `align` and `distill`. Writes what `sft` writes, and goes on where it was killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_reasoning_distill.scripts.arguments import AccuracyArguments
from trl_reasoning_distill.scripts.stage import stage_main
from trl_reasoning_distill.scripts.training import TrainingDataArguments, TrainingStage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from trl import TrlParser

    from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
    from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    from trl_reasoning_distill.trainer.config import StudentConfig
    from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig

    types = (TrainingDataArguments, TopKGKDConfig, StudentConfig, AccuracyArguments)
    return TrlParser(types, prog=prog)  # type: ignore[arg-type]


class GKD(TrainingStage):
    """Distil a live teacher."""

    name = "gkd"

    def trainer_class(self) -> type[TopKGKDTrainer]:
        """The trainer."""
        from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer

        return TopKGKDTrainer

    def further_inputs(self) -> Mapping[str, str | PathLike[str]]:
        """The teacher, where it is loaded and not asked on a server."""
        config: TopKGKDConfig = self.config  # type: ignore[assignment]
        teacher = config.teacher_model_name_or_path
        return {"teacher": teacher} if teacher is not None and config.teacher_server_url is None else {}


main = stage_main(GKD, make_parser)

if __name__ == "__main__":
    main()
