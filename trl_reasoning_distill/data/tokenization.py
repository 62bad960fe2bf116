"""From a row of text to token ids and labels, exactly as TRL 1.16's `SFTTrainer` does it.

The Top-K store is captured from these tokens and trained on with TRL's, so both must be the same to the last id. Read
beside `SFTTrainer._prepare_dataset` (`tokenize_fn`, `add_eos`, `build_labels`); a test compares the two on every kind of row.
Nothing here truncates: a row that is too long is the caller's to drop.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from trl_reasoning_distill.data.chat import encode_chat

IGNORE_INDEX = -100


@dataclasses.dataclass(frozen=True)
class TokenizedExample:
    """Token ids and, at the supervised positions, the same ids again; −100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def tokenize_example(
    tokenizer: Any,
    example: Mapping[str, Any],
    *,
    assistant_only: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenizedExample:
    """Tokenize one row of training text.

    Args:
        tokenizer: A `transformers` tokenizer.
        example: A row with `prompt` and `completion` (both messages or both text: the completion is supervised), `messages` (all
            supervised) or `text` (all supervised). `tools` and `chat_template_kwargs` of the row reach the template.
        assistant_only: Supervise only what the template marks with `{% generation %}`.
        chat_template_kwargs: For every row's template, such as `{"enable_thinking": False}` or another `"chat_template"`; the row's
            own win.

    Raises:
        ValueError: If the row has none of these shapes, or the template marks no assistant token where that is asked for.
    """
    shape = _shape(example)
    if assistant_only and not isinstance(example[shape], list):
        raise ValueError(
            f"assistant_only needs messages, but {shape!r} is plain text; give messages, or turn assistant_only off."
        )
    options = {**(chat_template_kwargs or {}), **template_options(example)}
    prompt_length = 0
    if shape == "prompt":
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, list):
            prompt_ids = encode_chat(tokenizer, prompt, add_generation_prompt=True, **options)["input_ids"]
            encoded = encode_chat(
                tokenizer,
                prompt + completion,
                targets_from=len(prompt),
                return_assistant_tokens_mask=assistant_only,
                **options,
            )
        else:
            prompt = without_bos(tokenizer, prompt)
            prompt_ids = tokenizer(text=prompt)["input_ids"]
            encoded = tokenizer(text=prompt + _with_eos(tokenizer, completion))
        # Where the prompt's own tokens are not a prefix of the whole, because the template renders it otherwise or tokens merge
        # across the border, TRL lets the completion begin where the two diverge.
        prompt_length = _common_prefix_length(prompt_ids, encoded["input_ids"])
    elif isinstance(example[shape], list):
        encoded = encode_chat(
            tokenizer, example[shape], targets_from=0, return_assistant_tokens_mask=assistant_only, **options
        )
    else:
        encoded = tokenizer(text=_with_eos(tokenizer, without_bos(tokenizer, example[shape])))

    input_ids = list(encoded["input_ids"])
    assistant_mask = encoded["assistant_masks"] if assistant_only else [1] * len(input_ids)
    if 1 not in assistant_mask:
        raise ValueError(
            "The chat template marks no assistant token in this row. assistant_only needs a template with {% generation %} around the "
            "assistant's content; add it to the template, or turn assistant_only off."
        )
    labels = [
        token if index >= prompt_length and supervised else IGNORE_INDEX
        for index, (token, supervised) in enumerate(zip(input_ids, assistant_mask, strict=True))
    ]
    return TokenizedExample(input_ids, labels)


def is_supervised(labels: Any) -> Any:
    """Whether a label, or each of an array of labels, is to be learnt: the one place that knows how an ignored one is written."""
    return labels != IGNORE_INDEX


def supervised_positions(labels: Sequence[int]) -> list[int]:
    """The supervised positions of a row, in order: t ≥ 1 with a label, since the distribution that predicts t sits at t − 1.

    The n-th of them has the n-th of the row's records in a Top-K store.
    """
    return [t for t, label in enumerate(labels) if t and is_supervised(label)]


def completion_start(labels: Sequence[int]) -> int:
    """Index of the first token with a label; the length of the row where there is none."""
    return next((t for t, label in enumerate(labels) if is_supervised(label)), len(labels))


def row_hash(input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """Hash of a row's ids and of which positions are supervised: 32 hexadecimal digits, the same on every machine."""
    supervised = is_supervised(np.asarray(labels, np.int64)).astype(np.uint8).tobytes()
    ids = np.asarray(input_ids, "<u4").tobytes()
    return xxhash.xxh3_128_hexdigest(len(input_ids).to_bytes(8, "little") + ids + supervised)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that turns text into ids: vocabulary, merges, normalisation, added tokens, post-processing.

    Padding, truncation and the chat template are left out: they are settings of a run, and the template has its own fingerprint.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    else:  # a tokenizer written in Python
        added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "added": added}
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True, ensure_ascii=False).encode())


def chat_template_fingerprint(tokenizer: Any) -> str:
    """Hash of the chat template; that of the empty string if there is none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _shape(example: Mapping[str, Any]) -> str:
    """Which of the columns `prompt`, `messages`, `text` holds the row."""
    for shape in ("prompt", "messages", "text"):
        if shape in example:
            if shape == "prompt" and type(example.get("completion")) is not type(example["prompt"]):
                raise ValueError(
                    f"A prompt needs a completion of its own kind (messages or text); the prompt is a {type(example['prompt']).__name__}, "
                    f"the completion a {type(example.get('completion')).__name__}."
                )
            return shape
    raise ValueError(
        f"A row to tokenize needs `prompt` and `completion`, `messages`, or `text`; found the columns {sorted(example)}."
    )


def template_options(example: Mapping[str, Any]) -> dict[str, Any]:
    """What a row itself gives its chat template: `tools`, and `chat_template_kwargs`."""
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    variables = example.get("chat_template_kwargs") or {}
    if "chat_template" in variables:
        raise ValueError(
            "A row brings a chat template of its own (chat_template in its chat_template_kwargs), which would render it unlike the others "
            "and unlike the store's fingerprint. Take it out of the row; set chat_template_path for all rows."
        )
    return {**({"tools": tools} if tools else {}), **variables}


def without_bos(tokenizer: Any, text: str) -> str:
    """A text that was rendered before, without the beginning-of-sequence token that this tokenizer adds itself."""
    bos = tokenizer.bos_token
    adds = bos and text.startswith(bos) and tokenizer(text=bos)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    return text[len(bos) :] if adds else text


def _with_eos(tokenizer: Any, text: str) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length
