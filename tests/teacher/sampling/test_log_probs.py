"""What the transformers engine tells of a completion beside its text, and an adapter put on a given base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.teacher import tiny
from trl_reasoning_distill.teacher.sampling import EngineArguments, GenerationRequest, SamplingConfig
from trl_reasoning_distill.teacher.sampling.transformers import TransformersEngine


def ask(text: str, seed: int) -> GenerationRequest:
    return GenerationRequest(str(seed), [{"role": "user", "content": text}], seed)


@pytest.mark.parametrize("sampling", [SamplingConfig(16), SamplingConfig(16, temperature=1.5, top_k=5)])
def test_the_mean_log_prob_is_that_of_the_plain_model_whatever_chose_the_tokens(sampling: SamplingConfig) -> None:
    model, tokenizer = tiny.make_model(), tiny.make_tokenizer()
    engine = TransformersEngine(model, tokenizer, name="tiny", max_batch_size=2)
    requests = [ask("How many? " * (1 + seed), seed) for seed in range(3)]
    for request, output in engine.generate(requests, sampling):
        prompt = tokenizer(engine.render_prompt(request.messages), add_special_tokens=False)["input_ids"]
        written = tokenizer(output.text, add_special_tokens=False)["input_ids"]
        if output.finish_reason == "stop":
            written.append(tokenizer.eos_token_id)
        if len(written) != output.num_tokens:  # bytes that are no text do not survive decoding
            continue
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(written)[:, None]).mean().item()
        assert output.mean_log_prob == pytest.approx(expected, abs=1e-4)


def test_an_adapter_is_put_on_the_base_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny.make_model()
    for name in ("base", "moved"):
        model.save_pretrained(tmp_path / name)
        tiny.make_tokenizer().save_pretrained(tmp_path / name)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    arguments = EngineArguments(device="cpu", adapter=str(tmp_path / "adapter"))
    adapted = arguments.make_engine(str(tmp_path / "moved"))
    plain = EngineArguments(device="cpu").make_engine(str(tmp_path / "moved"))
    weights = [engine.model.model.layers[0].self_attn.q_proj.weight for engine in (adapted, plain)]
    assert not torch.equal(*weights)
    assert adapted.name == f"{tmp_path / 'moved'}+{tmp_path / 'adapter'}"
