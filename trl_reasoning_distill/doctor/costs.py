"""What a stage costs on given cards: memory per rank, steps, time and disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_reasoning_distill.doctor.memory import (
    GIB,
    LiveTeacher,
    Memory,
    Sharding,
    TrainingShape,
    adapter_parameters,
    inference_memory,
    model_shape,
    training_memory,
)
from trl_reasoning_distill.doctor.stages import ExaminedStage, Resources
from trl_reasoning_distill.scripts.planning import Plan, optimizer_steps, record_bytes

UTILISATION = 0.35
"""Share of a card's data-sheet TFLOP/s that trainings of small models reach."""

TRACE_BYTES_PER_TOKEN = 6
ASSUMED_PROMPT, ASSUMED_ROW = 150, 300
"""Tokens, where the rows do not exist yet."""

_FOUR_BIT = 0.52  # NF4 with double quantisation: 4 bits, and about 0.13 of a bit for the scales


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
    name: Card(name, int(gib * GIB), tflops)
    for name, gib, tflops in (
        ("t4", 14.7, 65),
        ("l4", 22.0, 121),
        ("a10g", 22.0, 70),
        ("rtx4090", 23.5, 165),
        ("l40s", 44.3, 362),
        ("a100-40", 39.4, 312),
        ("a100-80", 79.1, 312),
        ("h100", 79.1, 989),
        ("h200", 139.7, 989),
        ("b200", 178.0, 2250),
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


@dataclass(frozen=True)
class Costs:
    """What one stage takes.

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
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None
    disk: int = 0
    is_assumed: bool = False


def costs_of(
    stage: ExaminedStage,
    plan: Plan | None,
    rows: int | None,
    resources: Resources,
    sharding: Sharding,
    card: Card | None,
    completion_tokens: int | None = None,
) -> Costs:
    """What one stage takes.

    Args:
        stage: The stage.
        plan: Its own plan; `None` if its inputs do not exist yet.
        rows: How many rows reach it; `None` if not known.
        resources: Configurations and tokenizers.
        sharding: How it is launched.
        card: The GPUs it runs on; `None` for a CPU.
        completion_tokens: Most tokens of a completion, where rows do not exist yet.

    Raises:
        UnknownModelError: If the configuration of a training's model cannot be had.
    """
    if stage.is_training:
        return _training_costs(stage, plan, rows, resources, sharding, card, completion_tokens)
    asked = len(stage.models) + len(stage.served)
    shapes = [model_shape(resources.config(model)) for model in stage.models.values() if resources.has_config(model)]
    if not asked or (stage.models and not shapes):
        return Costs(None, rows, disk=plan.disk if plan else 0)
    is_capture = stage.item.script == "capture"
    if is_capture and plan is not None:
        tokens, disk = plan.tokens, plan.disk
    else:
        length = _assumed_length(stage.get("max_new_tokens") or completion_tokens)
        tokens = None if rows is None else rows * length * asked * (stage.get("num_samples") or 1)
        disk = (tokens or 0) * TRACE_BYTES_PER_TOKEN
    if is_capture and plan is None:
        disk = int((tokens or 0) * record_bytes(stage.get("store_top_k"), stage.get("encoding")))
    is_assumed = not (is_capture and plan is not None)
    if not shapes:  # a server's memory and speed are its own
        return Costs(None, rows, tokens, disk=disk, is_assumed=is_assumed)
    largest = max(shapes, key=lambda shape: shape.parameters)
    memory = inference_memory(
        largest,
        weight_bytes=_FOUR_BIT if stage.get("quantization") else 2 if card is not None else 4,
        batch_tokens=stage.get("max_batch_tokens"),
        logits_rows=1024 if is_capture else 128,
    )
    efficiency = UTILISATION if is_capture else UTILISATION / 10  # a decoder that writes waits for memory
    flops = 2 * largest.parameters * (tokens or 0)
    return Costs(memory, rows, tokens, None, _seconds(flops, card, sharding, efficiency), disk, is_assumed)


def _training_costs(
    stage: ExaminedStage,
    plan: Plan | None,
    rows: int | None,
    resources: Resources,
    sharding: Sharding,
    card: Card | None,
    completion_tokens: int | None,
) -> Costs:
    config = resources.config(stage.get("model_name_or_path"))
    shape = training_shape(stage, resources, cuda=card is not None)
    memory = training_memory(config, shape, sharding, cuda=card is not None)
    model = model_shape(config)
    batch, accumulation = shape.batch * sharding.ranks, int(stage.get("gradient_accumulation_steps"))
    most, epochs = int(stage.get("max_steps")), float(stage.get("num_train_epochs"))
    steps = optimizer_steps(rows or 0, batch, accumulation, epochs, most) if most > 0 or rows is not None else None
    length = _assumed_length(completion_tokens)
    if plan is not None and plan.steps and plan.tokens:  # its own steps are those of one process
        length = round(plan.tokens / (plan.steps * shape.batch * accumulation))
    tokens = steps * batch * accumulation * length if steps else None
    factor = (8 if shape.checkpointing else 6) - (2 if shape.trainable is not None else 0)
    asked = 2 * shape.teacher.model.parameters if shape.teacher else 0
    seconds = _seconds((factor * model.parameters + asked) * (tokens or 0), card, sharding, UTILISATION)
    trained = model.parameters if shape.trainable is None else shape.trainable
    saved = trained * 4 * 3 + (model.parameters * 4 if shape.trainable is None else 0)
    checkpoints = int(stage.get("save_total_limit") or 3) if stage.get("save_strategy") != "no" else 0
    return Costs(memory, rows, tokens, steps, seconds, saved * checkpoints + trained * 4, plan is None)


def training_shape(stage: ExaminedStage, resources: Resources, *, cuda: bool = True) -> TrainingShape:
    """What of a training's options decides its memory."""
    get = stage.get
    config = resources.config(get("model_name_or_path"))
    trainable = None
    if get("use_peft"):
        trainable = adapter_parameters(config, get("lora_r"), get("lora_target_modules"), get("lora_modules_to_save"))
    dtype = {"bfloat16": 2, "float16": 2}.get(str(get("dtype")), 4)
    asks_former_self = stage.item.script == "gkd" and not get("teacher_model_name_or_path")
    uses_reference = bool(get("use_kl_regularization") and not get("reference_logits")) or asks_former_self
    teacher = stage.models.get("teacher")
    return TrainingShape(
        batch=int(get("per_device_train_batch_size")),
        length=int(get("max_length") or 1024),
        weight_bytes=_FOUR_BIT if get("load_in_4bit") else 1 if get("load_in_8bit") else dtype,
        compute_bytes=2 if get("bf16") or get("fp16") else 4,
        checkpointing=bool(get("gradient_checkpointing")),
        accumulates=int(get("gradient_accumulation_steps")) > 1,
        trainable=trainable,
        optimizer=str(getattr(get("optim"), "value", get("optim"))),
        frozen_reference=uses_reference and trainable is None,
        teacher=None
        if teacher is None
        else _live_teacher(resources.config(teacher), get("teacher_quantization"), cuda),
    )


def cheapest(stage: ExaminedStage, resources: Resources, card: Card, most_ranks: int) -> tuple[str, int, Memory] | None:
    """The first launch in which a training fits on the cards, fewest GPUs first, offload when nothing else fits; `None` if none does."""
    config, shape = resources.config(stage.get("model_name_or_path")), training_shape(stage, resources)
    launches, ranks = [("single_gpu", 1)], 2
    while ranks <= most_ranks:
        launches += [(name, ranks) for name in ("ddp", "zero2", "zero3")]
        ranks *= 2
    for name, ranks in [*launches, ("zero3_offload", 1)]:
        base = SHARDINGS[name]
        memory = training_memory(config, shape, Sharding(base.kind, ranks, base.offload))
        if memory.on_gpu <= card.memory:
            return name, ranks, memory
    return None


def _live_teacher(config: Any, quantization: str | None, cuda: bool) -> LiveTeacher:
    """The teacher that is loaded beside the student."""
    stored = 4 if str(getattr(config, "dtype", None)) in ("torch.float32", "float32", "None") else 2
    quantised = {"4bit": _FOUR_BIT, "8bit": 1}.get(str(quantization))
    return LiveTeacher(model_shape(config), quantised or (stored if cuda else 4))


def _assumed_length(completion_tokens: int | None) -> int:
    """Tokens of a row that does not exist yet: a prompt, and half of what may be written."""
    return ASSUMED_PROMPT + int(completion_tokens) // 2 if completion_tokens else ASSUMED_ROW


def _seconds(flops: float, card: Card | None, sharding: Sharding, efficiency: float) -> float | None:
    return flops / (card.tflops * 1e12 * efficiency * sharding.ranks) if card and flops else None
