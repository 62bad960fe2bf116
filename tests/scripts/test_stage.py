"""Parsing is strict and its errors are one line; a stage's `main` answers help and typos before it does anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from trl.scripts.utils import TrlParser

from trl_reasoning_distill.data.files import DiskFullError
from trl_reasoning_distill.extras import MissingExtraError, require_extra
from trl_reasoning_distill.options import Count, option
from trl_reasoning_distill.scripts import command, source
from trl_reasoning_distill.scripts.command import _GRACE_SECONDS, Command, split_config
from trl_reasoning_distill.scripts.stage import StageArguments, command_main, parse_stage


@dataclass(kw_only=True)
class ExampleArguments(StageArguments):
    """The options of a stage that exists only here."""

    learning_rate: float = option(1e-3, "How fast, in 100% of cases.")
    top_k: Count | None = option(None, "Ids.")
    models: list[str] = option([], "Several.")
    save: Literal["no", "steps"] = "steps"
    shuffle: bool = True
    text: str | None = None
    options: dict | None = None


def make_parser(prog: str | None = None) -> TrlParser:
    return TrlParser(ExampleArguments, prog=prog)


Parse = Callable[..., ExampleArguments]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    def parse(yaml: str, *args: str) -> ExampleArguments:
        path = tmp_path / "example.yaml"
        path.write_text(yaml, encoding="utf-8")
        (options,) = parse_stage(make_parser(), ["--config", str(path), *args])
        return options

    return parse


def test_the_command_line_goes_before_yaml_before_defaults(parse: Parse) -> None:
    options = parse("output_dir: a\ntop_k: 5\nlearning_rate: 0.1\n", "--top_k", "6", "--dry-run")
    assert (options.output_dir, options.top_k, options.learning_rate, options.save) == ("a", 6, 0.1, "steps")
    assert options.dry_run
    assert not options.overwrite


def test_yaml_of_version_1_2(parse: Parse) -> None:
    options = parse(
        "output_dir: a\nlearning_rate: 1e-5\nsave: no\ntext: off\nshuffle: false\nmodels: [b=x, c]\noptions: {x: 1e3, y: yes}\n"
    )
    assert options.learning_rate == 1e-5
    assert (options.save, options.text, options.shuffle) == ("no", "off", False)
    assert options.models == ["b=x", "c"]
    assert options.options == {"x": 1000.0, "y": "yes"}


@pytest.mark.parametrize(
    ("yaml", "args", "message"),
    [
        ("learning_rat: 1", (), "unknown option 'learning_rat'. Did you mean 'learning_rate'?"),
        ("output-dir: a", (), "Did you mean 'output_dir'?"),
        ("zzz: 1\nyyy: 2", (), "unknown option 'zzz' (and 1 more: yyy). See --help"),
        ("output_dir: a", ("--to_k", "3"), "command line: unknown option '--to_k'. Did you mean '--top_k'?"),
        ("output_dir: a", ("--learning", "3"), "unknown option '--learning'."),
        ("output_dir: a", ("stray",), "unknown option 'stray'"),
        ("output_dir: a\ntop_k: 2.7", (), "top_k: invalid int value: '2.7'"),
        ("output_dir: a\ntop_k: true", (), "top_k: invalid int value: 'True'"),
        ("output_dir: a\nsave: epoch", (), "save: invalid choice: 'epoch'"),
        ("output_dir: a\nmodels: b", (), "models takes a list, found 'b'; write [b]"),
        ("output_dir: a\ntop_k: 0", (), "`top_k=0`: must be a whole number ≥ 1."),
        ("output_dir: a", ("--top_k", "many"), "argument --top_k/--top-k: invalid int value: 'many'"),
        ("top_k: 3", (), "output_dir is missing"),
        ("top_k: 3\ntop_k: 4", (), 'example.yaml, line 2: found duplicate key "top_k".'),
        ("options: {a: 1, a: 2}", (), 'found duplicate key "a"'),
        ("top_k: [3", (), "example.yaml, line 1: "),
        ("- top_k", (), "expected a mapping of option names to values, found ['top_k']"),
        ("output_dir: a\ntext: 12", (), "`text=12`: must be text, found int"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    parse: Parse, capsys: pytest.CaptureFixture[str], yaml: str, args: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(yaml, *args)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_another_process_speaks_only_after_the_main_one_had_its_turn(
    parse: Parse, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("trl_reasoning_distill.scripts.command.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse("zzz: 1")
    assert waited == [_GRACE_SECONDS]
    assert capsys.readouterr().err.startswith("process 1: error: ")


def test_an_empty_config_is_one(parse: Parse) -> None:
    assert parse("", "--output_dir", "a").output_dir == "a"


def test_config_in_both_spellings() -> None:
    assert split_config(["--a", "1", "--config", "x.yaml"]) == ("x.yaml", ["--a", "1"])
    assert split_config(["--config=x.yaml", "--a"]) == ("x.yaml", ["--a"])
    assert split_config(["--a"]) == (None, ["--a"])
    with pytest.raises(ValueError, match="needs a path"):
        split_config(["--config"])
    with pytest.raises(ValueError, match="given 2 times"):
        split_config(["--config", "a", "--config=b"])


@command_main
def main(command: Command) -> None:
    raise {
        "value": ValueError("top_k is \x1b[31mwrong"),
        "extra": MissingExtraError("no matplotlib"),
        "full": DiskFullError("no room"),
        "stop": KeyboardInterrupt(),
        "bug": TypeError(),
    }[command.words[-1]]


GIVEN = ["--output_dir", "a"]


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("value", 1, "error: top_k is �[31mwrong\n"),
        ("extra", 1, "error: no matplotlib\n"),
        ("full", 1, "error: no room Then go on with: the same command again\n"),
        ("stop", 130, "Stopped by Ctrl-C; what was made is kept. Go on from here with: the same command again"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    capsys: pytest.CaptureFixture[str], kind: str, code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*GIVEN, kind])
    assert exit_info.value.code == code
    assert capsys.readouterr().err.startswith(message)


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(TypeError):
        main([*GIVEN, "bug"])


def test_debug_shows_the_traceback_of_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRD_DEBUG", "1")
    with pytest.raises(ValueError, match="top_k is"):
        main([*GIVEN, "value"])


def test_help_comes_before_main(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bug", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--learning_rate float" in text
    assert "How fast, in 100% of cases. (default: 0.001)" in " ".join(text.split())
    assert "--output_dir" in text


def test_typos_come_before_main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.yaml").write_text("learning_rat: 1\n")
    for args in (["--learning_rat", "1", "bug"], ["--config", str(tmp_path / "a.yaml"), "bug"]):
        with pytest.raises(SystemExit) as exit_info:
            main(args)
        assert exit_info.value.code == 2
        assert "Did you mean" in capsys.readouterr().err
    monkeypatch.setenv("TRD_DEBUG", "1")
    with pytest.raises(ValueError, match="top_k is"):
        main([*GIVEN, "--no_shuffle", "--learning-rate=3", "value"])


def test_all_that_is_missing_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="output_dir, teacher and source are missing"):
        Command([]).checked("generate")
    (tmp_path / "a.yaml").write_text("teacher: t\n")
    with pytest.raises(ValueError, match=r"^source is missing: .*--source"):
        Command.read(["--config", str(tmp_path / "a.yaml"), "--output-dir=x"]).checked("generate")


def test_old_names_are_taken_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("model: t\ndataset: d\n")
    read = Command.read(["--config", str(tmp_path / "a.yaml"), "--top-k=3", "--output_dir", "x"]).checked("capture")
    assert read.config == {"teacher": "t", "dataset": "d"}
    assert read.words == ["--store_top_k=3", "--output_dir", "x"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: capture: {old!r} is now called {new!r}; the old name will go."
        for old, new in (("model", "teacher"), ("top_k", "store_top_k"))
    ]
    with pytest.raises(ValueError, match="'model' is now called 'teacher', and both are given"):
        Command([], {"model": "a", "teacher": "b"}).checked("capture")
    for stage, names in command.RENAMED.items():
        options = {name for one in source.read_options(source.script_path(stage)) for name in one.names}
        assert set(names.values()) <= options
        assert not names.keys() & options


def test_a_config_sets_only_variables_that_cannot_run_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    path = tmp_path / "a.yaml"
    path.write_text("output_dir: a\nenv: {NCCL_DEBUG: WARN}\n")
    with pytest.raises(SystemExit):
        main(["--config", str(path), "value"])
    assert os.environ["NCCL_DEBUG"] == "WARN"
    path.write_text("output_dir: a\nenv: {NCCL_DEBUG: INFO, GIT_SSH_COMMAND: touch it}\n")
    with pytest.raises(SystemExit) as exit_info:
        main(["--config", str(path), "value"])
    assert exit_info.value.code == 2
    assert "`env` may not set GIT_SSH_COMMAND" in capsys.readouterr().err
    assert os.environ["NCCL_DEBUG"] == "WARN"
    assert "GIT_SSH_COMMAND" not in os.environ


def test_a_missing_extra_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"no_such_module.*pip install 'trl-reasoning-distill\[report\]'"):
        require_extra("report", "no_such_module")
    assert require_extra("report", "json").dumps([]) == "[]"
