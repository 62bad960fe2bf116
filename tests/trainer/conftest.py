"""What the trainers' tests share; trl is imported once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import tiny

PLAIN = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.1,
    "optim": "sgd",  # the update is the gradient: equal weights mean equal gradients
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def teacher() -> Any:
    return tiny.make_model(7, vocab_size=272)  # more rows than the student: Qwen2.5 7B and 0.5B


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, teacher: Any) -> Path:
    """A store captured from `teacher` on `tiny.make_rows()`."""
    return tiny.make_store(tmp_path_factory.mktemp("store"), teacher, tokenizer, tiny.make_rows())


@pytest.fixture
def fit(tmp_path: Path, tokenizer: Any) -> Callable[..., Any]:
    """`fit(TrainerClass, ConfigClass, model=…, dataset=…, **config)`: a trained trainer."""

    def _fit(trainer_class: type, config_class: type, *, train: bool = True, **options: Any) -> Any:
        arguments = {
            name: options.pop(name) for name in ("eval_dataset", "peft_config", "callbacks") if name in options
        }
        model = options.pop("model", None) or tiny.make_model()
        dataset = options.pop("dataset", "default")
        dataset = tiny.make_dataset() if isinstance(dataset, str) else dataset
        resume = options.pop("resume_from", None)
        settings = {**PLAIN, "output_dir": str(tmp_path / "out"), **options}
        trainer = trainer_class(
            model, config_class(**settings), train_dataset=dataset, processing_class=tokenizer, **arguments
        )
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return _fit


def weights(trainer: Any) -> torch.Tensor:
    """All weights of a trainer's model, flat, float64."""
    return torch.cat([parameter.detach().double().flatten() for parameter in trainer.model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    """The values of a metric, in the order they were logged."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
