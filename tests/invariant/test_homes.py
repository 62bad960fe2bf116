"""Each concept stands in its home and nowhere else; and a planted second home of each is found."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from tests.invariant.homes import CONCEPTS, strays
from tests.invariant.import_rules import PACKAGE
from trl_reasoning_distill.data.tokenization import IGNORE_INDEX
from trl_reasoning_distill.losses.fused import IGNORED_LABEL

PLANTED = {
    "the prompt encoder": "def f(tokenizer, messages):\n    return tokenizer.apply_chat_template(messages)",
    "loading by name": "def f(name):\n    return AutoTokenizer.from_pretrained(name)",
    "a model's head": "def f(config):\n    return getattr(config, 'logits_scaling', 1.0)",
    "a model's context length": "def f(config):\n    return getattr(config, 'max_position_embeddings', None)",
    "supervised positions": "def f(labels):\n    return [label != IGNORE_INDEX for label in labels]",
    "the ignored label": "IGNORED = -100",
}


def test_every_concept_has_one_home(repository: Path) -> None:
    assert list(strays(repository / PACKAGE)) == []


def test_every_concept_is_at_home(repository: Path) -> None:
    """A home that was moved or emptied would make its rule empty too."""
    for name, concept in CONCEPTS.items():
        for home in concept.homes:
            nodes = ast.walk(ast.parse((repository / PACKAGE / home).read_text(encoding="utf-8")))
            assert any(map(concept.stands_in, nodes)), f"{name} does not stand in {home}"


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_second_home_is_found(repository: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(repository / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__")))
    file = copy / "data" / "files.py"
    file.write_text(f"{file.read_text(encoding='utf-8')}\n\n{PLANTED[name]}\n", encoding="utf-8")
    assert any(stray.startswith(f"{name}: data/files.py:") for stray in strays(copy))


def test_data_and_losses_ignore_the_same_label() -> None:
    """`losses` imports nothing of ours, so it names the label once more."""
    assert IGNORE_INDEX == IGNORED_LABEL
