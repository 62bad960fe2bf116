"""The store: bytes per position, divergence from the teacher, and speed of encoding and decoding, on real logits.

    python benchmarks/store.py --model PATH_OF_SMOLLM2_135M --texts gsm8k/train.jsonl --cache smollm2.npz

Reads solutions with a real model once, keeps its exact Top-M records in `--cache`, and writes them to a store again and again. Speeds
are per core, of one thread's own processor time; `decode` is `TopKStore.read` in order with an empty cache, checksums included.
The vocabulary decides about the size of ids: 49,152 for SmolLM2.

Side by side, on the same records: the layouts that one would else choose, without what their containers add. DistillKit's exact layout is
counted as its own `DistributionQuantizationConfig.total_bits` does (ids of ⌈log2 V⌉ bits, log-probs in float16); its lossy ones are larger
than half of that too, at more error (see `docs/concepts/store-format.md`).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from trl_reasoning_distill.teacher.audit import divergence
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store import TopKStore, TopKStoreWriter

BLOCK = 4096
GOALS = {
    "bytes_per_position": 50.0,
    "kl": 1e-5,
    "ratio_to_distillkit": 0.6,
    "ratio_of_kl_to_distillkit": 1.0,
    "decode_positions_per_second": 2e6,
}


def read_with_model(model_path: str, texts: str, positions: int, top_k: int) -> TopKLogProbs:
    """Exact records of a model's own distributions over GSM8K solutions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_reasoning_distill.teacher.scoring import TransformersReader

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    reader = TransformersReader(model, tokenizer, top_k, (1.0, 2.0), max_batch_tokens=2048)
    parts, count = [], 0
    for line in Path(texts).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        ids = prompt + tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        parts += reader.read([ids], [range(len(prompt), len(ids))])
        count += len(parts[-1])
        if count >= positions:
            break
    return TopKLogProbs.concatenate(parts)


def load_records(options: argparse.Namespace) -> TopKLogProbs:
    """The cached records, or those of the model, which are then cached."""
    cache = Path(options.cache) if options.cache else None
    if cache is None or not cache.exists():
        if not options.model or not options.texts:
            raise SystemExit("Give --model and --texts, or a --cache that exists.")
        records = read_with_model(
            options.model, options.texts, 2048 if options.quick else 24_000, max(25, options.top_k)
        )
        if cache is not None:
            tails = {} if records.log_tail is None else {"log_tail": records.log_tail}
            np.savez(cache, ids=records.ids, log_probs=records.log_probs, log_sum_exp=records.log_sum_exp, **tails)
    else:
        with np.load(cache) as arrays:
            log_sum_exp = arrays["log_sum_exp"]  # of a server at T = 1 alone
            records = TopKLogProbs(
                arrays["ids"],
                arrays["log_probs"],
                log_sum_exp,
                (1.0, 2.0)[: log_sum_exp.shape[1]],
                arrays.get("log_tail"),  # of version 0.1.0 none
            )
    is_kept = np.broadcast_to(np.arange(records.top_k) < options.top_k, records.ids.shape)
    tails = [records.tail_outside(is_kept, temperature) for temperature in records.temperatures]
    return TopKLogProbs(
        np.ascontiguousarray(records.ids[:, : options.top_k]),
        np.ascontiguousarray(records.log_probs[:, : options.top_k]),
        records.log_sum_exp,
        records.temperatures,
        None if records.log_tail is None else np.stack(tails, axis=1),
    )


def in_float16(records: TopKLogProbs) -> TopKLogProbs:
    """The same records with their log-probs rounded to float16."""
    rounded = records.log_probs.astype(np.float16).astype(np.float32)
    return TopKLogProbs(records.ids, rounded, records.log_sum_exp, records.temperatures)


def other_layouts(records: TopKLogProbs, vocab_size: int) -> dict[str, dict[str, float]]:
    """Bytes per position and mean divergence of the layouts that one would else choose."""
    rounded, k = float(divergence(records, in_float16(records)).mean()), records.top_k
    id_bits = math.ceil(math.log2(vocab_size))
    return {
        "int32 ids, float32 log-probs": {"bytes_per_position": 8 * k, "kl": 0.0},
        "int32 ids, float16 log-probs": {"bytes_per_position": 6 * k, "kl": rounded},
        f"DistillKit exact: {id_bits}-bit ids, float16": {
            "bytes_per_position": math.ceil(k * id_bits / 8) + 2 * k,
            "kl": rounded,
        },
    }


def at_one(records: TopKLogProbs) -> TopKLogProbs:
    """The same records without further temperatures."""
    return TopKLogProbs(records.ids, records.log_probs, np.ascontiguousarray(records.log_sum_exp[:, :1]), (1.0,))


def write(records: TopKLogProbs, path: Path, encoding: str) -> float:
    """Write a store of one row; returns seconds of processor time."""
    started = time.process_time()
    with TopKStoreWriter(
        path, top_k=records.top_k, temperatures=records.temperatures, fingerprint={}, encoding=encoding
    ) as writer:
        writer.add([0] * (len(records) + 1), [0] * (len(records) + 1), records)
    return time.process_time() - started


def read(path: Path, positions: int) -> tuple[float, TopKLogProbs]:
    """Read all blocks in order, each once; returns seconds of processor time and the records."""
    store = TopKStore.open(path, cache_blocks=1)
    indices = [np.arange(start, min(start + BLOCK, positions)) for start in range(0, positions, BLOCK)]
    started = time.process_time()
    blocks = [store.read(index) for index in indices]
    return time.process_time() - started, TopKLogProbs.concatenate(blocks)


def measure(records: TopKLogProbs, rounds: int, vocab_size: int) -> dict[str, Any]:
    """All figures of one set of records; speeds are the best of the rounds."""
    positions, plain = len(records), at_one(records)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in ("compact", "two_temperatures", "lossless")}
        encode = min(write(plain, Path(folder) / str(number), "compact") for number in range(max(2, rounds // 2)))
        write(plain, paths["compact"], "compact")
        write(records, paths["two_temperatures"], "compact")
        write(plain, paths["lossless"], "lossless")
        size = {
            name: sum(entry["bytes"] for entry in TopKStore.open(path).manifest["shards"]) / positions
            for name, path in paths.items()
        }
        runs = [read(paths["compact"], positions) for _ in range(rounds)]
        decoded, lossless = runs[0][1], read(paths["lossless"], positions)[1]
    assert (lossless.log_probs == records.log_probs).all()
    kl = divergence(plain, decoded)
    others = other_layouts(plain, vocab_size)
    for other in others.values():
        other["ratio_of_bytes"] = size["compact"] / other["bytes_per_position"]
    distillkit = next(other for name, other in others.items() if name.startswith("DistillKit"))
    return {
        "positions": positions,
        "top_k": records.top_k,
        "mass": float(np.exp(records.log_probs).sum(axis=1).mean()),
        "bytes_per_position": size["compact"],
        "bytes_per_further_temperature": size["two_temperatures"] - size["compact"],
        "bytes_per_position_lossless": size["lossless"],
        "ratio_to_distillkit": distillkit["ratio_of_bytes"],
        "ratio_of_kl_to_distillkit": float(kl.mean()) / distillkit["kl"],
        "kl": float(kl.mean()),
        "kl_worst": float(kl.max()),
        "encode_positions_per_second": positions / encode,
        "decode_positions_per_second": positions / min(seconds for seconds, _ in runs),
        "other_layouts": others,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--texts", help="GSM8K's train.jsonl")
    parser.add_argument("--cache", help="file to keep the model's records in (.npz)")
    parser.add_argument("--top_k", type=int, default=25)
    parser.add_argument("--vocab_size", type=int, default=49_152, help="of the model; for the size of packed ids")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="2,048 positions instead of 24,000")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    options = parser.parse_args()
    figures = measure(load_records(options), options.rounds, options.vocab_size)
    if not options.json:
        for name, other in figures["other_layouts"].items():
            print(
                f"{name:45s} {other['bytes_per_position']:6g} bytes, KL {other['kl']:.1e}; ours / its {other['ratio_of_bytes']:.2f}"
            )
        for name, value in figures.items():
            if name == "other_layouts":
                continue
            goal = f"   (goal: {GOALS[name]:g})" if name in GOALS and options.top_k == 25 else ""
            print(f"{name:32s} {value:14,.4g}{goal}")
    print(json.dumps({"benchmark": "store", **figures, "goals": GOALS}))


if __name__ == "__main__":
    main()
