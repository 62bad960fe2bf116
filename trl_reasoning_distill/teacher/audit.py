"""Is the store what the teacher says? Rows are read again by the teacher and compared with what is stored of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trl_reasoning_distill.teacher.capture import CaptureConfig, anchor_row
from trl_reasoning_distill.teacher.records import MISSING_ID, TopKLogProbs
from trl_reasoning_distill.teacher.scoring import Reader
from trl_reasoning_distill.teacher.store import StoreError, TopKStore

COVERAGE_AT = (1, 5, 10, 25, 50, 100)


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        rows: Rows read again.
        positions: Their records.
        kl: `(positions,)`: KL(teacher ‖ stored) in nats, over the teacher's Top-M ids and the tail.
        coverage: K to the mean mass of the K most likely tokens.
        same_top1: Share of positions where the most likely token is the stored one.
        bytes_per_position: Of all shards.
    """

    rows: int
    positions: int
    kl: npt.NDArray[np.float64]
    coverage: dict[int, float]
    same_top1: float
    bytes_per_position: float


def audit_store(store: TopKStore, reader: Reader, tokenizer: Any, *, num_rows: int = 64) -> Audit:
    """Read a sample of rows again and compare.

    Args:
        store: A store that has not been aligned.
        reader: The teacher, with the store's M and temperatures.
        tokenizer: Its tokenizer, with the chat template of the capture.
        num_rows: Rows of the sample, spread evenly over the store.

    Raises:
        StoreError: If the store was aligned, keeps no text, or the tokenizer makes other tokens of it.
    """
    if store.manifest["aligned_to"]:
        raise StoreError(f"The store at {store.path} was aligned to a student: audit the teacher's own store.")
    made_with = store.fingerprint
    config = CaptureConfig(
        assistant_only=bool(made_with.get("assistant_only")), chat_template_kwargs=made_with.get("chat_template_kwargs")
    )
    numbers = sample_of(store, num_rows)
    anchored = []
    for number in numbers:
        example = store.example(number)
        row = anchor_row(tokenizer, example, config) if example is not None else None
        if row is None or row.input_ids != store.row(number).input_ids.tolist():
            raise StoreError(
                f"Row {number} of {store.path} cannot be read again: the tokenizer or its chat template makes other tokens of it."
            )
        anchored.append(row)
    dense = TopKLogProbs.concatenate(
        reader.read([row.teacher_ids for row in anchored], [row.positions for row in anchored])
    )
    rows = [store.row(number) for number in numbers]
    stored = store.read(np.concatenate([np.arange(row.offset, row.offset + row.count) for row in rows]))
    mass = np.exp(stored.log_probs, dtype=np.float64).cumsum(axis=1)
    return Audit(
        rows=len(numbers),
        positions=len(stored),
        kl=divergence(dense, stored),
        coverage={k: float(mass[:, k - 1].mean()) for k in COVERAGE_AT if k <= store.top_k},
        same_top1=float((dense.ids[:, 0] == stored.ids[:, 0]).mean()),
        bytes_per_position=sum(entry["bytes"] for entry in store.manifest["shards"]) / max(1, len(store)),
    )


def sample_of(store: TopKStore, num_rows: int) -> list[int]:
    """Numbers of so many rows, spread evenly over a store."""
    return np.unique(np.linspace(0, store.rows - 1, min(num_rows, store.rows)).astype(int)).tolist()


def divergence(teacher: TopKLogProbs, stored: TopKLogProbs) -> npt.NDArray[np.float64]:
    """KL(teacher ‖ stored) per position, in nats, over the teacher's ids and one bucket for all the rest.

    An id that only the teacher has is taken to be as likely as the last stored one: so it is when a tie fell the other way, and else
    the store cannot have thought more of it.
    """
    log_p = teacher.log_probs.astype(np.float64)
    least = np.where(stored.ids == MISSING_ID, np.inf, stored.log_probs).min(axis=1).astype(np.float64)
    log_q = np.repeat(np.where(np.isinf(least), 0.0, least)[:, None], teacher.top_k, axis=1)
    for place in range(stored.top_k):
        log_q = np.where(teacher.ids == stored.ids[:, place, None], stored.log_probs[:, place, None], log_q)
    is_token = teacher.ids != MISSING_ID
    log_p, log_q = (np.where(is_token, values, 0.0) for values in (log_p, log_q))
    p, q = (np.where(is_token, np.exp(values), 0.0) for values in (log_p, log_q))
    inside = (p * (log_p - log_q)).sum(axis=1)
    rest_p, rest_q = (np.clip(1.0 - mass.sum(axis=1), 1e-12, 1.0) for mass in (p, q))
    return inside + rest_p * (np.log(rest_p) - np.log(rest_q))


def plot_audit(audit: Audit, path: str) -> None:
    """Draw the distribution of the error and the coverage by K."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.hist(np.log10(np.maximum(audit.kl, 1e-12)), bins=60)
    left.set(xlabel="log10 KL(teacher ‖ stored), nats", ylabel="positions", title=f"mean {audit.kl.mean():.1e}")
    ks: Sequence[int] = list(audit.coverage)
    right.plot(ks, [audit.coverage[k] for k in ks], marker="o")
    right.set(xlabel="K", ylabel="mean mass of the Top-K", ylim=(None, 1.0), title="coverage")
    figure.savefig(path, dpi=150)
    plt.close(figure)
