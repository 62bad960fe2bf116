"""A distillation on any number of processes: `accelerate launch … train_worker.py MODEL STORE OUTPUT [NAME=VALUE …]`.

Leaves `result.json` (losses, gradient norms, counts) and `final_model/` in OUTPUT. Options of the config may follow; `lora=1` trains an
adapter, `expect=TYPE` is the distributed type that the launch must have led to (a wrong config silently trains on one process).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

STEPS, GLOBAL_BATCH = 3, 4


def shim_fsdp_on_cpu() -> None:
    """Let accelerate take FSDP on gloo processes; it would silently fall back to DDP."""
    import torch
    from accelerate import state
    from accelerate.utils import DistributedType

    os.environ.pop("ACCELERATE_USE_CPU", None)
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def zero_stage(trainer: Any) -> int:
    """Stage of ZeRO that this runs under; 0 without DeepSpeed."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin.zero_stage if plugin is not None else 0


def check_sharded(model: Any) -> None:
    """FSDP2, and every parameter one of its shards."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    assert isinstance(model, FSDPModule)
    model.reshard()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.to_local().numel() < parameter.numel() or parameter.numel() < 2, name


def check_reference_is_sharded(trainer: Any) -> None:
    """No rank holds the whole frozen copy."""
    if not hasattr(trainer.reference, "model"):
        return
    if trainer.is_fsdp_enabled:
        for module in trainer.reference.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        check_sharded(trainer.reference.wrapped)
    else:
        parameters = list(trainer.reference.model.parameters())
        assert all(hasattr(parameter, "ds_id") for parameter in parameters)
        assert max(parameter.ds_tensor.numel() for parameter in parameters) < max(p.ds_numel for p in parameters)


def train(
    model: str, store: str, output: Path, *, expect: str = "NO", lora: bool = False, **options: Any
) -> dict[str, Any]:
    """Train for a few steps on the store's rows and save; the result of the main process."""
    import torch

    from tests.trainer.tiny import make_tokenizer
    from trl_reasoning_distill.scripts.training import save_final_model
    from trl_reasoning_distill.trainer.config import TopKDistillConfig
    from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if expect == "FSDP":
        shim_fsdp_on_cpu()
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "teacher_logits": store,
        "top_k": 6,
        "kd_warmup_steps": 2,
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
        "model_init_kwargs": {"dtype": "float32"},
    }
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    config = TopKDistillConfig(**{**settings, **options})
    trainer = TopKDistillTrainer(model, config, processing_class=make_tokenizer(), peft_config=peft_config)
    found = trainer.accelerator.distributed_type.value
    assert (found, trainer.accelerator.num_processes) == (expect, world), (found, trainer.accelerator.num_processes)
    trainer.train(resume_from_checkpoint=trainer.find_checkpoint(True, required=False).path)
    if expect == "FSDP":
        check_sharded(trainer.model)
    if zero_stage(trainer) == 3 or expect == "FSDP":
        check_reference_is_sharded(trainer)
    save_final_model(trainer, output / "final_model")
    names = (
        "loss",
        "grad_norm",
        "sft_loss",
        "kd_loss",
        "kl_loss",
        "kl_coef",
        "teacher_mass",
        "top1_agreement",
        "num_tokens",
    )
    history = trainer.state.log_history
    result: dict[str, Any] = {name: [entry[name] for entry in history if name in entry] for name in names}
    result["supervised_tokens"] = trainer.supervised_tokens_seen
    if trainer.kl_controller is not None:
        coefficient = torch.tensor([trainer.kl_controller.coefficient], dtype=torch.float64)
        everywhere = trainer.accelerator.gather(coefficient).tolist()
        assert everywhere == [everywhere[0]] * world
    if trainer.is_world_process_zero():
        (output / "result.json").write_text(json.dumps(result))
    if world > 1:
        trainer.accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return result


if __name__ == "__main__":
    model, store, output, *words = sys.argv[1:]
    pairs = (word.split("=", 1) for word in words)
    train(
        model, store, Path(output), **{name: value if name == "expect" else json.loads(value) for name, value in pairs}
    )
