"""From a dataset of text to rows of tokens that the trainers can take: tokenized, checked, cut to length, packed.

TRL does this too, but its truncation and packing part per-token columns from their tokens, and it is silent about what it cuts.
Tokens and labels are those of `data.tokenization`, the same that `capture` wrote the store for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM
from trl import maybe_convert_to_chatml, pack_dataset

from trl_reasoning_distill.data.chat import render_prompt
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.tokenization import (
    IGNORE_INDEX,
    TokenizedExample,
    is_supervised,
    row_hash,
    supervised_positions,
    tokenize_example,
)
from trl_reasoning_distill.hub import load_config, load_processor
from trl_reasoning_distill.trainer.trl_bridge import construct_until_prepared

_TURN_END = "<|im_end|>"

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML that keeps whatever the assistant wrote, in every turn, and marks it with `{% generation %}`."""

_DROPS_THOUGHT = re.compile(r"[\w.\[\]'\"]+\.split\(\s*['\"]</think>['\"]\s*\)\s*\[-1\](?:\.\w+\([^()]*\))*")


def add_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template ChatML; one that has a template keeps it.

    A turn ends with `<|im_end|>` if that is a token of the vocabulary, which then becomes the end-of-sequence token, so that a
    trained model stops there. Else it ends with the end-of-sequence token the model already knows. No token is added.

    Returns:
        Whether the tokenizer was given one.
    """
    if tokenizer.chat_template:
        return False
    if _TURN_END in tokenizer.get_vocab():
        tokenizer.eos_token = _TURN_END
        tokenizer.chat_template = CHATML
    else:
        tokenizer.chat_template = CHATML.replace(_TURN_END, tokenizer.eos_token)
    return True


def advise(template: str | None) -> str:
    """How to mend a template that loses the reasoning, as specifically as its text allows."""
    found = _DROPS_THOUGHT.search(template or "")
    if found is None:
        return "Give a template that keeps what the assistant wrote, with chat_template_path."
    expression = found.group()
    content = expression.partition(".split(")[0]
    return (
        f"It does so with `{expression}`: copy the template to a .jinja file, write `{content}` in that place, and give the file as "
        "chat_template_path."
    )


TOKEN_COLUMNS = ("input_ids", "labels")
LOSS_WEIGHT = "loss_weight"


@dataclasses.dataclass(frozen=True)
class PreparationReport:
    """What became of a dataset.

    Attributes:
        rows: Rows that are trained on.
        overlong: Rows left out because they are longer than `max_length`.
        truncated: Rows of which the end was cut instead.
        unsupervised: Rows left out because no token of them is supervised.
        supervised_tokens: Supervised tokens in all rows.
        with_reasoning: Rows whose completion holds a reasoning in the configured format.
    """

    rows: int
    overlong: int
    truncated: int
    unsupervised: int
    supervised_tokens: int
    with_reasoning: int

    def __str__(self) -> str:
        per_row, share = self.supervised_tokens / max(1, self.rows), self.with_reasoning / max(1, self.rows)
        return (
            f"{self.rows:,} rows, {per_row:.1f} supervised tokens per row, {share:.1%} with reasoning; "
            f"left out: {self.overlong:,} too long, {self.unsupervised:,} without a supervised token; {self.truncated:,} truncated"
        )


@dataclasses.dataclass(frozen=True)
class RowTokenizer:
    """Turns one row into `input_ids`, `labels` and what the checks need to know of it.

    Attributes:
        tokenizer: The student's tokenizer.
        format: How the completions are written.
        completion_only: Whether a prompt is left unsupervised.
        assistant_only: Whether only what the chat template marks as the assistant's is supervised.
        chat_template: A template in place of the tokenizer's own.
        text_field: The column that holds plain text.
        formatting_func: Turns a row into that text first.
        segment_weights: Weight of each token of the reasoning and after it, or `None` for no such column.
        chat_template_kwargs: Variables for the chat template; a row's own win.
    """

    tokenizer: Any
    format: ReasoningFormat
    completion_only: bool
    assistant_only: bool
    chat_template: str | None
    text_field: str
    formatting_func: Callable[[dict[str, Any]], str] | None
    segment_weights: tuple[float, float] | None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's `input_ids`, `labels`, `row_hash`, `has_reasoning`, `is_damaged` and, if asked for, `loss_weight`."""
        text_of_completion = None
        if "input_ids" in row:
            tokens = _labelled(row, self.completion_only)
        else:
            example = self._example(row)
            tokens = tokenize_example(
                self.tokenizer, example, assistant_only=self.assistant_only, chat_template_kwargs=self._template_options
            )
            if "prompt" in example:
                completion = example["completion"]
                text_of_completion = completion if isinstance(completion, str) else str(completion[-1]["content"])
        supervised = [index for index, label in enumerate(tokens.labels) if is_supervised(label)]
        start = supervised[0] if supervised else len(tokens.labels)
        text = self.tokenizer.decode(tokens.input_ids[start:])
        opened = self.format.is_opened_by(self.tokenizer.decode(tokens.input_ids[:start][-16:]))
        parsed = self.format.parse(text, opened=opened)
        was_whole = text_of_completion is not None and self.format.parse(text_of_completion, opened=False).well_formed
        prepared = {
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "row_hash": row_hash(tokens.input_ids, tokens.labels),
            "has_reasoning": bool(parsed.reasoning),
            "is_damaged": was_whole and not parsed.well_formed,
        }
        if self.segment_weights is not None:
            think_weight, answer_weight = self.segment_weights
            split = start + self._reasoning_length(tokens.input_ids[start:], text)
            prepared[LOSS_WEIGHT] = [
                think_weight if index < split else answer_weight for index in range(len(tokens.input_ids))
            ]
        return prepared

    def refuse_closed_thought(self, row: dict[str, Any], name: str) -> None:
        """Refuse a template that ends the generation prompt with a closed thought, where the row's completion thinks.

        Raises:
            ValueError: With what to set instead.
        """
        if self._closes_thought(row):
            raise ValueError(
                f"The chat template ends its generation prompt with a closed {self.format.open_tag}…{self.format.close_tag}, but the completions of "
                f"the {name} dataset think: the student would be asked not to do what it learns. Set chat_template_kwargs to "
                '{"enable_thinking": true} where the template reads that, or give another template with chat_template_path.'
            )

    def refuse_damage(self, rows: Dataset, name: str) -> None:
        """Refuse rows, made by this tokenizer, whose tokens no longer hold the reasoning that their text had.

        Raises:
            ValueError: With the first of them, and how to mend the template.
        """
        damaged = [index for index, is_damaged in enumerate(rows["is_damaged"]) if is_damaged]
        if damaged:
            template = self.chat_template or self.tokenizer.chat_template
            raise ValueError(
                f"The chat template drops or doubles the reasoning of {len(damaged):,} of {len(rows):,} rows of the {name} dataset: their "
                f"completions are well formed ({self.format.name!r}), their tokens are not. Row {damaged[0]} ends in "
                f"{self.tokenizer.decode(rows[damaged[0]]['input_ids'])[-200:]!r}. {advise(template)} Or, if the template opens the reasoning "
                "itself, leave the open tag out of the completions."
            )

    def _closes_thought(self, row: dict[str, Any]) -> bool:
        example = {} if "input_ids" in row else self._example(row)
        prompt, completion = example.get("prompt"), example.get("completion")
        if not (self.format.close_tag and isinstance(prompt, list) and isinstance(completion, list)):
            return False
        options = {**self._template_options, **(row.get("chat_template_kwargs") or {})}
        text = render_prompt(self.tokenizer, prompt, **options)
        thinks = bool(self.format.parse(str(completion[-1]["content"])).reasoning)
        return thinks and text.rstrip().endswith(self.format.close_tag)

    @property
    def _template_options(self) -> dict[str, Any]:
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {**self.chat_template_kwargs, **template}

    def _example(self, row: dict[str, Any]) -> Mapping[str, Any]:
        """The row in one of the shapes that `tokenize_example` knows."""
        if self.formatting_func is not None:
            return {"text": self.formatting_func(row)}
        row = maybe_convert_to_chatml(row)
        if "prompt" in row and not self.completion_only:
            whole = row["prompt"] + row["completion"]
            options: dict[str, Any] = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
            return {"text" if isinstance(whole, str) else "messages": whole, **options}
        if self.text_field in row and not {"prompt", "messages"} & row.keys():
            return {"text": row[self.text_field]}
        return row

    def _reasoning_length(self, ids: Sequence[int], text: str) -> int:
        """How many of the completion's tokens belong to its reasoning, the close tag included."""
        if self.format.close_tag:
            end = text.rfind(self.format.close_tag)
            end = end + len(self.format.close_tag) if end >= 0 else len(text) * (self.format.open_tag in text)
        else:
            end = max(0, text.rfind(self.format.answer_prefix.strip() or self.format.gap))
        low, high = 0, len(ids)
        while low < high:  # the fewest tokens whose text reaches the end of the reasoning
            middle = (low + high) // 2
            if len(self.tokenizer.decode(ids[:middle])) >= end:
                high = middle
            else:
                low = middle + 1
        return low


def select_rows(
    rows: Dataset,
    *,
    max_length: int | None,
    overlong: str,
    columns: Sequence[str],
    whole_columns: Sequence[str] = (),
    **map_kwargs: Any,
) -> tuple[Dataset, PreparationReport]:
    """Drop or cut rows that are too long and drop those with nothing to learn from; cut every per-token column alike.

    Args:
        rows: Rows as `RowTokenizer` made them.
        max_length: Longest row allowed; `None` for any.
        overlong: `"drop"` or `"truncate"`.
        columns: Names of the per-token columns, `input_ids` and `labels` included.
        whole_columns: Further columns to keep as they are, where there are such.
        map_kwargs: For `Dataset.map`.

    Returns:
        The rows with these columns only, and what became of them.

    Raises:
        ValueError: If no row is left, with the reasons.
    """
    found = len(rows)
    measured = rows.map(_measure, fn_kwargs={"max_length": max_length}, remove_columns=rows.column_names, **map_kwargs)
    lengths, supervised, reasoned = list(measured["length"]), list(measured["supervised"]), list(rows["has_reasoning"])
    too_long = [max_length is not None and length > max_length for length in lengths]
    dropped = [long and overlong == "drop" for long in too_long]
    keep = [index for index in range(found) if supervised[index] and not dropped[index]]
    report = PreparationReport(
        rows=len(keep),
        overlong=sum(dropped),
        truncated=sum(too_long[index] for index in keep),
        unsupervised=found - len(keep) - sum(dropped),
        supervised_tokens=sum(supervised[index] for index in keep),
        with_reasoning=sum(reasoned[index] for index in keep),
    )
    if not keep:
        longest = max(lengths, default=0)
        raise ValueError(
            f"None of {found:,} rows can be trained on: {report.overlong:,} are longer than max_length={max_length} (the longest has {longest:,} "
            f"tokens), {report.unsupervised:,} have no supervised token. Raise max_length, or look at the rows' completions."
        )
    whole = [name for name in whole_columns if name in rows.column_names]
    rows = rows.select(keep).select_columns([*columns, *whole])
    if report.truncated:
        rows = rows.map(_truncate, fn_kwargs={"max_length": max_length, "columns": list(columns)}, **map_kwargs)
    return rows, report


def pack_rows(rows: Dataset, max_length: int, strategy: str, **map_kwargs: Any) -> Dataset:
    """Pack rows into sequences of `max_length`, every per-token column in step (`trl.pack_dataset`)."""
    return pack_dataset(rows, max_length, strategy, map_kwargs)


def _measure(row: Mapping[str, Any], max_length: int | None) -> dict[str, int]:
    labels = row["labels"][:max_length]
    # The token at 0 has nothing before it to be predicted from
    return {"length": len(row["labels"]), "supervised": len(supervised_positions(labels))}


def _truncate(row: Mapping[str, Any], max_length: int, columns: Sequence[str]) -> dict[str, Any]:
    return {name: row[name][:max_length] for name in columns}


def _labelled(row: Mapping[str, Any], completion_only: bool) -> TokenizedExample:
    """A row that came as tokens: its own labels, or those that its masks make."""
    input_ids = list(row["input_ids"])
    if row.get("labels") is not None:
        return TokenizedExample(input_ids, list(row["labels"]))
    names = (["completion_mask"] if completion_only else []) + ["assistant_masks"]
    masks = [row[name] for name in names if row.get(name) is not None]
    labels = [token if all(bits) else IGNORE_INDEX for token, *bits in zip(input_ids, *masks, strict=True)]
    return TokenizedExample(input_ids, labels)


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
    shape, tokenizer = load_config(name, **options), load_processor(name, **options)
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
