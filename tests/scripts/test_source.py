"""The options that are read from the source are those of the real parsers."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from trl_reasoning_distill.scripts import STAGES
from trl_reasoning_distill.scripts.source import (
    UnreadableOptionsError,
    known_flags,
    launcher_flags,
    read_options,
    script_path,
)


@pytest.mark.parametrize("name", STAGES)
def test_options_equal_those_of_the_real_parser(name: str) -> None:
    options = {option.name: option for option in read_options(script_path(name))}
    parser = importlib.import_module(f"trl_reasoning_distill.scripts.{name}").make_parser()
    actions = {
        action.dest: action
        for action in parser._actions
        if action.dest != "help" and not action.option_strings[0].startswith("--no_")
    }
    assert options.keys() == actions.keys()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert set(known_flags(options.values())) == flags - {"-h"} | {"--config"}
    for key, option in options.items():
        assert option.help or option.package != "trl_reasoning_distill", f"{name}: {key} has no help"
        try:
            default = None if option.default is None else ast.literal_eval(option.default)
        except ValueError:
            continue  # a name or a call, such as an enumeration's member
        if actions[key].nargs == "+" and actions[key].default is None:
            continue  # the real parser forgets the default of a list that is not made by a factory
        assert actions[key].default == default, key


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_guarded_and_teaches(name: str, repository: Path) -> None:
    module = importlib.import_module(f"trl_reasoning_distill.scripts.{name}")
    assert hasattr(module.main, "__wrapped__"), "main needs @stage_main"
    assert module.__doc__
    launcher = repository / "recipes" / f"{'select_traces' if name == 'select' else name}.py"
    assert f"from trl_reasoning_distill.scripts.{name} import main" in launcher.read_text(encoding="utf-8")


def test_launcher_options_equal_those_of_accelerate() -> None:
    from accelerate.commands.launch import launch_command_parser

    real = {f for action in launch_command_parser()._actions for f in action.option_strings if f.startswith("--")}
    known = set(launcher_flags())
    assert {"--" + flag[2:].replace("-", "_") for flag in real} <= known
    assert known <= real | {"--accelerate_config"}


def test_source_that_cannot_be_followed_is_said_to_be_so(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text("def make_parser(prog=None):\n    return build()\n")
    with pytest.raises(UnreadableOptionsError, match="has no make_parser"):
        read_options(str(script))
    other = tmp_path / "other.py"
    other.write_text("def make_parser(prog=None):\n    return TrlParser(Missing, prog=prog)\n")
    with pytest.raises(UnreadableOptionsError, match="neither defines nor imports a class 'Missing'"):
        read_options(str(other))


@pytest.mark.parametrize("name", ["sft", "distill"])
def test_help_of_a_training_loads_no_torch(name: str) -> None:
    code = (
        "import sys\nfrom trl_reasoning_distill import cli\n"
        "try: cli.main([sys.argv[1], '--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'trl', 'accelerate'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"
    assert "--learning_rate float" in result.stdout
    assert "--num_processes" in result.stdout


def test_bounds_choices_and_aliases_are_read_from_the_source(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(
        "class Arguments:\n"
        "    k: Count | None = option(3, 'Ids.', aliases=['top_k'])\n"
        "    cut: Literal['drop', 'keep'] = option('drop', 'What ' 'happens.')\n"
        "    seed: 'Annotated[int, Bounds(ge=0, lt=9)]' = option(0, help='Seed.')\n"
        "    store: str = option(help='Where.')\n"
        "    names: list[str] = option(['all'], 'Which.')\n"
        "def make_parser(prog=None):\n    return TrlParser((Arguments,), prog=prog)\n"
    )
    found = {option.name: option for option in read_options(str(script))}
    assert [option.type for option in found.values()] == [
        "int ≥ 1 | None", "drop | keep", "int ≥ 0 and < 9", "str", "list[str]",
    ]  # fmt: skip
    assert [option.default for option in found.values()] == ["3", "'drop'", "0", None, "['all']"]
    assert [option.help for option in found.values()] == ["Ids.", "What happens.", "Seed.", "Where.", "Which."]
    assert found["k"].flags == ("--k", "--top_k")
