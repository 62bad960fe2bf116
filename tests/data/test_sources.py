"""Every named source reads its real file; bad rows are counted; samples nest; errors teach."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill.data.files import read_jsonl, write_jsonl
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources import (
    BENCHMARKS,
    SOURCES,
    Refusal,
    RejectedRow,
    SourceUnavailableError,
    load_problems,
    read_source,
)


@pytest.mark.parametrize(
    ("source", "split", "count"),
    [
        ("gsm8k", "train", 7473),
        ("gsm8k", "test", 1319),
        ("gsm_hard", "test", 1319),
        ("svamp", None, 1000),
        ("math500", None, 500),
    ],
)
def test_real_files_are_read_whole(source: str, split: str | None, count: int, shared_data: Path) -> None:
    read = read_source(source, split=split, data_dir=str(shared_data))
    assert (len(read.problems), read.rejected) == (count, [])
    assert len({problem.id for problem in read.problems}) == count
    assert all(problem.source == source and problem.answer for problem in read.problems)


def test_gsm8k_loses_its_calculator_marks_and_nothing_else(shared_data: Path) -> None:
    rows = read_jsonl(shared_data / "gsm8k" / "train.jsonl")
    problems = load_problems("gsm8k", data_dir=str(shared_data))
    first = problems[0]
    assert (
        first.solution
        == "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
    )
    assert (first.answer, first.kind, first.id) == ("72", "2 steps", "gsm8k-train-000000")
    assert not any(
        "<<" in (p.solution or "") or ">>" in (p.solution or "") or "," in (p.answer or "") for p in problems
    )
    assert all(row["answer"].endswith(p.answer[-3:]) for row, p in zip(rows, problems, strict=True) if p.answer)


def test_rows_of_the_other_real_files(shared_data: Path) -> None:
    directory = str(shared_data)
    assert load_problems("gsm_hard", data_dir=directory)[0].answer == "-9867630"
    svamp = load_problems("svamp", data_dir=directory)[0]
    assert svamp.question == (
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack. How much do you have to pay to buy each pack?"
    )
    assert (svamp.answer, svamp.kind, svamp.id) == ("51", "Subtraction", "svamp-chal-1")
    assert load_problems("math500", data_dir=directory)[0].answer == "\\left( 3, \\frac{\\pi}{2} \\right)"


@pytest.mark.parametrize(
    ("source", "row", "answer", "solution"),
    [
        ("numinamath_qwq", {"prompt": "q", "response": "r", "ground_truth": "7", "correct": True}, "7", "r"),
        ("numinamath_qwq", {"prompt": "q", "response": "r", "ground_truth": "7", "correct": False}, "7", None),
        (
            "openthoughts",
            {
                "system": "s",
                "conversations": [
                    {"from": "user", "value": "q"},
                    {"from": "assistant", "value": "<|begin_of_thought|>\n\nr\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nSo \\boxed{7}.\n\n<|end_of_solution|>"},
                ],
            },
            "7",
            "r",
        ),
        ("openr1_math", {"problem": "q", "solution": "r", "answer": "7", "problem_type": "Algebra", "uuid": "u"}, "7", "r"),
    ],
)  # fmt: skip
def test_rows_of_the_large_sources(
    source: str, row: dict[str, Any], answer: str, solution: str | None, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / SOURCES[source].splits["train"].file, [row])
    (problem,) = load_problems(source, data_dir=str(tmp_path))
    assert (problem.question, problem.answer) == ("q", answer)
    assert (problem.solution or "").strip() == (solution or "")


@pytest.mark.parametrize(
    ("source", "row", "expected"),
    [
        (
            "gsm_plus",
            {"question": "q", "solution": "2 + 3 = <<2+3=5>>5\n#### 5", "answer": "5.0", "perturbation_type": "numerical substitution"},
            ("q", "5", "2 + 3 = 5", "numerical substitution"),
        ),
        ("gsm_plus", {"question": "q", "solution": "s", "answer": "None", "perturbation_type": "critical thinking"}, "it has no answer (critical thinking)"),
        (
            "asdiv",
            {"body": "Seven red apples and two green apples are in the basket.", "question": "How many apples are in the basket?", "solution_type": "Addition", "answer": "9 (apples)", "formula": "7+2=9"},
            ("Seven red apples and two green apples are in the basket. How many apples are in the basket?", "9", None, "Addition"),
        ),
        ("asdiv", {"body": "b", "question": "q?", "solution_type": "Ratio", "answer": "2:3", "formula": "r"}, ("b. q?", "2:3", None, "Ratio")),
        (
            "math",
            {"problem": "q", "level": "Level 5", "type": "Algebra", "solution": "So $\\boxed{\\frac{1}{2}}$."},
            ("q", "\\frac{1}{2}", "So $\\boxed{\\frac{1}{2}}$.", "Algebra, level 5"),
        ),
        ("math", {"problem": "q", "level": "Level 5", "type": "Algebra", "solution": "No box."}, "boxes no answer"),
        ("aime", {"id": 60, "problem": "q", "answer": "033", "solution": "s", "url": "u", "year": "2024"}, ("q", "33", "s", "")),
        ("aime", {"id": 0, "problem": "q", "answer": "1000"}, "no integer from 0 to 999"),
    ],
)  # fmt: skip
def test_rows_of_the_benchmarks_without_a_local_copy(
    source: str, row: dict[str, Any], expected: tuple[str | None, ...] | str, tmp_path: Path
) -> None:
    """Rows of the shape that their pages on the hub show."""
    split = next(iter(SOURCES[source].splits.values()))
    write_jsonl(tmp_path / split.file, [row])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            load_problems(source, data_dir=str(tmp_path))
    else:
        (problem,) = load_problems(source, data_dir=str(tmp_path))
        assert (problem.question, problem.answer, problem.solution, problem.kind) == expected


def test_reasoning_and_reply_of_an_openr1_row_come_from_a_generation_that_was_verified(tmp_path: Path) -> None:
    row = {
        "problem": "q", "solution": "short", "answer": "7", "problem_type": "Algebra", "uuid": "u",
        "generations": ["<think>\nbad\n</think>\n\n8", "<think>\ngood\n</think>\n\nSo \\boxed{7}."],
        "correctness_math_verify": [False, True], "is_reasoning_complete": [True, True],
    }  # fmt: skip
    write_jsonl(
        tmp_path / SOURCES["openr1_math"].splits["train"].file,
        [row, row | {"uuid": "v", "correctness_math_verify": [False, False]}],
    )
    first, second = load_problems("openr1_math", data_dir=str(tmp_path))
    assert (first.solution, first.response, first.answer) == ("good", "So \\boxed{7}.", "7")
    assert (second.solution, second.response, second.id) == ("short", None, "openr1-v")


def test_a_sample_nests_in_a_larger_one_and_keeps_the_order(shared_data: Path) -> None:
    def ids(limit: int, seed: int = 0) -> list[str]:
        return [p.id for p in load_problems("gsm8k", split="test", limit=limit, seed=seed, data_dir=str(shared_data))]

    small, large = ids(20), ids(50)
    assert len(small) == 20
    assert set(small) < set(large)
    assert large == sorted(large)
    assert set(ids(20, seed=1)) != set(small)


def test_synthetic_problems_need_no_file() -> None:
    problems = load_problems("synthetic_arithmetic", split="test", limit=5, seed=3, steps=[2], families=["chain"])
    assert {problem.kind for problem in problems} == {"chain-2"}
    with pytest.raises(ValueError, match="endless"):
        load_problems("synthetic_arithmetic")


def test_bad_rows_are_left_out_with_their_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"question": "1+1?", "answer": 2, "id": "a"}, {"question": " ", "answer": "2"}, {"question": "?"}, {"question": "?", "answer": [2]},
            {"question": "?", "answer": "x", "id": "a"}, {"question": "no gold?", "answer": None}, {"question": "?", "answer": " "}]  # fmt: skip
    write_jsonl(path, rows)
    read = read_source(str(path))
    assert [(p.id, p.answer) for p in read.problems] == [("a", "2"), ("mine-000002", None), ("mine-000005", None)]
    reasons = {row.where: row.reason for row in read.rejected}
    assert reasons["mine, row 1"] == "the question is empty"
    assert "a list" in reasons["mine, row 3"]
    assert "stands twice" in reasons["mine, row 4"]
    assert reasons["mine, row 6"] == "the answer is empty"
    with caplog.at_level(logging.WARNING):
        load_problems("jsonl", path=str(path))
    assert "4 rows are no problems" in caplog.text
    assert "2 of 3 problems have no answer: they can be generated from" in caplog.text
    aside = [row.to_row() for row in read.rejected]
    assert aside[0] == {
        "where": "mine, row 1",
        "cause": "bad_row",
        "reason": "the question is empty",
        "row": {"question": " ", "answer": "2"},
    }
    json.dumps(
        [row.to_row() for row in [RejectedRow("w", "r", row={"when": math.nan, "what": object()})]], allow_nan=False
    )


def test_questions_may_lack_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without an option: what has none can be generated from, and that it cannot be judged is said."""
    path = tmp_path / "raw_questions.jsonl"
    write_jsonl(path, [{"question": "1+1?"}, {"question": "2+2?", "answer": 4}])
    for options in ({}, {"answer_rule": "optional"}):
        caplog.clear()
        problems = load_problems(str(path), **options)
        assert [(problem.question, problem.answer) for problem in problems] == [("1+1?", None), ("2+2?", "4")]
        assert "1 of 2 problems have no answer" in caplog.text
    # Where a rule for the answer is named, a row without the column is a bad one
    assert [problem.answer for problem in load_problems(str(path), answer_rule="as_is")] == ["4"]


def test_a_problem_that_is_not_admitted_makes_room_for_another(shared_data: Path) -> None:
    def admit(problem: Problem) -> Refusal | None:
        return Refusal("contaminated", "too long", "x") if len(problem.question) > 200 else None

    read = read_source("gsm8k", limit=30, data_dir=str(shared_data), admit=admit)
    assert len(read.problems) == 30
    assert all(len(problem.question) <= 200 for problem in read.problems)
    assert {(row.cause, row.reason, row.detail) for row in read.rejected} == {("contaminated", "too long", "x")}
    with pytest.raises(ValueError, match="no problem"):
        read_source("gsm8k", limit=30, data_dir=str(shared_data), admit=lambda problem: Refusal("bad_row", "no"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_of_other_columns(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    rows = [{"prompt": "1+1?", "target": "so\n#### 1,002", "topic": "sums"}]
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        path.write_text('prompt,target,topic\n1+1?,"so\n#### 1,002",sums\n')
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    columns = {"question": "prompt", "answer": "target", "kind": "topic"}
    (problem,) = load_problems(str(path), columns=columns, answer_rule="gsm8k")
    assert (problem.question, problem.answer, problem.kind, problem.source) == ("1+1?", "1002", "sums", "mine")


def test_errors_teach(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'gsm8k'"):
        load_problems("gsm8")
    with pytest.raises(ValueError, match=r"splits \['train', 'test'\]"):
        load_problems("gsm8k", split="dev", data_dir=str(shared_data))
    with pytest.raises(SourceUnavailableError, match="no copy of gsm8k"):
        load_problems("gsm8k", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"does not take \['steps'\]"):
        load_problems("gsm8k", steps=[2])
    with pytest.raises(ValueError, match="at least 1"):
        load_problems("gsm8k", limit=0)
    with pytest.raises(ValueError, match="needs `path`"):
        load_problems("jsonl")
    with pytest.raises(SourceUnavailableError, match="No file"):
        load_problems("absent.jsonl")
    path = tmp_path / "mine.jsonl"
    write_jsonl(path, [{"wording": "?"}])
    with pytest.raises(ValueError, match="no column 'question'"):
        load_problems(str(path))
    with pytest.raises(ValueError, match="answer_rule"):
        load_problems(str(path), answer_rule="gsm")
    with pytest.raises(ValueError, match="columns names"):
        load_problems(str(path), columns={"answr": "x"})


def test_the_hub_out_of_reach_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("no route\nmore"))
    )
    for source in ("gsm8k", "hub:someone/something"):
        with pytest.raises(SourceUnavailableError, match=r"no route\. Check the name and the network"):
            load_problems(source)


def test_the_hub_is_asked_for_the_right_split_and_streams_are_named_by_their_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datasets import Dataset

    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool, **options: str) -> Any:
        asked.append((name, config, split, streaming, *options.values()))
        if streaming:
            return Dataset.from_list(
                [{"prompt": f"q{i}", "response": "r", "ground_truth": str(i), "correct": True} for i in range(5)]
            ).to_iterable_dataset()
        if name == "EleutherAI/asdiv":
            return Dataset.from_list(
                [{"body": "b", "question": "q?", "answer": "1 (x)", "formula": "", "solution_type": "Sum"}]
            )
        if name == "math-ai/aime25":
            return Dataset.from_list([{"problem": "q", "answer": "70", "id": "0"}])
        return Dataset.from_list([{"input": "q", "target": 2.5, "code": ""}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_problems("gsm_hard")[0].answer == "2.5"
    streamed = load_problems("numinamath_qwq", limit=3, seed=1)
    assert load_problems("asdiv")[0].answer == "1"
    assert load_problems("aime", split="2025")[0].id == "aime-2025-000000"
    assert asked == [
        ("reasoning-machines/gsm-hard", None, "train", False),
        ("PrimeIntellect/NuminaMath-QwQ-CoT-5M", None, "train", True),
        ("EleutherAI/asdiv", "asdiv", "validation", False, "refs/convert/parquet"),
        ("math-ai/aime25", None, "test", False),
    ]
    whole = load_problems("numinamath_qwq")
    assert [p.question for p in whole] == [f"q{i}" for i in range(5)], "a whole stream is not shuffled"
    assert len({p.id for p in streamed}) == 3
    assert all(p.id.startswith("numinamath_qwq-train-") for p in streamed)


def test_large_sources_stream_and_a_bad_row_among_them_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the shape that the hub has; only as many are fetched as are asked for."""
    from datasets import IterableDataset

    def openthoughts(number: int) -> dict[str, Any]:
        reply = f"<|begin_of_thought|>\n\nthought {number}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n\\boxed{{{number}}}\n\n<|end_of_solution|>"
        turns = [
            {"from": "user", "value": f"q{number}"},
            {"from": "assistant", "value": "cut" if number == 1 else reply},
        ]
        return {"system": "Your role as an assistant …", "conversations": turns}

    def openr1(number: int) -> dict[str, Any]:
        return {
            "problem": "" if number == 1 else f"q{number}", "solution": "s", "answer": str(number), "problem_type": "Algebra",
            "question_type": "math-word-problem", "source": "olympiads", "uuid": f"u{number}", "is_reasoning_complete": [True],
            "generations": [f"<think>\nthought {number}\n</think>\n\n\\boxed{{{number}}}"], "correctness_math_verify": [True],
            "correctness_llama": None, "finish_reasons": None, "correctness_count": 1, "messages": [],
        }  # fmt: skip

    fetched = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        make = openthoughts if "OpenThoughts" in name else openr1

        def rows() -> Any:
            for number in range(1000):
                fetched.append(number)
                yield make(number)

        assert streaming
        stream = IterableDataset.from_generator(rows)
        stream.shuffle = lambda seed, buffer_size: stream
        return stream

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source in ("openthoughts", "openr1_math"):
        fetched.clear()
        read = read_source(source, limit=5)
        assert [(p.question, p.answer, p.solution, p.response) for p in read.problems] == [
            (f"q{n}", str(n), f"thought {n}", f"\\boxed{{{n}}}") for n in (0, 2, 3, 4, 5)
        ]
        (bad,) = read.rejected
        assert bad.where == f"{source}-train, row 1"
        assert bad.to_row()["row"].keys() == read.rejected[0].row.keys()
        assert len(fetched) < 20


def test_every_evaluation_set_is_known() -> None:
    assert {"gsm8k", "gsm_hard", "gsm_plus", "svamp", "asdiv", "math", "math500", "aime"} == {
        name for name, _ in BENCHMARKS
    }
    assert all(split in SOURCES[name].splits for name, split in BENCHMARKS)


def test_without_the_mark_a_row_is_refused_by_the_source_and_by_the_answer_rule(tmp_path: Path) -> None:
    """The whole solution is no answer."""
    rows = [{"question": "q", "answer": "so 72"}, {"question": "r", "answer": "so\n#### 1,072"}]
    path = tmp_path / "gsm8k" / "train.jsonl"
    write_jsonl(path, rows)
    for read in (read_source("gsm8k", data_dir=str(tmp_path)), read_source(str(path), answer_rule="gsm8k")):
        assert [problem.answer for problem in read.problems] == ["1072"]
        assert [row.reason for row in read.rejected] == ["the answer has no #### line"]
