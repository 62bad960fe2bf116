"""Every causal architecture that transformers has, tiny and from its config: the head's logits are its own, or it is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from trl_reasoning_distill.losses.head import prove_head

pytestmark = pytest.mark.slow

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "num_hidden_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rotary_dim": 16,
    "default_language": "en_XX",
}
_WIDTH, _HEADS = {"hidden_size": 64, "intermediate_size": 64}, {"num_attention_heads": 4, "num_key_value_heads": 4}
# From the smallest that some can be made with to their own defaults.
_SIZES = (
    {**_COMMON, **_WIDTH, **_HEADS, "head_dim": 16, "embedding_dim": 64},
    {**_COMMON, **_WIDTH, **_HEADS, "num_hidden_layers": 8, "head_dim": 16},  # where the kinds of layers alternate
    {**_COMMON, **_WIDTH, **_HEADS},
    {**_COMMON, **_WIDTH},
    {**_COMMON, **_HEADS},
    _COMMON,
    {},
)
_MOST_PARAMETERS = 200_000_000
# What a small one of these needs besides.
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"mamba_n_heads": 8, "mamba_d_head": 16, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "GraniteMoeHybridForCausalLM": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "Mamba2ForCausalLM": {"num_heads": 8},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3, "lru_width": 64},
    "xLSTMForCausalLM": {"num_heads": 4, "num_blocks": 2, "qk_dim_factor": 1.0},
    "JambaForCausalLM": {"num_hidden_layers": 8},
    "KimiLinearForCausalLM": {"num_hidden_layers": 4},
    "RwkvForCausalLM": {"attention_hidden_size": 64},
    "AXK1ForCausalLM": {"qk_rope_head_dim": 16, "n_group": 1, "topk_group": 1},
    "DeepseekV2ForCausalLM": {"qk_rope_head_dim": 16, "n_group": 1, "topk_group": 1},
    "Dots1ForCausalLM": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
}
# Their logits are more than a linear map of their last hidden state, scaled and capped.
_REFUSED = {
    *("BertLMHeadModel", "BigBirdForCausalLM", "CamembertForCausalLM", "Data2VecTextForCausalLM", "ElectraForCausalLM"),
    *("ErnieForCausalLM", "MegatronBertForCausalLM", "ModernBertDecoderForCausalLM", "ProphetNetForCausalLM"),
    *("RemBertForCausalLM", "RoCBertForCausalLM", "RoFormerForCausalLM", "RobertaForCausalLM"),
    *("RobertaPreLayerNormForCausalLM", "XLMRobertaForCausalLM", "XLMRobertaXLForCausalLM", "XmodForCausalLM"),
}
# No small one was found, or none that runs on token ids alone on a CPU; the trainer proves these when they are given to it.
_NOT_MADE = {
    *("BltForCausalLM", "CohereCompassForCausalLM", "DbrxForCausalLM", "DeepseekV2ForCausalLM", "HrmTextForCausalLM"),
    *("Gemma3nForConditionalGeneration", "Gemma3nForCausalLM", "Gemma4AssistantForCausalLM", "Lfm2MoeForCausalLM"),
    *("Gemma4UnifiedAssistantForCausalLM", "MossTranscribeDiarizeForConditionalGeneration", "Qwen4ExpForCausalLM"),
    *("MusicgenForCausalLM", "MusicgenMelodyForCausalLM", "Phi4MultimodalForCausalLM", "Zamba2ForCausalLM"),
    "ZambaForCausalLM",
}


def _architectures() -> Iterator[Any]:
    seen = set()
    for config_class, found in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for model_class in found if isinstance(found, tuple) else (found,):
            if model_class not in seen:
                seen.add(model_class)
                yield pytest.param(model_class, model_class.config_class or config_class, id=model_class.__name__)


def _configure(config_class: Any, sizes: dict[str, Any]) -> Any:
    config = config_class()
    try:
        text = config.get_text_config()
    except ValueError:  # several
        text = config
    for name, value in sizes.items():
        try:
            if hasattr(text, name):
                setattr(text, name, value)
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            pass  # derived from another, or checked against one
    try:
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[-text.num_hidden_layers :]
    except AttributeError:
        pass
    return config


def _make(model_class: Any, config_class: Any) -> Any:
    """A small model that runs; a failure of every size raises the first of them."""
    failures: list[Exception] = []
    for sizes in _SIZES:
        torch.manual_seed(0)
        try:
            config = _configure(config_class, sizes | _OWN_SIZES.get(model_class.__name__, {}))
            with torch.device("meta"):
                parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
            if parameters > _MOST_PARAMETERS:
                raise ValueError(f"{parameters} parameters")
            model = model_class(config).eval()
            model(input_ids=torch.arange(1, 9)[None])
        except Exception as failure:  # whatever an architecture makes of sizes that are not its own
            failures.append(failure)
        else:
            return model
    raise failures[0]


@pytest.mark.parametrize(("model_class", "config_class"), _architectures())
def test_the_head_is_the_models_own_or_refused_by_name(model_class: Any, config_class: Any) -> None:
    name = model_class.__name__
    if name in _NOT_MADE:
        pytest.skip("no small model of this architecture runs on token ids alone")
    model = _make(model_class, config_class)
    if name in _REFUSED:
        with pytest.raises(ValueError, match=rf"{name}.*Please report this architecture"):
            prove_head(model)
    else:
        prove_head(model)
