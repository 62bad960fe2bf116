"""Every kind of adapter that PEFT has trains as with TRL, and saves at each step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from trl import SFTConfig, SFTTrainer

from tests.trainer import tiny
from tests.trainer.conftest import logged
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

TARGETS = ["q_proj", "v_proj"]
OUTPUT = ["o_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "target_modules": TARGETS},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2, "target_modules": TARGETS},
    "IA3": {"target_modules": TARGETS, "feedforward_modules": []},
    "VERA": {"r": 4, "target_modules": OUTPUT},
    "LOKR": {"r": 4, "target_modules": TARGETS},
    "LOHA": {"r": 4, "target_modules": TARGETS},
    "OFT": {"oft_block_size": 2, "target_modules": ["q_proj"]},
    "BOFT": {"boft_block_size": 2, "target_modules": ["q_proj"]},
    "HRA": {"r": 4, "target_modules": TARGETS},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 2, "topk": 2, "target_modules": TARGETS},
    "FOURIERFT": {"n_frequency": 4, "target_modules": TARGETS},
    "RANDLORA": {"r": 2, "target_modules": OUTPUT},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4, "target_modules": TARGETS},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [65, 258]},
    "C3A": {"block_size": 2, "target_modules": OUTPUT},
    "SHIRA": {"r": 2, "target_modules": OUTPUT},
}
EMBEDDING = {"r": 4, "target_modules": [*TARGETS, "embed_tokens"]}
KINDS = {**{name: (name, settings) for name, settings in SETTINGS.items()}, "embedding": ("LORA", EMBEDDING)}


def make_config(kind: str, settings: dict[str, Any]) -> Any:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    return config_class(task_type="CAUSAL_LM", **copy.deepcopy(settings))


ALWAYS = ("LORA", "VERA", "HRA", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "TRAINABLE_TOKENS", "embedding")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in KINDS]
)
def test_it_trains_and_saves_as_with_trl(fit: Callable[..., Any], store: Path, name: str) -> None:
    if KINDS[name][0] not in PeftType.__members__:
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    options = {"save_strategy": "steps", "save_steps": 1, "report_to": "none"}
    runs = [
        fit(trainer_class, config_class, peft_config=make_config(*KINDS[name]), **options)
        for trainer_class, config_class in ((SFTTrainer, SFTConfig), (ReasoningSFTTrainer, ReasoningSFTConfig))
    ]
    for metric in ("loss", "grad_norm", "mean_token_accuracy"):
        assert logged(runs[1], metric) == pytest.approx(logged(runs[0], metric), rel=1e-5), metric
    checkpoint = Path(runs[1].args.output_dir, "checkpoint-2")
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert "adapter |" in (checkpoint.parent / "README.md").read_text()


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "TRAINABLE_TOKENS", "embedding"])
def test_it_is_distilled(fit: Callable[..., Any], store: Path, name: str) -> None:
    trainer = fit(
        TopKDistillTrainer, TopKDistillConfig, peft_config=make_config(*KINDS[name]), teacher_logits=str(store), kd_top_k=4,
        kd_warmup_ratio=0.0, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert min(logged(trainer, "kd_loss")) > 0
    assert min(logged(trainer, "grad_norm")) > 0


def test_a_prompt_that_cannot_be_switched_off_is_no_reference(fit: Callable[..., Any]) -> None:
    loaded: list[Any] = []

    class Watched(ReasoningSFTTrainer):
        def prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            loaded.append(args)
            return super().prepare_dataset(*args, **kwargs)

    config = make_config("PROMPT_TUNING", SETTINGS["PROMPT_TUNING"])
    with pytest.raises(ValueError, match=r"PROMPT_TUNING: learned prompts .* cannot be switched off"):
        fit(Watched, ReasoningSFTConfig, peft_config=config, use_kl_regularization=True)
    assert not loaded


UNTRAINABLE = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "CPT": {},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "POLY": {"target_modules": OUTPUT},
    "SHADOW": {"target_modules": OUTPUT},
    "XLORA": {"hidden_size": 32, "adapters": {}},
}


@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_what_trl_cannot_train_is_refused_before_anything_loads(tmp_path: Path, kind: str) -> None:
    if kind not in PeftType.__members__:
        pytest.skip(f"PEFT {peft.__version__} has no {kind}")
    args = ReasoningSFTConfig(str(tmp_path), bf16=False, use_cpu=True)
    config = make_config(kind, UNTRAINABLE[kind])
    with pytest.raises(ValueError, match=f"of the kind {kind}: it "):
        ReasoningSFTTrainer("no/such-model", args, train_dataset=tiny.make_dataset(), peft_config=config)
