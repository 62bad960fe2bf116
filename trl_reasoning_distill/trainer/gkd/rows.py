"""Rows and batches of a live distillation: the prompt to write from, and the row as the teacher reads it.

A prepared row carries, beside its tokens, the ids of its prompt up to where a model begins to write (`prompt_ids`) and, where the
teacher reads another one, that prompt (`teacher_prompt_ids`, of which `teacher_prefix` stand before the dataset's completion).
The teacher's row is its own prompt and the student's completion, id for id, whoever wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import maybe_convert_to_chatml

from trl_reasoning_distill.data.tokenization import TokenizedExample, completion_start
from trl_reasoning_distill.teacher.context import TeacherContext, anchor, prompt_ids

PROMPT_IDS = "prompt_ids"
TEACHER_PROMPT_IDS = "teacher_prompt_ids"
TEACHER_PREFIX = "teacher_prefix"
TEACHER_TOKENS = "teacher_tokens"
"""Length of a row as the teacher reads it; 0 where the dataset's completion has other ids behind the teacher's prompt."""


@dataclasses.dataclass(frozen=True)
class PromptAndCompletion:
    """Brings a row into the form `prompt`, `completion`: the last reply is the completion.

    Attributes:
        needs_completion: Whether a row without one is refused. Otherwise it gets an empty one, which nothing is learnt from.
    """

    needs_completion: bool

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with `prompt` and `completion`, or as it is where it holds tokens already."""
        if "input_ids" in row:
            return row
        row = dict(maybe_convert_to_chatml(row))
        messages = row.pop("messages", None)
        if messages:
            is_answered = messages[-1]["role"] == "assistant"
            row["prompt"] = messages[:-1] if is_answered else messages
            row["completion"] = messages[-1:] if is_answered else None
        if not row.get("prompt"):
            raise ValueError(
                f"A row for GKD needs a prompt to write from: `prompt` and `completion`, or `messages`; found {sorted(row)}. Plain "
                "text has none; train on it with `sft` or `distill`."
            )
        if not row.get("completion"):
            if self.needs_completion:
                raise ValueError(
                    "A row has no completion, and not all batches are written by a model: give completions, or set lmbda=1."
                )
            row["completion"] = "" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": ""}]
        return row


@dataclasses.dataclass(frozen=True)
class PromptColumns:
    """Adds the columns of a live distillation to a tokenized row.

    Attributes:
        tokenizer: The student's tokenizer.
        context: What the teacher reads.
        template_options: Chat-template options for all rows.
        shared_ids: Ids below this mean the same to teacher and student.
    """

    tokenizer: Any
    context: TeacherContext
    template_options: Mapping[str, Any]
    shared_ids: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`prompt_ids`, and with a context `teacher_prompt_ids`, `teacher_prefix`; always `teacher_tokens`."""
        tokens = TokenizedExample(row["input_ids"], row["labels"])
        self._refuse_foreign_ids(tokens.input_ids)
        start = completion_start(tokens.labels)
        if not start:
            raise ValueError("A row begins with a supervised token, so there is no prompt to write from.")
        if row.get("prompt") is None:  # it came as tokens
            return {PROMPT_IDS: tokens.input_ids[:start], TEACHER_TOKENS: len(tokens.input_ids)}
        columns: dict[str, Any] = {
            PROMPT_IDS: prompt_ids(self.tokenizer, row["prompt"], row, self.template_options),
            TEACHER_TOKENS: len(tokens.input_ids),
        }
        if self.context:
            example = {name: row[name] for name in _EXAMPLE_COLUMNS if row.get(name) is not None}
            prompt = self.context.prompt(row)
            anchored = anchor(
                self.tokenizer, example, prompt, tokens, chat_template_kwargs=self.template_options or None
            )
            columns[TEACHER_PROMPT_IDS] = anchored.ids if anchored else []
            columns[TEACHER_PREFIX] = anchored.prefix if anchored else 0
            completion = len(tokens.input_ids) - start
            columns[TEACHER_TOKENS] = max(len(anchored.ids), anchored.prefix + completion) if anchored else 0
            self._refuse_foreign_ids(columns[TEACHER_PROMPT_IDS])
        return columns

    def _refuse_foreign_ids(self, ids: Sequence[int]) -> None:
        foreign = next((token for token in ids if token >= self.shared_ids), None)
        if foreign is not None:
            raise ValueError(
                f"The rows hold the token {foreign} ({self.tokenizer.decode([foreign])!r}), which the teacher does not know: teacher and "
                f"student share the ids below {self.shared_ids:,}. Leave such tokens out of the text, or give a teacher that has them."
            )


_EXAMPLE_COLUMNS = ("prompt", "completion", "tools", "chat_template_kwargs")
ROW_COLUMNS = (PROMPT_IDS, TEACHER_PROMPT_IDS, TEACHER_PREFIX)


class PromptCollator:
    """Batches of reference rows: what `base` makes of them, the prompts, and the rows as the teacher reads them.

    Adds `prompts` and `prompt_attention_mask (batch, prompt length)`, padded on the left for generation; and what
    `teacher_columns` gives, with `teacher_prompts` and their mask, where the teacher reads another prompt.

    Args:
        base: Makes `input_ids`, `attention_mask`, `labels` and per-token columns, padded on the right.
        pad_id: Id that fills up.
    """

    def __init__(self, base: Any, pad_id: int) -> None:
        self.base, self.pad_id = base, pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of reference rows."""
        before = None
        if TEACHER_PROMPT_IDS in examples[0]:
            before = [example[TEACHER_PROMPT_IDS][: example[TEACHER_PREFIX]] for example in examples]
        batch = self.lay_out(examples, before)
        batch["prompts"], batch["prompt_attention_mask"] = pad(
            [example[PROMPT_IDS] for example in examples], self.pad_id, left=True
        )
        if before is not None:
            batch["teacher_prompts"], batch["teacher_prompt_attention_mask"] = pad(
                [example[TEACHER_PROMPT_IDS] for example in examples], self.pad_id, left=True
            )
        return batch

    def lay_out(self, examples: list[dict[str, Any]], before: Sequence[Sequence[int]] | None) -> dict[str, Any]:
        """A batch of any rows with `input_ids` and `labels`.

        Args:
            examples: The rows.
            before: What the teacher reads before each row's completion; `None` for what the student reads.
        """
        batch = self.base(examples)
        return batch if before is None else {**batch, **teacher_columns(examples, before, self.pad_id)}


TEACHER_COLUMNS = ("teacher_input_ids", "teacher_attention_mask", "teacher_shift")
BATCH_PROMPTS = ("prompts", "prompt_attention_mask", "teacher_prompts", "teacher_prompt_attention_mask")


def teacher_columns(
    examples: Sequence[Mapping[str, Any]], before: Sequence[Sequence[int]], pad_id: int
) -> dict[str, Tensor]:
    """The rows as the teacher reads them: `before`, and the completion.

    Returns:
        `teacher_input_ids` and `teacher_attention_mask (batch, length)`, padded on the right, and `teacher_shift (batch,)`: the token at t of
        the student's row stands at t + shift of the teacher's.
    """
    rows, shifts = [], []
    for example, ids in zip(examples, before, strict=True):
        start = completion_start(example["labels"])
        rows.append([*ids, *example["input_ids"][start:]])
        shifts.append(len(ids) - start)
    input_ids, mask = pad(rows, pad_id)
    return dict(zip(TEACHER_COLUMNS, (input_ids, mask, torch.tensor(shifts)), strict=True))


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows as `(rows, longest)` ids and mask, padded on the right or the left."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad_id), torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def unpad(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of a padded batch, on whichever side."""
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
