"""A fine-tuning that measures accuracy, on any number of processes: `accelerate launch … accuracy_worker.py MODEL KIND OUTPUT EXPECTED_TYPE`.

KIND is `full` or `lora`. Leaves `result.json` in OUTPUT: what each rank measured, and the losses.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def train(model: str, kind: str, output: Path, expect: str = "NO") -> list[dict[str, Any]]:
    """Train three steps with an evaluation after each; what each rank measured, on the main process."""
    from accelerate.utils import gather_object
    from peft import LoraConfig

    from tests.distributed.train_worker import shim_fsdp_on_cpu
    from tests.trainer import tiny
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.trainer.accuracy import AccuracyCallback, HeldOutProblem
    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

    if expect == "FSDP":
        shim_fsdp_on_cpu()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = ReasoningSFTConfig(
        output_dir=str(output),
        bf16=False,
        use_cpu=expect != "FSDP",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=2,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        disable_tqdm=True,
        add_think_tokens=True,
        preview_examples=1,
        model_init_kwargs={"dtype": "float32"},
    )
    adapter = (
        LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0, task_type="CAUSAL_LM") if kind == "lora" else None
    )
    rows = tiny.make_dataset()
    trainer = ReasoningSFTTrainer(
        model, config, train_dataset=rows, eval_dataset=rows.select(range(4)), peft_config=adapter
    )
    found = trainer.accelerator.distributed_type.value
    assert (found, trainer.accelerator.num_processes) == (expect, world), (found, trainer.accelerator.num_processes)
    # Five for two ranks: one of them answers a problem that the other has already
    problems = [HeldOutProblem([{"role": "user", "content": "?" * (n + 1)}], str(n)) for n in range(5)]
    callback = AccuracyCallback(problems, ReasoningFormat.preset("think"), max_new_tokens=9).attach(trainer)
    answers: list[list[str]] = []
    summarize = callback._summarize
    callback._summarize = lambda answered: (answers.append([item.text for item in answered]), summarize(answered))[1]  # type: ignore[method-assign]
    trainer.train()
    history = trainer.state.log_history
    mine = {
        "answers": answers,
        "accuracy": [entry["eval_math_accuracy"] for entry in history if "eval_math_accuracy" in entry],
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "eval_loss": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
    }
    results = gather_object([mine])
    if trainer.is_world_process_zero():
        (output / "result.json").write_text(json.dumps(results))
    if world > 1:
        import torch

        trainer.accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    model, kind, output, expect = sys.argv[1:]
    train(model, kind, Path(output), expect)
