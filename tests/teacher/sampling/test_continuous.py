"""Continuous batching writes what static batches write: the same texts, ends, counts and log-probabilities."""

from __future__ import annotations

import random
import types
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from tests.teacher import tiny
from trl_reasoning_distill.teacher.sampling import GenerationOutput, GenerationRequest, SamplingConfig
from trl_reasoning_distill.teacher.sampling.continuous import _SeededRequests, is_worth_while
from trl_reasoning_distill.teacher.sampling.parameters import uniforms
from trl_reasoning_distill.teacher.sampling.transformers import TransformersEngine


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


def requests(count: int) -> list[GenerationRequest]:
    texts = ["How many? " * (1 + i % 4) + str(i) for i in range(count)]
    return [GenerationRequest(str(i), [{"role": "user", "content": text}], 1000 + i) for i, text in enumerate(texts)]


def outputs(engine: TransformersEngine, batch: list[GenerationRequest], sampling: SamplingConfig) -> Any:
    return {request.key: output for request, output in engine.generate(batch, sampling)}


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(24), SamplingConfig(24, 1.3), SamplingConfig(24, 0.7, top_p=0.9, top_k=20)],
    ids=["greedy", "sampled", "warped"],
)
def test_it_writes_what_static_batches_write(model: Any, tokenizer: Any, sampling: SamplingConfig) -> None:
    batch = requests(12)
    expected = outputs(TransformersEngine(model, tokenizer, batching="static"), batch, sampling)
    engine = TransformersEngine(model, tokenizer, batching="continuous", max_batch_size=5)
    attention = model.config._attn_implementation
    found = outputs(engine, random.Random(0).sample(batch, len(batch)), sampling)
    assert found.keys() == expected.keys()
    for key, output in expected.items():
        same = found[key]
        assert (same.text, same.finish_reason, same.num_tokens, same.prompt_tokens) == (
            output.text,
            output.finish_reason,
            output.num_tokens,
            output.prompt_tokens,
        )
        if sampling.temperature == 0:
            assert same.mean_log_prob == pytest.approx(output.mean_log_prob, abs=1e-5)
        else:
            assert same.mean_log_prob is None
    assert model.config._attn_implementation == attention


def test_the_context_limits_a_long_prompt(model: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(model, tokenizer, batching="continuous")
    frame = len(
        tokenizer(engine.render_prompt([{"role": "user", "content": ""}]), add_special_tokens=False)["input_ids"]
    )
    batch = [
        GenerationRequest("long", [{"role": "user", "content": "x" * (128 - frame - 10)}]),
        GenerationRequest("too long", [{"role": "user", "content": "x" * 200}]),
    ]
    found = outputs(engine, batch, SamplingConfig(24))
    assert (found["long"].num_tokens, found["long"].finish_reason) == (10, "length")
    assert found["too long"] == GenerationOutput("", "length", 0, 200 + frame, 0.0)


def test_a_caller_that_stops_early_leaves_no_thread_behind(model: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(model, tokenizer, batching="continuous")
    answers = engine.generate(requests(6), SamplingConfig(24, 1.0))
    next(answers)
    answers.close()
    assert len(outputs(engine, requests(6), SamplingConfig(4))) == 6


def test_a_request_that_was_evicted_goes_on_with_its_own_numbers() -> None:
    processor = _SeededRequests(SamplingConfig(8, 1.0))
    expected = (uniforms(7, 8) * 2**31).astype(int).tolist()
    state = RequestState("r", [1, 2, 3], max_new_tokens=8, logit_processor_kwargs={"seed": 7})
    found = []
    for step in range(8):
        if step == 4:
            state = state.create_equivalent_initial_request()
        found.append(processor.prepare_tensor_args([FutureRequestState(state, True, {}, 1)]).item())
        state.generated_tokens.append(step)
    assert found == expected
    scores = torch.zeros(1, 100)
    processor.warpers.clear()
    drawn = processor(scores, torch.tensor([found[0]], dtype=torch.int32)).argmax().item()
    assert drawn == int(uniforms(7, 1)[0] * 100)


def test_it_is_chosen_only_where_it_pays(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not TransformersEngine(model, tokenizer).is_continuous
    assert not is_worth_while(model)
    monkeypatch.setattr("trl_reasoning_distill.teacher.sampling.continuous.is_flash_attn_2_available", lambda: True)
    on_gpu: Any = types.SimpleNamespace(device=torch.device("cuda"), _supports_flash_attn=True)
    assert is_worth_while(on_gpu)
    on_gpu.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert not is_worth_while(on_gpu)
    on_gpu.hf_device_map, on_gpu._supports_flash_attn = {"": 0}, False
    assert not is_worth_while(on_gpu)
    with pytest.raises(ValueError, match="continuous, static"):
        TransformersEngine(model, tokenizer, batching="dynamic")
