"""Fine-tune a student on chains of thought.

    accelerate launch recipes/sft.py --config recipes/quickstart/sft.yaml
    trl-distill sft --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_path runs/x/verify --output_dir runs/x/sft

Rows are those of `train.jsonl` (prompt and completion as messages), or any dataset that TRL's SFTTrainer takes. Rows longer than
`max_length` are left out and counted. Writes `final_model/`, `trainer_state.json` and checkpoints; a killed run goes on from
the newest. LoRA with `use_peft: true`, 4-bit with `load_in_4bit: true`, a KL term to the model as it was with
`use_kl_regularization: true`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_reasoning_distill.scripts.arguments import AccuracyArguments
from trl_reasoning_distill.scripts.stage import stage_main
from trl_reasoning_distill.scripts.training import TrainingDataArguments, TrainingStage

if TYPE_CHECKING:
    from trl import TrlParser

    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, StudentConfig

    types = (TrainingDataArguments, ReasoningSFTConfig, StudentConfig, AccuracyArguments)
    return TrlParser(types, prog=prog)  # type: ignore[arg-type]


class SFT(TrainingStage):
    """Fine-tune on text."""

    name = "sft"

    def trainer_class(self) -> type[ReasoningSFTTrainer]:
        """The trainer."""
        from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

        return ReasoningSFTTrainer


main = stage_main(SFT, make_parser)

if __name__ == "__main__":
    main()
