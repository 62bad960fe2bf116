"""What `trl-distill doctor` predicts of a training's memory, beside what a real training takes.

    python benchmarks/doctor.py --output benchmarks/results/doctor-cpu
    python benchmarks/doctor.py --quick --json

Each case trains three steps in a fresh process. On a GPU the peak is torch's own count; on a CPU it is the process's peak resident
size less what it was before the model was made.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 8000}
LARGE = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 10, "vocab_size": 32000}

CASES: dict[str, dict[str, Any]] = {
    "full, float32": {"bf16": False, "gradient_checkpointing": False},
    "full, bf16": {"bf16": True, "gradient_checkpointing": False},
    "full, bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True},
    "full, float32, accumulation 2": {"bf16": False, "gradient_checkpointing": False, "accumulation": 2},
    "LoRA, bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True, "lora": 16},
    "LoRA, float32": {"bf16": False, "gradient_checkpointing": False, "lora": 16},
}


def main() -> None:
    """Predict and measure each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="only these")
    parser.add_argument("--output", type=Path, help="also write the table to OUTPUT.md and the figures to OUTPUT.json")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(CASES[options.case], quick=options.quick)))
        return
    results: dict[str, dict[str, float]] = {}
    for name in options.cases:
        command = [sys.executable, __file__, "--case", name, *(["--quick"] if options.quick else [])]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            raise SystemExit(f"{name}: {child.stderr}")
        figures = json.loads(child.stdout.splitlines()[-1])
        results[name] = {**figures, "ratio": round(figures["predicted_mib"] / figures["measured_mib"], 3)}
        if not options.json:
            print(name, results[name], flush=True)
    if options.output:
        _write(options.output, results)
    print(json.dumps({"predicted_over_measured": results}))


def measure(case: dict[str, Any], *, quick: bool) -> dict[str, float]:
    """Train a few steps, and say what that took and what was predicted."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from step import make_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trl_reasoning_distill.doctor.memory import Sharding, TrainingShape, adapter_parameters, training_memory
    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

    torch.set_num_threads(1)
    on_cuda = torch.cuda.is_available()
    batch, length = (2, 128) if quick else (4, 512)
    config = Qwen2Config(num_attention_heads=8, num_key_value_heads=2, **(SMALL if quick else LARGE))
    rank, accumulation = case.get("lora"), case.get("accumulation", 1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = TrainingShape(
        batch=batch,
        length=length,
        compute_bytes=2 if case["bf16"] else 4,
        checkpointing=case["gradient_checkpointing"],
        accumulates=accumulation > 1,
        trainable=adapter_parameters(config, rank, targets) if rank else None,
    )
    predicted = training_memory(config, shape, Sharding(), cuda=on_cuda).tensors
    with tempfile.TemporaryDirectory() as folder:
        rows = torch.randint(0, config.vocab_size, (batch * accumulation * 3, length)).tolist()
        dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
        warm_up(make_tokenizer(), folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trainer = ReasoningSFTTrainer(
            Qwen2ForCausalLM(config),
            ReasoningSFTConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_steps=3,
                max_length=None,
                report_to="none",
                save_strategy="no",
                use_cpu=not on_cuda,
                bf16=case["bf16"],
                gradient_checkpointing=case["gradient_checkpointing"],
            ),
            train_dataset=dataset,
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM") if rank else None,
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    measured = torch.cuda.max_memory_allocated() if on_cuda else peak
    return {"predicted_mib": round(predicted / MIB, 1), "measured_mib": round(measured / MIB, 1)}


def warm_up(tokenizer: Any, folder: str) -> None:
    """Train a tiny model, so that libraries and thread pools are loaded before the count begins."""
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    rows = [[1, 2, 3, 4]] * 2
    options = ReasoningSFTConfig(output_dir=folder, max_steps=1, report_to="none", save_strategy="no", bf16=False)
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    ReasoningSFTTrainer(Qwen2ForCausalLM(config), options, train_dataset=dataset, processing_class=tokenizer).train()


def _write(output: Path, results: dict[str, dict[str, float]]) -> None:
    lines = [
        f"`python benchmarks/doctor.py --output {output}`",
        "",
        "| training | predicted MiB | measured MiB | ratio |",
    ]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {name} | {row['predicted_mib']:,.0f} | {row['measured_mib']:,.0f} | {row['ratio']:.2f} |"
        for name, row in results.items()
    ]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
