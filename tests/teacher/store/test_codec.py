"""Bytes and back: ids to the last one, log-probs to the stored precision, masses at every temperature."""

from __future__ import annotations

import dataclasses

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.teacher.records import divergence, make_records
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.store.codec import STEP_LIMIT, decode_block, encode_block
from trl_reasoning_distill.teacher.store.shard import rank_ids


def round_trip(records: TopKLogProbs, encoding: str = "compact") -> TopKLogProbs:
    table, ranks = rank_ids(records.ids)
    data = encode_block(ranks, records, encoding)
    return decode_block(
        data,
        table,
        positions=len(records),
        top_k=records.top_k,
        temperatures=records.temperatures,
        encoding=encoding,
        log_tail=records.log_tail is not None,
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    top_k=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 1.0, 4.0, 12.0]),
    temperatures=st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 1.0, 4.0)]),
)
def test_compact_keeps_ids_order_and_precision(n, top_k, seed, scale, temperatures):
    records = make_records(n, top_k, vocab_size=64, temperatures=temperatures, scale=scale, seed=seed)
    decoded = round_trip(records)
    assert (decoded.ids == records.ids).all()
    assert (np.diff(decoded.log_probs, axis=1) <= 0).all()
    reachable = records.log_probs > -60  # deeper ones are kept as −64
    assert np.abs(decoded.log_probs - records.log_probs)[reachable].max() <= STEP_LIMIT + 1e-3
    for temperature in temperatures:
        assert np.exp(decoded.at_temperature(temperature)).sum(axis=1).max() < 1.0 + 1e-6
        assert divergence(records, decoded, temperature).mean() < 4e-5


@settings(max_examples=25, deadline=None)
@given(
    log_probs=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 20), st.integers(1, 12)), elements=st.floats(-90, 0, width=32)
    ),
    lse=st.floats(-5, 5, width=32),
)
def test_lossless_keeps_every_bit(log_probs, lse):
    ids = np.arange(log_probs.size, dtype=np.int32).reshape(log_probs.shape)
    log_sum_exp = np.stack([np.zeros(len(ids)), np.full(len(ids), lse)], axis=1).astype(np.float32)
    records = TopKLogProbs(ids, log_probs, log_sum_exp, (1.0, 2.0))
    decoded = round_trip(records, "lossless")
    for name in ("ids", "log_probs", "log_sum_exp"):
        assert getattr(decoded, name).tobytes() == getattr(records, name).tobytes()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_missing_places_carry_no_mass(data):
    records = make_records(data.draw(st.integers(1, 12)), data.draw(st.integers(1, 8)), vocab_size=32)
    kept = data.draw(hnp.arrays(np.int64, len(records), elements=st.integers(0, records.top_k)))
    missing = np.arange(records.top_k) >= kept[:, None]
    records = dataclasses.replace(
        records,
        ids=np.where(missing, np.int32(-1), records.ids),
        log_probs=np.where(missing, np.float32(-np.inf), records.log_probs),
    )
    decoded = round_trip(records)
    assert (decoded.ids == records.ids).all()
    assert np.isneginf(decoded.log_probs[missing]).all()
    assert np.isfinite(decoded.log_probs[~missing]).all()
    error = np.abs(np.exp(decoded.log_probs).sum(axis=1) - np.exp(records.log_probs).sum(axis=1))
    assert error.max() < 2e-4


def test_tail_is_kept_to_the_step_of_its_logit():
    """The mass outside of the M tokens, however small, to a quarter of a per mille, at each temperature."""
    records = make_records(2000, 10, scale=6.0, temperatures=(1.0, 2.0, 4.0))
    decoded = round_trip(records)
    for temperature in records.temperatures:
        true, stored = (
            1 - np.exp(r.at_temperature(temperature).astype(np.float64)).sum(axis=1) for r in (records, decoded)
        )
        sure = true > 1e-4  # below, float32 log-probs do not know the tail themselves
        assert np.abs(np.log(stored[sure] / true[sure])).max() < 3e-3


@pytest.mark.parametrize("encoding", ["compact", "lossless"])
def test_the_log_of_a_small_tail_is_kept(encoding):
    """Down to e^-128, where float32 log-probs leave nothing of it: what reverse KL takes the logarithm of."""
    records = make_records(3000, 5, vocab_size=40, scale=16.0, temperatures=(1.0, 2.0, 4.0))
    assert records.log_tail.min() < -100
    small = (records.log_tail < -20) & (records.log_tail > -128)
    assert small.mean() > 0.1
    decoded = round_trip(records, encoding)
    error = np.abs(decoded.log_tail - records.log_tail)[records.log_tail > -128]
    assert error.max() < (3e-3 if encoding == "compact" else 1e-9)
    assert (decoded.log_tail[records.log_tail <= -128] < -127.9).all()


@pytest.mark.parametrize("encoding", ["compact", "lossless"])
def test_blocks_of_version_0_1_0_are_a_beginning_of_todays(encoding):
    """They held no tails; what they held is still coded as it was, so that both decode to the same bits."""
    records = make_records(500, 5, vocab_size=40, scale=8.0)
    old = dataclasses.replace(records, log_tail=None)
    assert round_trip(old, encoding).log_tail is None
    for name in ("ids", "log_probs", "log_sum_exp"):
        assert (
            getattr(round_trip(old, encoding), name).tobytes() == getattr(round_trip(records, encoding), name).tobytes()
        )


@pytest.mark.parametrize("distinct", [3, 64, 65, 300, 30_000, 200_000])
def test_any_number_of_distinct_ids(distinct):
    ids = np.arange(distinct, dtype=np.int32)
    ids = np.resize(ids, (-(-distinct // 3), 3))
    records = TopKLogProbs(ids, np.full(ids.shape, -1.5, np.float32), np.zeros((len(ids), 1), np.float32), (1.0,))
    assert (round_trip(records).ids == ids).all()


def test_extreme_distributions():
    """A certain token, a flat distribution, and logits beyond the deepest step all stay finite and in order."""
    log_probs = np.array(
        [[-1e-9, -40.0, -80.0], [-1.0986123, -1.0986123, -1.0986123], [-0.5, -100.0, -300.0]], np.float32
    )
    ids = np.arange(9, dtype=np.int32).reshape(3, 3)
    decoded = round_trip(TopKLogProbs(ids, log_probs, np.zeros((3, 1), np.float32), (1.0,)))
    assert np.isfinite(decoded.log_probs).all()
    assert (np.diff(decoded.log_probs, axis=1) <= 0).all()
    assert np.abs(np.exp(decoded.log_probs) - np.exp(log_probs)).max() < 1e-3


def test_further_temperature_costs_two_bytes():
    one, three = (make_records(4096, 25, temperatures=t) for t in ((1.0,), (1.0, 2.0, 4.0)))
    sizes = [len(encode_block(rank_ids(records.ids)[1], records, "compact")) for records in (one, three)]
    assert (sizes[1] - sizes[0]) / 4096 <= 2 * 2.05
