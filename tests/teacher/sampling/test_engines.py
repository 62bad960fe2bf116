"""Engines: what a request gives depends on the request alone, and ends as it says it ended."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.teacher import tiny
from trl_reasoning_distill.extras import MissingExtraError
from trl_reasoning_distill.teacher import sampling
from trl_reasoning_distill.teacher.sampling import (
    ENGINES,
    EngineArguments,
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    in_chunks,
    make_engine,
    restore_open_tag,
)
from trl_reasoning_distill.teacher.sampling.openai import OpenAIEngine
from trl_reasoning_distill.teacher.sampling.transformers import SeededSampler, TransformersEngine

SAMPLED = SamplingConfig(max_new_tokens=24, temperature=1.0)
GREEDY = SamplingConfig(max_new_tokens=24)


def ask(text: str, seed: int = 0, key: str = "q") -> GenerationRequest:
    return GenerationRequest(key, [{"role": "user", "content": text}], seed)


def requests(count: int) -> list[GenerationRequest]:
    """Prompts of many lengths, each with its own seed."""
    return [ask("How many apples? " * (1 + i % 4) + str(i), seed=1000 + i, key=str(i)) for i in range(count)]


def outputs(engine: Any, batch: list[GenerationRequest], sampling: SamplingConfig) -> dict[str, GenerationOutput]:
    found = {
        request.key: dataclasses.replace(output, seconds=0.0, mean_log_prob=None)
        for request, output in engine.generate(batch, sampling)
    }
    assert len(found) == len(batch)
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def engine(model: Any, tokenizer: Any) -> TransformersEngine:
    return TransformersEngine(model, tokenizer, name="tiny")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# --- settings ---


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        SamplingConfig(**{setting: value})


def test_an_unknown_engine_or_option_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="transformers, vllm, openai"):
        make_engine("tgi", "m")
    with pytest.raises(ValueError, match=r"no option 'concurrency'.*max_batch_size"):
        make_engine("transformers", "m", concurrency=3)
    with pytest.raises(ValueError, match="base_url='http://x' means nothing to the 'transformers' engine"):
        EngineArguments(base_url="http://x").make_engine("m")
    with pytest.raises(ValueError, match="must be one of 'transformers'"):
        EngineArguments(engine="tgi")


def test_a_file_and_a_line_in_the_table_make_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parrot.py").write_text(
        "from trl_reasoning_distill.teacher.sampling import GenerationOutput\n\n\n"
        "class Parrot:\n"
        "    def __init__(self, model, *, dtype='auto'):\n"
        "        self.name, self.dtype = model, dtype\n\n"
        "    def generate(self, requests, sampling):\n"
        "        for request in requests:\n"
        "            yield request, GenerationOutput(request.messages[-1]['content'], 'stop', 0, 0, 0.0)\n"
    )
    monkeypatch.setattr(sampling, "__path__", [*sampling.__path__, str(tmp_path)])
    monkeypatch.setitem(ENGINES, "parrot", "Parrot")
    parrot = EngineArguments(engine="parrot", dtype="float32").make_engine("polly")
    assert (parrot.name, parrot.dtype) == ("polly", "float32")
    ((_, output),) = parrot.generate([ask("Hello?")], GREEDY)
    assert output.text == "Hello?"
    with pytest.raises(ValueError, match=r"concurrency=3 means nothing to the 'parrot' engine"):
        EngineArguments(engine="parrot", concurrency=3).make_engine("polly")


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No model could be loaded from") as error:
        make_engine("transformers", str(tmp_path / "nothing"), device="cpu")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="dtype='int3': choose one of auto"):
        make_engine("transformers", str(tmp_path), device="cpu", dtype="int3")


def test_vllm_without_its_extra_is_one_line() -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed here")
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'trl-reasoning-distill[vllm]'")):
        make_engine("vllm", "m")


# --- the sampler ---


def draw(logits: torch.Tensor, seeds: list[int], sampling: SamplingConfig) -> torch.Tensor:
    """One token for each seed, all from the same logits."""
    scores = SeededSampler(seeds, sampling, prompt_width=1)(
        torch.zeros(len(seeds), 1, dtype=torch.long), logits.expand(len(seeds), -1)
    )
    assert torch.isfinite(scores).sum(-1).eq(1).all()
    return scores.argmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, float("-inf"), 0.5]])
    counts = np.bincount(draw(logits, list(range(20_000)), SamplingConfig(1, temperature)).numpy(), minlength=6)
    expected = 20_000 * torch.softmax(logits.double() / temperature, -1)[0].numpy()
    assert counts[4] == 0
    keep = expected > 0
    assert stats.chisquare(counts[keep], expected[keep]).pvalue > 1e-3


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.log(torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]]))
    seeds = list(range(3000))
    assert set(draw(logits, seeds, SamplingConfig(1, 1.0, top_k=2)).tolist()) == {1, 3}
    assert set(draw(logits, seeds, SamplingConfig(1, 1.0, top_p=0.8)).tolist()) == {1, 2, 3}


# --- the transformers engine ---


def test_greedy_text_equals_a_plain_loop_without_cache_or_padding(
    engine: TransformersEngine, model: Any, tokenizer: Any
) -> None:
    batch = requests(9)
    found = outputs(engine, batch, GREEDY)
    for request in batch:
        ids = tokenizer(engine.render_prompt(request.messages), add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        written: list[int] = []
        while len(written) < 24 and 258 not in written:
            with torch.no_grad():
                token = model(torch.cat([ids, torch.tensor([written], dtype=torch.long)], -1)).logits[0, -1].argmax()
            written.append(int(token))
        assert found[request.key].text == tokenizer.decode(written, skip_special_tokens=True)
        assert found[request.key].num_tokens == len(written)
        assert found[request.key].prompt_tokens == ids.shape[1]


def test_sampled_text_equals_a_plain_loop_with_the_requests_own_stream(
    engine: TransformersEngine, model: Any, tokenizer: Any
) -> None:
    request = ask("How many?", seed=77)
    ids = tokenizer(engine.render_prompt(request.messages), add_special_tokens=False, return_tensors="pt")["input_ids"]
    stream = np.random.Generator(np.random.Philox(key=77)).random(24)
    written: list[int] = []
    for uniform in stream:
        with torch.no_grad():
            logits = model(torch.cat([ids, torch.tensor([written], dtype=torch.long)], -1)).logits[0, -1].double()
        cumulative = torch.softmax(logits, -1).cumsum(0)
        written.append(int((cumulative <= uniform * cumulative[-1]).sum()))
        if written[-1] == 258:
            break
    assert outputs(engine, [request], SAMPLED)["q"].text == tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize(
    "sampling", [GREEDY, SAMPLED, SamplingConfig(24, 0.7, top_p=0.9, top_k=20)], ids=["greedy", "sampled", "warped"]
)
def test_neither_batch_size_nor_order_nor_company_changes_a_text(
    model: Any, tokenizer: Any, sampling: SamplingConfig
) -> None:
    batch = requests(20)
    expected = outputs(TransformersEngine(model, tokenizer, max_batch_size=20), batch, sampling)
    assert outputs(TransformersEngine(model, tokenizer, max_batch_size=1), batch, sampling) == expected
    shuffled = random.Random(0).sample(batch, len(batch))
    assert outputs(TransformersEngine(model, tokenizer, max_batch_tokens=500), shuffled, sampling) == expected
    some = outputs(TransformersEngine(model, tokenizer, max_batch_size=3), shuffled[:7], sampling)
    assert some == {key: expected[key] for key in some}


def test_the_seed_changes_a_sampled_text_and_not_a_greedy_one(engine: TransformersEngine) -> None:
    batch = [ask("How many?", seed=seed, key=str(seed)) for seed in range(8)]
    assert len({output.text for output in outputs(engine, batch, SAMPLED).values()}) == 8
    assert len({output.text for output in outputs(engine, batch, GREEDY).values()}) == 1


def test_a_text_stops_at_its_end_token_or_says_that_it_was_cut(engine: TransformersEngine) -> None:
    found = outputs(
        engine, [ask("How many?", seed=seed, key=str(seed)) for seed in range(64)], SamplingConfig(60, 1.3)
    ).values()
    assert {output.finish_reason for output in found} == {"stop", "length"}
    for output in found:
        assert output.num_tokens == 60 if output.finish_reason == "length" else output.num_tokens <= 60
        assert "<|im_end|>" not in output.text


def test_a_stop_string_ends_its_own_row_and_no_other(engine: TransformersEngine) -> None:
    batch = requests(12)
    whole = outputs(engine, batch, SAMPLED)
    stop = next(output.text[3:5] for output in whole.values() if len(output.text) > 8)
    found = outputs(engine, batch, dataclasses.replace(SAMPLED, stop=(stop,)))
    stopped = [key for key, output in whole.items() if stop in output.text]
    assert 0 < len(stopped) < len(batch)
    for key, output in whole.items():
        if key not in stopped:
            assert found[key] == output
            continue
        assert output.text.startswith(found[key].text.partition(stop)[0])
        assert (found[key].finish_reason, found[key].text.count(stop)) == ("stop", 1)
        assert found[key].num_tokens <= output.num_tokens


def test_ranks_in_step_make_as_many_batches_whatever_their_prompts(model: Any, tokenizer: Any) -> None:
    long, short = [ask("x" * length, key=str(length)) for length in (20, 40, 90, 100)], requests(4)
    engine = TransformersEngine(model, tokenizer, max_batch_size=2, max_batch_tokens=100, in_step=True)
    sizes = [
        [len(batch) for batch in engine._batches(engine._encode(rank, SamplingConfig(8)))] for rank in (long, short)
    ]
    assert sizes == [[2, 2], [2, 2]]


def test_the_context_limits_a_long_prompt_and_only_that(engine: TransformersEngine, tokenizer: Any) -> None:
    overhead = len(
        tokenizer(engine.render_prompt([{"role": "user", "content": ""}]), add_special_tokens=False)["input_ids"]
    )
    batch = [ask("x" * (128 - overhead - 10), key="long"), ask("x" * 200, key="too long"), ask("x", key="short")]
    found = outputs(engine, batch, SamplingConfig(24))
    assert (found["long"].num_tokens, found["long"].finish_reason) == (10, "length")
    assert found["too long"] == GenerationOutput("", "length", 0, 200 + overhead, 0.0)
    assert found["short"] == outputs(engine, batch[2:], SamplingConfig(24))["short"]


def test_the_checkpoints_own_generation_settings_do_not_leak_in(engine: TransformersEngine, model: Any) -> None:
    expected = outputs(engine, requests(4), GREEDY)
    own = model.generation_config
    own.repetition_penalty = 50.0
    model.train()
    try:
        assert outputs(engine, requests(4), GREEDY) == expected
        assert model.generation_config is own
        assert model.training
    finally:
        own.repetition_penalty = None
        model.eval()


def test_a_think_tag_opened_by_the_template_is_put_back(model: Any, tokenizer: Any) -> None:
    engine = TransformersEngine(model, tokenizer, chat_template_kwargs={"thinking": True})
    assert outputs(engine, [ask("How many?")], GREEDY)["q"].text.startswith("<think>\n")
    assert restore_open_tag("a</think>b") == "<think>\na</think>b"
    assert restore_open_tag("<think>a</think>b", opened=True) == "<think>a</think>b"
    assert restore_open_tag("plain") == "plain"


def test_a_saved_model_writes_what_the_loaded_one_does(engine: TransformersEngine, model_dir: Path) -> None:
    loaded = make_engine("transformers", str(model_dir), device="cpu", dtype="float32")
    assert outputs(loaded, requests(3), SAMPLED) == outputs(engine, requests(3), SAMPLED)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # alone, and as one of several processes
def test_a_cpu_computes_in_float32_unless_told_otherwise(model_dir: Path, tmp_path: Path, device: str) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert make_engine("transformers", str(tmp_path), device=device).model.dtype == torch.float32


def test_an_adapter_folder_loads_on_its_base(
    engine: TransformersEngine, model_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = outputs(TransformersEngine(adapted.eval(), tokenizer), requests(3), GREEDY)
    assert outputs(make_engine("transformers", str(tmp_path), device="cpu"), requests(3), GREEDY) == expected
    assert outputs(engine, requests(3), GREEDY) != expected


@pytest.mark.slow
def test_four_bits_load_and_write(model_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    loaded = make_engine("transformers", str(model_dir), device="cpu", quantization="4bit", dtype="float32")
    assert any("4bit" in type(module).__name__ for module in loaded.model.modules())  # type: ignore[attr-defined]
    assert outputs(loaded, requests(2), GREEDY)["0"].num_tokens > 0


def test_a_real_pretrained_model_without_template_tells_a_story(shared_data: Path) -> None:
    with pytest.warns(UserWarning, match="no chat template"):
        stories = make_engine("transformers", str(shared_data / "models" / "stories260K"), device="cpu")
    (output,) = outputs(stories, [ask("Once upon a time, there was a little girl")], SamplingConfig(40)).values()
    assert len(set(output.text.split()) & {"was", "a", "the", "she", "to", "and"}) >= 3
    assert output.prompt_tokens > 1


def test_chunks_follow_size_and_time() -> None:
    assert list(in_chunks(iter(range(7)), size=3, seconds=60)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_chunks(iter(range(3)), size=100, seconds=0)) == [[0], [1], [2]]


# --- the vllm engine, on a stand-in for the library ---


def test_vllm_is_asked_with_a_seed_per_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: dict[str, Any] = {}

    class LLM:
        def __init__(self, **kwargs: Any) -> None:
            calls["init"] = kwargs

        def chat(self, messages: list[Any], sampling_params: list[Any], **kwargs: Any) -> list[Any]:
            calls["chat"] = kwargs
            ends = types.SimpleNamespace(text="r</think>4", finish_reason="stop", token_ids=[1, 2, 3])
            cut = types.SimpleNamespace(text="<think>r", finish_reason="length", token_ids=[1])
            calls["seeds"] = [params.seed for params in sampling_params]
            return [types.SimpleNamespace(outputs=[end], prompt_token_ids=[5, 6]) for end in (ends, cut)][
                : len(messages)
            ]

    stand_in = types.SimpleNamespace(LLM=LLM, SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)  # type: ignore[arg-type]
    engine = make_engine("vllm", str(tmp_path), quantization="4bit", tensor_parallel_size=2)
    found = outputs(engine, [ask("a", 5, "a"), ask("b", 6, "b")], SAMPLED)
    assert calls["init"]["quantization"] == "bitsandbytes"
    assert calls["init"]["tensor_parallel_size"] == 2
    assert calls["init"]["generation_config"] == "vllm"
    assert calls["seeds"] == [5, 6]
    assert found["a"] == GenerationOutput("<think>\nr</think>4", "stop", 3, 2, 0.0)
    assert found["b"] == GenerationOutput("<think>r", "length", 1, 2, 0.0)


# --- a server of transformers ---


def test_transformers_serve_writes_what_the_transformers_engine_writes(model_dir: Path, tmp_path: Path) -> None:
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason="`transformers serve` needs fastapi and uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(model_dir),
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
    ]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        remote = OpenAIEngine(str(model_dir), base_url=f"http://127.0.0.1:{port}/v1", concurrency=2)
        found = outputs(remote, requests(4), GREEDY)
        local = outputs(make_engine("transformers", str(model_dir), device="cpu", dtype="float32"), requests(4), GREEDY)
        assert {key: (o.text, o.finish_reason, o.prompt_tokens) for key, o in found.items()} == {
            key: (o.text, o.finish_reason, o.prompt_tokens) for key, o in local.items()
        }
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"transformers serve did not start: {log.read_text()[-2000:]}")
