"""Callbacks: what is shown when training starts, and what is counted across a kill."""

from __future__ import annotations

from typing import Any, ClassVar

from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
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


class SavedNumbers(TrainerCallback, ExportableState):
    """Numbers that go into `trainer_state.json` with each checkpoint, and come back when training resumes from one.

    Attributes:
        saved: Names of the attributes that hold them.
    """

    saved: ClassVar[tuple[str, ...]] = ()

    def state(self) -> dict[str, Any]:
        """What `Trainer` saves with a checkpoint."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in self.saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the checkpoint's numbers, where training resumes from one."""
        callbacks: Any = state.stateful_callbacks
        own = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        if isinstance(own, dict):  # a list where there are two of a kind
            for name in self.saved:
                setattr(self, name, own["attributes"][name])


class EarlyStopping(SavedNumbers, EarlyStoppingCallback):
    """Early stopping whose patience does not begin anew when training resumes, as that of `transformers` 5.23 does."""

    saved = ("early_stopping_patience_counter",)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on counting; a training that had stopped takes no further step."""
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step and self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class TokenCount(SavedNumbers):
    """Tokens trained on; a resumed run counts on from its checkpoint.

    Attributes:
        tokens: Tokens that went through the model, padding left out.
        supervised_tokens: Tokens that had a label.
    """

    saved = ("tokens", "supervised_tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.supervised_tokens = 0

    def add(self, tokens: int, supervised_tokens: int) -> None:
        """Count one micro-batch, of all ranks."""
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens
