"""What a training would do, found out by its own trainer, which is left as soon as its data is prepared: no weight is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.trainer.preparation import PreparationReport
from trl_reasoning_distill.trainer.trl_bridge import construct_until_prepared


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """The data of a training as its trainer has prepared it.

    Attributes:
        rows: What is trained on, packed where that is asked for.
        reports: What became of each dataset, by its name.
        left_out: Per dataset, rows that a live teacher cannot read.
        examples: Some rows as text, supervised tokens marked.
    """

    rows: Dataset
    reports: dict[str, PreparationReport]
    left_out: dict[str, dict[str, int]]
    examples: str

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding left out."""
        return sum(len(ids) for ids in self.rows["input_ids"])


def prepare_data(
    trainer_class: type, config: Any, name: str, revision: str | None, *, peft_config: Any, **datasets: Any
) -> PreparedData:
    """Let a trainer prepare its data beside a student that has its shape but no weights.

    Args:
        trainer_class: The trainer.
        config: Its configuration; shows `preview_examples` rows.
        name: Folder or hub name of the student.
        revision: Branch, tag or commit of a hub model.
        peft_config: The adapter that is to be trained, if any.
        datasets: `train_dataset` and `eval_dataset`.

    Raises:
        ValueError: Whatever the trainer refuses.
    """
    options = {"revision": revision, "trust_remote_code": config.trust_remote_code}
    try:
        shape = AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoProcessor.from_pretrained(name, **options)
    except OSError as error:
        raise ValueError(f"No model at {name!r}: {str(error).strip().splitlines()[0]}") from None
    if config.add_think_tokens:  # as a training does, but for the model that it writes
        form = ReasoningFormat.preset(config.reasoning_format)
        tags = [tag for tag in (form.open_tag, form.close_tag) if tag]
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)
    trainer, rows = construct_until_prepared(
        trainer_class, student, args=config, processing_class=tokenizer, peft_config=peft_config, **datasets
    )
    return PreparedData(rows, trainer.reports, getattr(trainer, "left_out", {}), trainer.preview)
