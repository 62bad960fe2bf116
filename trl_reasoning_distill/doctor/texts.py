"""What the student's tokenizer and chat template make of chains of thought: of one that is known, and of the rows that exist."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.chat import render_prompt
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.tokenization import IGNORE_INDEX, tokenize_example
from trl_reasoning_distill.doctor.facts import Resources, StageFacts
from trl_reasoning_distill.doctor.findings import Finding
from trl_reasoning_distill.teacher.engines import parse_mapping

_QUESTION, _REASONING, _ANSWER = "What is (2 + 3) * 4?", "First 2 + 3 = 5. Then 5 * 4 = 20.", "20"
_OVERLONG_WARNING, _OVERLONG_LIMIT = 0.01, 0.5


def check_template(facts: StageFacts, resources: Resources) -> Iterator[Finding]:
    """Do padding and template leave the reasoning and the end token alone?"""
    if not facts.is_training:
        return
    tokenizer = _student_tokenizer(facts, resources)
    if tokenizer.eos_token_id is None:
        yield Finding(
            "red", facts.name, "the student's tokenizer has no EOS token: the model could never learn to stop."
        )
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            "green",
            facts.name,
            "padding is the EOS token; only padding is masked, the completion's own EOS is trained on.",
        )
    if tokenizer.chat_template is not None:
        form = ReasoningFormat.preset(str(facts.get("reasoning_format") or "think"))
        yield _judge_template(facts.name, tokenizer, form, _template_variables(facts))


def _judge_template(stage: str, tokenizer: Any, form: ReasoningFormat, options: dict[str, Any]) -> Finding:
    """What becomes of one chain of thought."""
    question = [{"role": "user", "content": _QUESTION}]
    row = {
        "prompt": question,
        "completion": [{"role": "assistant", "content": form.render(_REASONING, _ANSWER)}],
    }
    prompt = render_prompt(tokenizer, question, **options)
    if form.close_tag and prompt.rstrip().endswith(form.close_tag):
        return Finding(
            "red",
            stage,
            f"the chat template ends its prompt with a closed {form.open_tag}…{form.close_tag}: the student would be asked not to think. Set "
            'chat_template_kwargs to {"enable_thinking": true}, or give another chat_template_path.',
        )
    tokens = tokenize_example(tokenizer, row, chat_template_kwargs=options)
    supervised = [token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if label != IGNORE_INDEX]
    before = tokenizer.decode(tokens.input_ids[: len(tokens.input_ids) - len(supervised)])
    text = tokenizer.decode(supervised)
    if form.open_tag and not form.parse(text, opened=form.is_opened_by(before)).well_formed:
        return Finding(
            "red",
            stage,
            f"the chat template drops or doubles {form.open_tag}: the student would be trained on {text[:80]!r}. Give another chat_template_path.",
        )
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in supervised:
        return Finding(
            "yellow",
            stage,
            f"the chat template ends the assistant's turn without {tokenizer.eos_token!r}: check that generation stops at what it ends with.",
        )
    return Finding("green", stage, "the chat template keeps the reasoning whole and ends with EOS.")


def check_rows(facts: StageFacts, resources: Resources) -> Iterator[Finding]:
    """Of the rows that exist: how many are too long, how many have nothing to learn from?"""
    if not facts.is_training or not facts.sample:
        return
    tokenizer, options = _student_tokenizer(facts, resources), _template_variables(facts)
    limit = facts.get("max_length")
    rows = [tokenize_example(tokenizer, row, chat_template_kwargs=options) for row in facts.sample]
    empty = sum(all(label == IGNORE_INDEX for label in row.labels[1:]) for row in rows)
    if empty:
        yield Finding(
            "red" if empty == len(rows) else "yellow",
            facts.name,
            f"{empty} of the first {len(rows)} rows have no supervised token.",
        )
    overlong = sum(limit is not None and len(row.input_ids) > int(limit) for row in rows)
    share = overlong / len(rows)
    if share > _OVERLONG_WARNING:
        longest = max(len(row.input_ids) for row in rows)
        yield Finding(
            "red" if share > _OVERLONG_LIMIT else "yellow",
            facts.name,
            f"{overlong} of the first {len(rows)} rows are longer than max_length={limit} (the longest has {longest}) and would be left out.",
        )


def _student_tokenizer(facts: StageFacts, resources: Resources) -> Any:
    """The student's tokenizer, with the chat template that the options put in its place."""
    tokenizer, path = resources.tokenizer(facts.get("model_name_or_path")), facts.get("chat_template_path")
    if not path:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    is_file = Path(path).is_file()
    tokenizer.chat_template = Path(path).read_text("utf-8") if is_file else resources.tokenizer(path).chat_template
    return tokenizer


def _template_variables(facts: StageFacts) -> dict[str, Any]:
    options = facts.get("chat_template_kwargs") or {}
    return parse_mapping(options, "chat_template_kwargs") if isinstance(options, str) else dict(options)
