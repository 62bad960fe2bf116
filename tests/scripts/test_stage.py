"""Parsing is strict and its errors are one line; a stage's `main` answers help and typos before it does anything."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from trl.scripts.utils import TrlParser

from trl_reasoning_distill.data.files import DiskFullError
from trl_reasoning_distill.extras import MissingExtraError, require_extra
from trl_reasoning_distill.scripts.stage import (
    _GRACE_SECONDS,
    StageArguments,
    parse_stage,
    read_config,
    split_config,
    stage_main,
)


@dataclass
class ExampleArguments(StageArguments):
    """The options of a stage that exists only here."""

    learning_rate: float = field(default=1e-3, metadata={"help": "How fast, in 100% of cases."})
    top_k: int | None = None
    models: list[str] = field(default_factory=list, metadata={"help": "Several."})
    save: Literal["no", "steps"] = "steps"
    shuffle: bool = True
    text: str | None = None
    options: dict | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {self.top_k}.")


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
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("12", 12),
        (".inf", math.inf),
        ("1e", "1e"),
        ("2.7.1", "2.7.1"),
        ("true", True),
        ("yes", "yes"),
        ("null", None),
        ("2024-01-01x", "2024-01-01x"),
    ],
)
def test_scalars(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "a.yaml").write_text(f"key: {text}\n")
    found = read_config(tmp_path / "a.yaml")["key"]
    assert found == value
    assert type(found) is type(value)


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
        ("output_dir: a\ntop_k: 0", (), "top_k must be at least 1, found 0"),
        ("output_dir: a", ("--top_k", "many"), "argument --top_k/--top-k: invalid int value: 'many'"),
        ("top_k: 3", (), "output_dir is missing"),
        ("top_k: 3\ntop_k: 4", (), "example.yaml, line 2: the key 'top_k' stands twice"),
        ("options: {a: 1, a: 2}", (), "the key 'a' stands twice"),
        ("top_k: [3", (), "example.yaml, line 1: "),
        ("- top_k", (), "expected a mapping of option names to values, found list"),
        ("env: 3", (), "`env` must be a mapping"),
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
    monkeypatch.setattr("trl_reasoning_distill.scripts.stage.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse("zzz: 1")
    assert waited == [_GRACE_SECONDS]
    assert capsys.readouterr().err.startswith("process 1: error: ")


def test_an_empty_config_and_its_environment(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRD_TEST_VARIABLE", "0")
    assert parse("", "--output_dir", "a").output_dir == "a"
    parse("output_dir: a\nenv: {TRD_TEST_VARIABLE: 1}")
    assert os.environ["TRD_TEST_VARIABLE"] == "1"


def test_config_in_both_spellings() -> None:
    assert split_config(["--a", "1", "--config", "x.yaml"]) == ("x.yaml", ["--a", "1"])
    assert split_config(["--config=x.yaml", "--a"]) == ("x.yaml", ["--a"])
    assert split_config(["--a"]) == (None, ["--a"])
    with pytest.raises(ValueError, match="needs a path"):
        split_config(["--config"])
    with pytest.raises(ValueError, match="given 2 times"):
        split_config(["--config", "a", "--config=b"])


@stage_main
def main(args: list[str] | None = None) -> None:
    assert args is not None
    raise {
        "value": ValueError("top_k is wrong"),
        "extra": MissingExtraError("no matplotlib"),
        "full": DiskFullError("no room"),
        "stop": KeyboardInterrupt(),
        "bug": TypeError(),
    }[args[-1]]


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("value", 1, "error: top_k is wrong\n"),
        ("extra", 1, "error: no matplotlib\n"),
        ("full", 1, "error: no room Then go on with: the same command again\n"),
        ("stop", 130, "Stopped by Ctrl-C; what was made is kept. Go on from here with: the same command again"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    capsys: pytest.CaptureFixture[str], kind: str, code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([kind])
    assert exit_info.value.code == code
    assert capsys.readouterr().err.startswith(message)


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(TypeError):
        main(["bug"])


def test_debug_shows_the_traceback_of_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRD_DEBUG", "1")
    with pytest.raises(ValueError, match="top_k is wrong"):
        main(["value"])


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
    with pytest.raises(ValueError, match="top_k is wrong"):
        main(["--no_shuffle", "--learning-rate=3", "value"])


def test_a_missing_extra_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match=r"no_such_module.*pip install 'trl-reasoning-distill\[report\]'"):
        require_extra("report", "no_such_module")
    assert require_extra("report", "json").dumps([]) == "[]"
