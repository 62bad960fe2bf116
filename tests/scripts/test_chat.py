"""Chat: student and teacher on one question, in a terminal or in a pipe."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from trl_reasoning_distill import cli
from trl_reasoning_distill.scripts import chat
from trl_reasoning_distill.teacher.sampling import EngineArguments, GenerationOutput, GenerationRequest, SamplingConfig


class Parrot:
    """Answers with its own number."""

    def __init__(self, answer: str) -> None:
        self.name, self.answer = "parrot", answer
        self.asked: list[list[dict[str, str]]] = []

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        for request in requests:
            self.asked.append(request.messages)
            yield request, GenerationOutput(f"<think>\nhm\n</think>\n\n{self.answer}", "stop", 4, 4, 0.1)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Parrot]:
    known = {"small": Parrot("7"), "big": Parrot("19")}
    monkeypatch.setattr(EngineArguments, "make_engine", lambda self, model, kind=None: known[model])
    return known


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_piped_questions_are_answered_one_by_one_and_verified(
    engines: dict[str, Parrot], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "What is 12 + 7? #### 19", "", json.dumps({"question": "What is 3 + 4?", "answer": 7}), "Why?")
    cli.main(["chat", "--student", "small", "--teacher", "big", "--system_prompt", ""])
    first, second, third = capsys.readouterr().out.split("question> ")[1:]
    assert first.startswith("What is 12 + 7? #### 19\n")
    assert first.index("✗ incorrect") < first.index("✓ correct")
    assert second.index("✓ correct") < second.index("✗ incorrect")
    assert "correct" not in third
    assert "answer: 7" in third
    assert "\x1b" not in first
    assert engines["big"].asked[1] == [{"role": "user", "content": "What is 3 + 4?"}]


def test_one_question_by_option_and_the_student_alone(
    engines: dict[str, Parrot], capsys: pytest.CaptureFixture[str]
) -> None:
    chat.main(["--student", "small", "--question", "What is 3 + 4?", "--gold", "7", "--color", "always"])
    shown = capsys.readouterr().out
    assert "\x1b[2m┊ hm\x1b[0m" in shown
    assert "teacher" not in shown
    assert not engines["big"].asked


def test_a_person_is_asked_until_they_leave(
    engines: dict[str, Parrot], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["What is 3 + 4? #### 7", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    chat.main(["--student", "small"])
    assert "✓ correct" in capsys.readouterr().out
    assert len(engines["small"].asked) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("plain", ("plain", None)),
        ("a #### b #### 3 ", ("a #### b", "3")),
        ("#### 3", ("#### 3", None)),
        ("{not json", ("{not json", None)),
        ('{"question": " q ", "answer": null}', ("q", None)),
    ],
)
def test_questions_are_read_as_they_are_written(line: str, expected: tuple[str, Any]) -> None:
    assert chat.read_question(line) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "student is missing"),
        (["--student", "m", "--gold", "3"], "gold is the answer to a question"),
        (["--student", "m", "--color", "blue"], "--color: invalid choice: 'blue'"),
        (["--student", '{"engine": "openai"}'], "needs the key `model`"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        chat.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
