"""The stages `capture`, `align` and `store` from their command lines, on a small real model and on a server of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.teacher.prompt_server import MODEL_NAME, prompt_server
from tests.teacher.tiny import make_model, make_tokenizer
from trl_reasoning_distill.scripts.capture import main as capture
from trl_reasoning_distill.scripts.store import main as store_command
from trl_reasoning_distill.teacher.store import TopKStore

ROWS = [{"prompt": f"{n} and {n}: ", "completion": f"it is {2 * n}."} for n in range(9)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def dataset(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(dataset: Path, output: Path, *options: str) -> TopKStore:
    capture(["--dataset", str(dataset), "--output_dir", str(output), "--store_top_k", "8", *options])
    return TopKStore.open(output)


def test_server_store_holds_what_the_teachers_own_holds(teacher, dataset, tmp_path, capsys):
    """The same ids and log-probs as in this process, at T = 1; the server may move between two goes."""
    own = run(dataset, tmp_path / "own", "--teacher", str(teacher))
    assert own.temperatures == (1.0, 2.0)
    options = [
        "--teacher",
        MODEL_NAME,
        "--engine",
        "openai",
        "--teacher_tokenizer",
        str(teacher),
        "--encoding",
        "lossless",
    ]
    for _ in range(2):  # the second go finds all done, at another address
        with prompt_server(make_model(), make_tokenizer()) as server:
            told = run(dataset, tmp_path / "told", *options, "--base_url", server.url)
    assert told.temperatures == (1.0,)
    assert told.tokenizer_name == str(teacher)
    assert told.fingerprint["engine"] == "openai"
    assert told.fingerprint["reader"] == {"protocol": "prompt_logprobs", "precision": "float32 logits"}
    assert server.url not in (tmp_path / "told" / "store" / "manifest.json").read_text()
    one, other = (store.read(np.arange(len(own))) for store in (own, told))
    kept = other.ids >= 0  # a server spends places on ids that pad the embedding
    assert kept.mean() > 0.8
    assert (one.ids[kept] == other.ids[kept]).all()
    np.testing.assert_allclose(one.log_probs[kept], other.log_probs[kept], atol=0.07)
    assert "Top-8 at T = 1 " in capsys.readouterr().out


def test_audit_of_a_server_store_asks_the_server_or_the_model(teacher, dataset, tmp_path, capsys):
    with prompt_server(make_model(), make_tokenizer()) as server:
        address = ["--base_url", server.url]
        run(
            dataset,
            tmp_path / "told",
            "--teacher",
            MODEL_NAME,
            "--engine",
            "openai",
            "--teacher_tokenizer",
            str(teacher),
            *address,
        )
        capsys.readouterr()
        store_command(["audit", str(tmp_path / "told"), *address])
    assert "most likely token is the stored one: 100.00%" in capsys.readouterr().out
    store_command(["audit", str(tmp_path / "told"), "--teacher", str(teacher)])
    assert "most likely token is the stored one: 100.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "tgi"], "--engine: invalid choice: 'tgi' (choose from 'transformers', 'openai')"),
        (["--base_url", "http://x"], "base_url='http://x' means nothing to the 'transformers' engine"),
        (["--engine", "openai", "--quantization", "4bit"], "quantization='4bit' means nothing to the 'openai' engine"),
    ],
)
def test_options_of_another_engine_are_refused(dataset, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        run(dataset, tmp_path / "out", "--teacher", "m", *options)
    assert message in capsys.readouterr().err


def test_server_is_not_asked_for_what_it_cannot_tell(teacher, dataset, tmp_path, capsys):
    with prompt_server(make_model(), make_tokenizer()) as server:
        options = [
            "--teacher",
            MODEL_NAME,
            "--engine",
            "openai",
            "--teacher_tokenizer",
            str(teacher),
            "--base_url",
            server.url,
        ]
        with pytest.raises(SystemExit):
            run(dataset, tmp_path / "out", *options, "--temperatures", "1", "2")
        assert "a server tells log-probabilities at T = 1 only" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            run(dataset, tmp_path / "other", *options, "--store_top_k", "25")
        said = capsys.readouterr().err
        assert f"{server.url} gives 20 log-probabilities per token, top_k = 25" in said
        assert "--max-logprobs 25" in said
