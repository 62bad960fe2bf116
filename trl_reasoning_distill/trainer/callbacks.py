"""Callbacks: what is shown when training starts, and what is counted across a kill."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class ShowText(TrainerCallback):
    """Prints a text on the main process when training starts."""

    def __init__(self, text: str) -> None:
        self.text = text

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print it."""
        if state.is_world_process_zero:
            tqdm.write(self.text)  # does not break a progress bar in two


class TokenCount(TrainerCallback, ExportableState):
    """Tokens trained on, kept in `trainer_state.json`, so that a resumed run counts on from its checkpoint.

    Attributes:
        tokens: Tokens that went through the model, padding left out.
        supervised_tokens: Tokens that had a label.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.supervised_tokens = 0

    def add(self, tokens: int, supervised_tokens: int) -> None:
        """Count one micro-batch, of all ranks."""
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens

    def state(self) -> dict[str, Any]:
        """What `Trainer` saves with a checkpoint."""
        return {"args": {}, "attributes": {"tokens": self.tokens, "supervised_tokens": self.supervised_tokens}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the counts of the checkpoint, where training resumes from one."""
        saved: Any = state.stateful_callbacks
        saved = saved.get(type(self).__name__) if isinstance(saved, dict) else None
        if isinstance(saved, dict):
            self.tokens = saved["attributes"]["tokens"]
            self.supervised_tokens = saved["attributes"]["supervised_tokens"]
