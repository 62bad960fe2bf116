"""The generate and evaluate stages: YAML and command line say the same, and a second run does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.teacher import tiny
from trl_reasoning_distill.data.files import write_jsonl
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
    assert {name: spec.model for name, spec in evaluate.parse_models(options.models).items()} == {
        "base": "m/a",
        "distilled": "m/b",
    }
    assert source.source_options == {"data_dir": "x"}
    words = ["--config", str(config), "--models", "sft=m=c/d", "--source_options", '{"data_dir": "y"}']
    options, source, *_ = parse_stage(evaluate.make_parser(), words)
    assert evaluate.parse_models(options.models)["sft"].model == "m=c/d"
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
        (generate, [], "teacher and source are missing"),
        (generate, ["--teacher", "m"], "source is missing"),
        (generate, ["--teacher", "m", "--source", "s", "--response_format", "thimk"], "Did you mean 'think'"),
        (generate, ["--teacher", "m", "--source", "s", "--temperature", "-1"], "temperature=-1"),
        (generate, ["--teacher", "m", "--source", "s", "--engine", "tgi"], "engine='tgi'"),
        (evaluate, ["--source", "s"], "models is missing"),
        (evaluate, ["--source", "s", "--models", "a=m", "--export", "helm"], "there are lm-eval, lighteval"),
        (evaluate, ["--source", "s", "--models", 'a={"model": "m", "dtyp": 1}'], "unknown options ['dtyp']"),
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
        "--teacher",
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
    assert manifest["inputs"]["teacher"]["hash"]
    traces = (tmp_path / "out" / "traces.jsonl").read_bytes()
    generate.main([*words, "--max_batch_size", "3"])
    assert "nothing to do" in capsys.readouterr().out
    generate.main([*words, "--max_batch_size", "3", "--overwrite"])
    assert (tmp_path / "out" / "traces.jsonl").read_bytes() == traces


def test_generate_shows_examples_of_a_source_and_says_what_it_cost(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = tmp_path / "examples.jsonl"
    write_jsonl(
        examples, [{"question": f"{i}+1?", "answer": str(i + 1), "solution": f"{i}+1={i + 1}"} for i in range(6)]
    )
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", [{"question": "2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}])
    words = [
        "--teacher",
        str(model),
        "--source",
        "gsm8k",
        "--split",
        "test",
        "--data_dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    words += ["--response_format", "source", "--few_shot", str(examples), "--max_new_tokens", "4"]
    generate.main([*words, "--num_few_shot", "2", "--dry_run", "--output_dir", "out"])
    shown = capsys.readouterr().out
    assert shown.count("assistant⟦") == 2
    assert "\n#### " in shown, "GSM8K's own format"
    output = tmp_path / "out"
    generate.main([*words, "--input_price", "1e4", "--output_price", "2e6", "--output_dir", str(output)])
    manifest = json.loads((output / "manifest.json").read_text())
    counts = manifest["counts"]
    assert manifest["config"]["response_format"] == "gsm8k"
    assert counts["cost"] == pytest.approx((1e4 * counts["prompt_tokens"] + 2e6 * counts["tokens"]) / 1e6)
    assert f"cost {counts['cost']:,.2f}" in manifest["result"]
    for wrong in (
        ["--num_few_shot", "0"],
        ["--input_price", "-1"],
        ["--source", "synthetic_arithmetic", "--limit", "1"],
    ):
        with pytest.raises(SystemExit):
            generate.main([*words, *wrong, "--output_dir", str(tmp_path / "other")])


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
        "--export",
        "lm-eval",
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
    assert len(list((tmp_path / "out" / "export" / "lm-eval").glob("*/results_*.json"))) == 2
    evaluate.main([*words, "--export", "lighteval"])
    assert "nothing to do" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "export" / "lighteval" / "results").glob("*/results_*.json"))) == 2


def test_evaluate_draws_several_answers_and_gives_models_options_of_their_own(tmp_path: Path, model: Path) -> None:
    spec = json.dumps({"model": str(model), "max_batch_size": 2})
    words = [
        "--models",
        f"base={spec}",
        "--num_samples",
        "2",
        "--temperature",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    evaluate.main([*SYNTHETIC, *words])
    base = json.loads((tmp_path / "out" / "metrics.json").read_text())["models"]["base"]
    assert (base["n"], base["samples"], list(base["pass_at_k"])) == (4, 2, ["1", "2"])
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    written = [
        row for row in predictions if row["num_tokens"]
    ]  # one prompt fills the model's context, and leaves no room for an answer
    assert base["calibration"]["n"] == len(written) - base["undecided"] == 6
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["models"] == {"base": {"max_batch_size": 2}}
    assert manifest["inputs"]["models.base"]["hash"]
