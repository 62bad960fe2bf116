"""Train the quickstart's embedded teacher and base student from scratch: `python recipes/quickstart/pretrain.py --help`.

Both are real Llama models, trained on `synthetic_arithmetic` and nothing else. The teacher sees every family and one to
four steps; the student is smaller and sees problems of one and two steps only, so that it knows the words and the sums but
has never carried a longer chain. Neither sees a test problem. The files this script writes are shipped in
`recipes/quickstart/models/`; run it only to make them anew.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.synthetic import draw_problem, iter_problems

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|im_start|>assistant\n' -}}{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
FORMAT = ReasoningFormat.preset("think")

# What each model is, and how it is trained. `pad_to` differs on purpose: as with Qwen2.5 7B and 0.5B, teacher and student share a
# tokenizer but not the number of embedding rows.
ROLES: dict[str, dict[str, int | float | tuple[int, ...]]] = {
    "teacher": {
        "hidden_size": 192,
        "layers": 4,
        "heads": 6,
        "pad_to": 128,
        "steps": (1, 2, 3, 4),
        "train_steps": 2000,
        "batch": 48,
        "lr": 5e-3,
    },
    "student": {
        "hidden_size": 128,
        "layers": 4,
        "heads": 4,
        "pad_to": 8,
        "steps": (1, 2),
        "train_steps": 1500,
        "batch": 48,
        "lr": 5e-3,
    },
}


def train_tokenizer(samples: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose words are whole tokens and whose digits stay single; any text can be encoded."""
    problems = iter_problems("train", seed=seed, steps=(1, 2, 3, 4))
    texts = [
        text
        for _, problem in zip(range(samples), problems, strict=False)
        for text in (problem.question, problem.solution or "")
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*texts, "user assistant system"] * 2,
        trainers.BpeTrainer(
            vocab_size=1024,
            min_frequency=2,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([FORMAT.open_tag, FORMAT.close_tag])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> tuple[list[int], int]:
    """Token ids of the rendered conversation, and how many of them are the prompt."""
    question = [{"role": "user", "content": problem.question}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    completion = FORMAT.render(problem.solution or "", problem.answer or "") + EOS
    return prompt_ids + tokenizer.encode(completion, add_special_tokens=False), len(prompt_ids)


def batches(
    tokenizer: PreTrainedTokenizerFast, steps: tuple[int, ...], size: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of fresh problems, of similar length within a batch."""
    rng = random.Random(seed)
    while True:
        rows = sorted(
            (encode(tokenizer, draw_problem(rng, "train", steps)) for _ in range(size * 16)),
            key=lambda row: len(row[0]),
        )
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            input_ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
            labels = torch.full((len(chunk), width), -100)
            for row, (ids, prompt_length) in enumerate(chunk):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
            mask = torch.arange(width)[None] < torch.tensor([len(ids) for ids, _ in chunk])[:, None]
            yield {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, steps: tuple[int, ...] = (2, 3, 4)
) -> float:
    """Greedy accuracy on the first `count` test problems."""
    model.eval()
    problems = [p for _, p in zip(range(count), iter_problems("test", steps=steps), strict=False)]
    right = 0
    for start in range(0, count, 100):
        chunk = problems[start : start + 100]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": p.question}], add_generation_prompt=True, tokenize=False
            )
            for p in chunk
        ]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False
        )
        output = model.generate(
            **inputs,
            max_new_tokens=96,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(FORMAT.parse(text).answer == p.answer for text, p in zip(texts, chunk, strict=True))
    model.train()
    return right / count


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for the weight matrices (Jordan et al. 2024), in the matrices' own precision.

    `torch.optim.Muon` orthogonalises in bfloat16, which a CPU without bfloat16 units does an order of magnitude slower.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonalize(update: torch.Tensor) -> torch.Tensor:
        """The nearest semi-orthogonal matrix, by five Newton-Schulz iterations."""
        x = update / (update.norm() + 1e-7)
        x = x.T if update.shape[0] > update.shape[1] else x
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.T if update.shape[0] > update.shape[1] else x

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = self.orthogonalize(parameter.grad.lerp(momentum, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                # 0.2 · sqrt(larger side) gives the update the root mean square that AdamW's has, and so AdamW's learning rates
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr / 2, betas=(0.9, 0.98), weight_decay=0.01)]


def train(
    role: str, tokenizer: PreTrainedTokenizerFast, out: Path, seed: int, train_steps: int | None, eval_count: int
) -> None:
    """Train one model from scratch and save it in bfloat16 beside a record of how it was made."""
    spec = dict(ROLES[role])
    spec["train_steps"] = train_steps or spec["train_steps"]
    torch.manual_seed(seed)
    pad_to = int(spec["pad_to"])
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / pad_to) * pad_to,
        hidden_size=spec["hidden_size"],
        intermediate_size=int(spec["hidden_size"]) * 8 // 3 // 8 * 8,
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    total = int(spec["train_steps"])
    optimizers = make_optimizers(model, float(spec["lr"]))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 50, (total - s) / (0.6 * total)))
        for o in optimizers
    ]
    stream = batches(tokenizer, spec["steps"], int(spec["batch"]), seed)
    started = time.monotonic()
    bar = tqdm(range(total), desc=f"{role} ({model.num_parameters() / 1e6:.2f}M)", unit="step", mininterval=5)
    for step in bar:
        loss = model(**next(stream)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % 200 == 199:
            tqdm.write(
                f"{role} step {step + 1}: loss {loss.item():.4f}, accuracy on 100 test problems {accuracy(model, tokenizer, 100):.2f}"
            )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.float()
    record = {
        "role": role, "seed": seed, **spec, "parameters": model.num_parameters(), "minutes": round((time.monotonic() - started) / 60, 1),
        "test_problems": eval_count, "test_accuracy": accuracy(model, tokenizer, eval_count), "torch": torch.__version__,
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).parent / "models",
        help="where teacher/ and student/ are written",
    )
    parser.add_argument("--roles", nargs="+", choices=list(ROLES), default=list(ROLES), help="which models to train")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, problems and order")
    parser.add_argument("--train_steps", type=int, default=None, help="optimizer steps, instead of each role's own")
    parser.add_argument("--eval_count", type=int, default=500, help="test problems for the final accuracy")
    args = parser.parse_args()
    tokenizer = train_tokenizer(20_000, args.seed)
    print(f"tokenizer: {len(tokenizer)} tokens", file=sys.stderr)
    for role in args.roles:
        train(role, tokenizer, args.output_dir / role, args.seed, args.train_steps, args.eval_count)


if __name__ == "__main__":
    main()
