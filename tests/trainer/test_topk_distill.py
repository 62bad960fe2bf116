"""Top-K distillation: the right gradient, and the same one however the batch is cut, packed, shuffled or resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.teacher.store.test_alignment import make_byte_level, write_teacher_store
from tests.trainer import tiny
from tests.trainer.conftest import logged, weights
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.teacher.store import StoreError, TopKStore
from trl_reasoning_distill.teacher.store.alignment import align_store
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.targets import KD_IDS, KD_INDEX, KD_LOG_PROBS, KD_LOG_TAIL
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

TOP_K, TEMPERATURE, ALPHA = 6, 2.0, 0.7
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}


@pytest.fixture
def distill(fit: Callable[..., Any], store: Path) -> Callable[..., Any]:
    def _distill(trainer_class: type = TopKDistillTrainer, **options: Any) -> Any:
        settings = {"kd_top_k": TOP_K, "kd_temperature": TEMPERATURE, "kd_weight": ALPHA, "kd_warmup_ratio": 0.0}
        return fit(trainer_class, TopKDistillConfig, **{"teacher_logits": str(store), **settings, **options})

    return _distill


def dense_losses(
    student: Any, teacher: Any, rows: list[dict[str, Any]], k: int = TOP_K
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean SFT and KD loss from full float64 logits: T² · KL(teacher ‖ student) on K ids and one tail bucket, from the formula."""
    tokenizer = tiny.make_tokenizer()
    nll = kd = torch.zeros((), dtype=torch.float64)
    count = 0
    for row in rows:
        tokens = tokenize_example(tokenizer, row)
        ids, labels = torch.tensor([tokens.input_ids]), torch.tensor(tokens.labels)[1:]
        keep = labels != -100
        student_logits = student(ids).logits[0, :-1][keep]
        with torch.no_grad():
            teacher_logits = teacher(ids).logits[0, :-1][keep]
        nll = nll - student_logits.log_softmax(-1).gather(1, labels[keep][:, None]).sum()
        p = (teacher_logits / TEMPERATURE).softmax(-1)
        top = teacher_logits.topk(k).indices
        inside = top < student_logits.shape[-1]  # padding rows of the teacher's embedding have no twin
        q = (student_logits / TEMPERATURE).softmax(-1)
        p_top, q_top = p.gather(1, top) * inside, q.gather(1, top.where(inside, 0)) * inside
        terms = torch.where(inside, p_top * (p_top.clamp_min(1e-300).log() - q_top.clamp_min(1e-300).log()), 0)
        p_tail, q_tail = 1 - p_top.sum(-1), 1 - q_top.sum(-1)
        kd = kd + TEMPERATURE**2 * (terms.sum() + (p_tail * (p_tail.log() - q_tail.log())).sum())
        count += int(keep.sum())
    return nll / count, kd / count


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_against_dense_float64(distill: Callable[..., Any], teacher: Any, tied: bool) -> None:
    exact = tiny.make_model(tied=tied).double()
    start = torch.cat([parameter.detach().flatten() for parameter in exact.parameters()])
    sft, kd = dense_losses(exact, _double(teacher), tiny.make_rows())
    (sft + ALPHA * kd).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()])

    trainer = distill(model=tiny.make_model(tied=tied), max_steps=1, per_device_train_batch_size=8, learning_rate=1.0)
    assert logged(trainer, "sft_loss")[0] == pytest.approx(sft.item(), rel=1e-6)
    assert logged(trainer, "kd_loss")[0] == pytest.approx(kd.item(), rel=1e-5)
    assert logged(trainer, "loss")[0] == pytest.approx((sft + ALPHA * kd).item(), rel=1e-6)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert (start - weights(trainer) - gradient).norm() / gradient.norm() < 1e-5


def sharp_teacher() -> Any:
    """It leaves e^-20 and less outside its Top-K."""
    model = tiny.make_model(7)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    return model


def dense_reverse_kl(student: Any, teacher: Any, k: int) -> torch.Tensor:
    """Mean KL(student ‖ teacher) at T = 1 on K ids and one tail bucket, from full float64 logits."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in tiny.make_rows():
        tokens = tokenize_example(tiny.make_tokenizer(), row)
        ids, keep = torch.tensor([tokens.input_ids]), torch.tensor(tokens.labels)[1:] != -100
        log_q = student(ids).logits[0, :-1][keep].log_softmax(-1)
        with torch.no_grad():
            log_p = teacher(ids).logits[0, :-1][keep].log_softmax(-1)
        top = log_p.topk(k).indices
        buckets = [
            torch.cat([x.gather(1, top), x.scatter(1, top, -torch.inf).logsumexp(-1, keepdim=True)], -1)
            for x in (log_q, log_p)
        ]
        total = total + (buckets[0].exp() * (buckets[0] - buckets[1])).sum()
        count += int(keep.sum())
    return total / count


@pytest.mark.parametrize("encoding", ["lossless", "compact"])
@pytest.mark.parametrize("top_k", [8, 3])
def test_reverse_kl_to_a_sharp_teacher_against_dense_float64(
    distill: Callable[..., Any], tokenizer: Any, tmp_path: Path, top_k: int, encoding: str
) -> None:
    """Its gradient takes the logarithm of the tail, of which one minus the rest knows nothing."""
    teacher = sharp_teacher()
    store = tiny.make_store(tmp_path / "sharp", teacher, tokenizer, tiny.make_rows(), encoding=encoding)
    exact = tiny.make_model().double()
    start = torch.cat([parameter.detach().flatten() for parameter in exact.parameters()])
    reverse_kl = dense_reverse_kl(exact, sharp_teacher().double(), top_k)
    reverse_kl.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()])

    options = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1.0, "kd_temperature": 1.0}
    options |= {"kd_top_k": top_k, "kd_divergence": "reverse_kl", "teacher_logits": str(store)}
    without = distill(model=tiny.make_model(), **options, kd_weight=0.0)
    trainer = distill(model=tiny.make_model(), **options, kd_weight=1.0)
    measured = weights(without) - weights(trainer)
    tolerance = 1e-4 if encoding == "lossless" else 5e-3
    assert logged(trainer, "kd_loss")[0] == pytest.approx(reverse_kl.item(), rel=tolerance)
    assert (measured - gradient).norm() / gradient.norm() < tolerance
    assert start.shape == gradient.shape


def test_a_store_without_tails_trains_as_before(
    distill: Callable[..., Any], teacher: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """One of version 0.1.0, or of a server; and forward KL does without tails from any."""
    stores = [
        tiny.make_store(tmp_path / str(known), teacher, tokenizer, tiny.make_rows(), log_tails=known)
        for known in (True, False)
    ]
    for divergence, is_used in (("forward_kl", False), ("reverse_kl", True)):
        with_tails, without = (distill(teacher_logits=str(store), kd_divergence=divergence) for store in stores)
        assert (KD_LOG_TAIL in with_tails.loss_columns) == is_used
        assert KD_LOG_TAIL not in without.loss_columns
        torch.testing.assert_close(weights(with_tails), weights(without), rtol=0, atol=1e-5 if is_used else 0)


def _double(model: Any) -> Any:
    twin = tiny.make_model(vocab_size=model.config.vocab_size)
    twin.load_state_dict(model.state_dict())
    return twin.double()


def test_batch_size_accumulation_and_packing_change_nothing(distill: Callable[..., Any]) -> None:
    dataset = tiny.make_dataset(4)
    shared = {"dataset": dataset, "max_steps": 3, "num_train_epochs": 3, "max_length": 256}
    whole = distill(per_device_train_batch_size=4, **shared)
    accumulated = distill(per_device_train_batch_size=1, gradient_accumulation_steps=4, **shared)
    packed = distill(per_device_train_batch_size=1, packing=True, **shared)
    flat = distill(per_device_train_batch_size=4, padding_free=True, **{**shared, "max_length": None})
    assert len(packed.train_dataset) == 1, "all rows in one sequence"
    for other in (accumulated, packed, flat):
        torch.testing.assert_close(weights(other), weights(whole), rtol=0, atol=1e-6)
        for name in ("loss", "grad_norm"):
            assert logged(other, name) == pytest.approx(logged(whole, name), rel=1e-6), name
    for name in ("kd_loss", "teacher_mass", "student_mass", "top1_agreement"):
        assert logged(packed, name) == pytest.approx(logged(whole, name), rel=1e-6), name


@pytest.mark.parametrize("packing", [False, True])
def test_every_token_keeps_its_own_target(distill: Callable[..., Any], teacher: Any, packing: bool) -> None:
    shuffled = tiny.make_dataset().shuffle(seed=3)
    trainer = distill(train=False, dataset=shuffled, packing=packing, max_length=130, shuffle_dataset=True)
    seen = 0
    for batch in trainer.get_train_dataloader():
        for row in range(len(batch["input_ids"])):
            positions = batch["position_ids"][row] if packing else torch.arange(batch["input_ids"].shape[1])
            starts = [int(at) for at in (positions == 0).nonzero()]
            for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
                ids, labels = batch["input_ids"][row, start:stop], batch["labels"][row, start:stop]
                with torch.no_grad():
                    expected = (teacher(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
                for t in range(1, len(ids)):
                    targets, log_probs = batch[KD_IDS][row, start + t], batch[KD_LOG_PROBS][row, start + t]
                    assert bool((targets >= 0).any()) == (int(labels[t]) != -100)
                    kept = targets >= 0
                    torch.testing.assert_close(log_probs[kept], expected[t - 1][targets[kept]], rtol=0, atol=1e-5)
                    seen += int(labels[t] != -100)
    assert seen == trainer.reports["train"].supervised_tokens


def test_order_of_rows_changes_nothing(distill: Callable[..., Any]) -> None:
    rows = tiny.make_rows()
    forward, backward = (
        distill(dataset=Dataset.from_list(order), per_device_train_batch_size=8, max_steps=1)
        for order in (rows, rows[::-1])
    )
    torch.testing.assert_close(weights(forward), weights(backward), rtol=0, atol=1e-6)


def test_one_token_completion_gets_its_target(
    distill: Callable[..., Any], tokenizer: Any, teacher: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{a}+{a}=", "completion": "<|im_end|>"} for a in range(4)]
    store = tiny.make_store(tmp_path / "one", teacher, tokenizer, rows)
    assert len(TopKStore.open(store)) == 4
    trainer = distill(teacher_logits=str(store), dataset=Dataset.from_list(rows), max_steps=1, reasoning_format="plain")
    sft, kd = dense_losses(tiny.make_model().double(), _double(teacher), rows)
    assert logged(trainer, "kd_loss")[0] == pytest.approx(kd.item(), rel=1e-5)
    assert logged(trainer, "sft_loss")[0] == pytest.approx(sft.item(), rel=1e-5)
    assert trainer.supervised_tokens_seen == 4


@pytest.mark.parametrize("packing", [False, True])
def test_resume_is_bitwise(distill: Callable[..., Any], tmp_path: Path, packing: bool) -> None:
    def options(name: str) -> dict[str, Any]:
        return {
            "output_dir": str(tmp_path / name), "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch",
            "kd_warmup_steps": 5, "model": tiny.make_model(attention_dropout=0.1), "learning_rate": 1e-2, "packing": packing,
            "max_length": 130, "per_device_train_batch_size": 1 if packing else 2, "max_grad_norm": 1.0,
        }  # fmt: skip

    whole = distill(**options("whole"))
    resumed = distill(resume_from=str(tmp_path / "whole" / "checkpoint-3"), **options("resumed"))
    assert torch.equal(weights(resumed), weights(whole))
    for name in ("loss", "grad_norm", "kd_loss", "kd_weight", "num_tokens"):
        assert logged(resumed, name) == logged(whole, name), name
    assert resumed.supervised_tokens_seen == whole.supervised_tokens_seen > 0


def test_weight_warms_up_linearly_from_zero(distill: Callable[..., Any]) -> None:
    trainer = distill(max_steps=6, kd_warmup_steps=4, per_device_train_batch_size=2)
    assert logged(trainer, "kd_weight") == pytest.approx([0, ALPHA / 4, ALPHA / 2, 3 * ALPHA / 4, ALPHA, ALPHA])
    by_ratio = distill(max_steps=6, kd_warmup_ratio=0.5, per_device_train_batch_size=2)
    assert logged(by_ratio, "kd_weight") == pytest.approx([0, ALPHA / 3, 2 * ALPHA / 3, ALPHA, ALPHA, ALPHA])


def test_without_weight_it_is_sft(distill: Callable[..., Any], fit: Callable[..., Any]) -> None:
    distilled, control = distill(kd_weight=0.0), fit(ReasoningSFTTrainer, ReasoningSFTConfig)
    torch.testing.assert_close(weights(distilled), weights(control), rtol=0, atol=1e-6)
    assert distilled.supervised_tokens_seen == control.supervised_tokens_seen


def test_example_weights(distill: Callable[..., Any]) -> None:
    dataset = tiny.make_dataset().add_column("trust", [1.0, 0.0] * 4)
    weighted = distill(dataset=dataset, kd_weight_column="trust", per_device_train_batch_size=8, max_steps=1)
    sft, _ = dense_losses(tiny.make_model().double(), tiny.make_model(7, vocab_size=272).double(), tiny.make_rows())
    _, half = dense_losses(
        tiny.make_model().double(), tiny.make_model(7, vocab_size=272).double(), tiny.make_rows()[::2]
    )
    trusted = sum(label != -100 for row in list(weighted.train_dataset)[::2] for label in row["labels"])
    share = trusted / weighted.supervised_tokens_seen
    assert logged(weighted, "loss")[0] == pytest.approx((sft + ALPHA * half * share).item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"kd_weight_column='trsut'.*no such column, only"):
        distill(dataset=dataset, kd_weight_column="trsut")


def test_the_stores_own_rows_and_a_part_of_them(distill: Callable[..., Any], store: Path) -> None:
    own, text = distill(dataset=None), distill()
    assert torch.equal(weights(own), weights(text))
    part = TopKStore.open(store).dataset().select([5, 2])
    trainer = distill(dataset=part, train=False)
    assert [row[KD_INDEX] for row in trainer.train_dataset] == [row[KD_INDEX] for row in part]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(distill: Callable[..., Any], checkpointing: bool) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer = distill(peft_config=lora, gradient_checkpointing=checkpointing, max_steps=12, use_kl_regularization=True)
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert torch.equal(trainer.model.get_base_model().lm_head.weight, tiny.make_model().lm_head.weight)


def test_checkpointing_changes_nothing(distill: Callable[..., Any]) -> None:
    torch.testing.assert_close(weights(distill(gradient_checkpointing=True)), weights(distill()), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"kd_divergence": "reverse_kl"},
        {"kd_divergence": "jsd", "kd_beta": 0.3},
        {"kd_support": "renormalized"},
        {"kd_top_p": 0.6},
        {"kd_scale_by_t2": False, "kd_temperature": 1.0},
        {"think_weight": 0.5, "use_kl_regularization": True},
        {"loss_type": "dft"},
        {"bf16": True},
    ],
    ids=str,
)
def test_kd_loss_falls_with_every_option(distill: Callable[..., Any], options: dict[str, Any]) -> None:
    trainer = distill(max_steps=8, per_device_train_batch_size=8, kd_weight=10.0, **ADAM, **options)
    losses = logged(trainer, "kd_loss")
    assert losses[-1] < 0.9 * losses[0]
    assert all(value >= 0 for value in losses)


def test_evaluation_reports_kd_loss_at_full_weight(distill: Callable[..., Any], fit: Callable[..., Any]) -> None:
    trainer = distill(train=False, eval_dataset=tiny.make_dataset(4), kd_warmup_steps=10)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_sft_loss"] + ALPHA * metrics["eval_kd_loss"], rel=1e-5)
    strangers = Dataset.from_list([{"prompt": "1", "completion": "2"}] * 2)
    metrics = trainer.evaluate(strangers)
    assert "eval_kd_loss" not in metrics
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_sft_loss"], rel=1e-6)


class HalfSquaredTrainer(TopKDistillTrainer):
    """A divergence of one's own: half the squared distance of the probabilities on the support."""

    def kd_loss(
        self, student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, student_log_tail: torch.Tensor
    ) -> torch.Tensor:
        on_support = teacher_log_probs > -torch.inf
        return 0.5 * ((student_log_probs.exp() - teacher_log_probs.exp()) * on_support).square().sum(-1)


class SameByHandTrainer(TopKDistillTrainer):
    """The default, through the override point."""

    def kd_loss(self, *args: torch.Tensor) -> torch.Tensor:
        return super().kd_loss(*args)


def test_a_divergence_of_ones_own(distill: Callable[..., Any]) -> None:
    torch.testing.assert_close(weights(distill(SameByHandTrainer)), weights(distill()), rtol=0, atol=1e-7)
    losses = logged(
        distill(HalfSquaredTrainer, max_steps=8, per_device_train_batch_size=8, kd_weight=1e4, **ADAM), "kd_loss"
    )
    assert losses[-1] < losses[0]


def test_wrong_stores_are_refused(
    distill: Callable[..., Any], tokenizer: Any, teacher: Any, tmp_path: Path, store: Path
) -> None:
    with pytest.raises(ValueError, match=r"Temperature 3 was not captured: this store has 1, 2"):
        distill(kd_temperature=3.0)
    with pytest.raises(ValueError, match=r"`kd_top_k=9`: the store at .* holds 8 ids per position"):
        distill(kd_top_k=9)
    foreign = tiny.make_store(
        tmp_path / "foreign", teacher, tokenizer, tiny.make_rows(), fingerprint={"tokenizer": "1f3a"}
    )
    with pytest.raises(StoreError, match=r"tokenizer is '1f3a' in the store.*Run `trl-distill align`"):
        distill(teacher_logits=str(foreign))
    with pytest.raises(
        ValueError, match=r"2 of 10 rows of the train dataset are not in it, the first is row 8; .*the texts differ"
    ):
        distill(dataset=tiny.make_dataset(10))
    other = tiny.make_store(
        tmp_path / "other", teacher, tokenizer, tiny.make_rows(), fingerprint={"chat_template": "77"}
    )
    with pytest.raises(ValueError, match=r"chat_template is '77' in the store"):
        distill(teacher_logits=str(other), dataset=tiny.make_dataset(9))
    with pytest.raises(StoreError, match="no Top-K store"):
        distill(teacher_logits=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="needs a TopKDistillConfig"):
        TopKDistillTrainer(tiny.make_model(), ReasoningSFTConfig(str(tmp_path), bf16=False, use_cpu=True))


def test_a_store_aligned_for_another_temperature_is_refused(
    distill: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    theirs = make_byte_level()
    write_teacher_store(tmp_path / "theirs", theirs)
    align_store(tmp_path / "theirs", tokenizer, tmp_path / "aligned", teacher_tokenizer=theirs, temperature=2.0)
    with pytest.raises(ValueError, match=r"aligned for T = 2, and the teacher is asked for at T = 1.*--temperature 1"):
        distill(teacher_logits=str(tmp_path / "aligned"), kd_temperature=1.0, top_k=4)
    with pytest.raises(ValueError, match="rows of the train dataset are not in it"):  # the temperature is right
        distill(teacher_logits=str(tmp_path / "aligned"), kd_temperature=2.0, top_k=4)


def test_ids_beyond_the_students_head_are_tail(distill: Callable[..., Any]) -> None:
    narrow = tiny.make_model(vocab_size=261)  # the tokenizer's size; the teacher's head has 272 rows
    trainer = distill(model=narrow, train=False)
    batch = next(iter(trainer.get_train_dataloader()))
    targets = batch[KD_INDEX] >= 0
    beyond = TopKStore.open(trainer.store.path).read(batch[KD_INDEX][targets].numpy()).ids[:, :TOP_K] >= 261
    assert beyond.any()
    assert torch.equal(batch[KD_IDS][targets] < 0, torch.from_numpy(beyond))
    assert (batch[KD_LOG_PROBS][targets][torch.from_numpy(beyond)] == -torch.inf).all()
