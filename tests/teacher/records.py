"""Records made up for tests: of real shape, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trl_reasoning_distill.teacher.records import TopKLogProbs


def make_records(
    n: int,
    top_k: int,
    *,
    vocab_size: int = 1000,
    temperatures: Sequence[float] = (1.0, 2.0),
    scale: float = 3.0,
    seed: int = 0,
) -> TopKLogProbs:
    """Exact records of random logits: `scale` makes them sharper."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, vocab_size)) * rng.gamma(2.0, scale / 2, size=(n, 1))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    order = np.argsort(-log_p, axis=1)
    ids, others = order[:, :top_k], order[:, top_k:]
    lse = np.stack([np.log(np.exp(log_p / t).sum(axis=1)) for t in temperatures], axis=1)
    lse[:, list(temperatures).index(1.0)] = 0.0
    rest = np.take_along_axis(log_p, others, 1)
    log_tail = np.stack(
        [np.logaddexp.reduce(rest / t, axis=1) - lse[:, column] for column, t in enumerate(temperatures)], axis=1
    )
    return TopKLogProbs(
        ids.astype(np.int32),
        np.take_along_axis(log_p, ids, 1).astype(np.float32),
        lse.astype(np.float32),
        tuple(temperatures),
        log_tail.astype(np.float32),
    )


def divergence(true: TopKLogProbs, stored: TopKLogProbs, temperature: float = 1.0) -> np.ndarray:
    """KL(true ‖ stored) over M + 1 buckets at a temperature, from the formula."""
    log_p, log_q = (records.at_temperature(temperature).astype(np.float64) for records in (true, stored))
    rest_p, rest_q = (np.clip(1 - np.exp(x).sum(axis=1), 1e-9, 1) for x in (log_p, log_q))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q)
