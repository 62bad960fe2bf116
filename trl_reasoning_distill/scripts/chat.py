"""Ask the student and the teacher the same question, side by side in the terminal.

    trl-distill chat --student runs/x/distill/final_model --teacher Qwen/Qwen2.5-7B-Instruct
    trl-distill chat --student runs/x/distill/final_model --question "What is 12 + 7?" --gold 19
    head -3 problems.jsonl | trl-distill chat --student runs/x/sft/final_model --teacher openai:big --base_url http://localhost:8000/v1

What a model thinks is dimmed. With a gold answer the answers are verified: write it behind the question, as in
`What is 12 + 7? #### 19`. Each line is one question by itself, there is no memory of earlier ones. Without a terminal the questions are
read from the standard input, one per line, as text or as JSON with `question` and `answer`. A model is written as for `evaluate`; the
options of the engine are those of `generate`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trl_reasoning_distill.evaluation.models import ModelSpec
from trl_reasoning_distill.options import Options, option
from trl_reasoning_distill.scripts.arguments import PromptArguments, SamplingArguments
from trl_reasoning_distill.scripts.command import Command, is_main_process
from trl_reasoning_distill.scripts.stage import command_main, parse_stage, parser_of, warn_of_remote_code
from trl_reasoning_distill.teacher.sampling import EngineArguments

if TYPE_CHECKING:
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.evaluation.side_by_side import Reply
    from trl_reasoning_distill.teacher.sampling import Engine, SamplingConfig

GOLD_MARK = "####"
_PROMPT = "question> "


@dataclass(kw_only=True)
class ChatArguments(Options):
    """Who is asked, and what."""

    student: str = option(help="The student: folder, hub name, adapter, or engine:name.")
    teacher: str | None = option(None, "The teacher, likewise; leave it out to ask the student alone.")
    question: str | None = option(None, "Ask this, and leave.")
    gold: str | None = option(None, "The right answer to it.")
    color: Literal["auto", "always", "never"] = option("auto", "auto (in a terminal), always or never.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gold is not None and self.question is None:
            raise ValueError(
                f"gold is the answer to a question: give one, or write it as `QUESTION {GOLD_MARK} ANSWER`."
            )
        for name, model in self.models().items():
            if not model.model:
                raise ValueError(f"{name} names no model.")

    def models(self) -> dict[str, ModelSpec]:
        """Who is asked, by role."""
        asked = {"student": self.student, "teacher": self.teacher}
        return {role: ModelSpec.parse(model) for role, model in asked.items() if model}


make_parser = parser_of(ChatArguments, PromptArguments, SamplingArguments, EngineArguments)


@command_main
def main(command: Command) -> None:
    """Run the command."""
    options, prompt, sampling, engine = parse_stage(make_parser(), command)
    if not is_main_process():
        return

    from trl_reasoning_distill.evaluation.side_by_side import render
    from trl_reasoning_distill.terminal import printable, takes_colour, width

    color = options.color == "always" or (options.color == "auto" and takes_colour())
    columns = width() if sys.stdout.isatty() else 80
    warn_of_remote_code([f"{role} {spec.model}" for role, spec in options.models().items() if spec.trusts_remote_code])
    engines = {role: spec.load(engine) for role, spec in options.models().items()}
    response_format, settings = prompt.make_format(), sampling.make_sampling()
    for question, gold in _questions(options, lambda: sys.stdin):
        replies = ask(engines, question, gold, response_format, settings, sampling.seed)
        if not sys.stdin.isatty() or options.question is not None:
            print(printable(f"{_PROMPT}{question}{f' {GOLD_MARK} {gold}' if gold is not None else ''}"))
        print(render(replies, width=columns, color=color) + "\n", flush=True)


def ask(
    engines: dict[str, Engine],
    question: str,
    gold: str | None,
    response_format: ReasoningFormat,
    sampling: SamplingConfig,
    seed: int = 0,
) -> list[Reply]:
    """The replies of all models to one question."""
    from trl_reasoning_distill.data.schema import Problem
    from trl_reasoning_distill.evaluation.side_by_side import make_reply
    from trl_reasoning_distill.teacher.sampling.loop import draw_and_judge

    asked = Problem(id=question, question=question, answer=gold, source="chat")
    replies = []
    for role, engine in engines.items():
        ((sample,),) = draw_and_judge(
            engine,
            [[(asked, 0)]],
            lambda problem: response_format.messages(problem.question),
            sampling,
            response_format=response_format,
            seed=seed,
        )
        replies.append(make_reply(role, sample, response_format))
    return replies


def _questions(options: ChatArguments, stdin: Callable[[], Any]) -> Iterator[tuple[str, str | None]]:
    """The questions to ask, each with its gold answer if one is known."""
    if options.question is not None:
        yield options.question, options.gold
        return
    lines: Iterable[str] = _typed() if stdin().isatty() else stdin()
    for line in lines:
        if line.strip():
            yield read_question(line)


def _typed() -> Iterator[str]:
    """Lines as a person types them, until Ctrl-D, Ctrl-C or `exit`."""
    with contextlib.suppress(ImportError):  # history and editing, where the system has it
        import readline  # noqa: F401
    print(f"Ask anything; add `{GOLD_MARK} ANSWER` to have the answers verified. Ctrl-D ends.")
    while True:
        try:
            line = input(_PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip() in ("exit", "quit"):
            return
        yield line


def read_question(line: str) -> tuple[str, str | None]:
    """A question and its gold answer, from `QUESTION #### ANSWER` or from JSON with `question` and `answer`.

    Raises:
        ValueError: If a line of JSON has no question.
    """
    if line.lstrip().startswith("{"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            if not isinstance(row.get("question"), str):
                raise ValueError(f"A question given as JSON needs the key `question`, found {sorted(row)}.")
            answer = row.get("answer")
            return row["question"].strip(), None if answer is None else str(answer)
    question, mark, gold = line.strip().rpartition(GOLD_MARK)
    return (question.strip(), gold.strip() or None) if mark and question.strip() else (line.strip(), None)


if __name__ == "__main__":
    main()
