"""GPUs that one can name, and the launch configurations to choose from."""

from __future__ import annotations

from dataclasses import dataclass

from trl_reasoning_distill.doctor.memory import GIB, Sharding


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
