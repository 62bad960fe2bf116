"""What SFTConfig and TRL offer still works with our loss: 4-bit models, Liger's layers, vision models, experts, the hub."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from tests.trainer import tiny
from tests.trainer.conftest import PLAIN, logged, weights
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def test_four_bit_base_with_an_adapter(tmp_path: Path, tokenizer: Any, store: Path) -> None:
    """QLoRA as the recipes set it: NF4, double quantisation, float32 compute on a CPU; KD, and KL to the 4-bit base."""
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "student"
    tiny.make_model(hidden_size=64, intermediate_size=64).save_pretrained(path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    options = {**PLAIN, "output_dir": str(tmp_path / "out"), "model_init_kwargs": {"dtype": "float32"}, "max_steps": 6}
    common = {"train_dataset": tiny.make_dataset(), "processing_class": tokenizer, "quantization_config": quantization}

    def fit(trainer_class: type, config_class: type, **extra: Any) -> Any:
        config = config_class(**{**options, "learning_rate": 1.0, **extra})
        trainer = trainer_class(str(path), args=config, peft_config=LoraConfig(**LORA), **common)
        trainer.train()
        return trainer

    stock, ours = fit(SFTTrainer, SFTConfig), fit(ReasoningSFTTrainer, ReasoningSFTConfig)
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
    distilled = fit(
        TopKDistillTrainer, TopKDistillConfig, teacher_logits=str(store), kd_top_k=6, kd_weight=5.0, use_kl_regularization=True
    )  # fmt: skip
    kinds = {type(parameter).__name__ for parameter in distilled.model.parameters() if not parameter.requires_grad}
    assert "Params4bit" in kinds
    divergence = logged(distilled, "kl_loss")
    assert min(logged(distilled, "grad_norm")) > 0
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[-1] > 1e-5


@pytest.mark.filterwarnings("ignore:.use_liger_kernel:FutureWarning")
def test_ligers_layers_leave_our_forward_alone(
    fit: Callable[..., Any], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger needs a GPU; here a stand-in patches as it does, when training starts, so after ours."""
    seen: list[dict[str, Any]] = []

    def apply(model: Any, **options: Any) -> None:
        seen.append(options)
        if options.get("fused_linear_cross_entropy", True):
            model.forward = lambda **_: pytest.fail("Liger's own loss took the place of ours")

    liger = types.ModuleType("liger_kernel.transformers")
    liger._apply_liger_kernel_to_instance = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    options = {"teacher_logits": str(store), "kd_top_k": 6}
    patched = fit(TopKDistillTrainer, TopKDistillConfig, use_liger_kernel=True, **options)
    assert [entry["fused_linear_cross_entropy"] for entry in seen] == [False]
    torch.testing.assert_close(
        weights(patched), weights(fit(TopKDistillTrainer, TopKDistillConfig, **options)), rtol=0, atol=0
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.use_liger_kernel:FutureWarning")
def test_ligers_layers_on_a_gpu(fit: Callable[..., Any], store: Path) -> None:
    pytest.importorskip("liger_kernel")
    options = {"teacher_logits": str(store), "kd_top_k": 6, "use_cpu": False, "kd_warmup_ratio": 0.0}
    runs = [fit(TopKDistillTrainer, TopKDistillConfig, use_liger_kernel=on, **options) for on in (False, True)]
    for name in ("loss", "kd_loss"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-3), name


def make_vision_model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=256,
        bos_token_id=None, eos_token_id=258,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=261, vision_feature_layer=-1, image_seq_length=4)
    )  # fmt: skip


def make_processor() -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = tiny.CHAT_TEMPLATE.replace(
        "{{- message['content'] +",
        "{%- if message['content'] is not string and message['content'][0]['type'] == 'image' -%}<image>{%- endif -%}"
        "{{- (message['content'] if message['content'] is string else message['content'][-1]['text']) +",
    )
    assert template != tiny.CHAT_TEMPLATE
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def make_pictures() -> Dataset:
    from PIL import Image

    rows = zip(tiny.make_rows(), (Image.new("RGB", (8, 8), (30 * number, 0, 0)) for number in range(8)), strict=True)
    return Dataset.from_list([{**row, "image": image} for row, image in rows])


@pytest.mark.parametrize("pictures", [False, True], ids=["text", "images"])
def test_vision_model_equals_trl(tmp_path: Path, pictures: bool) -> None:
    pytest.importorskip("PIL")
    settings = {**PLAIN, "output_dir": str(tmp_path), "max_length": None, "remove_unused_columns": not pictures}
    runs = []
    for trainer_class, config_class in ((SFTTrainer, SFTConfig), (ReasoningSFTTrainer, ReasoningSFTConfig)):
        dataset = make_pictures() if pictures else tiny.make_dataset()
        config = config_class(**settings)
        trainer = trainer_class(
            make_vision_model(), args=config, train_dataset=dataset, processing_class=make_processor()
        )
        trainer.train()
        runs.append(trainer)
    for name in ("loss", "grad_norm", "mean_token_accuracy"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-6), name
    torch.testing.assert_close(weights(runs[1]), weights(runs[0]), rtol=0, atol=1e-6)


def test_vision_model_is_distilled_on_text_and_not_on_images(tmp_path: Path, teacher: Any) -> None:
    pytest.importorskip("PIL")
    processor = make_processor()
    tokenizer = processor.tokenizer
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    store = tiny.make_store(tmp_path / "store", teacher, tokenizer, tiny.make_rows())
    config = TopKDistillConfig(
        **{**PLAIN, "output_dir": str(tmp_path), "teacher_logits": str(store), "kd_top_k": 6, "kd_weight": 1.0, "max_steps": 6}
    )  # fmt: skip
    trainer = TopKDistillTrainer(
        make_vision_model(), args=config, train_dataset=tiny.make_dataset(), processing_class=processor
    )
    trainer.train()
    losses = logged(trainer, "kd_loss")
    assert losses[-1] < losses[0]
    config.remove_unused_columns, config.max_length = False, None
    with pytest.raises(ValueError, match=r"holds images.*kd_index.*cannot follow the tokens. Use text only"):
        TopKDistillTrainer(
            make_vision_model(), args=config, train_dataset=make_pictures(), processing_class=make_processor()
        )


def test_auxiliary_loss_of_experts_is_added_to_distillation(fit: Callable[..., Any], store: Path) -> None:
    def make() -> MixtralForCausalLM:
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1, pad_token_id=256,
                bos_token_id=None, eos_token_id=258,
            )
        )  # fmt: skip

    options = {"teacher_logits": str(store), "kd_top_k": 6, "kd_warmup_ratio": 0.0, "max_steps": 1}
    trainer = fit(TopKDistillTrainer, TopKDistillConfig, model=make(), **options)
    loss, nll, kd, aux = (logged(trainer, name)[0] for name in ("loss", "sft_loss", "kd_loss", "aux_loss"))
    assert aux > 0
    assert loss == pytest.approx(nll + 0.35 * kd + 0.1 * aux, rel=1e-6)


def test_hub_arguments_reach_the_hub(fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, dict[str, Any]] = {}

    def create_repo(repo_id: str, **options: Any) -> Any:
        calls["create_repo"] = {"repo_id": repo_id, **options}
        return types.SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(**options: Any) -> Any:
        calls["upload_folder"] = {**options, "files": {path.name for path in Path(options["folder_path"]).iterdir()}}
        return types.SimpleNamespace(done=lambda: True)

    hub = types.SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = fit(
        ReasoningSFTTrainer, ReasoningSFTConfig, max_steps=1, push_to_hub=True, hub_model_id="reasoner", hub_private_repo=True,
        hub_token="hf_secret", output_dir=str(tmp_path / "hub"),
    )  # fmt: skip
    trainer.push_to_hub(commit_message="Trained")
    assert calls["create_repo"]["repo_id"] == "reasoner"
    assert calls["create_repo"]["private"] is True
    upload = calls["upload_folder"]
    assert (upload["repo_id"], upload["commit_message"], upload["token"]) == ("me/reasoner", "Trained", "hf_secret")
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= upload["files"]
    assert "hf_secret" not in "".join(
        path.read_text(errors="replace") for path in (tmp_path / "hub").rglob("*") if path.suffix in {".json", ".md"}
    )
