"""One block of records to bytes and back: the arithmetic of the store format.

What is kept of a position, and how:

- **ids**, as ranks in the shard's table of ids by falling frequency. A rank is a class of one byte, and for all but the 64 most
  frequent ids a remainder of one byte, or of two. The classes are close to what an entropy coder can use; the remainders are
  close to noise, and are kept as they are.
- **log-probs**, relative to the most likely token. The map `r ↦ √p`, straight below a knee, is rounded to whole steps, and the
  differences of successive steps are kept: since they are integers, nothing drifts when they are summed up again. Equal steps in
  √p are what a KL divergence asks for (KL ≈ 2 Σ (Δ√p)², Hellinger's distance), so precision goes where it counts.
- **the mass of the M tokens**, as a 16-bit logit. Decoding scales the tokens to it, so that the tail is right to the logit's step
  however the tokens were rounded.
- **per further temperature**, the mass of the M tokens at that temperature, in the same way; the log-sum-exp follows from it.
- **the log of the tail**, per temperature, at the positions whose tail is below a thousandth, in steps of 1/512: there the mass does not
  tell it, since the log-probs that it is summed from are float32. Blocks of version 0.1.0 end before it.

Values lie column by column (all most likely tokens, then all second ones, …), high and low bytes apart, and the columns in a few
groups of like distribution, each compressed on its own: that is what Huffman's code in zstd can use. Level 1 is not only faster
than level 3 here but smaller, since it looks less for repetitions where there are none.
The `lossless` encoding keeps the float32 bits instead.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from trl_reasoning_distill.teacher.records import MISSING_ID, TopKLogProbs, base_column

Encoding = Literal["compact", "lossless"]
ENCODINGS: tuple[Encoding, ...] = ("compact", "lossless")

STEP_AT_ONE = 0.005
"""Rounding step of a relative log-prob near 0, in nats; it grows as 1/√p …"""
STEP_LIMIT = 0.06
"""… up to this: rounding moves no relative log-prob by more than half of it."""
DEEPEST = 64.0
"""Relative log-probs below −64 nats are kept as −64."""
LOGIT_LIMIT = 16.0
"""Masses are kept between 1e-7 and 1 − 1e-7."""
TAIL_STEPS = 512
"""Steps per nat of the log of a small tail; with 16 bits it reaches down to e^−128."""

_LEVEL = 1
_COLUMN_GROUPS = (1, 3, 8)
_LOGIT_STEPS = 65535
_STEPS_PER_LOGIT = _LOGIT_STEPS / (2 * LOGIT_LIMIT)
# From this code of the mass on, the log of the tail is kept: logits of 7, tails of 0.0009.
_SMALL_TAIL = round((7.0 + LOGIT_LIMIT) * _STEPS_PER_LOGIT)

_SQRT_STEPS = 2.0 / STEP_AT_ONE
_KNEE_STEPS = _SQRT_STEPS * (1.0 - STEP_AT_ONE / STEP_LIMIT)
_KNEE = 2.0 * np.log(STEP_AT_ONE / STEP_LIMIT)

# Classes of ranks: 64 of one rank, 112 of 2⁸, 80 of 2¹⁴; together more than any vocabulary has.
_NARROW, _WIDE = 64, 176
_FIRST_WIDE = _NARROW + (_WIDE - _NARROW) * 256
_FIRST_RANK = np.array(
    [*range(_NARROW), *range(_NARROW, _FIRST_WIDE, 256), *(_FIRST_WIDE + (i << 14) for i in range(256 - _WIDE))],
    np.uint32,
)

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Codes: TypeAlias = npt.NDArray[np.uint16]


def encode_block(ranks: npt.NDArray[np.uint32], records: TopKLogProbs, encoding: Encoding) -> bytes:
    """Encode the records of one block.

    Args:
        ranks: `(n, M)`, the place of each id in the shard's table.
        records: The records, normalised (log-sum-exp 0 at T = 1).
        encoding: `"compact"` or `"lossless"`.
    """
    streams = _encode_ranks(np.ascontiguousarray(ranks.T))
    log_probs = np.ascontiguousarray(records.log_probs.T)
    further = _further(records.temperatures)
    if encoding == "lossless":
        streams += _byte_planes(log_probs)
        for column in further:
            streams += _byte_planes(np.ascontiguousarray(records.log_sum_exp[:, column]))
        if records.log_tail is not None:
            streams += _byte_planes(np.ascontiguousarray(records.log_tail.T))
        return _pack(streams)
    missing = records.ids.T == MISSING_ID
    first = np.where(missing[0], np.float32(0.0), log_probs[0])
    steps = _steps_of(np.where(missing, np.float32(0.0), log_probs - first))
    steps = np.maximum.accumulate(steps, axis=0)  # an empty place repeats the one before it
    deltas = _byte_planes(np.diff(steps, axis=0).astype(np.uint16))
    streams += [*_column_groups(deltas[0]), deltas[1]]
    masses = {base_column(records.temperatures): _mass_codes(log_probs)}
    for column in further:
        at_temperature = log_probs / np.float32(records.temperatures[column]) - records.log_sum_exp[:, column]
        masses[column] = _mass_codes(at_temperature)
    for codes in masses.values():
        streams += _byte_planes(codes)
    if records.log_tail is not None:
        for column, codes in masses.items():
            streams += _byte_planes(_tail_codes(records.log_tail[codes >= _SMALL_TAIL, column]))
    return _pack(streams)


def decode_block(
    data: bytes | memoryview,
    table: npt.NDArray[np.int32],
    *,
    positions: int,
    top_k: int,
    temperatures: tuple[float, ...],
    encoding: Encoding,
    log_tail: bool = False,
) -> TopKLogProbs:
    """Decode what `encode_block` made; `table` maps ranks to ids, and `log_tail` is whether the records knew their tails."""
    streams = _unpack(data)
    shape = (top_k, positions)
    ids = table.take(_decode_ranks(streams, shape), mode="clip")
    log_sum_exp = np.zeros((positions, len(temperatures)), np.float32)
    further = _further(temperatures)
    if encoding == "lossless":
        log_probs = _join_bytes(streams, np.uint32).view(np.float32).reshape(shape)
        for column in further:
            log_sum_exp[:, column] = _join_bytes(streams, np.uint32).view(np.float32)
        tails = None
        if log_tail:
            tails = _join_bytes(streams, np.uint32).view(np.float32).reshape(len(temperatures), positions).T.copy()
        return TopKLogProbs(ids.T.copy(), log_probs.T.copy(), log_sum_exp, temperatures, tails)
    steps = np.zeros(shape, np.uint16)
    steps[1:] = _join_groups(streams, (top_k - 1, positions))
    steps[1:] |= (next(streams).astype(np.uint16) << np.uint16(8)).reshape(top_k - 1, positions)
    for row in range(2, top_k):  # many times faster than `cumsum` along the first axis
        steps[row] += steps[row - 1]
    if MISSING_ID in table:
        steps[ids == MISSING_ID] = _NO_TOKEN
    relative = _RELATIVE.take(steps, mode="clip")
    masses = {base_column(temperatures): _join_bytes(streams, np.uint16)}
    shift = _log_mass(masses[base_column(temperatures)]) - _log_sum_exp(_RELATIVE, steps)
    for column in further:
        temperature = np.float32(temperatures[column])
        kept = _log_sum_exp(_RELATIVE / temperature, steps) + shift / temperature
        masses[column] = _join_bytes(streams, np.uint16)
        log_sum_exp[:, column] = kept - _log_mass(masses[column])
    relative += shift
    tails = None
    if log_tail:
        tails = np.empty_like(log_sum_exp)
        for column, codes in masses.items():
            tails[:, column] = _log_tail(codes)
            tails[codes >= _SMALL_TAIL, column] = _join_bytes(streams, np.uint16) / np.float32(-TAIL_STEPS)
    return TopKLogProbs(ids.T.copy(), relative.T.copy(), log_sum_exp, temperatures, tails)


def _further(temperatures: Sequence[float]) -> list[int]:
    """The columns of all temperatures but that of the log-probs, whose log-sum-exp is 0."""
    return [column for column in range(len(temperatures)) if column != base_column(temperatures)]


# Ranks ----------------------------------------------------------------------------------------------------------------------------


def _encode_ranks(ranks: npt.NDArray[np.uint32]) -> list[Bytes]:
    narrow, wide = _NARROW + (ranks - _NARROW >> 8), _WIDE + (ranks - _FIRST_WIDE >> 14)
    classes = np.where(ranks < _NARROW, ranks, np.where(ranks < _FIRST_WIDE, narrow, wide)).astype(np.uint8)
    remainders = ranks - _FIRST_RANK[classes]
    low = remainders[classes >= _NARROW] & 0xFF
    high = remainders[classes >= _WIDE] >> 8
    return [*_column_groups(classes), low.astype(np.uint8), high.astype(np.uint8)]


def _decode_ranks(streams: Iterator[Bytes], shape: tuple[int, int]) -> npt.NDArray[np.uint32]:
    classes = _join_groups(streams, shape).ravel()
    ranks = _FIRST_RANK.take(classes)
    ranks[np.flatnonzero(classes >= _NARROW)] += next(streams)  # many times faster than a mask
    ranks[np.flatnonzero(classes >= _WIDE)] += next(streams).astype(np.uint32) << np.uint32(8)
    return ranks.reshape(shape)


# Log-probs ------------------------------------------------------------------------------------------------------------------------


def _steps_of(relative: Floats) -> npt.NDArray[np.int32]:
    """Relative log-probs, ≤ 0, as whole steps, ≥ 0; monotone."""
    relative = np.clip(relative, -DEEPEST, 0.0)
    curved = _SQRT_STEPS * (1.0 - np.exp(relative / 2.0))
    straight = _KNEE_STEPS + (_KNEE - relative) / STEP_LIMIT
    return np.rint(np.where(relative >= _KNEE, curved, straight)).astype(np.int32)


def _table_of_steps() -> Floats:
    """The relative log-prob that each number of steps stands for: the inverse of `_steps_of`; at the end that of no token."""
    deepest = round(_KNEE_STEPS + (_KNEE + DEEPEST) / STEP_LIMIT)
    steps = np.arange(deepest + 1, dtype=np.float64)
    curved = 2.0 * np.log(np.maximum(1.0 - steps / _SQRT_STEPS, 1e-9))
    straight = _KNEE - (steps - _KNEE_STEPS) * STEP_LIMIT
    table = np.where(steps <= _KNEE_STEPS, curved, straight)
    return np.append(table, -np.inf).astype(np.float32)


_RELATIVE = _table_of_steps()
_NO_TOKEN = len(_RELATIVE) - 1


def _mass_codes(log_probs: Floats) -> Codes:
    """The mass of each position's tokens, `(M, n) -> (n,)`, as a logit in 16 bits."""
    edge = 1.0 / (1.0 + np.exp(LOGIT_LIMIT))
    mass = np.clip(np.exp(log_probs.astype(np.float64)).sum(axis=0), edge, 1.0 - edge)
    logit = np.log(mass) - np.log1p(-mass)
    return np.rint((logit + LOGIT_LIMIT) * _STEPS_PER_LOGIT).astype(np.uint16)


def _logit(codes: Codes) -> Floats:
    return codes.astype(np.float32) * np.float32(2 * LOGIT_LIMIT / _LOGIT_STEPS) - np.float32(LOGIT_LIMIT)


def _log_mass(codes: Codes) -> Floats:
    return -np.log1p(np.exp(-_logit(codes)))


def _log_tail(codes: Codes) -> Floats:
    return -np.log1p(np.exp(_logit(codes)))


def _tail_codes(log_tail: Floats) -> Codes:
    """Logs of small tails in 16 bits; one of no mass at all (M is the vocabulary) becomes the smallest."""
    return np.rint(np.clip(log_tail * np.float32(-TAIL_STEPS), 0, 65535)).astype(np.uint16)


def _log_sum_exp(values: Floats, steps: Codes) -> Floats:
    """log Σ exp over the M tokens of each position, `(n,)`, where `values` says what each number of steps stands for."""
    total = np.exp(values).take(steps, mode="clip").sum(axis=0)
    return np.log(np.where(total > 0.0, total, 1.0))  # a position without a token: anything finite will do


# Streams of bytes -----------------------------------------------------------------------------------------------------------------


def _byte_planes(values: npt.NDArray[np.generic]) -> list[Bytes]:
    """The bytes of numbers, lowest first, one plane each."""
    size = values.dtype.itemsize
    planes = values.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(*values.shape, size)
    return [np.ascontiguousarray(planes[..., byte]) for byte in range(size)]


def _join_bytes(streams: Iterator[Bytes], dtype: type[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    """Numbers from the next planes."""
    values = next(streams).astype(dtype)
    for byte in range(1, np.dtype(dtype).itemsize):
        values |= next(streams).astype(dtype) << dtype(8 * byte)
    return values


def _group_bounds(columns: int) -> list[tuple[int, int]]:
    return list(pairwise([0, *(bound for bound in _COLUMN_GROUPS if bound < columns), columns]))


def _column_groups(plane: Bytes) -> list[Bytes]:
    """A plane `(columns, n)`, cut into groups of columns that are distributed alike."""
    return [plane[start:stop] for start, stop in _group_bounds(len(plane))]


def _join_groups(streams: Iterator[Bytes], shape: tuple[int, int]) -> Bytes:
    return np.concatenate([next(streams) for _ in _group_bounds(shape[0])]).reshape(shape)


def _pack(streams: Sequence[Bytes]) -> bytes:
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    frames = [compressor.compress(stream.tobytes()) for stream in streams]
    return struct.pack(f"<B{len(frames)}I", len(frames), *map(len, frames)) + b"".join(frames)


def _unpack(data: bytes | memoryview) -> Iterator[Bytes]:
    decompressor = zstandard.ZstdDecompressor()
    start = 1 + 4 * data[0]
    for size in struct.unpack_from(f"<{data[0]}I", data, 1):
        yield np.frombuffer(decompressor.decompress(data[start : start + size]), np.uint8)
        start += size
