"""A server as teacher: what it tells is what the model says, and a server that cannot tell is refused with the reason."""

from __future__ import annotations

import logging
import re
import socket
import time

import numpy as np
import pytest
import torch

from tests.teacher.prompt_server import MODEL_NAME, prompt_server
from tests.teacher.tiny import make_model, make_tokenizer
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.scoring import ServerReader, TransformersReader
from trl_reasoning_distill.teacher.scoring.probe import precision_of

ROWS = [list(f"{n} and {n} is {2 * n}.".encode()) for n in range(2, 40, 3)]
POSITIONS = [list(range(5 + n % 3, len(row))) for n, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_reader(server, tokenizer, top_k=8, **options) -> ServerReader:
    return ServerReader(server.url, MODEL_NAME, tokenizer, top_k, **{"max_retries": 2} | options)


def check_equal(told: TopKLogProbs, own: TopKLogProbs) -> None:
    """The same records, but that a server spends some of its K on ids that pad the embedding."""
    kept = told.ids >= 0
    assert kept.mean() > 0.8
    assert (kept[:, :-1] >= kept[:, 1:]).all()
    assert (told.ids[kept] == own.ids[kept]).all()
    np.testing.assert_allclose(told.log_probs[kept], own.log_probs[kept], atol=2e-6)
    assert np.isneginf(told.log_probs[~kept]).all()


@pytest.mark.parametrize("protocol", ["prompt_logprobs", "echo"])
def test_server_tells_what_the_model_says(model, tokenizer, protocol):
    """Against the reader in this process, float32 on both sides, rows in batches and out of order."""
    with prompt_server(model, tokenizer, serves=(protocol,)) as server:
        reader = make_reader(server, tokenizer, batch_tokens=50, concurrency=3)
        told = reader.read([*ROWS, ROWS[0]], [*POSITIONS, []])
        assert 1 < server.most_busy <= 3
        sent = [body["prompt"] for _, body in server.seen if body["prompt"][0] in ROWS]
    assert sorted(row for batch in sent for row in batch) == sorted(ROWS)
    assert max(map(len, sent)) > 1
    assert all(sum(map(len, batch)) <= 50 or len(batch) == 1 for batch in sent)
    expected = TransformersReader(model, tokenizer, 8, (1.0,)).read(ROWS, POSITIONS)
    for mine, own in zip(told[:-1], expected, strict=True):
        check_equal(mine, own)
        assert not mine.log_sum_exp.any()
        assert mine.temperatures == (1.0,)
    assert len(told[-1]) == 0
    assert reader.provenance == {"protocol": protocol, "precision": "float32 logits"}
    assert reader.context_length == 127


def test_ids_that_pad_the_embedding_are_left_to_the_tail(tokenizer):
    padded = make_model()
    with torch.no_grad():
        padded.lm_head.weight[260] = 3 * padded.lm_head.weight[ROWS[0][6]]  # an id that no text has, often most likely
    with prompt_server(padded, tokenizer) as server:
        (told,) = make_reader(server, tokenizer).read(ROWS[:1], POSITIONS[:1])
    assert told.ids.max() < 259
    assert (told.ids[:, -1] == -1).any()
    check_equal(told, TransformersReader(padded, tokenizer, 8, (1.0,)).read(ROWS[:1], POSITIONS[:1])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serves": ()}, "ignored `prompt_logprobs` without a word.*ignored `echo` with `logprobs` without a word.*with vLLM"),
        ({"shift": 1}, "other positions than it says.*as if it were off by one"),
        ({"shift": -1}, "other positions than it says.*or not on the token before"),
        ({"serves": ("echo",), "shift": 1}, "answers `echo` for other positions.*off by one"),
        ({"serves": ("echo",), "names": "text"}, "names tokens by their text.*return_tokens_as_token_ids"),
        ({"max_logprobs": 5}, r"gives 5 log-probabilities per token, top_k = 8.*greater than max allowed: 5.*top_k to 5.*--max-logprobs 8"),
        ({"max_logprobs": 0}, r"`prompt_logprobs`: .*\(HTTP 400\).*`echo`: .*\(HTTP 400\)"),
        ({"cap": 3}, "gives [34] log-probabilities per token, top_k = 8"),
        ({"scale": 0.25}, "no log-probabilities: 8 tokens have a mass of"),
        ({"failures": [401]}, r"refused the key \(401\).*OPENAI_API_KEY"),
        ({"failures": [500] * 9}, "HTTP 500 after 3 tries: .*try again"),
    ],
)  # fmt: skip
def test_server_that_cannot_tell_is_refused_with_its_address(model, tokenizer, options, message):
    with prompt_server(model, tokenizer, **options) as server:
        with pytest.raises(ValueError, match=message) as error:
            make_reader(server, tokenizer).read(ROWS, POSITIONS)
        assert server.url in str(error.value)
        assert "\n" not in str(error.value)


def test_other_tokenizer_is_refused(model, tokenizer):
    other = make_tokenizer()
    other.add_tokens(["know", "= 2"])
    with prompt_server(model, tokenizer) as server, pytest.raises(ValueError, match="has another tokenizer than"):
        make_reader(server, other)


def test_busy_server_is_asked_again_and_a_silent_one_given_up(model, tokenizer):
    with prompt_server(model, tokenizer, failures=[429, 503]) as server:
        reader = make_reader(server, tokenizer)
        server.options["failures"] = [429, 503]
        assert len(reader.read(ROWS, POSITIONS)) == len(ROWS)
        server.options["delay"] = 1.5
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"did not answer within 0\.3 s after 1 tries: raise request_timeout"):
            make_reader(server, tokenizer, request_timeout=0.3, max_retries=0)
        assert time.monotonic() - started < 1.4


def test_absent_server_unknown_model_and_wrong_options(model, tokenizer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match=f"{url} cannot be reached"):
        ServerReader(url, "m", tokenizer, 8, max_retries=0)
    with prompt_server(model, tokenizer) as server, pytest.raises(ValueError, match="knows no model 'other'"):
        ServerReader(server.url, "other", tokenizer, 8)
    with pytest.raises(ValueError, match=r"T = 1 only.*engine: transformers"):
        ServerReader(url, "m", tokenizer, 8, (1.0, 2.0))
    with pytest.raises(ValueError, match="at most the teacher's 259 tokens"):
        ServerReader(url, "m", tokenizer, 300)
    with pytest.raises(ValueError, match="holds a password") as error:
        ServerReader("http://me:secret@localhost/v1", "m", tokenizer, 8)
    assert "secret" not in str(error.value)


def test_key_travels_and_is_not_shown(model, tokenizer, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "very-secret")
    with caplog.at_level(logging.DEBUG), prompt_server(model, tokenizer) as server:
        reader = make_reader(server, tokenizer, api_key_env="MY_KEY")
        reader.read(ROWS, POSITIONS)
        assert {headers["Authorization"] for headers, _ in server.seen} == {"Bearer very-secret"}
    assert "very-secret" not in repr(vars(reader)) + repr(vars(reader._client)) + caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "float32 logits"),
        ({"dtype": torch.bfloat16}, "16-bit logits"),
        ({"dtype": torch.float16}, "16-bit logits"),
        ({"decimals": 4}, "rounded to 4 decimals"),
    ],
)
def test_precision_is_seen_in_the_values(model, tokenizer, options, expected):
    large = make_model()
    with torch.no_grad():
        large.lm_head.weight *= 3.0  # logits of a size that real models have
    with prompt_server(large, tokenizer, **options) as server:
        assert make_reader(server, tokenizer, 20).provenance["precision"] == expected


def test_few_values_are_not_judged():
    assert precision_of([[(1, -0.512345678), (2, -1.512345678)]]) == "float32 logits"


def test_records_at_another_temperature_say_what_to_do(model, tokenizer):
    with prompt_server(model, tokenizer) as server:
        (told,) = make_reader(server, tokenizer).read(ROWS[:1], POSITIONS[:1])
    with pytest.raises(ValueError, match=re.escape("Temperature 2 was not captured")):
        told.at_temperature(2.0)
