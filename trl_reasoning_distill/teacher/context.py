"""Context distillation: the teacher reads another prompt than the student, and the same completion.

A teacher that has seen worked examples, the gold solution or better instructions knows more of each next token; the student learns
to know it from the plain prompt. What the teacher reads is settled here, once, for `capture` (offline) and for a live teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from trl_reasoning_distill.data.chat import encode_chat
from trl_reasoning_distill.data.tokenization import (
    TokenizedExample,
    completion_start,
    is_supervised,
    supervised_positions,
    template_options,
    tokenize_example,
    without_bos,
)

Row = Mapping[str, Any]
Prompt = str | list[dict[str, str]]
TEACHER_PROMPT = "teacher_prompt"
"""Column with the prompt that the teacher reads instead of `prompt`; a row that has it keeps it."""

GOLD_TEMPLATE = (
    "{{ prompt }}\n\nHere is a correct solution, for your eyes only:\n\n{{ solution }}\n\n"
    "Now solve the problem yourself, step by step."
)
_COLUMN_OF = {"gold_solution": "teacher_context_column", "system": "teacher_context_system"}
_NEEDS = {**_COLUMN_OF, "template": "teacher_context_template", "function": "teacher_context_function"}
_TEMPLATE_NAMES = ("prompt", "completion", "examples")
_DRAWS_PER_EXAMPLE = 50
KINDS = ("none", "few_shot", *_NEEDS)


@dataclass
class TeacherContextOptions:
    """What the teacher reads beside the student's prompt: the same options for `capture` and `gkd`.

    Args:
        teacher_context: `none`; `few_shot` (worked examples before the question); `gold_solution` (the row's own solution);
            `system` (another system message); `template` (Jinja); `function` (your own).
        teacher_context_shots: Examples per row for `few_shot`, `template` and `function`, drawn from the other rows.
        teacher_context_seed: Seed of that draw. A row's examples depend on it and on the rows, never on order or ranks.
        teacher_context_column: Column with the solution, for `gold_solution`; `completion` is the row's own completion.
        teacher_context_system: The system message, for `system`; it replaces one that is there.
        teacher_context_template: Jinja for the last user message, as text or as the path of a `.jinja` file: `prompt` is that message,
            `examples` holds `question` and `answer` of each example, and every column of the row has its name. For
            `gold_solution` it replaces the built-in wording, with the solution as `solution`.
        teacher_context_function: `package.module:name` of `f(row, examples)`, which returns the teacher's prompt: messages, or text where
            the row's prompt is text.

    Raises:
        ValueError: If the kind is unknown, or what it needs is missing.
    """

    teacher_context: str = field(
        default="none",
        metadata={
            "help": "Context distillation: what the teacher reads more than the student. none, few_shot, gold_solution, system, "
            "template or function.",
            "choices": list(KINDS),
        },
    )
    teacher_context_shots: int = field(default=2, metadata={"help": "Worked examples per row, from the other rows."})
    teacher_context_seed: int = field(default=0, metadata={"help": "Seed of the draw of the examples."})
    teacher_context_column: str | None = field(
        default=None,
        metadata={"help": "Column with the solution for gold_solution; completion is the row's own completion."},
    )
    teacher_context_system: str | None = field(
        default=None, metadata={"help": "System message of the teacher, for system."}
    )
    teacher_context_template: str | None = field(
        default=None,
        metadata={
            "help": "Jinja text or .jinja file for the teacher's last user message, with prompt, examples, solution and the columns."
        },
    )
    teacher_context_function: str | None = field(
        default=None, metadata={"help": "package.module:name of f(row, examples) that returns the teacher's prompt."}
    )

    def check_context(self) -> None:
        """Raise `ValueError` for an unknown kind, a missing setting, or a number out of range."""
        kind = self.teacher_context
        if kind not in KINDS:
            raise ValueError(f"`teacher_context={kind!r}`: must be one of {', '.join(KINDS)}.")
        needed = _NEEDS.get(kind)
        if needed and not getattr(self, needed):
            raise ValueError(f"`teacher_context={kind!r}` needs `{needed}`.")
        shots = self.teacher_context_shots
        if isinstance(shots, bool) or not isinstance(shots, int) or shots < (kind == "few_shot"):
            raise ValueError(
                f"`teacher_context_shots={shots!r}`: must be a whole number, at least 1 for few_shot, found "
                f"{type(shots).__name__}."
            )


class TeacherContext:
    """Builds the teacher's prompt of a row.

    Args:
        options: What it reads.
        pool: Rows that examples are drawn from, with `prompt` and `completion`; needed by `few_shot`.

    Raises:
        ValueError: If the options are not sound, a template or function cannot be had, or the pool is too small.
    """

    def __init__(self, options: TeacherContextOptions, pool: Sequence[Row] = ()) -> None:
        options.check_context()
        self.options, self.kind = options, options.teacher_context
        self._template: Callable[..., str] | None = None
        if self.kind in ("template", "gold_solution"):
            self._template = compile_template(options.teacher_context_template or GOLD_TEMPLATE)
        self._function = _load_function(str(options.teacher_context_function)) if self.kind == "function" else None
        wants_pool = self.kind in ("few_shot", "template", "function") and options.teacher_context_shots
        self._pool = [_question_and_answer(row) for row in pool if row.get("completion")] if wants_pool else []
        if self.kind == "few_shot" and len(self._pool) <= options.teacher_context_shots:
            raise ValueError(
                f"`teacher_context='few_shot'` draws {options.teacher_context_shots} examples for each row from the other rows, but only "
                f"{len(self._pool)} rows have a completion. Lower teacher_context_shots, or give more rows."
            )

    def __bool__(self) -> bool:
        return self.kind != "none"

    def prompt(self, row: Row) -> Prompt:
        """What the teacher reads before the completion of this row: its `prompt`, in the same form, with the context.

        Raises:
            ValueError: If the row has no prompt, or lacks the column that the context is made of.
        """
        if row.get(TEACHER_PROMPT) is not None:
            return row[TEACHER_PROMPT]
        if row.get("prompt") is None:
            raise ValueError(
                f"Another prompt for the teacher needs rows with `prompt` and `completion`; found {sorted(row)}."
            )
        prompt: Prompt = row["prompt"]
        if self.kind == "few_shot":
            return _with_examples(prompt, self.examples(row))
        if self.kind == "system":
            return _with_system(prompt, str(self.options.teacher_context_system))
        if self._template is not None:
            return _with_question(prompt, self._fill(row))
        if self._function is not None:
            return _checked(self._function(dict(row), self.examples(row)), prompt, self.options)
        return prompt

    def examples(self, row: Row) -> list[dict[str, str]]:
        """`question` and `answer` of the row's own examples: drawn from the rows that ask something else."""
        if not self._pool:
            return []
        question = question_of(row["prompt"])
        digest = xxhash.xxh3_64_intdigest(question.encode(), seed=self.options.teacher_context_seed % 2**64)
        draw, wanted = random.Random(digest), self.options.teacher_context_shots
        chosen: dict[str, dict[str, str]] = {}
        for _ in range(_DRAWS_PER_EXAMPLE * wanted):  # a question that occurs often may be drawn often
            example = self._pool[draw.randrange(len(self._pool))]
            if example["question"] != question:
                chosen.setdefault(example["question"], example)
            if len(chosen) == wanted:
                break
        return list(chosen.values())

    def _fill(self, row: Row) -> str:
        """The template with this row's columns."""
        values = {name: value for name, value in row.items() if name not in _TEMPLATE_NAMES}
        if self.kind == "gold_solution":
            column = str(self.options.teacher_context_column)
            if row.get(column) is None:
                raise ValueError(
                    f"`teacher_context_column={column!r}`: a row has no such column (or nothing in it), only {sorted(row)}."
                )
            value = row[column]
            values["solution"] = value if isinstance(value, str) else _text_of(value)
        assert self._template is not None
        completion = {"completion": _text_of(row["completion"])} if row.get("completion") else {}
        return self._template(**values, **completion, prompt=question_of(row["prompt"]), examples=self.examples(row))


@dataclasses.dataclass(frozen=True)
class AnchoredPrompt:
    """A teacher's prompt, and where the student's completion goes on from it.

    Attributes:
        ids: Token ids of the prompt up to where a model begins to write.
        prefix: How many of them stand before a completion of the dataset. Fewer than all where the template renders a given
            completion otherwise than one that is being written, such as after an opened `<think>`.
    """

    ids: list[int]
    prefix: int

    def before(self) -> list[int]:
        """The ids that stand before a completion of the dataset."""
        return self.ids[: self.prefix]


def anchored(
    tokenizer: Any, row: Row, prompt: Prompt, tokens: TokenizedExample, **template_options: Any
) -> TokenizedExample | None:
    """The row as the teacher reads it: its own prompt, then the student's supervised tokens, id for id; `None` if these differ.

    Args:
        tokenizer: The student's tokenizer, whose ids the teacher shares.
        row: The row, with its completion.
        prompt: What the teacher reads.
        tokens: The row as the student reads it.
        template_options: For `tokenize_example`.
    """
    teacher = tokenize_example(tokenizer, {**row, "prompt": prompt}, **template_options)
    asked, learnt = ([one.input_ids[t] for t in supervised_positions(one.labels)] for one in (teacher, tokens))
    return teacher if asked == learnt else None


def anchor(
    tokenizer: Any, row: Row, prompt: Prompt, tokens: TokenizedExample, **template_options: Any
) -> AnchoredPrompt | None:
    """The teacher's prompt as a prefix that any completion can follow, the dataset's or one that is written while training.

    Args:
        tokenizer: As `anchored`, whose arguments these are.
        row: As there.
        prompt: As there.
        tokens: As there.
        template_options: As there.

    Returns:
        The prompt; `None` if the whole completion, not only its supervised tokens, is not the same behind it.
    """
    teacher = anchored(tokenizer, row, prompt, tokens, **template_options)
    if teacher is None:
        return None
    start, own_start = completion_start(teacher.labels), completion_start(tokens.labels)
    if teacher.input_ids[start:] != tokens.input_ids[own_start:] or not own_start:
        return None
    if list(map(is_supervised, teacher.labels[start:])) != list(map(is_supervised, tokens.labels[own_start:])):
        return None
    ids = prompt_ids(tokenizer, prompt, row, template_options.get("chat_template_kwargs"))
    if ids[:start] != teacher.input_ids[:start]:
        return None
    return AnchoredPrompt(ids, start)


def prompt_ids(tokenizer: Any, prompt: Prompt, row: Row, options: Mapping[str, Any] | None = None) -> list[int]:
    """The ids of a prompt up to where a model begins to write."""
    if isinstance(prompt, str):
        return list(tokenizer(text=without_bos(tokenizer, prompt))["input_ids"])
    options = {**(options or {}), **template_options(row)}
    return list(encode_chat(tokenizer, prompt, add_generation_prompt=True, **options)["input_ids"])


def with_teacher_prompts(rows: Sequence[Row], options: TeacherContextOptions) -> list[dict[str, Any]]:
    """The rows with what the teacher reads in their column `teacher_prompt`; unchanged without a context."""
    if options.teacher_context == "none":
        return [dict(row) for row in rows]
    context = TeacherContext(options, rows)
    return [{**row, TEACHER_PROMPT: context.prompt(row)} for row in rows]


def compile_template(template: str) -> Callable[..., str]:
    """A Jinja template, given as text or as the path of a `.jinja` file, in a sandbox where it can only read what it is given.

    Raises:
        ValueError: If there is no such file or it is no Jinja; when called, if it names something that is not there.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if template.endswith((".jinja", ".j2")):
        if not Path(template).is_file():
            raise ValueError(f"`teacher_context_template={template!r}`: there is no such file.")
        template = Path(template).read_text(encoding="utf-8")
    try:
        compiled = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
            template
        )
    except TemplateError as error:
        raise ValueError(f"`teacher_context_template` is not Jinja: {error}.") from None

    @functools.wraps(compiled.render)
    def render(**values: Any) -> str:
        try:
            return compiled.render(**values)
        except TemplateError as error:
            raise ValueError(
                f"`teacher_context_template`: {error}; a row gives it {', '.join(sorted(values))}."
            ) from None

    return render


def question_of(prompt: Prompt) -> str:
    """The last user message, or the text where the prompt is text."""
    return prompt if isinstance(prompt, str) else prompt[_last_user(prompt)]["content"]


def _question_and_answer(row: Row) -> dict[str, str]:
    return {"question": question_of(row["prompt"]), "answer": _text_of(row["completion"])}


def _text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _last_user(prompt: Sequence[Mapping[str, str]]) -> int:
    places = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    if not places:
        raise ValueError(f"A prompt needs a user message; found the roles {[m['role'] for m in prompt]}.")
    return places[-1]


def _with_question(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another last user message."""
    if isinstance(prompt, str):
        return text
    last = _last_user(prompt)
    return [*prompt[:last], {**prompt[last], "content": text}, *prompt[last + 1 :]]


def _with_system(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another system message, or a first one."""
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    others = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    return [{"role": "system", "content": text}, *others]


def _with_examples(prompt: Prompt, examples: Sequence[Mapping[str, str]]) -> Prompt:
    """The prompt with worked examples before its first turn, as turns of their own."""
    if isinstance(prompt, str):
        return "".join(f"{one['question']}{one['answer']}\n\n" for one in examples) + prompt
    start = 1 if prompt and prompt[0]["role"] == "system" else 0
    turns = [
        {"role": role, "content": one[name]}
        for one in examples
        for role, name in (("user", "question"), ("assistant", "answer"))
    ]
    return [*prompt[:start], *turns, *prompt[start:]]


def _load_function(name: str) -> Callable[[dict[str, Any], list[dict[str, str]]], Any]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`teacher_context_function={name!r}`: {error}. Write it as package.module:function, importable from here."
        ) from None
    if not callable(function):
        raise ValueError(f"`teacher_context_function={name!r}` is a {type(function).__name__}, not a function.")
    return function


def _checked(result: Any, prompt: Prompt, options: TeacherContextOptions) -> Prompt:
    """A user's prompt, refused where it is of another form than the row's."""
    is_messages = isinstance(result, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in result
    )
    if isinstance(result, str) if isinstance(prompt, str) else is_messages:
        return result
    wanted = "text" if isinstance(prompt, str) else "a list of messages"
    raise ValueError(
        f"`teacher_context_function={options.teacher_context_function!r}` returned a {type(result).__name__}; the row's prompt "
        f"is {wanted}, so the teacher's must be."
    )
