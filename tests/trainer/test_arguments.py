"""What SFTTrainer takes, ours take: arguments by position, other configurations, columns, transforms; nothing is without effect in silence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.trainer import tiny
from tests.trainer.conftest import PLAIN, logged, weights
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig, convert_config
from trl_reasoning_distill.trainer.gkd.base import GKDConfig
from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

# Arguments and configurations


@pytest.mark.parametrize("trainer_class", [ReasoningSFTTrainer, TopKDistillTrainer])
def test_arguments_are_those_of_sft_by_position_and_in_the_signature(
    tmp_path: Path, tokenizer: Any, store: Path, trainer_class: Any
) -> None:
    assert list(inspect.signature(trainer_class).parameters) == list(inspect.signature(SFTTrainer).parameters)
    extra = {"teacher_logits": str(store), "kd_top_k": 4} if trainer_class is TopKDistillTrainer else {}
    args = trainer_class.config_class(**{**PLAIN, "output_dir": str(tmp_path), "max_steps": 1, **extra})
    trainer = trainer_class(tiny.make_model(), args, None, tiny.make_dataset(), tiny.make_dataset(2), tokenizer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(TypeError, match="unexpected keyword argument 'train_datasets'"):
        trainer_class(tiny.make_model(), args, train_datasets=tiny.make_dataset())


@pytest.mark.parametrize("config_class", [SFTConfig, TrainingArguments])
def test_other_configurations_are_converted(fit: Callable[..., Any], config_class: type, tmp_path: Path) -> None:
    options = {"hub_token": "hf_secret", "lr_scheduler_kwargs": {}, "accelerator_config": {"split_batches": True}}
    given = config_class(**{**PLAIN, "output_dir": str(tmp_path), **options})
    trainer = fit(ReasoningSFTTrainer, lambda **_: given)
    assert type(trainer.args) is ReasoningSFTConfig
    changed = [name for name, value in vars(given).items() if getattr(trainer.args, name) != value]
    assert set(changed) <= {"pad_token", "distributed_state", "_n_gpu", "include_num_input_tokens_seen"}, changed
    assert weights(trainer).equal(weights(fit(ReasoningSFTTrainer, ReasoningSFTConfig)))


def test_a_configuration_that_says_too_much_or_too_little_is_refused(tmp_path: Path) -> None:
    plain = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    with pytest.raises(ValueError, match=r"needs a TopKDistillConfig, found SFTConfig. `teacher_logits=None`"):
        convert_config(SFTConfig(**plain), TopKDistillConfig)
    with pytest.raises(ValueError, match=r"needs a ReasoningSFTConfig, which has no .*lmbda.*; found GKDConfig"):
        convert_config(GKDConfig(**plain), ReasoningSFTConfig)
    with pytest.raises(ValueError, match="needs a ReasoningSFTConfig, found dict"):
        convert_config(plain, ReasoningSFTConfig)


# Rows


def prepared(trainer: Any) -> list[tuple[list[int], list[int]]]:
    rows = trainer.train_dataset
    return list(zip(rows["input_ids"], rows["labels"], strict=True))


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 40},
        {"max_length": 25},  # whole completions are cut away
        {"max_length": 1},
        {"max_length": 40, "truncation_mode": "keep_end"},
        {"max_length": 30, "packing": True},
        {"max_length": 12, "packing": True, "packing_strategy": "wrapped"},
        {"max_length": None},
    ],
)
@pytest.mark.parametrize("kind", ["prompts", "text", "empty"])
def test_truncated_rows_are_trls_very_rows(fit: Callable[..., Any], options: dict[str, Any], kind: str) -> None:
    rows = tiny.make_rows()
    if kind == "text":
        rows = [{"text": row["prompt"][0]["content"] * (number + 1)} for number, row in enumerate(rows)]
    if kind == "empty":
        rows = [{"input_ids": [65] * 50, "labels": [-100] * (49 - 6 * n) + [65] * (6 * n + 1)} for n in range(8)]
        rows.append({"input_ids": [65] * 9, "labels": [-100] * 9})
    dataset = Dataset.from_list(rows)
    common = {"dataset": dataset, "train": False, **options}
    ours = {"overlong": "truncate", "malformed_thoughts": "train"}
    expected = prepared(fit(SFTTrainer, SFTConfig, **common))
    if expected:
        assert prepared(fit(ReasoningSFTTrainer, ReasoningSFTConfig, **common, **ours)) == expected
    else:
        with pytest.raises(ValueError, match="None of"):
            fit(ReasoningSFTTrainer, ReasoningSFTConfig, **common, **ours)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_truncation_mode_is_refused_where_nothing_is_cut_from_the_front(tmp_path: Path, store: Path) -> None:
    plain = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "truncation_mode": "keep_end"}
    for config_class, options, message in (
        (ReasoningSFTConfig, {}, r"no effect with `overlong='drop'`"),
        (ReasoningSFTConfig, {"overlong": "truncate", "packing": True}, "no effect with `packing`"),
        (TopKDistillConfig, {"overlong": "truncate", "teacher_logits": str(store)}, "context they were captured in"),
        (TopKGKDConfig, {"overlong": "truncate"}, "a row without its beginning"),
        (ReasoningSFTConfig, {"truncation_mode": "middle"}, "`truncation_mode='middle'`: must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            config_class(**{**plain, **options})


@pytest.mark.parametrize("distils", [False, True])
def test_unused_columns_reach_the_collator_where_they_are_kept(
    tmp_path: Path, tokenizer: Any, store: Path, distils: bool
) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    base, seen = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id), []

    def collate(examples: list[dict[str, Any]]) -> Any:
        seen.extend(example["level"] for example in examples)
        return base(examples)

    dataset = tiny.make_dataset().add_column("level", list(range(8)))
    options = {**PLAIN, "output_dir": str(tmp_path), "remove_unused_columns": False, "dataloader_pin_memory": False}
    if distils:
        args = TopKDistillConfig(**options, teacher_logits=str(store), kd_top_k=4)
        trainer: Any = TopKDistillTrainer(tiny.make_model(), args, collate, dataset, processing_class=tokenizer)
    else:
        trainer = ReasoningSFTTrainer(
            tiny.make_model(), ReasoningSFTConfig(**options), collate, dataset, processing_class=tokenizer
        )
    trainer.train()
    assert sorted(seen) == list(range(8))


def test_a_dataset_with_a_transform_is_taken_as_it_is_or_refused(fit: Callable[..., Any], tokenizer: Any) -> None:
    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = [tokenizer(text)["input_ids"] for text in batch["question"]]
        return {"input_ids": ids, "labels": ids}

    dataset = Dataset.from_list([{"question": f"{n}+{n}?"} for n in range(8)]).with_transform(transform)
    for options in ({}, {"remove_unused_columns": False}):
        with pytest.raises(ValueError, match=r"has a transform .*'skip_prepare_dataset': True"):
            fit(ReasoningSFTTrainer, ReasoningSFTConfig, dataset=dataset, **options)
    options = {
        "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    stock, ours = (
        fit(trainer_class, config_class, dataset=dataset, **options)
        for trainer_class, config_class in ((SFTTrainer, SFTConfig), (ReasoningSFTTrainer, ReasoningSFTConfig))
    )
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-6)
    with pytest.raises(ValueError, match="the rows lack loss_weight, which preparation adds"):
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, dataset=dataset, think_weight=2.0, **options)


# Saving and resuming


def test_a_model_card_never_stops_a_save(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(trainer: Any) -> Any:
        raise RuntimeError("no such fact")

    monkeypatch.setattr(ReasoningSFTTrainer, "card_sections", broken)
    trainer = fit(ReasoningSFTTrainer, ReasoningSFTConfig, save_strategy="steps", save_steps=1)
    assert (Path(trainer.args.output_dir) / "checkpoint-2" / "model.safetensors").is_file()
    assert "The model card could not be written: RuntimeError: no such fact" in caplog.text


def test_a_changed_resume_finds_the_newest_checkpoint_by_itself(fit: Callable[..., Any], tmp_path: Path) -> None:
    stock = fit(SFTTrainer, SFTConfig, save_strategy="steps", save_steps=1, max_steps=2)
    assert (tmp_path / "out" / "checkpoint-2").is_dir(), "without a manifest of ours"
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    with pytest.raises(ValueError, match="No valid checkpoint"):
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, resume_from=True, **options)
    (tmp_path / "out" / "checkpoint-9").mkdir()  # killed while it was made
    resumed = fit(ReasoningSFTTrainer, ReasoningSFTConfig, resume_from=True, allow_changed_resume=True, **options)
    assert resumed.state.global_step == 3
    assert resumed.state.log_history[:2] == stock.state.log_history[:2]


def test_deprecated_losses_are_refused_as_trl_announces_it(fit: Callable[..., Any], tmp_path: Path) -> None:
    args = ReasoningSFTConfig(str(tmp_path), bf16=False, use_cpu=True)
    message = r"`compute_loss_func` is deprecated .* will be removed in v2.0.0.*Subclass .* and override `compute_loss` instead"
    with pytest.raises(ValueError, match=message):
        ReasoningSFTTrainer(tiny.make_model(), args, train_dataset=tiny.make_dataset(), compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match=r"`label_smoothing_factor=0.1`.*will be removed in v2.0.0"):
        ReasoningSFTConfig(str(tmp_path), bf16=False, use_cpu=True, label_smoothing_factor=0.1)
