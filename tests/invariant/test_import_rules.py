"""The import rules hold, in the source and at run time; and a planted violation of each kind is found."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from tests.invariant.import_rules import HEAVY, PACKAGE, RULES, loaded_by, modules_of, violations


@pytest.fixture
def package(repository: Path) -> Path:
    return repository / PACKAGE


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """A copy of the package to plant violations in."""
    return Path(shutil.copytree(package, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__")))


def plant(path: Path, line: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")


def test_no_module_imports_what_its_room_may_not(package: Path) -> None:
    assert violations(package) == []


def test_every_room_has_a_rule(package: Path) -> None:
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == RULES.keys()


def test_data_and_verification_load_nothing_heavy(package: Path) -> None:
    assert not loaded_by(modules_of(package, "data", "verification"), package.parent) & HEAVY


def test_the_command_line_loads_nothing_heavy(package: Path) -> None:
    light = ["cli", "pipeline", "launch", "extras", "options", "config_files", "scripts.stage", "scripts.source"]
    assert not loaded_by([f"{PACKAGE}.{name}" for name in light], package.parent) & (
        HEAVY | {"accelerate", "datasets", "numpy"}
    )


def test_losses_load_torch_and_no_framework(package: Path) -> None:
    modules = modules_of(package, "losses")
    if (
        importlib.util.find_spec("triton") is None
    ):  # comes with torch where there is CUDA; its kernels are loaded there only
        modules = [module for module in modules if "._triton_" not in module]
    assert loaded_by(modules, package.parent) & (HEAVY | {"accelerate"}) == {"torch"}


def test_teacher_and_evaluation_do_not_load_trl(package: Path) -> None:
    assert "trl" not in loaded_by(modules_of(package, "teacher", "evaluation"), package.parent)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data/files.py", "import torch"),
        ("data/files.py", "def read():\n    from transformers import AutoTokenizer"),
        ("verification/__init__.py", "from trl_reasoning_distill.teacher import store"),
        ("losses/divergence.py", "import numpy"),
        ("losses/divergence.py", "from ..data import files"),
        ("teacher/records.py", "import trl"),
        ("trainer/config.py", "from trl_reasoning_distill.evaluation import compare"),
        ("trainer/config.py", "from trl_reasoning_distill import teacher"),
        ("evaluation/compare.py", "import trl_reasoning_distill.scripts.stage"),
        ("cli.py", "from trl import TrlParser"),
    ],
)
def test_a_planted_import_is_found_in_the_source(copy: Path, file: str, line: str) -> None:
    before = violations(copy)
    plant(copy / file, line)
    added = set(violations(copy)) - set(before)
    assert [violation.partition(":")[0] for violation in added] == [file]


def test_a_planted_import_is_found_at_run_time(copy: Path) -> None:
    plant(copy / "data" / "files.py", "import trl")
    assert "trl" in loaded_by([f"{PACKAGE}.data.files"], copy.parent)


def test_an_import_for_type_checkers_is_no_violation(copy: Path) -> None:
    before = violations(copy)
    plant(copy / "data" / "files.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerBase")
    assert violations(copy) == before


def test_a_new_room_needs_a_rule(copy: Path) -> None:
    (copy / "attic").mkdir()
    (copy / "attic" / "old.py").touch()
    assert any("'attic' has no import rule" in violation for violation in violations(copy))
