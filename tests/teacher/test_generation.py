"""Generation: the same traces whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.teacher import tiny
from trl_reasoning_distill.data.files import RankFiles
from trl_reasoning_distill.data.formatting import PRESETS, ReasoningFormat
from trl_reasoning_distill.data.schema import Problem, Trace
from trl_reasoning_distill.data.synthetic import iter_problems
from trl_reasoning_distill.teacher import generation
from trl_reasoning_distill.teacher.generation import GenerationConfig, build_messages, generate, instructed, sample_seed
from trl_reasoning_distill.teacher.sampling import GenerationOutput, GenerationRequest, SamplingConfig, loop
from trl_reasoning_distill.teacher.sampling.transformers import TransformersEngine

THREE = GenerationConfig(num_samples=3, seed=1, sampling=SamplingConfig(16, temperature=1.0))


class PlannedEngine:
    """Answers `problem + seed` at once; `right_from[question]` is the first sample that is right; dies after `dies_after` answers."""

    name = "planned"

    def __init__(
        self, dies_after: int | None = None, right: dict[int, str] | None = None, cut: set[int] | None = None
    ) -> None:
        self.dies_after = dies_after
        self.right = right or {}
        self.cut = cut or set()
        self.asked: list[int] = []

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        for request in reversed(requests):
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(request.seed)
            answer = self.right.get(request.seed, "-1")
            reason: Any = "length" if request.seed in self.cut else "stop"
            yield request, GenerationOutput(f"<think>\n{request.seed}\n</think>\n\n{answer}", reason, 5, 7, 0.1)


@pytest.fixture(autouse=True)
def write_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill can come between any two rows."""
    monkeypatch.setattr(loop, "in_chunks", lambda items: ([item] for item in items))


def problems(count: int = 5) -> list[Problem]:
    return [problem for _, problem in zip(range(count), iter_problems("train"), strict=False)]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    """Let `generate` believe that it is one rank of several; barriers are passed, since the ranks here run one by one."""
    state = types.SimpleNamespace(
        process_index=rank, num_processes=ranks, is_main_process=rank == 0, wait_for_everyone=lambda: None
    )
    monkeypatch.setattr(loop, "launch_state", lambda: state)


def test_traces_stand_in_order_and_carry_their_problem(tmp_path: Path) -> None:
    given = problems()
    counts = generate(given, PlannedEngine(), THREE, tmp_path)
    found = rows(tmp_path)
    assert [(row["problem_id"], row["sample"]) for row in found] == [(p.id, s) for p in given for s in range(3)]
    for row, problem in zip(found[::3], given, strict=True):
        assert (row["question"], row["gold_answer"], row["kind"], row["source"]) == (
            problem.question,
            problem.answer,
            problem.kind,
            problem.source,
        )
        assert (row["seed"], row["model"], row["prompt_tokens"]) == (sample_seed(problem.id, 0, 1), "planned", 7)
        assert Trace.from_row(row).completion == f"<think>\n{row['seed']}\n</think>\n\n-1"
    assert [
        Problem.from_row(json.loads(line)) for line in (tmp_path / "problems.jsonl").read_text().splitlines()
    ] == given
    assert {key: counts[key] for key in ("problems", "traces", "cut", "tokens", "prompt_tokens")} == {
        "problems": 5,
        "traces": 15,
        "cut": 0,
        "tokens": 75,
        "prompt_tokens": 105,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems.jsonl", "traces.jsonl"]


def test_seeds_are_stable_and_distinct() -> None:
    assert sample_seed("gsm8k-train-000001", 0) == 2093124400
    seeds = {sample_seed(f"p{i}", s, seed) for i in range(200) for s in range(8) for seed in range(2)}
    assert len(seeds) == 3200
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("killed_after", [0, 1, 7, 14])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 2), (1, 4)])
def test_a_killed_run_goes_on_with_another_number_of_ranks_and_makes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, before: int, after: int
) -> None:
    given = problems()
    generate(given, PlannedEngine(), THREE, tmp_path / "whole")
    killed = tmp_path / "killed"
    for rank in range(before):
        as_rank(monkeypatch, rank, before)
        with pytest.raises(KeyboardInterrupt):
            generate(
                given, PlannedEngine(dies_after=min(killed_after, 2) if before > 1 else killed_after), THREE, killed
            )
    assert not (killed / "traces.jsonl").exists()
    for path in killed.glob("traces.rank*"):
        with open(path, "a") as handle:
            handle.write('{"problem_id": "torn')
    made = sum(line.endswith("}\n") for path in killed.glob("traces.rank*") for line in path.open())
    asked = 0
    RankFiles(
        killed / "traces.jsonl", key=lambda row: row["problem_id"]
    ).repair()  # the main rank does, before others read
    for rank in [*range(1, after), 0]:  # the main rank last: it merges what all have made
        as_rank(monkeypatch, rank, after)
        engine = PlannedEngine()
        generate(given, engine, THREE, killed)
        asked += len(engine.asked)
    assert asked == 15 - made
    assert (killed / "traces.jsonl").read_bytes() == (tmp_path / "whole" / "traces.jsonl").read_bytes()


def test_a_finished_folder_asks_nothing_and_a_larger_run_only_what_is_new(tmp_path: Path) -> None:
    generate(problems(), PlannedEngine(), THREE, tmp_path)
    again, more = PlannedEngine(), PlannedEngine()
    generate(problems(), again, THREE, tmp_path)
    assert again.asked == []
    generate(problems(), more, dataclasses.replace(THREE, num_samples=4), tmp_path)
    assert len(more.asked) == 5


def test_traces_of_another_seed_or_model_are_not_taken_for_ours(tmp_path: Path) -> None:
    generate(problems(), PlannedEngine(), THREE, tmp_path)
    with pytest.raises(ValueError, match="of another run"):
        generate(problems(), PlannedEngine(), dataclasses.replace(THREE, seed=2), tmp_path)
    other = PlannedEngine()
    other.name = "other"
    with pytest.raises(ValueError, match="'model': 'planned'"):
        generate(problems(), other, THREE, tmp_path)


def test_drawing_stops_when_enough_are_right_and_a_cut_one_is_not(tmp_path: Path) -> None:
    first, second, third = given = problems(3)
    config = GenerationConfig(
        num_samples=2, until_verified=1, max_samples=5, sampling=SamplingConfig(16, temperature=1.0)
    )
    right = {sample_seed(first.id, 1): str(first.answer), sample_seed(second.id, 3): str(second.answer)}
    right[sample_seed(third.id, 0)] = str(third.answer)
    engine = PlannedEngine(right=right, cut={sample_seed(third.id, 0)})
    counts = generate(given, engine, config, tmp_path)
    samples = [[row["sample"] for row in rows(tmp_path) if row["problem_id"] == problem.id] for problem in given]
    assert samples == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert counts["cut"] == 1
    again = PlannedEngine(right=right)
    generate(given, again, config, tmp_path)
    assert again.asked == []


def test_few_shot_examples_are_earlier_turns() -> None:
    example = Problem(id="e", question="1+1?", answer="2", solution="1+1=2", source="s")
    response_format = ReasoningFormat.preset("gsm8k")
    messages = build_messages("2+2?", response_format, [example])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in messages[1:]] == ["1+1?", "1+1=2\n#### 2", "2+2?"]
    with pytest.raises(ValueError, match="'e' needs a solution"):
        build_messages("2+2?", response_format, [dataclasses.replace(example, solution=None)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 2}, "temperature=0"),
        ({"until_verified": 9}, "max_samples=8"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**settings)


def test_problems_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one = problems(1)
    with pytest.raises(ValueError, match="no problems"):
        generate([], PlannedEngine(), THREE, tmp_path)
    with pytest.raises(ValueError, match="belongs to 2 problems"):
        generate(one * 2, PlannedEngine(), THREE, tmp_path)
    config = GenerationConfig(until_verified=1, sampling=SamplingConfig(16, temperature=1.0))
    with pytest.raises(ValueError, match="1 problems have none"):
        generate([dataclasses.replace(one[0], answer=None)], PlannedEngine(), config, tmp_path)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_format_can_be_asked_for_in_a_system_prompt(name: str) -> None:
    system, user = build_messages("How many?", instructed(ReasoningFormat.preset(name)))
    assert (system["role"], user["content"]) == ("system", "How many?")
    marks = {
        "think": "</think>",
        "gsm8k": "####",
        "boxed": "\\boxed{}",
        "final_answer": '"Final Answer:"',
        "plain": "paragraph",
    }
    assert marks[name] in system["content"]


def test_the_problem_that_is_asked_is_no_example_of_itself() -> None:
    example = Problem(id="e", question="1+1?", answer="2", solution="1+1=2", source="s")
    other = dataclasses.replace(example, id="f", question="3+3?")
    messages = build_messages("1+1?", ReasoningFormat.preset("boxed"), [example, other])
    assert [message["content"] for message in messages[1:]] == ["3+3?", "1+1=2\n\n\\boxed{2}", "1+1?"]


@pytest.mark.parametrize("name", ["gsm8k", "boxed", "final_answer", "think", "plain"])
@pytest.mark.parametrize("shots", [0, 2])
def test_examples_are_written_in_the_format_that_is_asked_for(name: str, shots: int) -> None:
    response_format = ReasoningFormat.preset(name)
    messages = build_messages("How many?", response_format, problems(shots))
    assert [message["role"] for message in messages if message["role"] != "system"] == ["user", "assistant"] * shots + [
        "user"
    ]
    for message, problem in zip([m for m in messages if m["role"] == "assistant"], problems(shots), strict=True):
        parsed = response_format.parse(message["content"])
        assert (parsed.reasoning, parsed.answer, parsed.well_formed) == (problem.solution, problem.answer, True)


def test_time_counts_over_all_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: float(next(clock)))
    with pytest.raises(KeyboardInterrupt):
        generate(problems(), PlannedEngine(dies_after=3), THREE, tmp_path)
    spent = json.loads((tmp_path / "clock.jsonl").read_text().splitlines()[-1])["seconds"]
    assert spent > 0
    counts = generate(problems(), PlannedEngine(), THREE, tmp_path)
    assert counts["seconds"] > spent + 10
    assert counts["tokens_per_second"] == pytest.approx(75 / counts["seconds"], abs=0.06)
    assert not (tmp_path / "clock.jsonl").exists()


class RefusingEngine(PlannedEngine):
    """A server that refuses some seeds, as an engine yields it; an error after them if it answers nothing."""

    def __init__(self, refused: set[int], **options: Any) -> None:
        super().__init__(**options)
        self.refused = refused

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        yield from super().generate([request for request in requests if request.seed not in self.refused], sampling)
        refused = [request for request in requests if request.seed in self.refused]
        for request in refused:
            yield request, GenerationOutput("", "error", 0, 0, 0.0, error="HTTP 400: filtered")
        if len(refused) == len(requests):
            raise ValueError("HTTP 400: filtered")


def test_a_problem_that_a_server_refuses_is_counted_and_listed(tmp_path: Path) -> None:
    given = problems()
    refused = {sample_seed(given[1].id, sample, 1) for sample in range(3)}
    counts = generate(given, RefusingEngine(refused), THREE, tmp_path)
    assert (counts["traces"], counts["failed"]) == (12, 3)
    assert given[1].id not in {row["problem_id"] for row in rows(tmp_path)}
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert failures == [{"problem_id": given[1].id, "sample": n, "error": "HTTP 400: filtered"} for n in range(3)]

    counts = generate(given, RefusingEngine(refused), THREE, tmp_path)  # asked again, and refused again
    assert (counts["traces"], counts["failed"]) == (12, 3)
    counts = generate(given, PlannedEngine(), THREE, tmp_path)  # a server that has changed its mind
    assert (counts["traces"], counts["failed"]) == (15, 0)
    assert not (tmp_path / "failures.jsonl").exists()


def test_a_run_with_nothing_left_but_refusals_ends(tmp_path: Path) -> None:
    given = problems()
    refused = {sample_seed(given[4].id, sample, 1) for sample in range(3)}
    generate(given[:4], PlannedEngine(), THREE, tmp_path)
    counts = generate(given, RefusingEngine(refused), THREE, tmp_path)
    assert (counts["traces"], counts["failed"]) == (12, 3)


def test_a_server_that_answers_nothing_is_an_error(tmp_path: Path) -> None:
    given = problems()
    refused = {sample_seed(problem.id, sample, 1) for problem in given for sample in range(3)}
    with pytest.raises(ValueError, match="HTTP 400: filtered"):
        generate(given, RefusingEngine(refused), THREE, tmp_path)
    assert not list(tmp_path.glob("failures*"))


def test_a_trace_ends_before_a_question_of_the_models_own(tmp_path: Path) -> None:
    class RunsOn(PlannedEngine):
        def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingConfig) -> Any:
            for request in requests:
                yield request, GenerationOutput("so\n#### 5\n\nQuestion: 1+1?\n#### 2", "length", 9, 7, 0.1)

    config = GenerationConfig(response_format=ReasoningFormat.preset("gsm8k"))
    generate(problems(1), RunsOn(), config, tmp_path / "ended")
    (row,) = rows(tmp_path / "ended")
    assert (row["completion"], row["finish_reason"]) == ("so\n#### 5", "stop")
    own = dataclasses.replace(config, sampling=SamplingConfig(stop=()))
    generate(problems(1), RunsOn(), own, tmp_path / "whole")
    assert rows(tmp_path / "whole")[0]["completion"].endswith("#### 2")


_RANK = """
import json, sys
from tests.teacher import tiny
from tests.teacher.test_generation import problems, THREE
from trl_reasoning_distill.teacher.sampling.transformers import TransformersEngine
from trl_reasoning_distill.processes import launch_state
from trl_reasoning_distill.teacher.generation import generate
state = launch_state()
engine = TransformersEngine(tiny.make_model(), tiny.make_tokenizer(), name="tiny")
counts = generate(problems(), engine, THREE, sys.argv[1], show_progress=False)
assert state.num_processes == 2 and bool(counts) == state.is_main_process
import torch.distributed; torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_real_processes_make_what_one_makes(tmp_path: Path, repository: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(tmp_path / "two")],
            env=os.environ | launch | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(repository)},
            cwd=repository,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    engine = TransformersEngine(tiny.make_model(), tiny.make_tokenizer(), name="tiny")
    generate(problems(), engine, THREE, tmp_path / "one", show_progress=False)
    assert (tmp_path / "two" / "traces.jsonl").read_bytes() == (tmp_path / "one" / "traces.jsonl").read_bytes()
    assert len(rows(tmp_path / "one")) == 15
