"""From a dataset of text to rows of tokens that the trainers can take: tokenized, checked, cut to length, packed.

TRL does this too, but its truncation and packing part per-token columns from their tokens, and it is silent about what it cuts.
Tokens and labels are those of `data.tokenization`, the same that `capture` wrote the store for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM
from trl import pack_dataset

from trl_reasoning_distill.data.chat import render_prompt
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.normalization import ROW_NUMBER, name_rows
from trl_reasoning_distill.data.row_check import RowCheck, advise
from trl_reasoning_distill.data.tokenization import (
    IGNORE_INDEX,
    TokenizedExample,
    completion_start,
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


TOKEN_COLUMNS = ("input_ids", "labels")
LOSS_WEIGHT = "loss_weight"
_ASKING = ("prompt", "completion", "chat_template_kwargs", ROW_NUMBER)


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
        malformed: Number and fault of each row left out because its thought is not well formed.
    """

    rows: int
    overlong: int
    truncated: int
    unsupervised: int
    supervised_tokens: int
    with_reasoning: int
    malformed: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        per_row, share = self.supervised_tokens / max(1, self.rows), self.with_reasoning / max(1, self.rows)
        malformed = f"{describe_malformed(self.malformed)}, " if self.malformed else ""
        return (
            f"{self.rows:,} rows, {per_row:.1f} supervised tokens per row, {share:.1%} with reasoning; left out: {malformed}"
            f"{self.overlong:,} too long, {self.unsupervised:,} without a supervised token; {self.truncated:,} truncated"
        )


def describe_malformed(malformed: Sequence[tuple[int, str]]) -> str:
    """How many thoughts are not well formed, and the first rows of each fault."""
    by_fault: dict[str, list[int]] = {}
    for number, fault in malformed:
        by_fault.setdefault(fault, []).append(number)
    faults = "; ".join(f"{fault}: {name_rows(numbers)}" for fault, numbers in by_fault.items())
    return f"{len(malformed):,} with a malformed thought ({faults})"


@dataclasses.dataclass(frozen=True)
class RowTokenizer:
    """Turns one row into `input_ids`, `labels` and what the checks need to know of it.

    Attributes:
        tokenizer: The student's tokenizer.
        format: How the completions are written.
        completion_only: Whether only the replies are supervised, and not all of a conversation.
        assistant_only: Whether only what the chat template marks as the assistant's is supervised.
        chat_template: A template in place of the tokenizer's own.
        formatting_func: Turns a row into plain text first.
        segment_weights: Weight of each token of the reasoning and after it, or `None` for no such column.
        chat_template_kwargs: Variables for the chat template; a row's own win.
    """

    tokenizer: Any
    format: ReasoningFormat
    completion_only: bool
    assistant_only: bool
    chat_template: str | None
    formatting_func: Callable[[dict[str, Any]], str] | None
    segment_weights: tuple[float, float] | None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row's `input_ids`, `labels`, `row_hash`, what `RowCheck` found, and, if asked for, `loss_weight`.

        Raises:
            ValueError: If the chat template refuses the row, with its number.
        """
        example = self._example(row)
        try:
            tokens = self._tokenize(example)
        except ValueError as error:
            raise ValueError(f"Row {row.get(ROW_NUMBER, '?')}: {error}") from None
        finding = self._check(example, tokens)
        prepared = {
            "input_ids": np.asarray(tokens.input_ids, np.int64),  # written to Arrow in one piece
            "labels": np.asarray(tokens.labels, np.int64),
            "row_hash": row_hash(tokens.input_ids, tokens.labels),
            **dataclasses.asdict(finding),
        }
        if self.segment_weights is not None:
            start = completion_start(tokens.labels)
            think_weight, answer_weight = self.segment_weights
            split = start + self._reasoning_length(tokens.input_ids[start:])
            prepared[LOSS_WEIGHT] = [
                think_weight if index < split else answer_weight for index in range(len(tokens.input_ids))
            ]
        return prepared

    def refuse_closed_thought(self, rows: Dataset, name: str) -> None:
        """Refuse a template that ends the generation prompt with a closed thought, where a row's completion thinks.

        Raises:
            ValueError: With the first such row, and what to set instead.
        """
        if not self.format.close_tag:
            return
        asked: set[str] = set()
        for row in rows.select_columns([name for name in rows.column_names if name in _ASKING]):
            system = [
                message
                for message in row.get("prompt") or []
                if isinstance(message, dict) and message["role"] == "system"
            ]
            settings = repr((system, row.get("chat_template_kwargs")))
            if settings in asked:  # it depends on nothing else of a row
                continue
            if self._closes_thought(row):
                raise ValueError(
                    f"The chat template ends its generation prompt with a closed {self.format.open_tag}…{self.format.close_tag}, but the completions of "
                    f"the {name} dataset think (row {row.get(ROW_NUMBER, '?')}): the student would be asked not to do what it learns. Set "
                    'chat_template_kwargs to {"enable_thinking": true} where the template reads that, or give another template with '
                    "chat_template_path."
                )
            if self._thinks(row):
                asked.add(settings)

    def refuse_damage(self, rows: Dataset, name: str) -> None:
        """Refuse rows, made by this tokenizer, whose tokens do not train what their text holds.

        Raises:
            ValueError: With the first of them, what it holds and what would be trained, and how to mend the template.
        """
        damaged = [index for index, damage in enumerate(rows["damage"]) if damage is not None]
        if damaged:
            template = self.chat_template or self.tokenizer.chat_template
            first = rows[damaged[0]]
            loses = all(str(rows[index]["damage"]).startswith(("drops", "doubles")) for index in damaged)
            what = "drops or doubles the reasoning of" if loses else "changes what is trained of"
            raise ValueError(
                f"The chat template {what} {len(damaged):,} of {len(rows):,} rows of the {name} dataset. Row "
                f"{first.get(ROW_NUMBER, damaged[0] + 1)}: it {first['damage']}. {advise(template)} Or, if the template opens the "
                "reasoning itself, leave the open tag out of the completions."
            )

    def _tokenize(self, example: Mapping[str, Any]) -> TokenizedExample:
        if "input_ids" in example:
            return _labelled(example, self.completion_only)
        return tokenize_example(
            self.tokenizer, example, assistant_only=self.assistant_only, chat_template_kwargs=self._template_options
        )

    @functools.cached_property
    def _check(self) -> RowCheck:
        is_whole = not (self.completion_only or self.assistant_only)
        return RowCheck(self.tokenizer, self.format, self.chat_template, whole=is_whole)

    def _thinks(self, row: Mapping[str, Any]) -> bool:
        completion = row.get("completion")
        return isinstance(completion, list) and bool(self.format.parse(str(completion[-1]["content"])).reasoning)

    def _closes_thought(self, row: dict[str, Any]) -> bool:
        example = self._example(row)
        prompt = example.get("prompt")
        if not (self.format.close_tag and isinstance(prompt, list) and self._thinks(example)):
            return False
        options = {**self._template_options, **(row.get("chat_template_kwargs") or {})}
        return render_prompt(self.tokenizer, prompt, **options).rstrip().endswith(self.format.close_tag)

    @property
    def _template_options(self) -> dict[str, Any]:
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {**self.chat_template_kwargs, **template}

    def _example(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row in one of the shapes that `tokenize_example` knows."""
        if self.formatting_func is not None:
            return {"text": self.formatting_func(dict(row))}
        row = {name: value for name, value in row.items() if value is not None}
        if "prompt" in row and "input_ids" not in row and not self.completion_only:
            whole = row["prompt"] + row["completion"]
            options: dict[str, Any] = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
            return {"text" if isinstance(whole, str) else "messages": whole, **options}
        return row

    def _reasoning_length(self, ids: Sequence[int]) -> int:
        """How many of the completion's tokens belong to its reasoning, the close tag included."""
        text = self.tokenizer.decode(ids)
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
    malformed: str = "drop",
    truncation_mode: str = "keep_start",
    packing: bool = False,
    **map_kwargs: Any,
) -> tuple[Dataset, PreparationReport]:
    """Drop or cut rows that are too long and drop those with nothing to learn from; cut every per-token column alike.

    With `overlong="truncate"` they are TRL's very rows: one without any label is dropped only where rows are cut and not packed.

    Args:
        rows: Rows as `RowTokenizer` made them.
        max_length: Longest row allowed; `None` for any.
        overlong: `"drop"` or `"truncate"`.
        columns: Names of the per-token columns, `input_ids` and `labels` included.
        whole_columns: Further columns to keep as they are, where there are such.
        malformed: `"drop"` or `"train"`: what becomes of rows whose thought is not well formed.
        truncation_mode: `"keep_start"` or `"keep_end"` of a row that is cut.
        packing: Whether the rows are to be packed.
        map_kwargs: For `Dataset.map`.

    Returns:
        The rows with these columns only, and what became of them.

    Raises:
        ValueError: If no row is left, with the reasons.
    """
    found, cuts = len(rows), overlong == "truncate"
    kept_part = slice(-max_length, None) if max_length and truncation_mode == "keep_end" else slice(max_length)
    measured = rows.map(_measure, fn_kwargs={"kept": kept_part}, remove_columns=rows.column_names, **map_kwargs)
    lengths, supervised, reasoned = list(measured["length"]), list(measured["supervised"]), list(rows["has_reasoning"])
    too_long = [max_length is not None and length > max_length for length in lengths]
    faults = list(rows["malformed"]) if malformed == "drop" else [None] * found
    numbers = list(rows[ROW_NUMBER]) if ROW_NUMBER in rows.column_names else range(1, found + 1)
    dropped = [long and not cuts and faults[index] is None for index, long in enumerate(too_long)]
    is_kept = list(measured["labelled"]) if cuts else supervised
    if cuts and any(is_kept) and (packing or max_length is None):
        is_kept = [True] * found
    keep = [index for index in range(found) if is_kept[index] and not dropped[index] and faults[index] is None]
    report = PreparationReport(
        rows=len(keep),
        overlong=sum(dropped),
        truncated=sum(too_long[index] for index in keep),
        unsupervised=found - len(keep) - sum(dropped) - sum(fault is not None for fault in faults),
        supervised_tokens=sum(supervised[index] for index in keep),
        with_reasoning=sum(reasoned[index] for index in keep),
        malformed=tuple((number, fault) for number, fault in zip(numbers, faults, strict=True) if fault is not None),
    )
    if not keep:
        longest = max(lengths, default=0)
        thoughts = f"{describe_malformed(report.malformed)}, " if report.malformed else ""
        raise ValueError(
            f"None of {found:,} rows can be trained on: {thoughts}{report.overlong:,} are longer than max_length={max_length} (the longest has "
            f"{longest:,} tokens), {report.unsupervised:,} have no supervised token. Raise max_length, or look at the rows' completions"
            f"{'; malformed_thoughts: train takes them as they are' if thoughts else ''}."
        )
    whole = [name for name in whole_columns if name in rows.column_names]
    rows = rows.select(keep).select_columns([*columns, *whole])
    if report.truncated:
        rows = rows.map(_truncate, fn_kwargs={"kept": kept_part, "columns": list(columns)}, **map_kwargs)
    return rows, report


def pack_rows(rows: Dataset, max_length: int, strategy: str, **map_kwargs: Any) -> Dataset:
    """Pack rows into sequences of `max_length`, every per-token column in step (`trl.pack_dataset`)."""
    return pack_dataset(rows, max_length, strategy, map_kwargs)


def _measure(row: Mapping[str, Any], kept: slice) -> dict[str, int]:
    labels = row["labels"][kept]
    return {
        "length": len(row["labels"]),
        "supervised": len(supervised_positions(labels)),
        "labelled": sum(map(is_supervised, labels)),  # the first label too, which nothing before it can predict
    }


def _truncate(row: Mapping[str, Any], kept: slice, columns: Sequence[str]) -> dict[str, Any]:
    return {name: row[name][kept] for name in columns}


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
