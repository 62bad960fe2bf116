"""No option without effect: every field of SFTConfig and GKDConfig changes something, is refused by name, or stands in a list with its reason."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig

from tests.trainer import tiny
from tests.trainer.conftest import PLAIN, logged, weights
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
from trl_reasoning_distill.trainer.gkd.base import GKDConfig
from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer


def own_fields(config_class: Any, *bases: Any) -> set[str]:
    """Fields that a class has and its bases lack."""
    return {field.name for field in dataclasses.fields(config_class)} - {
        field.name for base in bases for field in dataclasses.fields(base)
    }


# SFTConfig's and GKDConfig's own fields: a value that is not the default, and the settings that it needs beside it

TEXT = [{"text": "a b c d e " * (n + 1)} for n in range(8)]
PROMPTED = [{"prompt": f"{n}+{n}? ", "completion": f"it is {2 * n}"} for n in range(8)]
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "router_aux_loss_coef": (0.5, {"refused": "not a Mixture-of-Experts model"}),
    "chat_template_path": ("TEMPLATE", {}),
    "dataset_text_field": ("body", {"dataset": [{"text": "aaaa bb", "body": row["text"]} for row in TEXT]}),
    "dataset_kwargs": ({"skip_prepare_dataset": True}, {"refused": "No columns in the dataset match|input_ids"}),
    "eos_token": ("<|im_start|>", {"dataset": PROMPTED}),
    "max_length": (40, {}),
    "truncation_mode": ("keep_end", {"overlong": "truncate", "max_length": 40}),
    "shuffle_dataset": (True, {"per_device_train_batch_size": 2}),
    "packing": (True, {"max_length": 200, "per_device_train_batch_size": 1}),
    "packing_strategy": ("wrapped", {"packing": True, "max_length": 60, "per_device_train_batch_size": 1}),
    "padding_free": (True, {"max_length": None}),
    "pad_to_multiple_of": (64, {}),
    "eval_packing": (True, {"max_length": 200}),
    "completion_only_loss": (False, {"dataset": PROMPTED}),
    "assistant_only_loss": (True, {"dataset": "MESSAGES"}),
    "loss_type": ("dft", {}),
    "pad_token": ("<|im_start|>", {}),
    "model_init_kwargs": ({"attn_implementation": "eager"}, {"model": "FOLDER"}),
}
WITHOUT_EFFECT = {
    "trust_remote_code": "reaches the loaders of models and tokenizers, which need code to run for an effect",
    "activation_offloading": "TRL moves activations off an accelerator, and has nothing to move on a CPU",
    "dataset_num_proc": "processes that prepare rows; the rows are the same",
}


def observe(trainer: Any) -> dict[str, Any]:
    """Whatever an option may change: rows, batches, weights, losses, and the setting of the model."""
    trainer.train()
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[0], rows[1]] if len(rows) > 1 else [rows[0]])
    return {
        "rows": [rows[index]["input_ids"] for index in range(len(rows))],
        "labels": [rows[index]["labels"] for index in range(len(rows))],
        "eval rows": len(trainer.eval_dataset),
        "batch": {name: value.shape for name, value in batch.items() if torch.is_tensor(value)},
        "loss": logged(trainer, "loss"),
        "weights": weights(trainer).tolist(),
        "attention": trainer.model.config._attn_implementation,
        "pad": trainer.processing_class.pad_token,
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`run(**settings)`: what can be observed of a training."""
    (tmp_path / "own.jinja").write_text(tiny.CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|> "), encoding="utf-8")

    def _run(**settings: Any) -> dict[str, Any]:
        tokenizer, rows = tiny.make_tokenizer(), settings.pop("dataset", tiny.make_rows())
        if rows == "MESSAGES":
            rows = [{"messages": row["prompt"] + row["completion"]} for row in tiny.make_rows()]
        model: Any = tiny.make_model()
        if settings.pop("model", None) == "FOLDER":
            model.save_pretrained(tmp_path / "student")
            tokenizer.save_pretrained(tmp_path / "student")
            model = str(tmp_path / "student")
        if settings.get("chat_template_path") == "TEMPLATE":
            settings["chat_template_path"] = str(tmp_path / "own.jinja")
        args = ReasoningSFTConfig(
            **{**PLAIN, "output_dir": str(tmp_path / "out"), "max_steps": 1, "preview_examples": 0, **settings}
        )
        dataset = Dataset.from_list(rows)
        return observe(
            ReasoningSFTTrainer(model, args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer)
        )

    return _run


def test_every_own_field_of_sft_is_in_a_table() -> None:
    assert own_fields(SFTConfig, TrainingArguments) == {*CHANGES, *WITHOUT_EFFECT}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*(pad_token|flash|padding-free):UserWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_field_of_sft_changes_something_or_is_refused(run: Callable[..., dict[str, Any]], name: str) -> None:
    value, beside = CHANGES[name]
    beside = dict(beside)
    refused = beside.pop("refused", None)
    if refused is not None:
        with pytest.raises((ValueError, KeyError), match=refused):
            run(**beside, **{name: value})
        return
    assert run(**beside, **{name: value}) != run(**beside)


GKD_CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.2, {"lmbda": 1.0}),
    "lmbda": (0.0, {"lmbda": 1.0}),
    "beta": (0.0, {"lmbda": 0.0}),
    "max_new_tokens": (2, {"lmbda": 1.0}),
    "teacher_model_name_or_path": ("TEACHER", {"lmbda": 0.0, "teacher": None}),
    "teacher_model_init_kwargs": ({"dtype": "bfloat16"}, {"lmbda": 0.0, "teacher": "TEACHER"}),
    "disable_dropout": (False, {"lmbda": 0.0, "dropout": 0.5}),
    "seq_kd": (True, {"lmbda": 0.0}),
}


def test_every_own_field_of_gkd_is_in_the_table() -> None:
    assert own_fields(GKDConfig, SFTConfig) == GKD_CHANGES.keys()


@pytest.mark.parametrize("name", GKD_CHANGES)
def test_a_field_of_gkd_changes_the_loss(tmp_path: Path, teacher: Any, name: str) -> None:
    tokenizer = tiny.make_tokenizer()
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")

    def loss(**settings: Any) -> float:
        folder, given = str(tmp_path / "teacher"), settings.pop("teacher", teacher)
        model = tiny.make_model()
        dropout = torch.nn.Dropout(settings.pop("dropout", 0.0))
        model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), dropout)
        settings = {key: folder if value == "TEACHER" else value for key, value in settings.items()}
        args = TopKGKDConfig(
            **{**PLAIN, "output_dir": str(tmp_path / "out"), "max_steps": 1, "max_new_tokens": 6, "preview_examples": 0, **settings}
        )  # fmt: skip
        trainer = TopKGKDTrainer(
            model, folder if given == "TEACHER" else given, args, train_dataset=tiny.make_dataset(4), processing_class=tokenizer,
            teacher_tokenizer=None if given is None else tokenizer,
        )  # fmt: skip
        trainer.train()
        return logged(trainer, "loss")[0]

    value, beside = GKD_CHANGES[name]
    assert loss(**{**beside, name: value}) != loss(**beside)


# transformers' own fields: each is read by something that runs in a training, an evaluation and a save

UNREAD = {
    "of the hub, read where `push_to_hub` is set": "hub_always_push hub_private_repo hub_revision hub_strategy hub_token",
    "of a tracker, read where `report_to` names it": "project run_name trackio_bucket_id trackio_space_id trackio_static_space_id",
    "of a launch, read as the arguments are made": "ddp_timeout deepspeed fsdp_config local_rank tf32",
    "of a resumption": "ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint",
    "read where another option is set": (
        "activation_checkpointing_kwargs length_column_name liger_kernel_config optim_target_modules prediction_loss_only torch_compile"
    ),
    "for scripts: transformers' Trainer reads none": "do_eval do_predict do_train",
}
"""Of transformers' own fields those that a plain training does not read."""


def test_every_field_of_transformers_is_read_by_a_training(
    fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    passing = {
        "to_dict",
        "to_sanitized_dict",
        "__post_init__",
        "asdict",
        "_asdict_inner",
        "__repr__",
        "__str__",
        "fields",
    }

    def record(self: Any, name: str) -> Any:
        if name in names and sys._getframe(1).f_code.co_name not in passing:
            read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(ReasoningSFTConfig, "__getattribute__", record, raising=False)
    trainer = fit(
        ReasoningSFTTrainer, ReasoningSFTConfig, eval_dataset=tiny.make_dataset(2), save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    assert trainer.state.global_step == 2
    assert names - read <= {name for listed in UNREAD.values() for name in listed.split()}
