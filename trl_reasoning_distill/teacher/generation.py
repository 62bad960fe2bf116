"""Problems to traces: n samples per problem, resumable after a kill, on any number of ranks.

The work list follows from the configuration alone: sample s of problem p is drawn with the seed `sample_seed(p, s)`. Each
rank takes every n-th problem, writes what it has made to a file of its own every few seconds, and on the next start the rows
of all files count as done, whatever the number of ranks then is.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import append_jsonl, read_jsonl_prefix, write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem, Trace
from trl_reasoning_distill.data.sources import PROBLEMS_NAME
from trl_reasoning_distill.teacher.sampling import Engine, SamplingConfig, sample_seed
from trl_reasoning_distill.teacher.sampling.loop import ResumableRows, Sample, Work, draw_and_judge
from trl_reasoning_distill.verification.verify import verify_answers

TRACES_NAME = "traces.jsonl"
FAILURES_NAME = "failures.jsonl"
_CLOCK_NAME = "clock.jsonl"

ZERO_SHOT_PROMPTS: Mapping[str, str] = {
    "think": "Solve the problem. First think step by step between <think> and </think>. After </think> write the final answer alone.",
    "plain": "Solve the problem step by step. Then write the final answer alone, as a paragraph of its own.",
}
"""System prompts for the formats that bring none, because models that were trained on them need none."""


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What is asked of the teacher, and how often.

    Attributes:
        num_samples: Samples drawn for every problem.
        until_verified: Draw further samples, one at a time, for a problem with fewer right ones than this; `None` draws
            exactly `num_samples`.
        max_samples: Most samples for a problem when `until_verified` is set.
        seed: Changes every sample's seed.
        sampling: How tokens are chosen.
        response_format: Writes the prompt (its system prompt, if any) and the few-shot answers.
        few_shot: Problems with solution and answer, shown as earlier turns of the conversation; never the one that is asked.
    """

    num_samples: int = 1
    until_verified: int | None = None
    max_samples: int = 8
    seed: int = 0
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    response_format: ReasoningFormat = dataclasses.field(default_factory=lambda: ReasoningFormat.preset("think"))
    few_shot: tuple[Problem, ...] = ()

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}: draw at least one sample per problem.")
        if self.until_verified is not None and not 1 <= self.until_verified <= self.max_samples:
            raise ValueError(
                f"until_verified={self.until_verified} with max_samples={self.max_samples}: "
                "ask for at least 1 right sample, and for no more than may be drawn."
            )
        repeats = self.num_samples > 1 or self.until_verified is not None
        if repeats and self.sampling.temperature == 0:
            raise ValueError(
                "Several samples per problem at temperature=0 would all be the same text; set a temperature above 0."
            )


def instructed(response_format: ReasoningFormat) -> ReasoningFormat:
    """The format with a system prompt that asks for it, for a teacher that was not trained on it."""
    if response_format.system_prompt is not None:
        return response_format
    return dataclasses.replace(response_format, system_prompt=ZERO_SHOT_PROMPTS[response_format.name])


def build_messages(
    question: str, response_format: ReasoningFormat, few_shot: Sequence[Problem] = ()
) -> list[dict[str, str]]:
    """The conversation that asks `question`: system prompt, worked examples as earlier turns, the question.

    Raises:
        ValueError: If an example lacks a solution or an answer, or cannot be written in this format.
    """
    *system, user = response_format.messages(question)
    shots = []
    for problem in few_shot:
        if problem.question == question:
            continue  # its answer would be in the prompt
        if problem.solution is None or problem.answer is None:
            raise ValueError(f"The few-shot problem {problem.id!r} needs a solution and an answer to be an example.")
        shots.append(response_format.messages(problem.question)[-1])
        shots.append({"role": "assistant", "content": response_format.render(problem.solution, problem.answer)})
    return [*system, *shots, user]


def generate(
    problems: Iterable[Problem],
    engine: Engine,
    config: GenerationConfig,
    output_dir: str | Path,
    *,
    show_progress: bool = True,
) -> dict[str, int | float]:
    """Generate traces and leave them in `output_dir`, as `problems.jsonl` and `traces.jsonl`.

    Traces are in the order of the problems, then of the samples; each row is a `Trace`. Call it on every rank of a launch; rows
    that an earlier, killed call has made are kept. What a server would not answer is in `failures.jsonl`, with its reason.

    Args:
        problems: Distinct ids; with `until_verified`, all with an answer.
        engine: What generates.
        config: What is asked of it.
        output_dir: Folder for the files.
        show_progress: A bar on the main rank, for the main rank's share.

    Returns:
        On the main rank: `problems`, `traces`, `failed` (samples without an answer), `cut` (traces that met the token limit), `tokens`,
        `prompt_tokens`, `seconds` (with those of earlier calls that were killed) and `tokens_per_second`. Empty on other ranks.

    Raises:
        ValueError: For problems that do not fit, a folder with traces of another model or seed, or a server that answers nothing.
    """
    problems, folder = list(problems), Path(output_dir)
    _check_problems(problems, config)
    rows = ResumableRows(folder / TRACES_NAME, _key)
    failures = ResumableRows(folder / FAILURES_NAME, _key)
    if rows.is_main:
        write_jsonl(folder / PROBLEMS_NAME, (problem.to_row() for problem in problems))
    _check_earlier(rows.done, problems, engine, config)
    clock = _Clock(folder / _CLOCK_NAME) if rows.is_main else None
    plan = _Plan(rows.share(problems), config, rows.done)
    for samples in draw_and_judge(
        engine,
        plan.rounds(),
        lambda problem: build_messages(problem.question, config.response_format, config.few_shot),
        config.sampling,
        response_format=config.response_format,
        seed=config.seed,
        has_answers=bool(rows.done),
        label="generate",
        show_progress=show_progress and rows.is_main,
    ):
        rows.append(_trace(sample, engine.name).to_row() for sample in samples if sample.output.error is None)
        if failed := [_failure(sample) for sample in samples if sample.output.error is not None]:
            failures.append(failed)
        plan.count(samples)
        if clock is not None:
            clock.tick()

    drawn = range(max(config.num_samples, config.max_samples))
    order = [(problem.id, number) for problem in problems for number in drawn]
    traces = rows.finish(order)
    made = {_key(row) for row in traces}
    failed = failures.finish(key for key in order if key not in made)
    if clock is None:
        return {}
    if not failed:
        (folder / FAILURES_NAME).unlink()
    counts = _count(problems, traces, len(failed), clock.seconds)
    clock.remove()
    return counts


class _Plan:
    """One rank's share of the problems: what has been drawn for each, and what is to be drawn next."""

    def __init__(
        self,
        problems: Sequence[Problem],
        config: GenerationConfig,
        done: Mapping[tuple[str, int], Mapping[str, Any]],
    ) -> None:
        self.problems = problems
        self.config = config
        ids = {problem.id for problem in problems}
        self.drawn = {key for key in done if key[0] in ids}
        self.right: Counter[str] = Counter()
        if config.until_verified is not None:
            earlier = [Trace.from_row(done[key]) for key in self.drawn]
            whole = [trace for trace in earlier if trace.finish_reason == "stop"]
            verdicts = verify_answers([trace.completion for trace in whole], [trace.gold_answer for trace in whole])
            self.right.update(
                trace.problem_id for trace, verdict in zip(whole, verdicts, strict=True) if verdict.status == "correct"
            )

    def rounds(self) -> Iterator[list[Work]]:
        """Rounds of samples, until every problem has enough."""
        while work := [(problem, number) for problem in self.problems for number in self._next_samples(problem)]:
            yield work

    def count(self, samples: Sequence[Sample]) -> None:
        """Take note of what was drawn."""
        self.drawn.update((sample.problem.id, sample.number) for sample in samples)
        self.right.update(sample.problem.id for sample in samples if sample.is_right)

    def _next_samples(self, problem: Problem) -> list[int]:
        """Numbers of the samples to draw in this round: all first ones at once, then one more while too few are right."""
        first = [number for number in range(self.config.num_samples) if (problem.id, number) not in self.drawn]
        wanted = self.config.until_verified
        if first or wanted is None or self.right[problem.id] >= wanted:
            return first
        further = range(self.config.num_samples, self.config.max_samples)
        return [number for number in further if (problem.id, number) not in self.drawn][:1]


def _trace(sample: Sample, model: str) -> Trace:
    problem, output = sample.problem, sample.output
    return Trace(
        problem_id=problem.id,
        sample=sample.number,
        question=problem.question,
        gold_answer=problem.answer,
        completion=output.text,
        finish_reason=output.finish_reason,
        num_tokens=output.num_tokens,
        model=model,
        seed=sample.request.seed,
        kind=problem.kind,
        source=problem.source,
        prompt_tokens=output.prompt_tokens,
    )


def _failure(sample: Sample) -> dict[str, Any]:
    return {"problem_id": sample.problem.id, "sample": sample.number, "error": sample.output.error}


class _Clock:
    """Seconds spent on a folder, over all calls: what a killed one has spent is kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        ticks = read_jsonl_prefix(path)  # a line that a kill has torn is dropped
        self._earlier = float(ticks[-1]["seconds"]) if ticks else 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._started

    def tick(self) -> None:
        append_jsonl(self.path, [{"seconds": round(self.seconds, 3)}])

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["problem_id"], row["sample"]


def _check_problems(problems: Sequence[Problem], config: GenerationConfig) -> None:
    if not problems:
        raise ValueError("There are no problems to generate for.")
    (problem_id, count), *_ = Counter(problem.id for problem in problems).most_common(1)
    if count > 1:
        raise ValueError(f"The id {problem_id!r} belongs to {count} problems; ids must be distinct.")
    if config.until_verified is not None and (open_ended := [p.id for p in problems if p.answer is None]):
        raise ValueError(
            f"until_verified needs answers to verify, but {len(open_ended)} problems have none, such as {open_ended[0]!r}; "
            "leave them out, or draw a fixed num_samples."
        )


def _check_earlier(
    done: Mapping[tuple[str, int], Mapping[str, Any]],
    problems: Sequence[Problem],
    engine: Engine,
    config: GenerationConfig,
) -> None:
    """Refuse to go on from traces that this run would not have made."""
    ids = {problem.id for problem in problems}
    for (problem_id, sample), row in done.items():
        expected = {"model": engine.name, "seed": sample_seed(problem_id, sample, config.seed)}
        found = {name: row.get(name) for name in expected}
        if problem_id in ids and found != expected:
            raise ValueError(
                f"The output folder holds a trace for {problem_id!r} (sample {sample}) of another run: {found}, but this run makes "
                f"{expected}. Give another output folder, or remove the traces."
            )


def _count(
    problems: Sequence[Problem], traces: Sequence[Mapping[str, Any]], failed: int, seconds: float
) -> dict[str, int | float]:
    tokens = sum(row["num_tokens"] for row in traces)
    return {
        "problems": len(problems),
        "traces": len(traces),
        "failed": failed,
        "cut": sum(row["finish_reason"] == "length" for row in traces),
        "tokens": tokens,
        "prompt_tokens": sum(row.get("prompt_tokens", 0) for row in traces),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }
