"""`tokenize_example` makes what TRL's `SFTTrainer` makes of the same rows; hashes and fingerprints tell rows and tokenizers apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill.data.tokenization import (
    chat_template_fingerprint,
    row_hash,
    tokenize_example,
    tokenizer_fingerprint,
)

TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
QUESTIONS = ["What is 2+3?", "  Tom has 4 pens.\nHe buys 5 more. How many? ", "Is <think> a tag, or </p> one? ½ é 漢"]
REPLIES = ["<think>\n2+3=5\n</think>\n\n5", "9</s>", "<think>\n\n</think>\n\nno 🙂"]


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def conversations() -> list[dict[str, Any]]:
    pairs = list(zip(QUESTIONS, REPLIES, strict=True))
    rows: list[dict[str, Any]] = [{"prompt": user(q), "completion": assistant(a)} for q, a in pairs]
    turns = user(QUESTIONS[0]) + assistant(REPLIES[0]) + user(QUESTIONS[1])
    return [*rows, {"prompt": turns, "completion": assistant(REPLIES[1])}]


def dialogues() -> list[dict[str, Any]]:
    return [{"messages": row["prompt"] + row["completion"]} for row in conversations()]


def plain_pairs() -> list[dict[str, Any]]:
    return [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, REPLIES, strict=True)]


def texts() -> list[dict[str, Any]]:
    return [{"text": q + a} for q, a in zip(QUESTIONS, REPLIES, strict=True)]


@pytest.fixture(scope="module")
def prepare(shared_data: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """Rows as the real `SFTTrainer` prepares them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(shared_data / "models" / "stories260K")

    def run(rows: list[dict[str, Any]], **options: Any) -> list[tuple[list[int], list[int]]]:
        config = SFTConfig(
            output_dir=str(tmp_path_factory.mktemp("sft")),
            use_cpu=True,
            bf16=False,
            max_length=None,
            report_to="none",
            **options,
        )
        dataset = SFTTrainer(
            model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        ).train_dataset
        return [(row["input_ids"], row["labels"]) for row in dataset]

    return run


CASES = {
    "prompt and completion, messages": (conversations, False),
    "prompt and completion, assistant only": (conversations, True),
    "messages": (dialogues, False),
    "messages, assistant only": (dialogues, True),
    "prompt and completion, text": (plain_pairs, False),
    "text": (texts, False),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_what_trl_prepares(name: str, prepare: Any, tokenizer: Any) -> None:
    make_rows, assistant_only = CASES[name]
    expected = prepare(make_rows(), assistant_only_loss=assistant_only)
    ours = [tokenize_example(tokenizer, row, assistant_only=assistant_only) for row in make_rows()]
    assert [(row.input_ids, row.labels) for row in ours] == expected
    assert all(any(label != -100 for label in labels) for _, labels in expected)


TEMPLATES = [
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "Qwen-QwQ-32B",
    "HuggingFaceTB-SmolLM3-3B",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_equals_trl_under_published_templates(template: str, prepare: Any, tokenizer: Any, shared_data: Path) -> None:
    """Including those that open `<think>` in the generation prompt, close it at once, or strip it from the reply."""
    tokenizer.chat_template = (shared_data / "chat_templates" / f"{template}.jinja").read_text()
    try:
        rows = [
            {**row, "chat_template_kwargs": {"enable_thinking": index == 0}}
            for index, row in enumerate(conversations())
        ]
        expected = prepare(rows)
        ours = [tokenize_example(tokenizer, row) for row in rows]
        again = [
            tokenize_example(tokenizer, row, chat_template_kwargs={"enable_thinking": index == 0})
            for index, row in enumerate(conversations())
        ]
    finally:
        tokenizer.chat_template = TEMPLATE
    assert [(row.input_ids, row.labels) for row in ours] == expected
    assert again == ours


def test_labels_cover_the_reply_and_its_end(tokenizer: Any) -> None:
    row = tokenize_example(tokenizer, {"prompt": user("Hi"), "completion": assistant("Yes")}, assistant_only=True)
    assert tokenizer.decode([label for label in row.labels if label != -100]) == "Yes<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_errors_teach(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="found the columns \\['question'\\]"):
        tokenize_example(tokenizer, {"question": "?"})
    with pytest.raises(ValueError, match="the completion a NoneType"):
        tokenize_example(tokenizer, {"prompt": "?"})
    with pytest.raises(ValueError, match="the completion a str"):
        tokenize_example(tokenizer, {"prompt": user("?"), "completion": "!"})
    with pytest.raises(ValueError, match="plain text"):
        tokenize_example(tokenizer, {"prompt": "?", "completion": "!"}, assistant_only=True)
    unmarked = {"chat_template": "{{ messages[0]['content'] }}"}
    with pytest.raises(ValueError, match="marks no assistant token"):
        tokenize_example(tokenizer, {"messages": user("?")}, assistant_only=True, chat_template_kwargs=unmarked)


def test_row_hash_sees_ids_order_length_and_mask() -> None:
    rows = [([1, 2], [1, 2]), ([2, 1], [2, 1]), ([1, 2], [-100, 2]), ([1, 2, 0], [1, 2, 0]), ([258], [258]), ([], [])]
    assert len({row_hash(*row) for row in rows}) == len(rows)
    assert row_hash([1, 2], [-100, 2]) == row_hash([1, 2], [-100, 7]), (
        "labels are the ids: only which are supervised counts"
    )
    assert row_hash([1, 2], [-100, 2]) == "aeab001e47d58eb9751dd396f4f04c27", (
        "a store on disk holds this hash: it must never change"
    )


def test_fingerprints_change_with_what_matters_only(tokenizer: Any, shared_data: Path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    assert chat_template_fingerprint(other) != chat_template_fingerprint(tokenizer)
    other.pad_token = "</s>"
    other(["a", "a b c"], padding=True, truncation=True, max_length=8)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    other.add_tokens(["<think>"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
