"""What `trl-distill doctor` predicts of a training's memory, beside what torch allocates in a real one.

    python benchmarks/doctor.py --output benchmarks/results/doctor-cpu
    python benchmarks/doctor.py --quick --json

Each case trains three steps. Weights, optimizer and the other model are summed tensor by tensor; the peak is that of torch's own
allocator: on a CPU by the profiler's memory events, on a GPU by `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MIB = 2**20

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 8000}
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 16000}

CASES: dict[str, dict[str, Any]] = {
    "full, float32": {},
    "full, bf16": {"bf16": True},
    "full, bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True},
    "full, float32, accumulation 2": {"accumulation": 2},
    "LoRA, float32": {"lora": 16},
    "LoRA, bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True, "lora": 16},
    "live teacher, float32": {"teacher": True},
    "live teacher, bf16": {"bf16": True, "teacher": True},
}


def main() -> None:
    """Predict and measure each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="only these")
    parser.add_argument("--output", type=Path, help="also write the table to OUTPUT.md and the figures to OUTPUT.json")
    options = parser.parse_args()
    results = {}
    for name in options.cases:
        results[name] = measure(CASES[name], quick=options.quick)
        if not options.json:
            print(name, results[name], flush=True)
    if options.output:
        _write(options.output, results, quick=options.quick)
    print(json.dumps({"predicted_over_measured": results}))


def measure(case: dict[str, Any], *, quick: bool) -> dict[str, float]:
    """Train a few steps, and say by part what that took and what was predicted; in MiB, and the ratio of the peaks."""
    import torch
    from peft import LoraConfig
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trl_reasoning_distill.doctor.memory import (
        LiveTeacher,
        Sharding,
        TrainingShape,
        adapter_parameters,
        model_shape,
        training_memory,
    )

    torch.set_num_threads(1)
    sizes, batch, length = (SMALL, 2, 128) if quick else (LARGE, 4, 256)
    config = Qwen2Config(num_attention_heads=8, num_key_value_heads=2, **sizes)
    big = Qwen2Config(
        num_attention_heads=8, num_key_value_heads=2, **{**sizes, "hidden_size": sizes["hidden_size"] * 3 // 2}
    )
    rank, accumulation = case.get("lora"), case.get("accumulation", 1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = TrainingShape(
        batch=batch,
        length=length,
        compute_bytes=2 if case.get("bf16") else 4,
        checkpointing=case.get("gradient_checkpointing", False),
        accumulates=accumulation > 1,
        trainable=adapter_parameters(config, rank, targets) if rank else None,
        teacher=LiveTeacher(model_shape(big), 4) if case.get("teacher") else None,
    )
    predicted = training_memory(config, shape, Sharding(), cuda=torch.cuda.is_available())
    peft_config = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM") if rank else None
    with peak_of_torch() as peak:
        teacher = Qwen2ForCausalLM(big) if case.get("teacher") else None
        trainer = train(Qwen2ForCausalLM(config), teacher, peft_config, case, batch, length)
    measured = {
        "weights": _bytes(trainer.model.parameters()),
        "optimizer": _bytes(t for state in trainer.optimizer.state.values() for t in state.values()),
        "other_model": _bytes(teacher.parameters()) if teacher else 0,
        "peak": peak[0],
    }
    told = {name: getattr(predicted, name) for name in ("weights", "optimizer", "other_model")}
    figures = {f"predicted_{name}": value for name, value in {**told, "peak": predicted.tensors}.items()}
    figures |= {f"measured_{name}": value for name, value in measured.items()}
    return {name: round(value / MIB, 1) for name, value in figures.items()} | {
        "ratio": round(predicted.tensors / measured["peak"], 3)
    }


def train(model: Any, teacher: Any, peft_config: Any, case: dict[str, Any], batch: int, length: int) -> Any:
    """Three steps of `sft`, or of `gkd` where there is a teacher, on random tokens."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
    from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
    from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

    accumulation = case.get("accumulation", 1)
    ids = torch.randint(4, 64, (batch * accumulation * 3, length)).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 8 + row[8:] for row in ids]})
    words = {f"{number}": number for number in range(model.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 3,
            "max_length": None,
            "report_to": "none",
            "save_strategy": "no",
            "preview_examples": 0,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": case.get("bf16", False),
            "gradient_checkpointing": case.get("gradient_checkpointing", False),
        }
        common = {"train_dataset": dataset, "processing_class": tokenizer, "peft_config": peft_config}
        if teacher is None:
            trainer: Any = ReasoningSFTTrainer(model, ReasoningSFTConfig(**options), **common)
        else:
            config = TopKGKDConfig(**options, lmbda=0.0, max_new_tokens=8)
            trainer = TopKGKDTrainer(model, teacher, config, teacher_tokenizer=tokenizer, **common)
        trainer.train()
    return trainer


@contextlib.contextmanager
def peak_of_torch() -> Iterator[list[int]]:
    """The most bytes that torch's allocator holds at a time inside the block, as the list's only item after it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what an earlier case has left would be given back inside the block
    peak = [0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated()
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    held = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak[0] = max(peak[0], held)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _write(output: Path, results: dict[str, dict[str, float]], *, quick: bool) -> None:
    parts = ("weights", "optimizer", "other_model", "peak")
    lines = [
        f"`python benchmarks/doctor.py{' --quick' * quick} --output {output}`",
        "",
        "In MiB, predicted / measured.",
        "",
    ]
    lines += [f"| training | {' | '.join(part.replace('_', ' ') for part in parts)} | ratio of the peaks |"]
    lines += ["|---|" + "---|" * (len(parts) + 1)]
    for name, row in results.items():
        cells = [f"{row[f'predicted_{part}']:,.1f} / {row[f'measured_{part}']:,.1f}" for part in parts]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['ratio']:.2f} |")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
