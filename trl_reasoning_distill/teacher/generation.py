"""Problems to traces: n samples per problem, resumable after a kill, on any number of ranks.

The work list follows from the configuration alone: sample s of problem p is drawn with the seed `sample_seed(p, s)`. Each
rank takes every n-th problem, writes what it has made to a file of its own every few seconds, and on the next start the rows
of all files count as done, whatever the number of ranks then is.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trl_reasoning_distill.data.files import RankFiles, append_jsonl, read_jsonl_prefix, write_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem, Trace
from trl_reasoning_distill.data.sources import PROBLEMS_NAME
from trl_reasoning_distill.processes import launch_state
from trl_reasoning_distill.teacher.sampling import (
    Engine,
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    in_chunks,
    sample_seed,
)
from trl_reasoning_distill.verification.verify import verify_answers

TRACES_NAME = "traces.jsonl"
_CLOCK_NAME = "clock.jsonl"

ZERO_SHOT_PROMPTS: Mapping[str, str] = {
    "think": "Solve the problem. First think step by step between <think> and </think>. After </think> write the final answer alone.",
    "plain": "Solve the problem step by step. Then write the final answer alone, as a paragraph of its own.",
}
"""System prompts for the formats that bring none, because models that were trained on them need none."""

Work = tuple[Problem, int]


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
            continue  # the answer would stand in the prompt
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

    Traces stand in the order of the problems, then of the samples; each row is a `Trace`. Call it on
    every rank of a launch; rows that an earlier, killed call has made are kept.

    Args:
        problems: Distinct ids; with `until_verified`, all with an answer.
        engine: What generates.
        config: What is asked of it.
        output_dir: Folder for the two files.
        show_progress: A bar on the main rank, for the main rank's share.

    Returns:
        On the main rank: `problems`, `traces`, `cut` (traces that met the token limit), `tokens`, `prompt_tokens`, `seconds` (with
        those of earlier calls that were killed) and `tokens_per_second`. Empty on other ranks.

    Raises:
        ValueError: For problems that do not fit, or a folder with traces of another model or seed.
    """
    problems = list(problems)
    _check_problems(problems, config)
    state = launch_state()
    files = RankFiles(Path(output_dir) / TRACES_NAME, key=_key, rank=state.process_index)
    if state.is_main_process:
        write_jsonl(Path(output_dir) / PROBLEMS_NAME, (problem.to_row() for problem in problems))
        files.repair()
    state.wait_for_everyone()
    done = files.read()
    _check_earlier(done, problems, engine, config)
    state.wait_for_everyone()  # nobody appends before everybody has read

    clock = _Clock(Path(output_dir) / _CLOCK_NAME) if state.is_main_process else None
    mine = problems[state.process_index :: state.num_processes]
    _Worker(mine, engine, config, files, done, clock, show_progress and state.is_main_process).run()

    state.wait_for_everyone()
    counts: dict[str, int | float] = {}
    if clock is not None:
        samples = max(config.num_samples, config.max_samples)
        traces = files.merge((problem.id, sample) for problem in problems for sample in range(samples))
        counts = _count(problems, traces, clock.seconds)
        clock.remove()
    state.wait_for_everyone()
    return counts


class _Worker:
    """One rank's share of the problems: what has been drawn for each, and what is to be drawn next."""

    def __init__(
        self,
        problems: Sequence[Problem],
        engine: Engine,
        config: GenerationConfig,
        files: RankFiles[tuple[str, int]],
        done: Mapping[tuple[str, int], Mapping[str, Any]],
        clock: _Clock | None,
        show_progress: bool,
    ) -> None:
        self.problems = problems
        self.engine = engine
        self.config = config
        self.files = files
        self.clock = clock
        self.show_progress = show_progress
        ids = {problem.id for problem in problems}
        earlier = [Trace.from_row(row) for (problem_id, _), row in done.items() if problem_id in ids]
        self.drawn = {(trace.problem_id, trace.sample) for trace in earlier}
        self.verified: Counter[str] = Counter()
        self.judged = 0
        self.tokens = 0
        if config.until_verified is not None:
            self._judge(earlier)

    def run(self) -> None:
        """Draw rounds of samples until every problem has enough."""
        self.started = time.perf_counter()
        with tqdm(total=0, desc="generate", unit="trace", disable=not self.show_progress, dynamic_ncols=True) as bar:
            while work := [(problem, sample) for problem in self.problems for sample in self._next_samples(problem)]:
                bar.total += len(work)
                bar.refresh()
                self._draw(work, bar)

    def _next_samples(self, problem: Problem) -> list[int]:
        """Numbers of the samples to draw in this round: all first ones at once, then one more while too few are right."""
        first = [sample for sample in range(self.config.num_samples) if (problem.id, sample) not in self.drawn]
        wanted = self.config.until_verified
        if first or wanted is None or self.verified[problem.id] >= wanted:
            return first
        further = range(self.config.num_samples, self.config.max_samples)
        return [sample for sample in further if (problem.id, sample) not in self.drawn][:1]

    def _draw(self, work: Sequence[Work], bar: tqdm) -> None:
        by_key = {f"{problem.id}#{sample}": (problem, sample) for problem, sample in work}
        requests = [
            GenerationRequest(
                key,
                build_messages(problem.question, self.config.response_format, self.config.few_shot),
                sample_seed(problem.id, sample, self.config.seed),
            )
            for key, (problem, sample) in by_key.items()
        ]
        for chunk in in_chunks(self.engine.generate(requests, self.config.sampling)):
            traces = [self._trace(*by_key[request.key], request, output) for request, output in chunk]
            self.files.append(trace.to_row() for trace in traces)
            self.drawn.update((trace.problem_id, trace.sample) for trace in traces)
            self._judge(traces)
            self.tokens += sum(trace.num_tokens for trace in traces)
            if self.clock is not None:
                self.clock.tick()
            self._show(bar, len(chunk))

    def _trace(self, problem: Problem, sample: int, request: GenerationRequest, output: GenerationOutput) -> Trace:
        return Trace(
            problem_id=problem.id,
            sample=sample,
            question=problem.question,
            gold_answer=problem.answer,
            completion=output.text,
            finish_reason=output.finish_reason,
            num_tokens=output.num_tokens,
            model=self.engine.name,
            seed=request.seed,
            kind=problem.kind,
            source=problem.source,
            prompt_tokens=output.prompt_tokens,
        )

    def _judge(self, traces: Sequence[Trace]) -> None:
        """Count right answers; a trace that was cut is none, whatever stands in it."""
        answered = [trace for trace in traces if trace.gold_answer is not None]
        whole = [trace for trace in answered if trace.finish_reason == "stop"]
        verdicts = verify_answers([trace.completion for trace in whole], [trace.gold_answer or "" for trace in whole])
        self.verified.update(
            trace.problem_id for trace, verdict in zip(whole, verdicts, strict=True) if verdict.status == "correct"
        )
        self.judged += len(answered)

    def _show(self, bar: tqdm, count: int) -> None:
        rate = self.tokens / max(time.perf_counter() - self.started, 1e-9)
        verified = f", {self.verified.total() / self.judged:.1%} verified" if self.judged else ""
        bar.set_postfix_str(f"{rate:,.0f} tokens/s{verified}", refresh=False)
        bar.update(count)


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


def _count(problems: Sequence[Problem], traces: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, int | float]:
    tokens = sum(row["num_tokens"] for row in traces)
    return {
        "problems": len(problems),
        "traces": len(traces),
        "cut": sum(row["finish_reason"] == "length" for row in traces),
        "tokens": tokens,
        "prompt_tokens": sum(row.get("prompt_tokens", 0) for row in traces),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }
