"""Callbacks: what is shown when training starts, and what is counted across a kill."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_reasoning_distill.processes import on_interruption
from trl_reasoning_distill.trainer.trl_bridge import ExportableState


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


class StopOnSignal(TrainerCallback):
    """Save and stop after the first SIGTERM or SIGINT that reaches any rank.

        with StopOnSignal(trainer) as stop:
            trainer.train()
        if stop.number is not None: ...

    `TrainingArguments.enable_jit_checkpoint` saves when its own rank hears the signal, and ranks that hear it in different steps
    then wait for each other for ever. Here the ranks agree after each step, in the background and on the CPU, so that no step
    waits for it: the answer is read one step later.

    Attributes:
        number: The signal that stopped the training on this or another rank; `None` if none did.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.number: int | None = None
        self._heard = 0
        self._trainer = trainer
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> StopOnSignal:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self._stack.enter_context(on_interruption(self._hear))
        self._trainer.add_callback(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trainer.remove_callback(self)
        self._stack.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to save and stop, once any rank has heard a signal."""
        if number := self._agreed():
            self.number = number
            control.should_save = True
            control.should_training_stop = True

    def _hear(self, number: int) -> None:
        self._heard = number

    def _agreed(self) -> int:
        """The signal that any rank had heard when it ended the step before; on one process, that has been heard by now."""
        if self._group is None:
            return self._heard
        heard = 0
        if self._pending is not None:
            work, answer = self._pending
            work.wait()
            heard = int(answer)
        question = torch.tensor(self._heard)
        work = dist.all_reduce(question, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = work, question
        return heard


GAIN = 0.1
LARGEST_ERROR = 0.2


class KLController(SavedNumbers):
    """Raises the coefficient while the measured KL is above its target, and lowers it while it is below.

    After each optimizer step, with `error = clip(KL / target − 1, ±0.2)`: `coefficient ← coefficient · (1 + 0.1 · error)`, so at most
    2 % per step. The KL is the mean per token over the step's whole global batch, so every rank computes the same coefficient. It is
    kept in `trainer_state.json` and goes on from there when training resumes.

    Args:
        coefficient: Before the first step.
        target: Nats per supervised token.

    Attributes:
        coefficient: What the KL term is multiplied by now.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.
    """

    saved = ("coefficient",)

    def __init__(self, coefficient: float, target: float) -> None:
        self.coefficient, self.target = coefficient, target
        self._kl = self._tokens = 0.0

    def add(self, kl: float, tokens: float) -> None:
        """Count one micro-batch: the sum of its KL over all ranks, in nats, and its tokens with a reference."""
        self._kl += kl
        self._tokens += tokens

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adapt to the step that has just ended."""
        kl = self._kl / self._tokens if self._tokens else math.nan
        if math.isfinite(kl):
            error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
            self.coefficient *= 1 + GAIN * error
        self._kl = self._tokens = 0.0


def show_samples(
    samples: Sequence[Mapping[str, Any]], trainer: Any, *, name: str = "completions", title: str = ""
) -> None:
    """Show samples on the console, and send them to trackio, wandb and tensorboard as far as `report_to` names them.

    Args:
        samples: One mapping of column to value per row, with the same columns.
        trainer: The trainer: its step, its trackers.
        name: Of the table in the trackers.
        title: A line above the table on the console.
    """
    if not samples or not trainer.is_world_process_zero():
        return
    tqdm.write("\n".join(part for part in (title, markdown_table(samples)) if part))
    for tracker in _open_trackers(trainer.args.report_to):
        import pandas as pd

        tracker.log({name: tracker.Table(dataframe=pd.DataFrame(list(samples)))})
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)  # transformers' TensorBoardCallback
        if writer is not None:
            writer.add_text(name, markdown_table(samples, width=2000), trainer.state.global_step)


def markdown_table(samples: Sequence[Mapping[str, Any]], width: int = 60) -> str:
    """Samples as a Markdown table, a row each; texts are brought to one line of at most `width` characters."""
    if not samples:
        return ""
    names = list(samples[0])
    rows = [names, ["---"] * len(names), *([_cell(sample[name], width) for name in names] for sample in samples)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any, width: int) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= width else f"{text[: width // 2]} … {text[-(width // 2) :]}"


def _open_trackers(names: Iterable[str]) -> list[Any]:
    """trackio and wandb, where they are asked for, installed and running; their tables are made alike."""
    trackers = []
    for name in ("trackio", "wandb"):
        if name in names and importlib.util.find_spec(name) is not None:
            tracker = importlib.import_module(name)
            if name == "trackio" or tracker.run is not None:
                trackers.append(tracker)
    return trackers
