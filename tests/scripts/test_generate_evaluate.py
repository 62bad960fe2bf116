"""The generate and evaluate stages: YAML and command line say the same, and a second run does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.teacher import tiny
from trl_reasoning_distill.scripts import evaluate, generate
from trl_reasoning_distill.scripts.stage import parse_stage

SYNTHETIC = ["--source", "synthetic_arithmetic", "--limit", "4", "--max_new_tokens", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.make_model().save_pretrained(path)
    tiny.make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("models", ["{base: m/a, distilled: m/b}", "[base=m/a, distilled=m/b]"])
def test_models_are_a_mapping_or_a_list_in_yaml_and_words_on_the_command_line(tmp_path: Path, models: str) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"models: {models}\nsource: gsm8k\noutput_dir: out\nsource_options: {{data_dir: x}}\n")
    options, source, *_ = parse_stage(evaluate.make_parser(), ["--config", str(config)])
    assert evaluate.parse_models(options.models) == {"base": "m/a", "distilled": "m/b"}
    assert source.source_options == {"data_dir": "x"}
    words = ["--config", str(config), "--models", "sft=m=c/d", "--source_options", '{"data_dir": "y"}']
    options, source, *_ = parse_stage(evaluate.make_parser(), words)
    assert evaluate.parse_models(options.models) == {"sft": "m=c/d"}
    assert source.source_options == {"data_dir": "y"}


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "models is missing"),
        (["m/a"], "write each as name=path"),
        (["a=x", "a=y"], "stands twice"),
        ({"a": None}, "with None"),
    ],
)
def test_models_that_cannot_be_read_are_refused(models: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.parse_models(models)


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        (generate, [], "model is missing"),
        (generate, ["--model", "m"], "source is missing"),
        (generate, ["--model", "m", "--source", "s", "--response_format", "thimk"], "Did you mean 'think'"),
        (generate, ["--model", "m", "--source", "s", "--temperature", "-1"], "temperature=-1"),
        (generate, ["--model", "m", "--source", "s", "--engine", "tgi"], "engine='tgi'"),
        (evaluate, ["--source", "s"], "models is missing"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(
    stage: object, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        stage.main([*words, "--output_dir", "out"])  # type: ignore[attr-defined]
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_generate_runs_once_and_a_dry_run_only_says_what_it_would_do(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *SYNTHETIC,
        "--model",
        str(model),
        "--num_samples",
        "2",
        "--temperature",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    generate.main([*words, "--dry_run"])
    assert "2 samples for each of 4 problems" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    generate.main(words)
    assert capsys.readouterr().out.startswith("generate: 8 traces for 4 problems · ")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["stage"], manifest["counts"]["traces"], manifest["seed"]) == ("generate", 8, 0)
    assert manifest["inputs"]["model"]["hash"]
    traces = (tmp_path / "out" / "traces.jsonl").read_bytes()
    generate.main([*words, "--max_batch_size", "3"])
    assert "nothing to do" in capsys.readouterr().out
    generate.main([*words, "--max_batch_size", "3", "--overwrite"])
    assert (tmp_path / "out" / "traces.jsonl").read_bytes() == traces


def test_evaluate_writes_predictions_metrics_and_a_manifest(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *SYNTHETIC,
        "--models",
        f"base={model}",
        f"sft={model}",
        "--split",
        "test",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    evaluate.main(words)
    assert capsys.readouterr().out == "evaluate: base 0.0 % · sft 0.0 % (n = 4)\n"
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["models"]) == ["base", "sft"]
    assert metrics["dataset"] == {"n": 4, "sources": ["synthetic_arithmetic"]}
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 8
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["sft_correct"] == 0
    evaluate.main(words)
    assert "nothing to do" in capsys.readouterr().out
