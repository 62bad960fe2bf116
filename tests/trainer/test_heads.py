"""The head that trainers and capture read is the model's own: equal logits, or the architecture is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests.trainer import tiny
from trl_reasoning_distill.losses.fused import FusedLoss, fused_linear_distillation_loss
from trl_reasoning_distill.losses.head import Head, body_of, prove_head
from trl_reasoning_distill.teacher.scoring.local import TransformersReader
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
from trl_reasoning_distill.trainer.head import add_head_loss
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.trl_bridge import gathered_head

SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
# Model, what its config says of the logits, and the factor and cap that this means.
TRANSFORMS: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "Llama": ({}, 1.0, None),
    "HyperCLOVAX": ({"logits_scaling": 0.125}, 0.125, None),
    "Cohere": ({"logit_scale": 0.25}, 0.25, None),
    "Granite": ({"logits_scaling": 8.0}, 0.125, None),
    "FalconH1": ({"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}, 0.5, None),
    "Gemma2": ({"final_logit_softcapping": 5.0}, 1.0, 5.0),
    "RecurrentGemma": ({"logits_soft_cap": 5.0, "lru_width": 32, "num_hidden_layers": 3}, 1.0, 5.0),
}
UNKNOWN = {"ModernBertDecoder": {}}


def make(name: str, **options: Any) -> Any:
    """A tiny model whose logits are large enough for a soft-cap to show."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=2.0)
    return model


IDS = torch.tensor([[5, 4, 9, 200, 31]])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_logits_of_trainer_and_capture_are_the_models_own(name: str) -> None:
    options, scale, softcap = TRANSFORMS[name]
    model = make(name, **options)
    own = model(input_ids=IDS).logits[0].detach()

    head = Head.of(model)
    assert (head.logit_scale, head.logit_softcap) == (scale, softcap)

    def sft(hidden: Any, head: Head, *_: Any) -> FusedLoss:
        transform = {"bias": head.bias, "logit_scale": head.logit_scale, "logit_softcap": head.logit_softcap}
        return fused_linear_distillation_loss(hidden[0, :-1], head.weight, IDS[0, 1:], **transform)

    captured = TransformersReader(model, tiny.make_tokenizer(), 8, (1.0,))
    hidden = body_of(model)(input_ids=IDS).last_hidden_state[0]
    torch.testing.assert_close(captured.head.logits(hidden), own, rtol=1e-4, atol=1e-4)

    add_head_loss(model)
    trained = model(input_ids=IDS, head_loss=sft)
    expected = torch.nn.functional.cross_entropy(own[:-1], IDS[0, 1:], reduction="none")
    torch.testing.assert_close(trained.per_token.nll, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_transform_that_no_attribute_names_is_refused_with_both_figures(fit: Callable[..., Any], name: str) -> None:
    message = rf"{name}ForCausalLM\)? does something to its logits.*is -?[\d.]+ in its own forward, but -?[\d.]+"
    with pytest.raises(ValueError, match=message):
        TransformersReader(make(name), tiny.make_tokenizer(), 8, (1.0,))
    with pytest.raises(ValueError, match=message):
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False, model=make(name))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Gemma2", {"final_logit_softcapping": None}),
        ("Cohere", {"logit_scale": 0.2}),
        ("Llama", {"logits_scaling": 3.0}),
    ],
)
def test_a_config_that_is_not_what_the_model_does_is_refused(name: str, change: dict[str, Any]) -> None:
    """Read when the model was made, and changed since; a model with small logits, whose soft-cap hardly shows in them."""
    model = make(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    prove_head(model)
    own = model.config
    model.config = copy.deepcopy(own)
    for attribute, value in change.items():
        setattr(model.config, attribute, value)
    forward = model.forward

    def with_own_config(*args: Any, **kwargs: Any) -> Any:
        read, model.config = model.config, own
        try:
            return forward(*args, **kwargs)
        finally:
            model.config = read

    model.forward = with_own_config
    with pytest.raises(ValueError, match="does something to its logits"):
        prove_head(model)


def test_the_proof_leaves_no_trace() -> None:
    model = make("Llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    prove_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not model.lm_head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_transform(dtype: torch.dtype) -> None:
    prove_head(make("Gemma2").to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        prove_head(make("Gemma2"))


def test_an_adapter_on_the_head_is_refused_and_not_left_out() -> None:
    """TRL refuses it for a student; a live teacher comes as it is."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(make("Llama"), lora).get_base_model()
    with pytest.raises(ValueError, match=r"An adapter changes the output layer.*name it in `modules_to_save`"):
        prove_head(model)
    TransformersReader(model, tiny.make_tokenizer(), 8, (1.0,))  # capture runs the layer itself


def test_a_deep_copy_computes_with_its_own_weights() -> None:
    model = make("Llama")
    add_head_loss(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    fresh = make("Llama")
    fresh.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(input_ids=IDS).logits, fresh(input_ids=IDS).logits)
    assert not torch.allclose(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with gathered_head(twin) as head:
        assert head.weight is twin.lm_head.weight
