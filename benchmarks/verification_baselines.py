"""The verifiers that ours is compared with: math-verify alone, TRL's `accuracy_reward`, and lm-eval's own rules.

Each takes cases and returns, for each, whether the verifier takes it for right. All run with their defaults, in one process.
lm-eval needs another version of ANTLR than math-verify, so it runs in the environment that `--lm_eval_python` names:

    python -m venv lm-eval && lm-eval/bin/pip install --no-deps lm-eval==0.4.13 && lm-eval/bin/pip install 'math-verify[antlr4_11_0]' typing_extensions
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from verification_cases import Case


def math_verify_alone(cases: Sequence[Case]) -> list[bool]:
    """`verify(parse(gold), parse(output))`, math-verify's own recipe; golds without math marks are given them."""
    from math_verify import parse, verify

    return [bool(verify(parse(_as_math(case.gold)), parse(case.output))) for case in cases]


def trl_accuracy_reward(cases: Sequence[Case]) -> list[bool]:
    """TRL's reward function; a reward of `None` (unreadable gold) is not right."""
    from trl.rewards import accuracy_reward

    rewards = accuracy_reward([[{"content": case.output}] for case in cases], [_as_math(case.gold) for case in cases])
    return [reward == 1.0 for reward in rewards]


def lm_eval_rules(cases: Sequence[Case], python: Path) -> list[bool]:
    """lm-eval's rules, run by `python` from the installed package (see `_lm_eval_main`)."""
    rows = [{"output": case.output, "gold": case.gold, "gsm8k": case.group == "GSM8K outputs"} for case in cases]
    done = subprocess.run([python, __file__], input=json.dumps(rows), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _as_math(gold: str) -> str:
    return gold if "$" in gold or "\\boxed" in gold or "\\(" in gold or "\\[" in gold else f"${gold}$"


def _lm_eval_main() -> None:
    """In lm-eval's environment: `minerva_math`'s functions for mathematics, `gsm8k`'s flexible filter for GSM8K.

    `minerva_math` reads only "The final answer is … I hope it is correct"; where a text lacks it, its last box is taken, as lm-eval
    does for the gold solutions. The filter and the ignored characters of `gsm8k` are those of its YAML.
    """
    import importlib.util

    package = importlib.util.find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "tasks" / "minerva_math" / "utils.py"
    spec = importlib.util.spec_from_file_location("minerva_math_utils", file)
    assert spec is not None
    assert spec.loader is not None
    minerva = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minerva)

    def flexible(text: str) -> str:
        found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
        last = next(filter(None, found[-1]), "") if found else "[invalid]"
        return re.sub(r"\.$", "", re.sub(r",|\$|(?s:.*#### )", "", last))

    def is_right(row: dict) -> bool:
        if row["gsm8k"]:
            return flexible(row["output"]) == re.sub(r",|\$", "", row["gold"])
        answer = minerva.get_unnormalized_answer(row["output"])
        box = minerva.last_boxed_only_string(row["output"])
        if answer == "[invalidanswer]" and box is not None:
            answer = minerva.remove_boxed(box)
        gold_box = minerva.last_boxed_only_string(row["gold"])
        gold = minerva.remove_boxed(gold_box) if gold_box else row["gold"]
        return minerva.is_equiv(minerva.normalize_final_answer(answer), minerva.normalize_final_answer(gold))

    def guarded(row: dict) -> bool:
        try:
            return bool(is_right(row))
        except Exception:  # an assertion on an odd box: not right
            return False

    print(json.dumps([guarded(row) for row in json.load(sys.stdin)]))


if __name__ == "__main__":
    _lm_eval_main()
