"""Steps, tokens, time and disk of a stage, as far as they can be foretold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_reasoning_distill.doctor.facts import Resources, StageFacts
from trl_reasoning_distill.doctor.memory import GIB, Memory, Sharding, inference_memory, model_shape, training_memory
from trl_reasoning_distill.scripts.planning import optimizer_steps


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        memory: Bytes that a process can use.
        tflops: Dense 16-bit TFLOP/s by its data sheet.
    """

    name: str
    memory: int
    tflops: float


CARDS = {
    card.name: card
    for card in (
        Card("t4", int(14.7 * GIB), 65),
        Card("l4", int(22.0 * GIB), 121),
        Card("a10g", int(22.0 * GIB), 70),
        Card("rtx4090", int(23.5 * GIB), 165),
        Card("l40s", int(44.3 * GIB), 362),
        Card("a100-40", int(39.4 * GIB), 312),
        Card("a100-80", int(79.1 * GIB), 312),
        Card("h100", int(79.1 * GIB), 989),
        Card("h200", int(139.7 * GIB), 989),
        Card("b200", int(178.0 * GIB), 2250),
    )
}


def find_card(name: str) -> Card:
    """The card of this name, or one of so many GiB (`24`).

    Raises:
        ValueError: If it is neither, with the names there are.
    """
    if name in CARDS:
        return CARDS[name]
    try:
        size = float(name)
    except ValueError:
        raise ValueError(
            f"Unknown card {name!r}; name one of {', '.join(CARDS)}, or its memory in GiB, such as 24."
        ) from None
    return Card(f"{size:g} GiB", int(size * GIB), 150)


SHARDINGS = {
    "cpu": Sharding(),
    "single_gpu": Sharding(),
    "ddp": Sharding("ddp"),
    "multi_node": Sharding("ddp"),
    "zero2": Sharding("zero2"),
    "fsdp2": Sharding("fsdp2"),
    "zero3": Sharding("zero3"),
    "zero3_offload": Sharding("zero3", offload=True),
    "zero3_nvme": Sharding("zero3", offload=True),
}
"""How each of `accelerate_configs/` spreads a model."""


def candidates(most_ranks: int) -> list[tuple[str, int]]:
    """Configurations from the cheapest to the dearest: fewer GPUs first, then what runs faster; offload when nothing else fits."""
    found = [("single_gpu", 1)]
    ranks = 2
    while ranks <= most_ranks:
        found += [(name, ranks) for name in ("ddp", "zero2", "zero3")]
        ranks *= 2
    return [*found, ("zero3_offload", 1)]


UTILISATION = 0.35
"""Share of a card's data-sheet TFLOP/s that trainings of small models reach."""

STORE_BYTES_PER_POSITION_AND_ID = 1.8
ASSUMED_TOKENS = 300


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take.

    Attributes:
        memory: On one rank; `None` for stages without a model.
        rows: Rows it reads; `None` if that is not known yet.
        tokens: Tokens that go through a model in all.
        steps: Optimizer steps of a training.
        seconds: With the card's speed; `None` without one.
        disk: Bytes it writes.
        is_assumed: Whether the tokens per row are assumed because the rows do not exist yet.
    """

    memory: Memory | None
    rows: int | None
    tokens: int | None
    steps: int | None
    seconds: float | None
    disk: int
    is_assumed: bool


def plan_stage(
    facts: StageFacts,
    resources: Resources,
    *,
    rows: int | None,
    sharding: Sharding,
    card: Card | None,
    completion_tokens: int | None = None,
) -> StagePlan:
    """Foretell one stage.

    Args:
        facts: The stage.
        resources: Configurations and tokenizers.
        rows: How many rows reach it; `None` if not known.
        sharding: How it is launched.
        card: The GPUs it runs on.
        completion_tokens: Most tokens of a completion, where rows do not exist yet.
    """
    rows = min(rows, int(facts.get("limit"))) if rows is not None and facts.get("limit") else rows
    length, is_assumed = _row_length(facts, resources, completion_tokens)
    if facts.is_training:
        return _plan_training(facts, resources, rows, length, is_assumed, sharding, card)
    asked = len(facts.models) + len(facts.served)
    shapes = [model_shape(resources.config(model)) for model in facts.models.values() if resources.has_config(model)]
    if not asked or (facts.models and not shapes):
        return StagePlan(None, rows, None, None, None, 0, is_assumed)
    capture = facts.item.script == "capture"
    passes = asked * int(facts.get("num_samples") or 1)
    tokens = rows * length * passes if rows is not None else None
    disk = (tokens or 0) * 6
    if capture:
        disk = int((tokens or 0) * (2 + STORE_BYTES_PER_POSITION_AND_ID * int(facts.get("top_k") or 25)))
    if not shapes:  # a server's memory and speed are its own
        return StagePlan(None, rows, tokens, None, None, disk, is_assumed)
    largest = max(shapes, key=lambda shape: shape.parameters)
    quantised = facts.get("quantization") or facts.get("load_in_4bit")
    weight_bytes = 0.52 if quantised else 2 if card is not None else 4
    memory = inference_memory(
        largest,
        weight_bytes=weight_bytes,
        batch_tokens=int(facts.get("max_batch_tokens") or 16384),
        logits_rows=1024 if capture else 128,
    )
    efficiency = UTILISATION if capture else UTILISATION / 10  # a decoder that writes waits for memory
    speed = card.tflops * 1e12 * efficiency * sharding.ranks if card else 0.0
    seconds = 2 * largest.parameters * tokens / speed if card and tokens else None
    return StagePlan(memory, rows, tokens, None, seconds, disk, is_assumed)


def _plan_training(
    facts: StageFacts,
    resources: Resources,
    rows: int | None,
    length: int,
    is_assumed: bool,
    sharding: Sharding,
    card: Card | None,
) -> StagePlan:
    config = resources.config(facts.get("model_name_or_path"))
    shape = facts.training_shape(resources, cuda=card is not None)
    memory = training_memory(config, shape, sharding, cuda=card is not None)
    model = model_shape(config)
    batch, accumulation = shape.batch * sharding.ranks, int(facts.get("gradient_accumulation_steps") or 1)
    most, epochs = int(facts.get("max_steps") or -1), float(facts.get("num_train_epochs") or 3)
    steps = None
    if most > 0 or rows is not None:
        steps = optimizer_steps(rows or 0, batch, accumulation, epochs, most)
    tokens = steps * batch * accumulation * length if steps else None
    factor = (8 if shape.checkpointing else 6) - (2 if shape.trainable is not None else 0)
    seconds = None
    if card and tokens:
        asked = 2 * shape.teacher.model.parameters if shape.teacher else 0
        flops = (factor * model.parameters + asked) * tokens
        seconds = flops / (card.tflops * 1e12 * UTILISATION * sharding.ranks)
    trained = model.parameters if shape.trainable is None else shape.trainable
    saved = trained * 4 * 3 + (model.parameters * 4 if shape.trainable is None else 0)
    checkpoints = int(facts.get("save_total_limit") or 3) if facts.get("save_strategy") != "no" else 0
    return StagePlan(memory, rows, tokens, steps, seconds, saved * checkpoints + trained * 4, is_assumed)


def _row_length(facts: StageFacts, resources: Resources, completion_tokens: int | None) -> tuple[int, bool]:
    """Mean tokens per row, from the rows if they exist, and whether it is an assumption."""
    model = facts.models.get("student") or next(iter(facts.models.values()), None)
    if facts.sample and model and resources.has_config(model):
        tokenizer = resources.tokenizer(model)
        lengths = [len(tokenizer(row_text(row)).input_ids) for row in facts.sample]
        return max(1, round(sum(lengths) / len(lengths))), False
    limit = facts.get("max_new_tokens") or completion_tokens
    return (150 + int(limit) // 2 if limit else ASSUMED_TOKENS), True


def row_text(row: dict[str, Any]) -> str:
    """All text of a training row."""
    parts = []
    for name in ("prompt", "completion", "messages", "text"):
        value = row.get(name)
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, list):
            parts += [str(message.get("content", "")) for message in value]
    return "\n".join(parts)


def count_rows(stages: Sequence[StageFacts]) -> dict[str, int | None]:
    """How many rows reach each stage: counted where a file is there, else the most that the stages before it can make."""
    made: int | None = None
    counted: dict[str, int | None] = {}
    for facts in stages:
        limit = int(facts.get("limit")) if facts.get("limit") else None
        if facts.item.script in ("evaluate", "report"):  # their problems are none of the other stages'
            counted[facts.name] = limit
            continue
        if facts.rows_path is not None:
            made = facts.row_count
        elif facts.item.script == "data":
            made = _mixture_size(facts)
        elif facts.item.script == "generate":
            reads_stage = any(str(facts.get("source")) == str(other.item.output_dir) for other in stages)
            made = limit or (made if reads_stage else None)
        counted[facts.name] = made
    return counted


def _mixture_size(facts: StageFacts) -> int | None:
    """Problems that a mixture asks for; `None` where it leaves that to the sources."""
    mixture = facts.get("mixture")
    if not isinstance(mixture, Mapping):
        return None
    counts = [entry.get("count") if isinstance(entry, Mapping) else entry for entry in mixture.values()]
    known = [int(count) for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else facts.get("total")


def cheapest(facts: StageFacts, resources: Resources, card: Card, most_ranks: int) -> tuple[str, int, Memory] | None:
    """The first launch configuration, from the cheapest on, in which a training fits on the cards; `None` if none does."""
    config, shape = resources.config(facts.get("model_name_or_path")), facts.training_shape(resources)
    for name, ranks in candidates(most_ranks):
        base = SHARDINGS[name]
        memory = training_memory(config, shape, Sharding(base.kind, ranks, base.offload))
        if memory.on_gpu <= card.memory:
            return name, ranks, memory
    return None
