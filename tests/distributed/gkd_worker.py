"""GKD on any number of processes: `accelerate launch … gkd_worker.py STUDENT TEACHER OUTPUT [NAME=VALUE …]`.

As `train_worker.py`; `self=1` lets the student as it was teach, `lora=1` trains an adapter.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

STEPS, GLOBAL_BATCH = 2, 4


def train(
    student: str,
    teacher: str,
    output: Path,
    *,
    expect: str = "NO",
    lora: bool = False,
    itself: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train for a few steps and save; the result of the main process."""
    import torch

    from tests.distributed.train_worker import shim_fsdp_on_cpu
    from tests.trainer.tiny import make_dataset, make_tokenizer
    from trl_reasoning_distill.scripts.training import save_final_model
    from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
    from trl_reasoning_distill.trainer.topk_gkd import TopKGKDTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if expect == "FSDP":
        shim_fsdp_on_cpu()
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "teacher_model_name_or_path": None if itself else teacher,
        "top_k": 6,
        "kd_temperature": 2.0,
        "beta": 0.0,
        "lmbda": 0.0,
        "max_new_tokens": 8,
        "bf16": False,
        "use_cpu": expect != "FSDP",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "learning_rate": 1e-2,
        # Where a gradient is nearly zero, AdamW's own epsilon makes the update its sign, and so rounding a whole step
        "adam_epsilon": 1e-4,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "preview_examples": 0,
        "model_init_kwargs": {"dtype": "float32"},
    }
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    trainer = TopKGKDTrainer(
        student,
        args=TopKGKDConfig(**{**settings, **options}),
        train_dataset=make_dataset(8),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
    found = trainer.accelerator.distributed_type.value
    assert (found, trainer.accelerator.num_processes) == (expect, world), (found, trainer.accelerator.num_processes)
    trainer.train()
    save_final_model(trainer, output / "final_model")
    names = (
        "loss",
        "grad_norm",
        "sft_loss",
        "kd_loss",
        "teacher_mass",
        "top1_agreement",
        "num_tokens",
        "on_policy_share",
    )
    names = (*names, "completion_length", "truncated_share")
    history = trainer.state.log_history
    result: dict[str, Any] = {name: [entry[name] for entry in history if name in entry] for name in names}
    result["supervised_tokens"] = trainer.supervised_tokens_seen
    model = getattr(trainer.teacher, "model", None)
    result["teacher_is_sharded"] = model is not None and any(
        hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor") for parameter in model.parameters()
    )
    if trainer.is_world_process_zero():
        (output / "result.json").write_text(json.dumps(result))
    if world > 1:
        trainer.accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return result


if __name__ == "__main__":
    student, teacher, output, *words = sys.argv[1:]
    pairs = (word.split("=", 1) for word in words)
    train(
        student,
        teacher,
        Path(output),
        **{name: value if name == "expect" else json.loads(value) for name, value in pairs},
    )
