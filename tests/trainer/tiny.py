"""Tiny models, a tokenizer, chains of thought and a store, all made in-process: what the trainers' tests run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.tokenization import chat_template_fingerprint, tokenize_example, tokenizer_fingerprint
from trl_reasoning_distill.teacher.store import TopKLogProbs, TopKStoreWriter

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEMPERATURES = (1.0, 2.0)


def make_tokenizer(*, think_tokens: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text, 256 bytes, three special tokens and, unless told not to, the think tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    if think_tokens:
        backend.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def make_model(seed: int = 0, *, vocab_size: int = 264, tied: bool = False, **config: Any) -> LlamaForCausalLM:
    """A Llama of some 30k parameters in float32, with weights large enough that its distributions are not flat."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": vocab_size,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 256,
                "tie_word_embeddings": tied,
                "pad_token_id": 256,
                "bos_token_id": None,
                "eos_token_id": 258,
                **config,
            }
        )
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def make_rows(count: int = 8) -> list[dict[str, Any]]:
    """Prompt–completion rows with reasoning, of different lengths."""
    format_ = ReasoningFormat.preset("think")
    return [
        {
            "prompt": [{"role": "user", "content": f"{a}+{a + 1}?"}],
            "completion": [
                {"role": "assistant", "content": format_.render("so " * (a % 4) + f"{a}+{a + 1}", str(2 * a + 1))}
            ],
        }
        for a in range(count)
    ]


def make_dataset(count: int = 8) -> Dataset:
    """`make_rows` as a dataset."""
    return Dataset.from_list(make_rows(count))


@torch.no_grad()
def make_store(
    path: Path,
    teacher: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    *,
    top_k: int = 8,
    fingerprint: dict[str, Any] | None = None,
    log_tails: bool = True,
    **writer_arguments: Any,
) -> Path:
    """Capture the teacher's Top-K on `rows`, one row at a time and without any of the product's capture code."""
    fingerprint = {
        "teacher": "tiny",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": chat_template_fingerprint(tokenizer),
        **(fingerprint or {}),
    }
    arguments = {"encoding": "lossless", **writer_arguments}
    with TopKStoreWriter(path, top_k=top_k, temperatures=TEMPERATURES, fingerprint=fingerprint, **arguments) as writer:
        for row in rows:
            tokens = tokenize_example(tokenizer, row)
            supervised = [t for t, label in enumerate(tokens.labels) if t > 0 and label != -100]
            logits = teacher(torch.tensor([tokens.input_ids])).logits[0, [t - 1 for t in supervised]].double()
            log_probs, ids = logits.log_softmax(-1).topk(top_k)
            lse = torch.stack([(logits.log_softmax(-1) / t).logsumexp(-1) for t in TEMPERATURES], -1)
            rest = logits.log_softmax(-1).scatter(-1, ids, -torch.inf)
            log_tail = torch.stack([(rest / t).logsumexp(-1) for t in TEMPERATURES], -1) - lse
            records = TopKLogProbs(
                ids.numpy().astype(np.int32),
                log_probs.float().numpy(),
                lse.float().numpy(),
                TEMPERATURES,
                log_tail.float().numpy() if log_tails else None,
            )
            writer.add(tokens.input_ids, tokens.labels, records)
    return path
