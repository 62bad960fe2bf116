"""The sampling loop: draw samples for problems from an engine, end each where its answer ends, and verify it.

`generate`, `evaluate`, `chat` and the accuracy in the training loop differ in what they ask and in what they keep; what lies between is
`draw_and_judge`. `ResumableRows` is the file that a launch's ranks fill together and that outlives a kill.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from trl_reasoning_distill.data.files import RankFiles
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem, Verdict
from trl_reasoning_distill.processes import launch_state
from trl_reasoning_distill.teacher.sampling.base import (
    Engine,
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    in_chunks,
    sample_seed,
)
from trl_reasoning_distill.teacher.sampling.stopping import end_completion
from trl_reasoning_distill.verification.verify import verify_answers

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")

Work = tuple[Problem, int]
"""A problem, and the number of the sample to draw for it."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample that was drawn.

    Attributes:
        problem: What was asked.
        number: Number of the sample for this problem, from 0.
        request: How it was asked.
        output: What came back; its text ends where the answer ends.
        verdict: Whether it is right; undecided without a gold answer, and where nothing came back.
    """

    problem: Problem
    number: int
    request: GenerationRequest
    output: GenerationOutput
    verdict: Verdict

    @property
    def is_right(self) -> bool:
        """Whether it is whole and verified as correct."""
        return self.output.finish_reason == "stop" and self.verdict.status == "correct"


def draw_and_judge(
    engine: Engine,
    rounds: Iterable[Sequence[Work]],
    messages: Callable[[Problem], list[dict[str, str]]],
    sampling: SamplingConfig,
    *,
    response_format: ReasoningFormat | None = None,
    seed: int = 0,
    timeout: float = 2.0,
    has_answers: bool = False,
    label: str = "",
    show_progress: bool = False,
) -> Iterator[list[Sample]]:
    """Yield samples as they come, a few seconds' worth at a time, each verified once.

    Args:
        engine: What writes.
        rounds: What to draw. A round is asked for when the one before it has been drawn and yielded.
        messages: The conversation that asks a problem.
        sampling: How tokens are chosen, and where a completion ends.
        response_format: What the completions are to look like, and so where an answer ends.
        seed: Changes every sample's seed.
        timeout: Seconds that verifying one answer may take.
        has_answers: Whether earlier calls have had answers: a server that then answers nothing has refused a few prompts only.
        label: What the progress bar is called.
        show_progress: Whether there is one, with the time that is left.

    Raises:
        ValueError: If a server answers nothing, or no more.
    """
    started = time.perf_counter()
    tokens = judged = right = 0
    with tqdm(total=0, desc=label, unit="sample", disable=not show_progress, dynamic_ncols=True) as bar:
        for work in rounds:
            bar.total += len(work)
            bar.refresh()
            by_key = {f"{problem.id}#{number}": (problem, number) for problem, number in work}
            requests = [
                GenerationRequest(key, messages(problem), sample_seed(problem.id, number, seed))
                for key, (problem, number) in by_key.items()
            ]
            for chunk in in_chunks(_answers(engine, requests, sampling, has_answers)):
                ended = [(request, end_completion(output, response_format, sampling.stop)) for request, output in chunk]
                samples = _judge([(*by_key[request.key], request, output) for request, output in ended], timeout)
                yield samples
                has_answers = has_answers or any(sample.output.error is None for sample in samples)
                tokens += sum(sample.output.num_tokens for sample in samples)
                judged += sum(sample.problem.answer is not None for sample in samples)
                right += sum(sample.verdict.status == "correct" for sample in samples)
                rate = tokens / max(time.perf_counter() - started, 1e-9)
                share = f", {right / judged:.1%} correct" if judged else ""
                bar.set_postfix_str(f"{rate:,.0f} tokens/s{share}", refresh=False)
                bar.update(len(samples))


def _answers(
    engine: Engine, requests: Sequence[GenerationRequest], sampling: SamplingConfig, has_answers: bool
) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
    """What the engine yields, failures last: where everything failed, and always has, they are an error and no outputs."""
    failed = []
    try:
        for request, output in engine.generate(requests, sampling):
            if output.error is None:
                yield request, output
            else:
                failed.append((request, output))
    except ValueError:
        if not has_answers or len(failed) < len(requests):
            raise
    yield from failed


def _judge(answers: Sequence[tuple[Problem, int, GenerationRequest, GenerationOutput]], timeout: float) -> list[Sample]:
    verdicts = verify_answers(
        [output.text for *_, output in answers], [problem.answer for problem, *_ in answers], timeout=timeout
    )
    return [
        Sample(*answer, verdict if answer[-1].error is None else Verdict("undecided", "none", answer[-1].error))
        for answer, verdict in zip(answers, verdicts, strict=True)
    ]


class ResumableRows(Generic[Key]):
    """The rows that the ranks of a launch write together. To be made, and finished, on every rank.

    Args:
        path: The final file, such as `runs/x/generate/traces.jsonl`.
        key: What makes a row the same row.

    Attributes:
        done: The rows that earlier, killed calls have made, on any number of ranks.
        is_main: Whether this is the main rank.
    """

    def __init__(self, path: str | Path, key: Callable[[Mapping[str, Any]], Key]) -> None:
        self._state = launch_state()
        self.is_main = bool(self._state.is_main_process)
        self._files: RankFiles[Key] = RankFiles(path, key=key, rank=self._state.process_index)
        if self.is_main:
            self._files.repair()
        self._state.wait_for_everyone()
        self.done = self._files.read()
        self._state.wait_for_everyone()  # nobody appends before everybody has read

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of the items that fall to this rank."""
        return items[self._state.process_index :: self._state.num_processes]

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, and flush them to the disk."""
        self._files.append(rows)

    def finish(self, order: Iterable[Key]) -> list[dict[str, Any]]:
        """When all ranks have ended, write the final file.

        Args:
            order: Keys in the order of the file; those without a row are passed over.

        Returns:
            On the main rank its rows; on others none.
        """
        self._state.wait_for_everyone()
        rows = self._files.merge(order) if self.is_main else []
        self._state.wait_for_everyone()
        return rows
