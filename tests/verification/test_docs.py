"""The page on verification: its examples run, its table of disagreements is the measured one, its rules are the code's."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

from tests.verification.test_verify import DISAGREEMENTS
from trl_reasoning_distill.verification import answers, extract
from trl_reasoning_distill.verification.comparison import RULES


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "concepts" / "verification.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_first_example_says_what_it_says(page: str) -> None:
    scope: dict = {}
    calls = re.findall(r"^(\w+_answer\(.*\))\n# (.*)$", blocks(page)[0], re.MULTILINE)
    exec(blocks(page)[0], scope)
    from trl_reasoning_distill.data.schema import Verdict

    assert len(calls) == 2
    for call, result in calls:
        names = {**scope, "Verdict": Verdict, "ExtractedAnswer": extract.ExtractedAnswer}
        assert eval(call, scope) == eval(result, names)


def test_the_reward_function_gives_rewards_as_trl_asks_for_them(page: str) -> None:
    scope: dict = {}
    exec(next(block for block in blocks(page) if "verified_reward" in block), scope)
    reward = scope["verified_reward"]
    texts = ["<think>\nr\n</think>\n\n\\boxed{\\sqrt{8}}", "#### 41", "I give up on this one, sorry", "5"]
    answers = ["2\\sqrt{2}", "42", "42", None]
    columns = {"prompts": ["p"] * 4, "completion_ids": [[1]] * 4, "trainer_state": None, "log_extra": None}
    expected = [1.0, 0.0, 0.0, None]
    assert reward(completions=texts, answer=answers, **columns) == expected
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions=messages, answer=answers, **columns) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_grpo_trainer_takes_the_reward_function(page: str, quickstart_models: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    scope: dict = {}
    exec(next(block for block in blocks(page) if "verified_reward" in block), scope)
    asked = []

    def verified_reward(completions: list, answer: list[str], **columns: object) -> list[float | None]:
        asked.append(answer)
        return scope["verified_reward"](completions, answer, **columns)

    rows = [{"prompt": [{"role": "user", "content": "Add 2 and 3."}], "answer": "5"}] * 2
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=8,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(quickstart_models / "student"),
        reward_funcs=verified_reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    assert asked == [["5", "5"]]


def test_every_disagreement_is_told(page: str) -> None:
    rows = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert [int(row) for row in rows] == sorted(DISAGREEMENTS)


def between(page: str, begin: str, end: str) -> list[str]:
    start = page.index(begin)
    return [line for line in page[start : page.index(end, start)].splitlines()[1:] if line.strip()]


def test_the_page_of_rules_is_the_codes(page: str) -> None:
    expected = [
        "| gold answer | what is the same |",
        "|---|---|",
        *(f"| {name} | {rule} |" for _, name, rule, _ in RULES),
    ]
    assert between(page, "<!-- rules:", "<!-- end of rules -->") == expected


def test_there_is_a_rule_for_each_type_of_answer() -> None:
    assert {kind for kind, *_ in RULES} == set(typing.get_args(answers.Answer))


def test_the_figures_are_those_of_the_benchmark(page: str, repository: Path) -> None:
    results = (repository / "benchmarks" / "results" / "verification.md").read_text(encoding="utf-8")
    tables = [line for line in results[: results.index("| goal |")].splitlines() if line.startswith("|")]
    assert len(tables) > 15
    assert between(page, "<!-- figures:", "<!-- end of figures -->") == tables


def test_the_page_and_the_module_name_the_same_rules(page: str) -> None:
    assert extract.__doc__ is not None
    in_module = set(re.findall(r"^\| `(\w+)`", extract.__doc__, re.MULTILINE))
    table = page[page.index("| rule |") : page.index("The first six")]
    assert set(re.findall(r"`([a-z_]+)`(?=[,| ])", table.replace("`and`", ""))) >= in_module
