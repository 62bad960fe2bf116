"""A merged model serves what base and adapter serve together, also where tied layers were trained apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer import tiny
from trl_reasoning_distill.trainer.config import LORA_PRESETS, StudentConfig
from trl_reasoning_distill.trainer.merging import merge_adapter

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """`adapter(tied=…, **lora)`: the folder of an adapter whose weights are not zero, and the logits it serves on its base."""

    def make(*, tied: bool = False, **lora: Any) -> tuple[Path, torch.Tensor]:
        tiny.make_model(tied=tied).save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **lora)
        model = get_peft_model(base, config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            logits = model(IDS).logits
        model.save_pretrained(tmp_path / "adapter")
        tiny.make_tokenizer().save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits

    return make


@pytest.mark.parametrize(
    ("tied", "lora"),
    [
        (False, {}),
        (True, {}),
        (False, {"modules_to_save": ["lm_head"]}),
        (True, {"modules_to_save": ["lm_head"]}),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, {"trainable_token_indices": {"embed_tokens": [5, 7], "lm_head": [5, 7]}}),
        (True, {"trainable_token_indices": {"embed_tokens": [5, 7]}}),
        (False, {"use_dora": True}),
    ],
)
def test_base_and_adapter_merged_serve_the_same(
    adapter: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path, tied: bool, lora: dict[str, Any]
) -> None:
    path, expected = adapter(tied=tied, **lora)
    with torch.no_grad():
        if "use_dora" not in lora:  # transformers 5.23 loads a DoRA adapter without an error, and serves other logits
            loaded = AutoModelForCausalLM.from_pretrained(path).eval()(IDS).logits
            torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)
        merge_adapter(path, tmp_path / "merged")
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tiny.CHAT_TEMPLATE
    parted = tied and "modules_to_save" in lora
    assert merged.config.tie_word_embeddings == (tied and not parted)


def test_the_dtype_is_the_one_asked_for(adapter: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    path, _ = adapter()
    merge_adapter(path, tmp_path / "merged", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    merge_adapter(path, tmp_path / "merged", dtype="auto")  # an earlier one is replaced
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.float32


def test_a_quantised_base_is_refused(
    adapter: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = adapter()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.config.quantization_config = {"quant_method": "bitsandbytes"}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: base)
    with pytest.raises(ValueError, match="is stored quantised"):
        merge_adapter(path, tmp_path / "merged")


def test_presets_are_the_recipes_and_explicit_keys_win() -> None:
    cot, tinyllama = StudentConfig(lora_preset="cot_lora"), StudentConfig(lora_preset="tinyllama", lora_r=4)
    assert (cot.use_peft, cot.lora_r, cot.lora_alpha, cot.lora_dropout) == (True, 8, 16, 0.05)
    assert cot.lora_target_modules is not None
    assert len(cot.lora_target_modules) == 6
    assert (tinyllama.lora_r, tinyllama.lora_alpha, tinyllama.lora_dropout) == (4, 64, 0.1)
    assert tinyllama.lora_target_modules == LORA_PRESETS["tinyllama"]["lora_target_modules"]
    plain = StudentConfig()
    assert (plain.use_peft, plain.lora_r, plain.lora_alpha, plain.lora_dropout) == (False, 16, 32, 0.05)
    assert StudentConfig(lora_preset="cot_lora", lora_target_modules=["q_proj"]).lora_target_modules == "q_proj"


def test_what_needs_an_adapter_says_so() -> None:
    with pytest.raises(ValueError, match="Did you mean 'tinyllama'"):
        StudentConfig(lora_preset="tinyllma")
    with pytest.raises(ValueError, match="set use_peft"):
        StudentConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="merges an adapter into its base"):
        StudentConfig(merge=True)
