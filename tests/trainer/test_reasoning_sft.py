"""`ReasoningSFTTrainer` is TRL's SFTTrainer to the last digit, and what it adds does what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from tests.trainer import tiny
from tests.trainer.conftest import logged, weights
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
SMALL = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 258,
}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
        pad_token_id=256,
        bos_token_id=None,
        eos_token_id=258,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize(
    ("config", "make_model"),
    [
        ({}, tiny.make_model),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, tiny.make_model),
        ({"gradient_checkpointing": True}, tiny.make_model),
        ({"packing": True, "max_length": 120, "per_device_train_batch_size": 1, "max_steps": 1}, tiny.make_model),
        ({"loss_type": "dft"}, tiny.make_model),
        ({"completion_only_loss": False}, tiny.make_model),
        ({"assistant_only_loss": True}, tiny.make_model),
        ({"average_tokens_across_devices": False}, tiny.make_model),
        ({}, lambda: tiny.make_model(tied=True)),
        ({}, mixtral),
    ],
    ids=[
        "plain",
        "accumulation",
        "checkpointing",
        "packing",
        "dft",
        "whole-row",
        "assistant-only",
        "local-count",
        "tied",
        "moe",
    ],
)
def test_equals_trl(fit: Callable[..., Any], config: dict[str, Any], make_model: Callable[[], Any]) -> None:
    stock = fit(SFTTrainer, SFTConfig, model=make_model(), eval_dataset=tiny.make_dataset(3), **config)
    ours = fit(ReasoningSFTTrainer, ReasoningSFTConfig, model=make_model(), eval_dataset=tiny.make_dataset(3), **config)
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"):
        assert logged(ours, name) == pytest.approx(logged(stock, name), rel=1e-6, abs=1e-6), name
    torch.testing.assert_close(weights(ours), weights(stock), rtol=0, atol=1e-6)
    assert ours.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-6)


def test_lora_equals_trl(fit: Callable[..., Any]) -> None:
    runs = [
        fit(trainer, config, peft_config=LoraConfig(**LORA), gradient_checkpointing=True)
        for trainer, config in ((SFTTrainer, SFTConfig), (ReasoningSFTTrainer, ReasoningSFTConfig))
    ]
    torch.testing.assert_close(weights(runs[1]), weights(runs[0]), rtol=0, atol=1e-6)
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-6)


@pytest.mark.parametrize("transform", ["softcap", "scale"])
def test_bias_and_transform_of_the_head_are_honoured(fit: Callable[..., Any], transform: str) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        if transform == "softcap":
            model: Any = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0))
        else:
            model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5))
        model.lm_head = torch.nn.Linear(32, 264)
        torch.nn.init.normal_(model.lm_head.bias)
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
        return model

    stock = fit(SFTTrainer, SFTConfig, model=make())
    ours = fit(ReasoningSFTTrainer, ReasoningSFTConfig, model=make())
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-6)
    torch.testing.assert_close(weights(ours), weights(stock), rtol=0, atol=1e-6)


def test_prompt_learning_predicts_the_same_tokens(fit: Callable[..., Any]) -> None:
    from peft import PromptTuningConfig

    runs = [
        fit(trainer, config, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        for trainer, config in ((SFTTrainer, SFTConfig), (ReasoningSFTTrainer, ReasoningSFTConfig))
    ]
    assert logged(runs[1], "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-6)


def test_overlong_rows_are_dropped_and_counted(fit: Callable[..., Any]) -> None:
    trainer = fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False, max_length=41)
    lengths = [len(row["input_ids"]) for row in fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False).train_dataset]
    report = trainer.reports["train"]
    assert report.overlong == sum(length > 41 for length in lengths) > 0
    assert report.rows == len(trainer.train_dataset) == 8 - report.overlong
    assert report.with_reasoning == report.rows
    assert report.supervised_tokens == sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    assert f"{report.overlong} too long" in str(report)


def test_truncation_is_there_for_those_who_ask(fit: Callable[..., Any]) -> None:
    trainer = fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False, max_length=34, overlong="truncate")
    assert trainer.reports["train"].truncated == 8
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {34}


def test_nothing_to_learn_is_refused(fit: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"None of 8 rows.*8 are longer than max_length=10.*Raise max_length"):
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, max_length=10)
    with pytest.raises(ValueError, match="8 have no supervised token"):
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, max_length=20, overlong="truncate")


@pytest.mark.parametrize(
    ("content", "kind"),
    [("message['content'].split('</think>')[-1]", "dropped"), ("'<think>\n' + message['content']", "doubled")],
)
def test_template_that_damages_reasoning_is_refused(
    fit: Callable[..., Any], tokenizer: Any, content: str, kind: str
) -> None:
    template = tiny.CHAT_TEMPLATE.replace(
        "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration",
        f"{{{{- {content} + '<|im_end|>' -}}}}{{%- endgeneration",
    )
    assert template != tiny.CHAT_TEMPLATE
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        with pytest.raises(ValueError, match=r"drops or doubles the reasoning of 8 of 8 rows.*chat_template_path"):
            fit(ReasoningSFTTrainer, ReasoningSFTConfig)
    finally:
        tokenizer.chat_template = kept


def test_segments_are_weighted(fit: Callable[..., Any], tokenizer: Any) -> None:
    trainer = fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False, think_weight=0.25, answer_weight=2.0)
    for row in trainer.train_dataset:
        text = dict.fromkeys((0.25, 2.0), "")
        for token, label, weight in zip(row["input_ids"], row["labels"], row["loss_weight"], strict=True):
            if label != -100:
                text[weight] += tokenizer.decode([token])
        assert text[0.25].startswith("<think>")
        assert text[0.25].endswith("</think>")
        assert text[2.0].strip().removesuffix("<|im_end|>").strip().isdigit()


def test_weights_follow_their_tokens_into_packed_rows(fit: Callable[..., Any], tokenizer: Any) -> None:
    """Packed or not, a weighted loss is the same number, over the same tokens with the same weights."""
    weighted = {"think_weight": 0.25, "answer_weight": 2.0, "max_steps": 1}
    plain = fit(ReasoningSFTTrainer, ReasoningSFTConfig, per_device_train_batch_size=8, **weighted)
    packed = fit(
        ReasoningSFTTrainer,
        ReasoningSFTConfig,
        packing=True,
        max_length=1024,
        per_device_train_batch_size=1,
        **weighted,
    )

    def pairs(trainer: Any) -> list[tuple[int, float]]:
        rows = trainer.train_dataset
        return sorted(
            (x, w) for row in rows for x, w in zip(row["labels"], row["loss_weight"], strict=True) if x != -100
        )

    assert len(packed.train_dataset) == 1
    assert pairs(packed) == pairs(plain)
    assert logged(packed, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(packed, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize(
    "question", ["What does <think> mean?", "Is </think> a tag?", "<think>x</think> 1+1?", "<think>"]
)
def test_tags_in_the_question_are_not_the_models(fit: Callable[..., Any], tokenizer: Any, question: str) -> None:
    row = tiny.make_rows(1)[0]
    dataset = Dataset.from_list([{**row, "prompt": [{"role": "user", "content": question}]}] * 4)
    trainer = fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False, dataset=dataset, think_weight=0.5)
    (first, *_) = trainer.train_dataset
    thought = [x for x, w in zip(first["labels"], first["loss_weight"], strict=True) if w == 0.5 and x != -100]
    assert tokenizer.decode(thought) == "<think>\n0+1\n</think>"
    assert trainer.reports["train"].with_reasoning == 4
    assert "a reasoning of 1 words and the answer '1'; well formed" in trainer.preview


def test_weight_zero_removes_a_segment(fit: Callable[..., Any]) -> None:
    weighted = fit(ReasoningSFTTrainer, ReasoningSFTConfig, think_weight=1.0, answer_weight=0.0, max_steps=1)
    rows = fit(ReasoningSFTTrainer, ReasoningSFTConfig, train=False, answer_weight=0.5).train_dataset
    masked = rows.map(
        lambda row: {
            "labels": [x if w == 1.0 else -100 for x, w in zip(row["labels"], row["loss_weight"], strict=True)]
        }
    ).remove_columns("loss_weight")
    alone = fit(ReasoningSFTTrainer, ReasoningSFTConfig, dataset=masked, max_steps=1)
    # One is divided by all supervised tokens, the other by those of the reasoning
    counts = [trainer.supervised_tokens_seen for trainer in (alone, weighted)]
    assert logged(weighted, "loss")[0] == pytest.approx(logged(alone, "loss")[0] * counts[0] / counts[1], rel=1e-5)


def dense_kl(student: Any, reference: Any, direction: str) -> torch.Tensor:
    """Mean KL over supervised tokens of all rows, float64, from full logits."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows_of_tokens():
        ids = torch.tensor([row["input_ids"]])
        p = student(ids).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            q = reference(ids).logits[0, :-1].log_softmax(-1)
        keep = torch.tensor(row["labels"])[1:] != -100
        p, q = (p, q) if direction == "reverse" else (q, p)
        total = total + (p.exp() * (p - q)).sum(-1)[keep].sum()
        count += int(keep.sum())
    return total / count


def rows_of_tokens() -> list[dict[str, list[int]]]:
    from trl_reasoning_distill.data.tokenization import tokenize_example

    tokenizer = tiny.make_tokenizer()
    return [vars(tokenize_example(tokenizer, row)) for row in tiny.make_rows()]


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_term_against_dense_float64(fit: Callable[..., Any], direction: str) -> None:
    student = tiny.make_model(1)
    options = {"kl_direction": direction, "per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1.0}
    trainer = fit(
        ReasoningSFTTrainer,
        ReasoningSFTConfig,
        train=False,
        model=student,
        use_kl_regularization=True,
        kl_coef=3.0,
        **options,
    )
    # Move the student away from its frozen reference, so that there is something to measure
    student.load_state_dict(tiny.make_model(2).state_dict())
    before = weights(trainer)
    trainer.train()
    plain = tiny.make_model(2)
    without = fit(ReasoningSFTTrainer, ReasoningSFTConfig, model=plain, **options)

    exact, reference = tiny.make_model(2).double(), tiny.make_model(1).double()
    expected = dense_kl(exact, reference, direction)
    expected.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()])
    assert logged(trainer, "kl_loss")[0] == pytest.approx(expected.item(), rel=1e-5)
    measured = (weights(without) - weights(trainer)) / 3.0
    assert (measured - gradient).norm() / gradient.norm() < 1e-4
    assert before.shape == measured.shape


def test_kl_to_the_adapter_switched_off(fit: Callable[..., Any]) -> None:
    trainer = fit(
        ReasoningSFTTrainer, ReasoningSFTConfig, use_kl_regularization=True, kl_coef=0.5, max_steps=3, learning_rate=1.0,
        peft_config=LoraConfig(**{**LORA, "lora_dropout": 0.1}, modules_to_save=["lm_head"]),
    )  # fmt: skip
    divergence = logged(trainer, "kl_loss")
    assert divergence[0] == pytest.approx(0, abs=1e-6)  # B is zero at first, and the reference has no dropout
    assert divergence[1] > 1e-5
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("lora" in name for name in trainable)
    assert any("modules_to_save" in name for name in trainable)
    frozen = trainer.model.get_base_model().lm_head.original_module.weight
    assert torch.equal(frozen, tiny.make_model().lm_head.weight)


def test_kl_holds_the_model_near_its_reference(fit: Callable[..., Any]) -> None:
    runs = [
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, use_kl_regularization=True, kl_coef=coefficient, max_steps=8)
        for coefficient in (0.0, 1.0)
    ]
    free, held = (logged(run, "kl_loss")[-1] for run in runs)
    assert held < 0.6 * free


def test_plain_text_is_trained_as_trl_does_and_conversations_as_their_last_reply(fit: Callable[..., Any]) -> None:
    rows = tiny.make_rows(4)
    pairs = [
        {"prompt": [{"role": "user", "content": "1+1?"}], "completion": [{"role": "assistant", "content": "2"}]}
    ] * 4
    messages = [{"messages": row["prompt"] + row["completion"]} for row in rows]
    shapes = [
        (messages, rows),
        ([{"prompt": "1+1?", "completion": "<think>\nx\n</think>\n\n2"}] * 4, None),
        ([{"text": "just text"}] * 4, None),
        ([{"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}] * 4, pairs),
    ]
    for shape, same in shapes:
        stock = fit(SFTTrainer, SFTConfig, dataset=Dataset.from_list(same or shape), max_steps=1)
        ours = fit(ReasoningSFTTrainer, ReasoningSFTConfig, dataset=Dataset.from_list(shape), max_steps=1)
        assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-6)
    whole = {"dataset": Dataset.from_list(messages), "max_steps": 1, "completion_only_loss": False}
    ours = fit(ReasoningSFTTrainer, ReasoningSFTConfig, **whole)
    assert logged(ours, "loss") == pytest.approx(logged(fit(SFTTrainer, SFTConfig, **whole), "loss"), rel=1e-6)


def test_what_cannot_be_honoured_is_refused(fit: Callable[..., Any], tmp_path: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"IterableDataset.*streaming=False"):
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, dataset=tiny.make_dataset().to_iterable_dataset())
    with pytest.raises(ValueError, match=r"compute_loss_func.*never builds"):
        ReasoningSFTTrainer(
            tiny.make_model(), ReasoningSFTConfig(str(tmp_path), bf16=False, use_cpu=True), train_dataset=tiny.make_dataset(),
            processing_class=tokenizer, compute_loss_func=lambda *_: 0,
        )  # fmt: skip


def test_weights_on_disk_are_refused_with_what_to_do(fit: Callable[..., Any]) -> None:
    model = tiny.make_model()
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"\['cpu', 'disk'\].*zero3_offload.yaml"):
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, model=model)


def test_logits_are_still_there_for_generation(fit: Callable[..., Any]) -> None:
    trainer = fit(ReasoningSFTTrainer, ReasoningSFTConfig, max_steps=1)
    output = trainer.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)
    assert output.shape == (1, 6)
