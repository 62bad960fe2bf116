"""Distil a teacher's stored Top-K log-probabilities into a student, beside fine-tuning on the text.

    accelerate launch recipes/distill.py --config recipes/quickstart/distill.yaml
    trl-distill distill --model_name_or_path Qwen/Qwen2.5-0.5B --teacher_logits runs/x/capture --output_dir runs/x/distill

Needs the store that `capture` wrote, and `align` if the student's vocabulary is another. Without `dataset_path` or
`dataset_name` all rows of the store are trained on; with one, its rows are found in the store by their tokens. With the same rows,
seed and schedule it takes the same steps and tokens as `sft`: the two are a fair comparison. Writes `final_model/`,
`trainer_state.json` and checkpoints; a killed run goes on from the newest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_reasoning_distill.scripts.arguments import AccuracyArguments
from trl_reasoning_distill.scripts.stage import parse_stage, stage_main
from trl_reasoning_distill.scripts.training import TrainingDataArguments, run_training

if TYPE_CHECKING:
    from trl import TrlParser


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    from trl_reasoning_distill.trainer.config import StudentConfig, TopKDistillConfig

    types = (TrainingDataArguments, TopKDistillConfig, StudentConfig, AccuracyArguments)
    return TrlParser(types, prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    data, config, model, accuracy = parse_stage(make_parser(), args)

    from trl_reasoning_distill.teacher.store import TopKStore
    from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

    store = TopKStore.open(config.teacher_logits)
    rows = data.load()
    rows = store.dataset() if rows is None else rows
    # The store's manifest holds the checksums of all its parts, so its hash stands for the whole
    inputs = {"teacher_logits": store.path / "manifest.json"}
    run_training("distill", TopKDistillTrainer, data, config, model, rows=rows, accuracy=accuracy, inputs=inputs)


if __name__ == "__main__":
    main()
