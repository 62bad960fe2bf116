"""GKD with a live teacher. Where TRL's own GKD 1.16 does otherwise, the test first shows what it does."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl.import_utils import suppress_experimental_warning

with suppress_experimental_warning():
    from trl.experimental.gkd import GKDConfig, GKDTrainer

from tests.teacher.prompt_server import MODEL_NAME, prompt_server
from tests.trainer import tiny
from tests.trainer.conftest import PLAIN, logged, weights
from trl_reasoning_distill.data.tokenization import tokenize_example
from trl_reasoning_distill.teacher.capture import CaptureConfig, capture
from trl_reasoning_distill.teacher.context import TeacherContext, TeacherContextOptions, with_teacher_prompts
from trl_reasoning_distill.teacher.scoring import TransformersReader
from trl_reasoning_distill.teacher.store import TopKStore
from trl_reasoning_distill.trainer.config import TopKDistillConfig
from trl_reasoning_distill.trainer.gkd import rollouts
from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
from trl_reasoning_distill.trainer.gkd.live_teacher import count_shared_ids
from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

SHARED = 261  # the tokenizer's ids; the models' embeddings have 264 and 272 rows
GREEDY = {"lmbda": 1.0, "temperature": 0.0, "max_new_tokens": 6}


@pytest.fixture
def gkd(tmp_path: Path, tokenizer: Any, teacher: Any) -> Callable[..., TopKGKDTrainer]:
    """`gkd(**config)`: a trained `TopKGKDTrainer`; `teacher`, `model`, `dataset`, `train`, `peft_config` beside the configuration."""

    def run(**options: Any) -> TopKGKDTrainer:
        given = options.pop("teacher", "tiny")
        given = teacher if given == "tiny" else given
        names = ("peft_config", "eval_dataset", "callbacks")
        arguments = {name: options.pop(name) for name in names if name in options}
        resume, train = options.pop("resume_from", None), options.pop("train", True)
        model, dataset = options.pop("model", None) or tiny.make_model(), options.pop("dataset", None)
        args = TopKGKDConfig(
            **{**PLAIN, "max_steps": 1, "output_dir": str(tmp_path / "out"), "preview_examples": 0, **options}
        )
        trainer = TopKGKDTrainer(
            model,
            given,
            args,
            teacher_tokenizer=None if given is None else tokenizer,
            train_dataset=dataset or tiny.make_dataset(4),
            processing_class=tokenizer,
            **arguments,
        )
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture
def stock(tmp_path: Path, tokenizer: Any) -> Callable[..., GKDTrainer]:
    """TRL's own trainer on messages, its teacher with as many rows as the student."""

    def make(rows: list[dict[str, Any]], **options: Any) -> GKDTrainer:
        messages = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in rows])
        given = options.pop("teacher", None) or tiny.make_model(7)
        args = GKDConfig(**{**PLAIN, "max_steps": 1, "output_dir": str(tmp_path / "stock"), **options})
        return GKDTrainer(tiny.make_model(), given, args, train_dataset=messages, processing_class=tokenizer)

    return make


@torch.no_grad()
def expected_kd(
    teacher: Any,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    *,
    beta: float,
    top_k: int | None = None,
    temperature: float = 1.0,
    teacher_rows: list[tuple[list[int], int]] | None = None,
) -> float:
    """Mean divergence per supervised token, from the formula: dense, float64, over the shared ids."""
    student, teacher = tiny.make_model().double(), teacher.double()
    total: list[Tensor] = []
    for number, row in enumerate(rows):
        tokens = tokenize_example(tokenizer, row)
        places = [t for t, label in enumerate(tokens.labels) if label != -100]
        ids, shift = (tokens.input_ids, 0) if teacher_rows is None else teacher_rows[number]
        theirs = (teacher(torch.tensor([ids])).logits[0, :, :SHARED] / temperature).softmax(-1)
        ours = (student(torch.tensor([tokens.input_ids])).logits[0, :, :SHARED] / temperature).softmax(-1)
        for t in places:
            p, q = theirs[t - 1 + shift], ours[t - 1]
            if top_k is not None:
                kept = (q if beta == 1.0 else p).topk(top_k).indices
                p, q = (torch.cat([one[kept], (1 - one[kept].sum())[None]]) for one in (p, q))
            m = {0.0: q, 1.0: p}.get(beta, beta * p + (1 - beta) * q)
            forward, reverse = (p * (p / m).log()).sum(), (q * (q / m).log()).sum()
            total.append({0.0: forward, 1.0: reverse}.get(beta, beta * forward + (1 - beta) * reverse))
    teacher.float()
    return float(torch.stack(total).mean()) * temperature**2


# The loss


@pytest.mark.parametrize(
    ("beta", "top_k", "temperature"),
    [
        (0.0, 8, 1.0),
        (1.0, 8, 2.0),
        (0.5, None, 1.0),
        pytest.param(0.0, None, 2.0, marks=pytest.mark.slow),
        pytest.param(0.5, 8, 1.0, marks=pytest.mark.slow),
    ],
)
def test_the_loss_is_gkds_on_the_shared_ids(
    gkd: Any, teacher: Any, tokenizer: Any, beta: float, top_k: int | None, temperature: float
) -> None:
    trainer = gkd(lmbda=0.0, beta=beta, kd_top_k=top_k, kd_temperature=temperature)
    expected = expected_kd(teacher, tiny.make_rows(4), tokenizer, beta=beta, top_k=top_k, temperature=temperature)
    assert trainer.shared_ids == SHARED
    assert logged(trainer, "kd_loss")[0] == pytest.approx(expected, rel=1e-4)
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-4)


def test_stock_refuses_padding_rows_and_has_no_temperature_in_its_loss(stock: Any, teacher: Any) -> None:
    with pytest.raises(ValueError, match="vocab_size 264 but the teacher model has vocab_size 272"):
        stock(tiny.make_rows(4), teacher=teacher)
    losses = []
    for temperature in (0.5, 2.0):
        trainer = stock(tiny.make_rows(4), lmbda=0.0, temperature=temperature)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] == losses[1]


def test_only_kd_temperature_reaches_our_loss(gkd: Any) -> None:
    first, second, third = (
        logged(gkd(lmbda=0.0, **options), "loss")[0]
        for options in ({"temperature": 0.5}, {"temperature": 2.0}, {"kd_temperature": 2.0})
    )
    assert first == second != third


def test_sft_and_kl_are_added_on_text_that_the_student_did_not_write(gkd: Any) -> None:
    plain, mixed = (
        gkd(lmbda=0.0),
        gkd(lmbda=0.0, sft_weight=0.5, kd_weight=2.0, use_kl_regularization=True, max_steps=2),
    )
    kd, sft = logged(plain, "kd_loss")[0], logged(plain, "sft_loss")[0]
    assert logged(mixed, "loss")[0] == pytest.approx(2 * kd + 0.5 * sft, rel=1e-5)
    assert logged(mixed, "kl_loss")[0] == pytest.approx(0.0, abs=1e-6)
    second = [logged(mixed, name)[1] for name in ("kd_loss", "sft_loss", "kl_loss")]
    assert second[2] > 1e-4
    assert logged(mixed, "loss")[1] == pytest.approx(2 * second[0] + 0.5 * second[1] + 0.1 * second[2], rel=1e-5)
    written = gkd(**{**GREEDY, "lmbda": 0.99}, sft_weight=5.0)
    assert logged(written, "on_policy_share") == [1.0]
    assert logged(written, "loss")[0] == pytest.approx(logged(written, "kd_loss")[0], rel=1e-5)


# What it is divided by


def with_long_references(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**row, "completion": [{**row["completion"][0], "content": row["completion"][0]["content"] + "7" * 40}]}
        for row in rows
    ]


def test_the_references_length_does_not_reach_a_loss_on_written_text(gkd: Any, stock: Any) -> None:
    short, long = tiny.make_rows(4), with_long_references(tiny.make_rows(4))
    stocks = []
    for rows in (short, long):
        trainer = stock(rows, lmbda=1.0, max_new_tokens=6)
        torch.manual_seed(0)
        trainer.train()
        stocks.append(logged(trainer, "loss")[0])
    assert stocks[1] < 0.6 * stocks[0], "stock divides by the labels of the dataset"
    ours = [gkd(**GREEDY, dataset=Dataset.from_list(rows)) for rows in (short, long)]
    assert logged(ours[0], "loss") == logged(ours[1], "loss")
    assert weights(ours[0]).equal(weights(ours[1]))
    kd = logged(ours[0], "kd_loss")[0]
    assert logged(ours[0], "loss")[0] == pytest.approx(kd, rel=1e-5), "a mean over the written tokens"


@pytest.mark.parametrize("options", [{"lmbda": 0.0}, {"lmbda": 1.0, "max_new_tokens": 6}])
def test_accumulation_and_padding_do_not_change_the_gradient(gkd: Any, options: dict[str, Any]) -> None:
    whole = gkd(**options)
    parts = gkd(**options, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert logged(parts, "loss")[0] == pytest.approx(logged(whole, "loss")[0], rel=1e-4)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=2e-6)


def test_stock_does_not_count_ranks() -> None:
    assert "num_processes" not in inspect.getsource(GKDTrainer.compute_loss)  # ours: tests/distributed/test_matrix.py


def test_a_completion_as_long_as_max_length_never_ends_the_run(gkd: Any, stock: Any) -> None:
    rows = tiny.make_rows(3) + with_long_references(tiny.make_rows(1))
    with pytest.raises(ValueError, match="no prompt tokens left"):
        stock(rows, lmbda=1.0, max_length=45).train()
    trainer = gkd(dataset=Dataset.from_list(rows), max_length=45, **GREEDY)
    assert (trainer.reports["train"].rows, trainer.reports["train"].overlong) == (3, 1)
    cut = gkd(dataset=Dataset.from_list(rows), max_length=45, overlong="truncate", lmbda=0.0)
    assert (cut.reports["train"].rows, cut.reports["train"].truncated) == (4, 1)


@pytest.mark.parametrize("decision", ["keep", "drop"])
def test_text_that_fills_max_length_is_cut_and_counted(gkd: Any, decision: str) -> None:
    options = {**GREEDY, "max_new_tokens": 200, "max_length": 50, "truncated_rollouts": decision}
    trainer = gkd(**options)
    assert logged(trainer, "truncated_share") == [1.0]
    assert logged(trainer, "dropped_share") == [float(decision == "drop")]
    assert logged(trainer, "num_tokens")[0] == 4 * 50
    loss = logged(trainer, "loss")[0]
    assert loss > 0 if decision == "keep" else loss == 0


# Who writes what


def test_the_student_writes_a_share_of_the_batches_and_all_ranks_agree(gkd: Any) -> None:
    trainer = gkd(lmbda=0.3, train=False)
    choices = [trainer.student_writes(number) for number in range(2000)]
    assert 0.27 < sum(choices) / 2000 < 0.33
    assert choices == [trainer.student_writes(number) for number in range(2000)]


def test_a_completion_does_not_depend_on_the_batch_nor_on_the_checkpoints_generation_settings(gkd: Any) -> None:
    trainer = gkd(lmbda=1.0, max_new_tokens=12, train=False)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    prompts, mask = batch["prompts"], batch["prompt_attention_mask"]
    together = trainer.writer.write(trainer.model, prompts, mask, [12] * 4, step=3)
    trainer.model.generation_config.repetition_penalty = 9.0
    for index in range(4):
        kept = mask[index].bool()
        alone = trainer.writer.write(trainer.model, prompts[index, kept][None], mask[index, kept][None], [12], step=3)
        assert alone == [together[index]]
    assert max(token for completion in together for token in completion.ids) < SHARED
    assert trainer.writer.write(trainer.model, prompts, mask, [12] * 4, step=4) != together


def test_with_seq_kd_the_teacher_writes_and_the_student_may_be_fine_tuned_on_it(gkd: Any, teacher: Any) -> None:
    trainer = gkd(lmbda=0.0, seq_kd=True, temperature=0.0, max_new_tokens=6, sft_weight=1.0, train=False)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    written = trainer._write(batch, by_student=False)
    ids, start = written["input_ids"][0], batch["prompts"].shape[1]
    with torch.no_grad():
        logits = teacher(ids[None]).logits[0, start - 1 : -1, :SHARED]
    assert ids[start:].equal(logits.argmax(-1))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(
        logged(trainer, "kd_loss")[0] + logged(trainer, "sft_loss")[0], rel=1e-5
    )


def test_rows_without_completions_do_where_the_student_writes_them_all(gkd: Any) -> None:
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in tiny.make_rows(4)])
    assert logged(gkd(**GREEDY, dataset=prompts), "loss") == logged(gkd(**GREEDY), "loss")
    with pytest.raises(ValueError, match="no reply to learn"):
        gkd(lmbda=0.5, dataset=prompts)


def test_a_resumed_run_writes_what_it_would_have_written(gkd: Any, tmp_path: Path) -> None:
    options = {"lmbda": 0.5, "max_new_tokens": 6, "max_steps": 4, "per_device_train_batch_size": 2, "sft_weight": 0.1}
    whole = gkd(**options, save_strategy="steps", save_steps=2)
    resumed = gkd(**options, resume_from=str(tmp_path / "out" / "checkpoint-2"))
    assert weights(resumed).equal(weights(whole))
    assert 0 < sum(logged(whole, "on_policy_share")) < 4, "both kinds of batches"


def test_vllm_writes_through_trls_own_generation(gkd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="vLLM is not available"):
        gkd(use_vllm=True, train=False)
    seen: list[Any] = []

    def make_vllm(model: Any, accelerator: Any, tokenizer: Any, **options: Any) -> Any:
        seen.append(options)

        def generate(prompts: list[list[int]], images: None, count: int) -> tuple[Any, ...]:
            seen.append(prompts)
            return prompts, [[65, 66, 258, 67], [65, 263, 66]] * (len(prompts) // 2), None, None

        return SimpleNamespace(generate=generate, sync_weights=lambda: seen.append("synced"))

    monkeypatch.setattr(rollouts, "make_vllm", make_vllm)
    trainer = gkd(use_vllm=True, lmbda=1.0, max_steps=2, vllm_gpu_memory_utilization=0.2, max_new_tokens=9)
    assert (seen[0]["gpu_memory_utilization"], seen[0]["max_completion_length"]) == (0.2, 9)
    assert [item for item in seen if item == "synced"] == ["synced"] * 2, "once per step"
    assert all(256 < row[0] < 259 for row in seen[2]), "prompts without their padding"
    assert logged(trainer, "completion_length") == [2.0, 2.0], "up to the end token, and before a foreign one"
    assert logged(trainer, "truncated_share") == [0.5, 0.5]


def test_what_was_written_is_shown(gkd: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = gkd(**GREEDY, log_completions=True, num_completions_to_print=2)
    shown = capsys.readouterr().out
    assert shown.count("| student |") == 2
    assert "| step | prompt | completion | truncated | written_by |" in shown
    assert logged(trainer, "generated_tokens_per_second")[0] > 0
    assert logged(trainer, "completion_length")[0] <= 6


# Teachers


def test_other_tokenizers_are_refused_before_anything_is_trained(gkd: Any, tokenizer: Any, teacher: Any) -> None:
    larger = tiny.make_tokenizer()
    larger.add_tokens(["<answer>"])
    assert count_shared_ids(larger, tokenizer) == count_shared_ids(tokenizer, larger) == SHARED
    other = tiny.make_tokenizer()
    state = (
        other.backend_tokenizer.to_str()
        .replace('"A":', '"X":', 1)
        .replace('"B":', '"A":', 1)
        .replace('"X":', '"B":', 1)
    )
    other = type(other)(tokenizer_object=type(other.backend_tokenizer).from_str(state), eos_token="<|im_end|>")
    with pytest.raises(ValueError, match=r"different tokenizers.*trl-distill align"):
        count_shared_ids(other, tokenizer)
    with pytest.raises(ValueError, match=r"so its tokenizer is not known\. .* pass it as teacher_tokenizer"):
        TopKGKDTrainer(
            tiny.make_model(),
            teacher,
            gkd(train=False).args,
            train_dataset=tiny.make_dataset(2),
            processing_class=tokenizer,
        )


def test_text_with_a_token_that_the_teacher_lacks_is_refused(gkd: Any, tokenizer: Any, teacher: Any) -> None:
    student = tiny.make_tokenizer()
    student.add_tokens(["<answer>"])
    rows = [{"prompt": "1+1? ", "completion": "<answer>2"}] * 4
    with pytest.raises(ValueError, match=r"'<answer>'.*which the teacher does not know"):
        TopKGKDTrainer(
            tiny.make_model(),
            teacher,
            gkd(train=False).args,
            teacher_tokenizer=tokenizer,
            train_dataset=Dataset.from_list(rows),
            processing_class=student,
        )


@pytest.mark.parametrize("is_lora", [True, False])
def test_without_a_teacher_it_is_the_student_as_it_was(gkd: Any, is_lora: bool) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if is_lora else None
    trainer = gkd(teacher=None, peft_config=lora, lmbda=0.0, sft_weight=1.0, beta=1.0, max_steps=2)
    first, second = logged(trainer, "kd_loss")
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-5, "the student has moved, the teacher has not"
    if not is_lora:
        with pytest.raises(ValueError, match="kept for its hidden states only"):
            gkd(teacher=None, seq_kd=True, train=False)
    taught = gkd(teacher=None, peft_config=lora, lmbda=0.0, teacher_context="few_shot", max_length=400)
    assert logged(taught, "kd_loss")[0] > 1e-2, "the same model, with examples before its eyes"


def test_a_teacher_by_name_whole_or_offloaded(gkd: Any, teacher: Any, tokenizer: Any, tmp_path: Path) -> None:
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    name = str(tmp_path / "teacher")
    expected = logged(gkd(lmbda=0.0), "kd_loss")
    assert logged(gkd(teacher=name, lmbda=0.0), "kd_loss") == pytest.approx(expected)
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    options = {
        "device_map": {**device_map, "model.rotary_emb": "cpu"},
        "offload_folder": str(tmp_path / "offload"),
    }
    offloaded = gkd(teacher=name, lmbda=0.0, teacher_model_init_kwargs=options)
    assert next(offloaded.teacher.model.lm_head.parameters()).device.type == "meta"
    assert logged(offloaded, "kd_loss") == pytest.approx(expected)


def test_a_teacher_in_4_bit(gkd: Any, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = tiny.make_model(7, hidden_size=64, intermediate_size=128)  # bitsandbytes takes whole blocks of 64
    wide.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    quantized = gkd(teacher=str(tmp_path / "teacher"), lmbda=0.0, teacher_quantization="4bit")
    assert quantized.teacher.model.is_loaded_in_4bit
    assert logged(quantized, "kd_loss") == pytest.approx(logged(gkd(teacher=wide, lmbda=0.0), "kd_loss"), rel=0.3)


def test_a_server_teaches_as_the_model_behind_it_does(gkd: Any, tokenizer: Any, tmp_path: Path) -> None:
    teacher = tiny.make_model(7, vocab_size=SHARED)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"lmbda": 0.0, "beta": 0.0, "kd_top_k": 20}
    student = tiny.make_model(vocab_size=SHARED)
    expected = logged(gkd(teacher=teacher, model=student, **options), "kd_loss")
    with prompt_server(teacher, tokenizer) as server:
        trainer = gkd(
            teacher=None,
            teacher_model_name_or_path=MODEL_NAME,
            model=tiny.make_model(vocab_size=SHARED),
            teacher_server_url=server.url,
            teacher_tokenizer=str(tmp_path / "tokenizer"),
            **options,
        )
        assert logged(trainer, "kd_loss") == pytest.approx(expected, rel=1e-4)
        with pytest.raises(ValueError, match=re.escape(server.url)):
            gkd(
                teacher=None,
                teacher_model_name_or_path="another",
                teacher_server_url=server.url,
                teacher_tokenizer=str(tmp_path / "tokenizer"),
            )


# Context distillation


def test_the_teacher_reads_its_own_prompt_and_the_same_completion(gkd: Any, teacher: Any, tokenizer: Any) -> None:
    rows = tiny.make_rows(4)
    options = {"teacher_context": "few_shot", "teacher_context_shots": 1}
    trainer = gkd(lmbda=0.0, beta=0.0, kd_top_k=8, max_length=200, **options)
    context = TeacherContext(TeacherContextOptions(**options), rows)
    teacher_rows = []
    for row in rows:
        own = tokenize_example(tokenizer, row).input_ids
        ids = tokenize_example(tokenizer, {**row, "prompt": context.prompt(row)}).input_ids
        teacher_rows.append((ids, len(ids) - len(own)))
        assert len(ids) > len(own)
    expected = expected_kd(teacher, rows, tokenizer, beta=0.0, top_k=8, teacher_rows=teacher_rows)
    assert logged(trainer, "kd_loss")[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_context": "system", "teacher_context_system": "Be exact."},
        {"teacher_context": "gold_solution", "teacher_context_column": "completion"},
        {"teacher_context": "none"},
    ],
)
def test_live_and_offline_are_the_same_with_the_same_settings(
    gkd: Any, fit: Any, tokenizer: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    teacher, rows = tiny.make_model(7, vocab_size=SHARED), tiny.make_rows(4)
    reader = TransformersReader(teacher, tokenizer, 8, (1.0, 2.0))
    captured = capture(
        lambda: reader,
        tokenizer,
        with_teacher_prompts(rows, TeacherContextOptions(**options)),
        tmp_path / "store",
        CaptureConfig(top_k=8, encoding="lossless"),
        fingerprint={**TopKFingerprint(tokenizer)},
    )
    common = {"max_length": 250, "kd_temperature": 2.0, "kd_top_k": 8, "max_steps": 1}
    offline = fit(
        TopKDistillTrainer,
        TopKDistillConfig,
        model=tiny.make_model(vocab_size=SHARED),
        dataset=tiny.make_dataset(4),
        teacher_logits=str(captured.store.path),
        **common,
    )
    live = gkd(teacher=teacher, model=tiny.make_model(vocab_size=SHARED), lmbda=0.0, beta=0.0, **common, **options)
    assert logged(live, "kd_loss")[0] == pytest.approx(logged(offline, "kd_loss")[0], rel=1e-4)
    assert logged(live, "teacher_mass")[0] == pytest.approx(logged(offline, "teacher_mass")[0], rel=1e-5)


def TopKFingerprint(tokenizer: Any) -> dict[str, str]:  # noqa: N802
    from trl_reasoning_distill.data.tokenization import chat_template_fingerprint, tokenizer_fingerprint

    return {
        "teacher": "tiny",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": chat_template_fingerprint(tokenizer),
    }


def test_written_text_follows_the_teachers_prompt_too(gkd: Any) -> None:
    trainer = gkd(**GREEDY, teacher_context="few_shot", max_length=200, train=False)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    written = trainer._write(batch, by_student=True)
    for index in range(2):
        label = written["labels"][index] != -100
        completion = written["input_ids"][index][label]
        shift = int(written["teacher_shift"][index])
        places = label.nonzero()[:, 0] + shift
        assert written["teacher_input_ids"][index][places].equal(completion)
        prompt = batch["teacher_prompts"][index][batch["teacher_prompt_attention_mask"][index].bool()]
        assert written["teacher_input_ids"][index][: len(prompt)].equal(prompt)


# What is left behind


def test_written_text_and_what_the_teacher_said_of_it_can_be_used_offline(gkd: Any, fit: Any, tmp_path: Path) -> None:
    folder = tmp_path / "refresh"
    options = {
        **GREEDY,
        "kd_temperature": 2.0,
        "refresh_store": str(folder),
        "refresh_top_k": 8,
        "beta": 0.0,
        "kd_top_k": 8,
    }
    trainer = gkd(
        model=tiny.make_model(vocab_size=SHARED),
        learning_rate=0.0,
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        **options,
    )
    store = TopKStore.open(folder / "store")
    assert (store.rows, store.top_k, store.temperatures) == (4, 8, (1.0, 2.0))
    assert len(store) == trainer.supervised_tokens_seen
    assert not (folder / "parts").exists()
    frozen = fit(
        TopKDistillTrainer,
        TopKDistillConfig,
        model=tiny.make_model(vocab_size=SHARED),
        dataset=None,
        teacher_logits=str(folder / "store"),
        kd_top_k=8,
        kd_temperature=2.0,
        max_steps=1,
    )
    live = gkd(
        model=tiny.make_model(vocab_size=SHARED), **GREEDY, kd_temperature=2.0, beta=0.0, kd_top_k=8, max_steps=1
    )
    assert logged(frozen, "kd_loss")[0] == pytest.approx(logged(live, "kd_loss")[0], rel=1e-3)
    gkd(**options)
    assert TopKStore.open(folder / "store").rows == 8, "a second run is appended"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "laid out there"),
        ({"sft_weight": 1.0, "lmbda": 1.0}, "writes every completion"),
        ({"kd_top_k": 2.5}, "kd_top_k"),
        ({"temperature": -1.0}, "temperature"),
        ({"teacher_context": "few-shot"}, "must be one of none, few_shot"),
        ({"teacher_context": "system"}, "needs `teacher_context_system`"),
        ({"teacher_server_url": "http://x/v1"}, "name that the server knows"),
        (
            {"teacher_server_url": "http://x/v1", "teacher_model_name_or_path": "m", "kd_temperature": 2.0},
            "log-sum-exp",
        ),
        ({"refresh_store": "x", "lmbda": 0.0}, "writes nothing"),
        ({"lmbda": 1.5}, "lmbda"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKGKDConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_it_is_trls_gkd() -> None:
    assert issubclass(TopKGKDTrainer, GKDTrainer)
    assert issubclass(TopKGKDConfig, GKDConfig)
    assert TopKGKDTrainer._paper["id"] == "2306.13649"
