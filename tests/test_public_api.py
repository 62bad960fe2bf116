"""The public names: pinned, lazily imported, and where type checkers look for them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import trl_reasoning_distill

PUBLIC = {
    "ReasoningFormat",
    "ReasoningSFTConfig",
    "ReasoningSFTTrainer",
    "TopKDistillConfig",
    "TopKDistillTrainer",
    "TopKGKDConfig",
    "TopKGKDTrainer",
    "TopKStore",
    "align_store",
    "compare_models",
    "evaluate_models",
    "extract_answer",
    "fused_linear_distillation_loss",
    "load_problems",
    "topk_divergence",
    "verify_answer",
    "verify_answers",
    "write_report",
}


def test_the_public_names_are_pinned() -> None:
    assert set(trl_reasoning_distill.__all__) == PUBLIC
    assert set(dir(trl_reasoning_distill)) == PUBLIC | {"__version__"}
    assert list(trl_reasoning_distill.__all__) == sorted(trl_reasoning_distill.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_name_can_be_had_and_says_what_it_is(name: str) -> None:
    value = getattr(trl_reasoning_distill, name)
    assert value.__name__ == name
    assert value.__doc__


def test_type_checkers_see_the_same_homes() -> None:
    tree = ast.parse(Path(trl_reasoning_distill.__file__).read_text(encoding="utf-8"))
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "trl_reasoning_distill." in str(node.module)
    ]
    seen = {
        alias.name: str(node.module).removeprefix("trl_reasoning_distill.") for node in imports for alias in node.names
    }
    assert seen == trl_reasoning_distill._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        trl_reasoning_distill.Trainer  # noqa: B018


def test_the_version_is_that_of_the_installed_package() -> None:
    assert trl_reasoning_distill.__version__.split(".")[0].isdigit()


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, trl_reasoning_distill; print({'torch', 'trl', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(("old", "name"), [("teacher.engines", "make_engine"), ("trainer.topk_gkd", "TopKGKDTrainer")])
def test_modules_by_their_names_in_0_1_0(old: str, name: str) -> None:
    sys.modules.pop(f"trl_reasoning_distill.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"trl_reasoning_distill.{old} is now"):
        assert hasattr(importlib.import_module(f"trl_reasoning_distill.{old}"), name)
