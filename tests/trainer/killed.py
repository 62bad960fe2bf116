"""Real trainings to be killed: each a process of its own, forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.trainer import tiny
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

STEPS = 12
FINAL = "final.pt"


def train(output: str, store: str | None) -> None:
    """Train to the end from the newest valid checkpoint, if there is one, saving after each step; leaves `FINAL`.

    Everything that must survive is in it: dropout (so the random numbers), shuffling over several epochs, accumulation, AdamW, a schedule, clipping, the
    warm-up of the distillation's weight and an adaptive KL coefficient.
    """
    torch.set_num_threads(1)
    options: dict[str, Any] = {
        "output_dir": output, "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "optim": "adamw_torch", "lr_scheduler_type": "cosine",
        "warmup_steps": 3, "max_grad_norm": 1.0, "gradient_checkpointing": False, "use_kl_regularization": True, "kl_target": 0.05,
    }  # fmt: skip
    dataset, trainer_class, config_class = tiny.make_dataset(), ReasoningSFTTrainer, ReasoningSFTConfig
    if store is not None:
        trainer_class, config_class = TopKDistillTrainer, TopKDistillConfig
        options |= {"teacher_logits": store, "top_k": 6, "kd_warmup_steps": 8}
    model = tiny.make_model(attention_dropout=0.1)
    trainer = trainer_class(
        model, config_class(**options), train_dataset=dataset, processing_class=tiny.make_tokenizer()
    )
    trainer.train(resume_from_checkpoint=trainer.find_checkpoint(True, required=False).path)
    result = {
        "weights": trainer.model.state_dict(),
        "optimizer": [entry for state in trainer.optimizer.state_dict()["state"].values() for entry in state.values()],
        "coefficient": trainer.kl_controller.coefficient,
        "tokens": (trainer.token_count.tokens, trainer.token_count.supervised_tokens),
        "log": [
            {
                name: entry[name]
                for name in ("step", "loss", "kl_loss", "kl_coef", "kd_weight", "num_tokens")
                if name in entry
            }
            for entry in trainer.state.log_history
        ],
    }
    torch.save(result, f"{output}/{FINAL}.part")
    os.replace(f"{output}/{FINAL}.part", f"{output}/{FINAL}")


def start(output: Path, store: Path | None) -> BaseProcess:
    """`train` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=train, args=(str(output), None if store is None else str(store)))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """SIGKILL, and wait."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def kill_while_saving(process: BaseProcess, output: Path, manifest: str) -> bool:
    """Kill as soon as a checkpoint's folder is there without its manifest; whether it was caught so."""
    known = set(output.glob("checkpoint-*"))
    while process.is_alive():
        new = set(output.glob("checkpoint-*")) - known
        if new:
            kill(process)
            return any(not (folder / manifest).exists() for folder in new)
        time.sleep(0.0005)
    return False
