"""`trainer/trl_bridge.py` alone touches what TRL and transformers do not promise, and `gkd/base.py` alone what is experimental; a planted touch is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.invariant.bridge import private_names, touches
from tests.invariant.import_rules import PACKAGE

ELSEWHERE = ("teacher/sampling/continuous.py",)
"""Outside `trainer`, which alone may import the bridge."""


def test_only_the_bridge_touches_what_is_not_promised(repository: Path) -> None:
    assert [touch for touch in touches(repository / PACKAGE) if not touch.startswith(ELSEWHERE)] == []


def test_private_names_of_the_libraries_are_known() -> None:
    assert {"_prepare_dataset", "_metrics", "_tokenizer", "_save_checkpoint", "_signature_columns"} <= private_names()


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("trainer/targets.py", "from trl.trainer.sft_trainer import DataCollatorForLanguageModeling"),
        ("trainer/gkd/rows.py", "def f():\n    import trl.experimental.gkd"),
        ("trainer/checkpoints.py", "from transformers.trainer_callback import ExportableState"),
        ("teacher/scoring/local.py", "from transformers.integrations import deepspeed"),
        ("trainer/reference.py", "def f(model):\n    return type(model)._from_config(model.config)"),
        ("trainer/config.py", "FIELDS = SFTConfig._dict_fields"),
        ("trainer/reasoning_sft.py", "class Mine(ReasoningSFTTrainer):\n    def _save_checkpoint(self, *args): ..."),
        ("trainer/card.py", "class Mine:\n    def f(self):\n        return self._metrics"),
    ],
)
def test_a_planted_touch_is_found(repository: Path, tmp_path: Path, file: str, line: str) -> None:
    copy = Path(shutil.copytree(repository / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__")))
    before = list(touches(copy))
    path = copy / file
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")
    added = set(touches(copy)) - set(before)
    assert [touch.partition(":")[0] for touch in added] == [file]
