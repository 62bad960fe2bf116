"""The trainings that are the same on any number of processes: what is trained, with which loss, and what is compared."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.trainer import tiny
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.scripts.training import save_final_model
from trl_reasoning_distill.trainer.accuracy import AccuracyCallback, HeldOutProblem
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.reference import FrozenReference
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer

GLOBAL_BATCH = 4
LOSSES = (
    *("loss", "grad_norm", "sft_loss", "kd_loss", "kl_loss", "kl_coef", "teacher_mass", "top1_agreement", "eval_loss"),
)
COUNTS = ("num_tokens", "on_policy_share", "completion_length", "truncated_share", "eval_math_accuracy")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        trainer: `sft`, `kd` (from a store) or `gkd` (from a live teacher).
        model: Folder of the student.
        lora: Train an adapter, with gradient checkpointing.
        options: Of the trainer's configuration.
        problems: Held-out problems that are answered after each step.
    """

    trainer: str
    model: str = "student"
    lora: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: int = 0


_TEACHER = {"teacher_model_name_or_path": "teacher"}
# One step on the dataset's text, then one on the student's own, written with the row's own random numbers, and fine-tuned on the rest
_MIXED = {"lmbda": 0.5, "seed": 1, "sft_weight": 0.5}
_KL = {"use_kl_regularization": True, "kl_coef": 2.0, "kl_target": 0.01}
_ACCURACY = {"add_think_tokens": True, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}

_STUDENTS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": True}, "tied": {"model": "tied"}}
_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}), "kd": ("kd", {}), "kl": ("sft", _KL), "gkd": ("gkd", {**_TEACHER, **_MIXED}),
}  # fmt: skip
MATRIX = {
    f"{student}-{loss}": Cell(trainer, options=options, **what)
    for loss, (trainer, options) in _LOSSES.items()
    for student, what in _STUDENTS.items()
}
FURTHER = {
    "packed": Cell("kd", options={"gradient_accumulation_steps": 2, "packing": True, "max_length": 64}),
    "saved": Cell("kd", options={**_KL, "save_strategy": "steps", "save_steps": 1}),
    "former-self": Cell("gkd", lora=True, options={"teacher_context": "few_shot", **_MIXED}),
    "teacher-writes": Cell("gkd", options={**_TEACHER, "seq_kd": True, "sft_weight": 1.0}),
    # Five for two ranks: one of them answers a problem that the other has already
    "accuracy": Cell("sft", model="plain", options=_ACCURACY, problems=5),
    "accuracy-lora": Cell("sft", model="plain", lora=True, options=_ACCURACY, problems=5),
    # At 1e-3 this small a model is chaotic: one process that sums in another order is 6e-4 away from itself after a hundred steps
    "hundred-sft": Cell("sft", options={"max_steps": 100, "learning_rate": 3e-4}),
    "hundred-kd": Cell("kd", options={"max_steps": 100, "learning_rate": 3e-4}),
}
CELLS = MATRIX | FURTHER


def make_material(folder: Path) -> Path:
    """Students, a teacher with more rows in its embedding, and a store of eight rows, on disk."""
    tokenizer = tiny.make_tokenizer()
    models = {
        "student": tiny.make_model(), "tied": tiny.make_model(tied=True), "plain": tiny.make_model(),
        "teacher": tiny.make_model(7, vocab_size=272),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(folder / name)
        (tiny.make_tokenizer(think_tokens=False) if name == "plain" else tokenizer).save_pretrained(folder / name)
    tiny.make_store(folder / "store", models["teacher"], tokenizer, tiny.make_rows())
    return folder


def train(cell: Cell, material: Path, output: Path, *, expect: str = "NO") -> dict[str, Any]:
    """Train a cell on all processes of this launch. Leaves `final_model/` and `result.json` in `output`.

    Args:
        cell: What to train.
        material: What `make_material` made.
        output: Folder for the results.
        expect: The distributed type that the launch must have led to: a wrong configuration silently trains on one process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    trainer = make_trainer(cell, material, output, expect, GLOBAL_BATCH // world)
    found = trainer.accelerator.distributed_type.value
    assert (found, trainer.accelerator.num_processes) == (expect, world), (found, trainer.accelerator.num_processes)
    answers = watch_answers(trainer, cell.problems) if cell.problems else []
    trainer.train(resume_from_checkpoint=trainer.find_checkpoint(True, required=False).path)
    check_sharding(trainer)
    save_final_model(trainer, output / "final_model")
    history = trainer.state.log_history
    result: dict[str, Any] = {name: [entry[name] for entry in history if name in entry] for name in (*LOSSES, *COUNTS)}
    result |= {"supervised_tokens": trainer.supervised_tokens_seen, "answers": answers}
    same_everywhere = [answers, trainer.kl_controller and trainer.kl_controller.coefficient]
    assert gather_object([same_everywhere]) == [same_everywhere] * world
    if trainer.is_world_process_zero():
        (output / "result.json").write_text(json.dumps(result))
    del trainer
    gc.collect()  # ZeRO's hooks and FSDP's shards, before the next cell
    return result


def make_trainer(cell: Cell, material: Path, output: Path, expect: str, batch: int) -> Any:
    """The trainer of a cell."""
    options: dict[str, Any] = {
        "output_dir": str(output),
        "bf16": False,
        "use_cpu": expect != "FSDP",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-2,
        # Where a gradient is nearly zero, AdamW's own epsilon makes the update its sign, and so rounding a whole step
        "adam_epsilon": 1e-4,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": cell.lora,
        "disable_tqdm": True,
        "preview_examples": 0,
        "model_init_kwargs": {"dtype": "float32"},
    }
    rows: dict[str, Dataset] = {"train_dataset": tiny.make_dataset(8)}
    if cell.problems:
        rows["eval_dataset"] = rows["train_dataset"].select(range(4))
    classes: Any = (ReasoningSFTTrainer, ReasoningSFTConfig)
    if cell.trainer == "kd":
        classes, rows = (TopKDistillTrainer, TopKDistillConfig), {}
        options |= {"teacher_logits": str(material / "store"), "kd_top_k": 6, "kd_warmup_steps": 2}
    elif cell.trainer == "gkd":
        classes = (TopKGKDTrainer, TopKGKDConfig)
        options |= {
            "kd_top_k": 6,
            "kd_temperature": 2.0,
            "beta": 0.0,
            "lmbda": 0.0,
            "max_new_tokens": 8,
            "max_steps": 2,
        }
    options |= cell.options
    if "teacher_model_name_or_path" in options:
        options["teacher_model_name_or_path"] = str(material / options["teacher_model_name_or_path"])
    peft_config = None
    if cell.lora:
        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    trainer_class, config_class = classes
    return trainer_class(str(material / cell.model), args=config_class(**options), peft_config=peft_config, **rows)


def watch_answers(trainer: Any, problems: int) -> list[list[str]]:
    """Let held-out problems be answered after each step; a list that will hold what was answered on this rank."""
    questions = [[{"role": "user", "content": "?" * (n + 1)}] for n in range(problems)]
    held_out = [HeldOutProblem(question, str(n)) for n, question in enumerate(questions)]
    callback: Any = AccuracyCallback(held_out, ReasoningFormat.preset("think"), max_new_tokens=9).attach(trainer)
    answers: list[list[str]] = []
    summarize = callback._summarize
    callback._summarize = lambda answered: (
        answers.append([item.text for item in answered]),
        summarize(answered),
    )[1]
    return answers


def check_sharding(trainer: Any) -> None:
    """Under ZeRO-3 and FSDP2 no rank holds a whole model: not the student, not a frozen copy of it, not a live teacher."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    is_sharded = trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
    models = [trainer.model, getattr(getattr(trainer, "teacher", None), "model", None)]
    models += [trainer.reference.model] if isinstance(trainer.reference, FrozenReference) else []
    for model in filter(None, models):
        for module in model.modules() if trainer.is_fsdp_enabled else ():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in model.named_parameters():
            assert is_shard(parameter) == is_sharded, name


def is_shard(parameter: Any) -> bool:
    """Whether a parameter is kept in parts over the ranks."""
    if hasattr(parameter, "ds_tensor"):
        return bool(parameter.ds_tensor.numel() < parameter.ds_numel)
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel() < parameter.numel()
    return False


def largest_differences(one: Path, two: Path) -> tuple[float, float]:
    """Between two results of a cell: of a loss or gradient norm, by its size where that is above 1, and of a weight.

    Raises:
        AssertionError: If the second failed, or they differ in what is counted, or in which weights there are.
    """
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    assert "error" not in second, second["error"]
    for name in (*COUNTS, "supervised_tokens", "answers"):
        assert second[name] == first[name], name
    loss = 0.0
    for name in LOSSES:
        for mine, other in zip(first[name], second[name], strict=True):
            loss = max(loss, abs(mine - other) / max(1.0, abs(mine)))
    weights, others = (load_weights(folder / "final_model") for folder in (one, two))
    if "lm_head.weight" in others.keys() - weights.keys():  # FSDP2's whole state writes a tied head out
        assert others.pop("lm_head.weight").equal(others["model.embed_tokens.weight"])
    assert weights.keys() == others.keys()
    return loss, max((weights[name] - others[name]).abs().max().item() for name in weights)


def load_weights(model: Path) -> dict[str, torch.Tensor]:
    """All weights that a training saved; of an adapter, the adapter's."""
    (file,) = model.glob("*.safetensors")
    return load_file(file)
