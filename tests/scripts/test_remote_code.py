"""`trust_remote_code` is off everywhere unless asked for, and then said loudly with the model's name before anything is loaded."""

from __future__ import annotations

import importlib

import pytest

from trl_reasoning_distill.scripts import STAGES, chat, evaluate
from trl_reasoning_distill.scripts.source import read_options, script_path
from trl_reasoning_distill.scripts.stage import parse_stage

TRAINING = ["--model_name_or_path", "some/model", "--use_cpu", "true", "--bf16", "false"]
WORDS = {
    "generate": ["--teacher", "some/model", "--source", "s"],
    "sft": TRAINING,
    "capture": ["--teacher", "some/model", "--dataset", "d"],
    "align": ["--student", "some/model", "--store", "s"],
    "distill": [*TRAINING, "--teacher_logits", "t"],
    "gkd": [*TRAINING, "--teacher", "big/model"],
    "evaluate": ["--models", "base=some/model", "--source", "s"],
    "chat": ["--student", "some/model"],
    "store": ["--teacher", "some/model", "--path", "p"],
}
OWN_OPTION = '{"model": "some/model", "trust_remote_code": true}'


def test_it_is_off_by_default_in_every_stage_and_these_are_all() -> None:
    defaults = {name: {option.name: option.default for option in read_options(script_path(name))} for name in STAGES}
    assert {name for name, options in defaults.items() if "trust_remote_code" in options} == WORDS.keys()
    assert {options.get("trust_remote_code", "False") for options in defaults.values()} == {"False"}


@pytest.mark.parametrize("name", WORDS)
def test_it_is_said_with_the_model_that_is_trusted(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = importlib.import_module(f"trl_reasoning_distill.scripts.{name}").make_parser
    words = [*WORDS[name], *(["--output_dir", "out"] if name not in ("chat", "store") else [])]
    parse_stage(parser(), words)
    assert "trust_remote_code" not in capsys.readouterr().err
    parse_stage(parser(), [*words, "--trust_remote_code", "true"])
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if "trust_remote_code" in line]
    assert line.startswith("WARNING: trust_remote_code is on")
    assert "some/model" in line
    assert ("big/model" in line) == (name == "gkd")
    monkeypatch.setenv("RANK", "1")
    parse_stage(parser(), [*words, "--trust_remote_code", "true"])
    assert "WARNING: trust_remote_code" not in capsys.readouterr().err, "once per launch"


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (evaluate, ["--models", "plain=m", f"odd={OWN_OPTION}", "--source", "nowhere.jsonl", "--output_dir", "out"]),
        (chat, ["--student", OWN_OPTION, "--question", "?"]),
    ],
)
def test_so_is_that_of_one_model_alone(stage: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stage.main(words)  # type: ignore[attr-defined]  # there is no such model
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "trust_remote_code" in line]
    assert "some/model" in line
    assert "plain" not in line
