"""A whole training step, forward, backward and optimizer, beside what a user would pick instead.

    python benchmarks/step.py --output benchmarks/results/step-bf16     # Qwen2.5-0.5B with random weights, minutes
    python benchmarks/step.py --quick --json

Every case is a trainer with its own data on one batch of random tokens, all supervised.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from harness import Goal, Run, Suite
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_reasoning_distill.data.tokenization import tokenizer_fingerprint
from trl_reasoning_distill.losses.divergence import topk_divergence
from trl_reasoning_distill.teacher.store import TopKLogProbs, TopKStoreWriter
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.targets import KD_IDS, KD_LOG_PROBS
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

TEMPERATURE = 2.0


class HuggingFaceTrainer(SFTTrainer):
    """The model's own loss from all logits, as `transformers.Trainer` trains it."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False).loss


class TextbookTrainer(TopKDistillTrainer):
    """Cross-entropy plus Top-K KL from all logits, with autograd."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1].float().flatten(0, 1)
        labels = inputs["labels"][:, 1:].flatten()
        ids, teacher = inputs[KD_IDS][:, 1:].flatten(0, 1), inputs[KD_LOG_PROBS][:, 1:].flatten(0, 1)
        student = torch.log_softmax(logits / TEMPERATURE, -1).gather(-1, ids)
        kd = topk_divergence(student, teacher).sum() * TEMPERATURE**2
        return (F.cross_entropy(logits, labels, reduction="sum") + 0.35 * kd) / num_items_in_batch


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The least that a trainer takes for one; no text is tokenized here."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def make_store(folder: str, rows: list[list[int]], options: argparse.Namespace, tokenizer: Any, vocab: int) -> str:
    """A store of random targets for the rows."""
    rng = np.random.default_rng(0)
    path = Path(folder) / "store"
    fingerprint = {"tokenizer": tokenizer_fingerprint(tokenizer)}
    with TopKStoreWriter(path, top_k=options.k, temperatures=(1.0, TEMPERATURE), fingerprint=fingerprint) as writer:
        for row in rows:
            count = len(row) - 1
            logits = np.sort(rng.normal(size=(count, options.k)) * 2, -1)[:, ::-1].astype(np.float32)
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True) / 0.97)
            at_t = np.log(np.exp(log_probs / TEMPERATURE).sum(-1) + 0.5)
            ids = np.stack([rng.choice(vocab, options.k, replace=False) for _ in range(count)]).astype(np.int32)
            lse = np.stack([np.zeros(count), at_t], -1).astype(np.float32)
            writer.add(row, row, TopKLogProbs(ids, log_probs.astype(np.float32), lse, (1.0, TEMPERATURE)))
    return str(path)


def step(trainer_class: type, config_class: type, **config: Any) -> Any:
    """A case: one step of a trainer."""

    def prepare(options: argparse.Namespace, small: bool) -> Run:
        tokens, vocab = (16, 500) if small else (options.tokens, options.vocab)
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocab,
                hidden_size=options.hidden,
                intermediate_size=options.hidden * 38 // 7,  # 4,864, as the rest the shape of Qwen2.5-0.5B
                num_hidden_layers=options.layers,
                num_attention_heads=options.hidden // 64,
                num_key_value_heads=min(2, options.hidden // 64),
                tie_word_embeddings=True,
                pad_token_id=0,
            )
        ).to(getattr(torch, options.dtype))
        rows = torch.randint(2, vocab, (options.batch, tokens // options.batch)).tolist()
        tokenizer = make_tokenizer()
        on_cpu = options.device == "cpu"
        settings: dict[str, Any] = {
            "per_device_train_batch_size": options.batch,
            "bf16": False,
            "use_cpu": on_cpu,
            "report_to": "none",
            "max_length": None,
            "gradient_checkpointing": False,
            "optim": "sgd",
            "disable_tqdm": True,
            **config,
        }
        with tempfile.TemporaryDirectory() as folder:
            if issubclass(config_class, TopKDistillConfig):
                settings |= {
                    "teacher_logits": make_store(folder, rows, options, tokenizer, vocab),
                    "kd_top_k": options.k,
                    "kd_temperature": TEMPERATURE,
                    "kd_warmup_ratio": 0.0,
                }
            trainer = trainer_class(
                model,
                config_class(folder, **settings),
                train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
                processing_class=tokenizer,
            )
            batch = next(iter(trainer.get_train_dataloader()))
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        count = batch["labels"][:, 1:].ne(-100).sum()

        def run() -> None:
            trainer.training_step(trainer.model, dict(batch), num_items_in_batch=count)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        return run

    return prepare


SUITE = Suite(
    script=__file__,
    description=__doc__.splitlines()[0],
    cases={
        "Hugging Face SFT": step(HuggingFaceTrainer, SFTConfig),
        "TRL SFT": step(SFTTrainer, SFTConfig),
        "textbook SFT + KD": step(TextbookTrainer, TopKDistillConfig),
        "ours SFT": step(ReasoningSFTTrainer, ReasoningSFTConfig),
        "ours SFT + KD": step(TopKDistillTrainer, TopKDistillConfig),
        "ours SFT + KL to a frozen copy": step(ReasoningSFTTrainer, ReasoningSFTConfig, use_kl_regularization=True),
    },
    goals=[
        Goal("ours SFT + KD", "ours SFT", 1.05),
        Goal("ours SFT + KD", "Hugging Face SFT", 0.95),
        Goal("ours SFT + KD", "TRL SFT", 0.95),
        Goal("ours SFT + KD", "textbook SFT + KD", 0.85),
        Goal("ours SFT + KD", "TRL SFT", 1.00, metric="peak_mib"),
    ],
    options={
        "tokens": (512, 64),
        "batch": (2, 2),
        "hidden": (896, 64),
        "layers": (24, 2),
        "vocab": (151936, 4001),
        "k": (25, 25),
        "dtype": ("bfloat16", "bfloat16"),
        "device": ("cpu", "cpu"),
    },
)

if __name__ == "__main__":
    SUITE.main()
