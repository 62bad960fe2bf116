"""KL to the model as it was: the same value from a copy, an adapter and a store, and a coefficient that keeps a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer import tiny
from tests.trainer.conftest import logged, weights
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.teacher.store import StoreError, TopKStore
from trl_reasoning_distill.trainer.callbacks import KLController
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.reasoning_sft import REFERENCE_IDS, REFERENCE_INDEX, ReasoningSFTTrainer
from trl_reasoning_distill.trainer.targets import KD_INDEX
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

KL = {"use_kl_regularization": True, "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1.0}


@pytest.fixture(scope="module")
def base_store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Captured from the base student."""
    return tiny.make_store(tmp_path_factory.mktemp("base"), tiny.make_model(1), tokenizer, tiny.make_rows(), top_k=8)


def moved(fit: Callable[..., Any], trainer_class: type = ReasoningSFTTrainer, **options: Any) -> Any:
    """A trainer whose student has moved away from the base model it started as, `tiny.make_model(1)`."""
    config = TopKDistillConfig if trainer_class is TopKDistillTrainer else ReasoningSFTConfig
    trainer = fit(trainer_class, config, train=False, model=tiny.make_model(1), **{**KL, **options})
    trainer.model.load_state_dict(tiny.make_model(2).state_dict())
    return trainer


def dense_bucket_kl(student: Any, base: Any, direction: str, top_k: int) -> torch.Tensor:
    """Mean KL over supervised tokens between the base's Top-K and one bucket for the rest, float64, from full probabilities."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in tiny.make_rows():
        tokens = tokenize_example(tiny.make_tokenizer(), row)
        ids = torch.tensor([tokens.input_ids])
        p = student(ids).logits[0, :-1].softmax(-1)
        with torch.no_grad():
            q = base(ids).logits[0, :-1].softmax(-1)
            top = q.topk(top_k).indices
        buckets = [torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q)]
        first, second = buckets if direction == "reverse" else buckets[::-1]
        keep = torch.tensor(tokens.labels)[1:] != -100
        total = total + (first * (first / second).log()).sum(-1)[keep].sum()
        count += int(keep.sum())
    return total / count


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_stored_reference_against_dense_float64(fit: Callable[..., Any], base_store: Path, direction: str) -> None:
    options = {"kl_direction": direction}
    trainer = moved(fit, kl_coef=3.0, reference_logits=str(base_store), **options)
    assert trainer.reference is None, "no second model"
    trainer.train()
    without = fit(ReasoningSFTTrainer, ReasoningSFTConfig, model=tiny.make_model(2), **{**KL, "kl_coef": 0.0})

    exact = tiny.make_model(2).double()
    expected = dense_bucket_kl(exact, tiny.make_model(1).double(), direction, top_k=8)
    expected.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()])
    assert logged(trainer, "kl_loss")[0] == pytest.approx(expected.item(), rel=1e-5)
    measured = (weights(without) - weights(trainer)) / 3.0
    assert (measured - gradient).norm() / gradient.norm() < 1e-4


def test_stored_reference_beside_a_stored_teacher(fit: Callable[..., Any], store: Path, base_store: Path) -> None:
    options = {"teacher_logits": str(store), "kd_top_k": 6, "kd_warmup_ratio": 0.0, "kl_coef": 0.5}
    runs = [
        moved(fit, TopKDistillTrainer, reference_logits=str(base_store), packing=packing, max_length=1024, **options)
        for packing in (False, True)
    ]
    for run in runs:
        run.train()
    for name in ("loss", "kd_loss", "kl_loss"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-5), name
    alone = moved(fit, reference_logits=str(base_store), kl_coef=0.5)
    alone.train()
    assert logged(runs[0], "kl_loss") == pytest.approx(logged(alone, "kl_loss"), rel=1e-6)
    total = logged(runs[0], "sft_loss")[0] + 0.35 * logged(runs[0], "kd_loss")[0] + 0.5 * logged(runs[0], "kl_loss")[0]
    assert logged(runs[0], "loss")[0] == pytest.approx(total, rel=1e-5)


def test_foreign_reference_stores_are_refused(
    fit: Callable[..., Any], tokenizer: Any, tmp_path: Path, base_store: Path
) -> None:
    with pytest.raises(ValueError, match=r"2 of 10 rows of the train dataset are not in it.*Capture the base student"):
        fit(
            ReasoningSFTTrainer,
            ReasoningSFTConfig,
            dataset=tiny.make_dataset(10),
            reference_logits=str(base_store),
            **KL,
        )
    foreign = tiny.make_store(
        tmp_path / "f", tiny.make_model(1), tokenizer, tiny.make_rows(), fingerprint={"tokenizer": "77"}
    )
    with pytest.raises(StoreError, match="tokenizer is '77' in the store"):
        fit(ReasoningSFTTrainer, ReasoningSFTConfig, reference_logits=str(foreign), **KL)


def test_evaluation_rows_need_no_reference(fit: Callable[..., Any], base_store: Path) -> None:
    trainer = moved(fit, reference_logits=str(base_store), kl_coef=0.5)
    known, unknown = (
        trainer.evaluate(tiny.make_dataset(8)),
        trainer.evaluate(tiny.make_dataset(16).select(range(8, 16))),
    )
    mixed = trainer.evaluate(tiny.make_dataset(16))
    assert "eval_kl_loss" not in unknown
    assert mixed["eval_kl_loss"] == pytest.approx(known["eval_kl_loss"], rel=1e-5), (
        "the mean is over tokens that have one"
    )
    assert known["eval_loss"] == pytest.approx(known["eval_sft_loss"] + 0.5 * known["eval_kl_loss"], rel=1e-5)


def test_rows_that_carry_another_stores_numbers_are_numbered_anew(
    fit: Callable[..., Any], tokenizer: Any, teacher: Any, store: Path, tmp_path: Path
) -> None:
    backward = tiny.make_store(tmp_path / "backward", teacher, tokenizer, tiny.make_rows()[::-1])
    rows = TopKStore.open(backward).dataset()
    options = {"teacher_logits": str(store), "kd_top_k": 6, "train": False}
    trainer = fit(TopKDistillTrainer, TopKDistillConfig, dataset=rows, **options)
    own = fit(TopKDistillTrainer, TopKDistillConfig, dataset=None, **options)
    assert [row[KD_INDEX] for row in trainer.train_dataset] == [row[KD_INDEX] for row in own.train_dataset][::-1]


def test_reference_records_follow_their_tokens(fit: Callable[..., Any], base_store: Path) -> None:
    dataset = Dataset.from_list(tiny.make_rows()[::-1])
    trainer = moved(fit, reference_logits=str(base_store), dataset=dataset, per_device_train_batch_size=3)
    base = tiny.make_model(1)
    for batch in trainer.get_train_dataloader():
        assert ((batch[REFERENCE_INDEX] >= 0) == (batch["labels"] != -100))[:, 1:].all()
        for ids, labels, named in zip(batch["input_ids"], batch["labels"], batch[REFERENCE_IDS], strict=True):
            with torch.no_grad():
                top = base(ids[None]).logits[0].argmax(-1)
            keep = (labels != -100)[1:]
            assert torch.equal(named[1:, 0][keep], top[:-1][keep])


def ziegler(coefficient: float, target: float, measured: list[float]) -> float:
    for kl in measured:
        coefficient *= 1 + 0.1 * max(-0.2, min(0.2, (kl - target) / target))
    return coefficient


@given(
    st.floats(1e-3, 10), st.floats(1e-3, 10), st.lists(st.floats(0, 100), max_size=20), st.integers(1, 4)
)  # fmt: skip
def test_controller_is_zieglers(start: float, target: float, measured: list[float], micro_batches: int) -> None:
    controller = KLController(start, target)
    for kl in measured:
        for _ in range(micro_batches):
            controller.add(kl * 7, 7)
        controller.on_step_end(None, None, None)  # type: ignore[arg-type]
    assert controller.coefficient == pytest.approx(ziegler(start, target, measured), rel=1e-6)
    before = controller.coefficient
    controller.on_step_end(None, None, None)  # type: ignore[arg-type]  # nothing was measured
    assert controller.coefficient == before


def test_coefficient_follows_the_global_batch(fit: Callable[..., Any]) -> None:
    options = {"use_kl_regularization": True, "kl_coef": 0.5, "kl_target": 6.0, "max_steps": 5}
    runs = [
        fit(
            ReasoningSFTTrainer, ReasoningSFTConfig, model=tiny.make_model(1), per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=8 // micro_batch, **options,
        )
        for micro_batch in (8, 2)
    ]  # fmt: skip
    divergence, coefficients = logged(runs[0], "kl_loss"), logged(runs[0], "kl_coef")
    assert coefficients == pytest.approx([ziegler(0.5, 6.0, divergence[:step]) for step in range(5)], rel=1e-6)
    assert min(coefficients) < 0.5 < max(coefficients), "below the target at first, above it later"
    assert logged(runs[1], "kl_coef") == pytest.approx(coefficients, rel=1e-5)
    losses, nll = logged(runs[0], "loss"), logged(runs[0], "sft_loss")
    for step in range(5):
        assert losses[step] == pytest.approx(nll[step] + coefficients[step] * divergence[step], rel=1e-5)


@pytest.mark.slow
def test_budget_is_kept(fit: Callable[..., Any]) -> None:
    options = {"use_kl_regularization": True, "max_steps": 100, "learning_rate": 3e-3, "optim": "adamw_torch"}
    free = fit(ReasoningSFTTrainer, ReasoningSFTConfig, kl_coef=0.0, per_device_train_batch_size=8, **options)
    target = logged(free, "kl_loss")[-1] / 2
    held = fit(
        ReasoningSFTTrainer, ReasoningSFTConfig, kl_coef=0.1, kl_target=target, per_device_train_batch_size=8, **options
    )
    late = logged(held, "kl_loss")[-20:]
    assert sum(late) / len(late) == pytest.approx(target, rel=0.2)


def test_controller_resumes_bitwise(fit: Callable[..., Any], tmp_path: Path) -> None:
    options = {
        "use_kl_regularization": True, "kl_coef": 0.3, "kl_target": 0.02, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
        "optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 2,
    }  # fmt: skip
    whole = fit(ReasoningSFTTrainer, ReasoningSFTConfig, output_dir=str(tmp_path / "whole"), **options)
    # A full fine-tuning resumes against the model as it was before training, not as the checkpoint has it
    resumed = fit(
        ReasoningSFTTrainer, ReasoningSFTConfig, resume_from=str(tmp_path / "whole" / "checkpoint-3"), **options
    )
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.kl_controller.coefficient == whole.kl_controller.coefficient != 0.3
    for name in ("kl_loss", "kl_coef", "loss"):
        assert logged(resumed, name) == logged(whole, name), name
