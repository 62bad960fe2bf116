"""A training that is asked to stop ends its step, saves a checkpoint, and stops: on all ranks at the same step."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_reasoning_distill.interruption import on_interruption


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
