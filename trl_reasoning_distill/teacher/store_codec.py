"""One block of records to bytes and back: the arithmetic of the store format.

What is kept of a position, and how:

- **ids**, as ranks in the shard's table of ids by falling frequency, so that most ranks are small; split in byte planes.
- **log-probs**, relative to the most likely token. The map `r ↦ √p`, straight below a floor, is rounded to whole steps, and the
  differences of successive steps are kept: since they are integers, nothing drifts when they are summed up again. Equal steps in
  √p are what a KL divergence asks for (KL ≈ 2 Σ (Δ√p)², Hellinger's distance), so precision goes where it counts.
- **the mass of the M tokens**, as a 16-bit logit. Decoding scales the tokens to it, so that the tail is right to the logit's step
  however the tokens were rounded.
- **per further temperature**, the mass of the M tokens at that temperature, in the same way; the log-sum-exp follows from it.

Each plane is column by column (all most likely tokens, then all second ones, …) and compressed on its own with zstd.
The `lossless` encoding keeps the float32 bits instead, in byte planes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from trl_reasoning_distill.teacher.records import MISSING_ID, TopKLogProbs

Encoding = Literal["compact", "lossless"]
ENCODINGS: tuple[Encoding, ...] = ("compact", "lossless")

STEP_AT_ONE = 0.010
"""Rounding step of a relative log-prob near 0, in nats; it grows as 1/√p …"""
STEP_LIMIT = 0.10
"""… up to this, so that the error of no log-prob exceeds half of it."""
DEEPEST = 64.0
"""Relative log-probs below −64 nats are kept as −64."""
LOGIT_LIMIT = 16.0
"""Masses are kept between 1e-7 and 1 − 1e-7."""

_LEVEL = 3
_LOGIT_STEPS = 65535
_SQRT_STEPS = 2.0 / STEP_AT_ONE
_KNEE_Q = _SQRT_STEPS * (1.0 - STEP_AT_ONE / STEP_LIMIT)
_KNEE_R = 2.0 * np.log(STEP_AT_ONE / STEP_LIMIT)

Floats: TypeAlias = npt.NDArray[np.float32]
Planes: TypeAlias = list[npt.NDArray[np.uint8]]


def _steps_of(relative: Floats) -> npt.NDArray[np.int32]:
    """Relative log-probs, ≤ 0, as whole steps, ≥ 0; monotone."""
    relative = np.clip(relative.astype(np.float64), -DEEPEST, 0.0)
    curved = _SQRT_STEPS * (1.0 - np.exp(relative / 2.0))
    straight = _KNEE_Q + (_KNEE_R - relative) / STEP_LIMIT
    return np.rint(np.where(relative >= _KNEE_R, curved, straight)).astype(np.int32)


def _table_of_steps() -> Floats:
    """The relative log-prob that each number of steps stands for: the inverse of `_steps_of`."""
    deepest = int(_steps_of(np.array([-DEEPEST], np.float32))[0])
    steps = np.arange(deepest + 1, dtype=np.float64)
    curved = 2.0 * np.log(np.maximum(1.0 - steps / _SQRT_STEPS, 1e-9))
    straight = _KNEE_R - (steps - _KNEE_Q) * STEP_LIMIT
    return np.where(steps <= _KNEE_Q, curved, straight).astype(np.float32)


_RELATIVE = _table_of_steps()


def _log_mass(log_probs: Floats) -> npt.NDArray[np.float64]:
    """log Σ exp over the M tokens, `(M, n) -> (n,)`; −inf where there is none."""
    with np.errstate(divide="ignore"):
        return np.log(np.exp(log_probs.astype(np.float64)).sum(axis=0))


def _mass_to_logit(log_mass: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    edge = 1.0 / (1.0 + np.exp(LOGIT_LIMIT))
    mass = np.clip(np.exp(np.minimum(log_mass, 0.0)), edge, 1.0 - edge)
    logit = np.log(mass) - np.log1p(-mass)
    return np.rint((logit + LOGIT_LIMIT) * (_LOGIT_STEPS / (2 * LOGIT_LIMIT))).astype(np.uint16)


def _logit_to_log_mass(codes: npt.NDArray[np.uint16]) -> Floats:
    logit = codes.astype(np.float32) * np.float32(2 * LOGIT_LIMIT / _LOGIT_STEPS) - np.float32(LOGIT_LIMIT)
    return -np.log1p(np.exp(-logit))


def _planes(values: npt.NDArray[np.unsignedinteger], width: int) -> Planes:
    """The `width` low bytes of unsigned integers, one plane each."""
    return [((values >> (8 * byte)) & 0xFF).astype(np.uint8) for byte in range(width)]


def _joined(planes: Sequence[npt.NDArray[np.uint8]], dtype: npt.DTypeLike) -> npt.NDArray[np.unsignedinteger]:
    values = planes[0].astype(dtype)
    for byte, plane in enumerate(planes[1:], start=1):
        values |= plane.astype(dtype) << np.asarray(8 * byte, dtype)
    return values


def rank_width(table_size: int) -> int:
    """Bytes per rank: two, or three when a shard uses more than 65,536 distinct ids."""
    return 1 if table_size <= 1 << 8 else 2 if table_size <= 1 << 16 else 3


def encode_block(ranks: npt.NDArray[np.uint32], records: TopKLogProbs, *, table_size: int, encoding: Encoding) -> bytes:
    """Encode the records of one block.

    Args:
        ranks: `(n, M)`, the place of each id in the shard's table.
        records: The records, normalised (log-sum-exp 0 at T = 1).
        table_size: Ids in the shard's table.
        encoding: `"compact"` or `"lossless"`.
    """
    planes = _planes(np.ascontiguousarray(ranks.T), rank_width(table_size))
    log_probs = np.ascontiguousarray(records.log_probs.T)
    further = [column for column, t in enumerate(records.temperatures) if t != 1.0]
    if encoding == "lossless":
        planes += _planes(log_probs.view(np.uint32), 4)
        for column in further:
            planes += _planes(np.ascontiguousarray(records.log_sum_exp[:, column]).view(np.uint32), 4)
        return _pack(planes)
    missing = records.ids.T == MISSING_ID
    first = np.where(missing[0], np.float32(0.0), log_probs[0])
    steps = _steps_of(np.where(missing, np.float32(0.0), log_probs - first))
    steps = np.maximum.accumulate(steps, axis=0)  # an empty place repeats the one before it
    planes += _planes(np.diff(steps, axis=0).astype(np.uint16), 2)
    planes += _planes(_mass_to_logit(_log_mass(log_probs)), 2)
    for column in further:
        log_p = log_probs / np.float32(records.temperatures[column]) - records.log_sum_exp[:, column]
        planes += _planes(_mass_to_logit(_log_mass(log_p)), 2)
    return _pack(planes)


def decode_block(
    data: bytes | memoryview,
    table: npt.NDArray[np.int32],
    *,
    positions: int,
    top_k: int,
    temperatures: tuple[float, ...],
    encoding: Encoding,
) -> TopKLogProbs:
    """Decode what `encode_block` made; `table` maps ranks to ids."""
    planes = _unpack(data)
    shape = (top_k, positions)
    width = rank_width(len(table))
    ranks = _joined(planes[:width], np.uint32 if width > 2 else np.uint16)
    ids = table.take(ranks, mode="clip").reshape(shape)
    planes = planes[width:]
    further = [column for column, t in enumerate(temperatures) if t != 1.0]
    log_sum_exp = np.zeros((positions, len(temperatures)), np.float32)
    if encoding == "lossless":
        log_probs = _joined(planes[:4], np.uint32).view(np.float32).reshape(shape)
        for number, column in enumerate(further, start=1):
            log_sum_exp[:, column] = _joined(planes[4 * number : 4 * number + 4], np.uint32).view(np.float32)
    else:
        relative = np.zeros(shape, np.float32)
        deltas = _joined(planes[:2], np.uint16).reshape(top_k - 1, positions)
        _RELATIVE.take(np.cumsum(deltas, axis=0, dtype=np.uint16), mode="clip", out=relative[1:])
        if MISSING_ID in table:
            relative[ids == MISSING_ID] = -np.inf
        log_probs, _ = _scaled(relative, _joined(planes[2:4], np.uint16))
        for number, column in enumerate(further, start=2):
            codes = _joined(planes[2 * number : 2 * number + 2], np.uint16)
            _, log_sum_exp[:, column] = _scaled(log_probs / np.float32(temperatures[column]), codes)
    return TopKLogProbs(np.ascontiguousarray(ids.T), np.ascontiguousarray(log_probs.T), log_sum_exp, temperatures)


def _scaled(logits: Floats, mass_codes: npt.NDArray[np.uint16]) -> tuple[Floats, Floats]:
    """Shift logits `(M, n)` so that they hold the coded mass; returns them and the log-sum-exp subtracted, `(n,)`."""
    with np.errstate(divide="ignore"):
        kept = np.log(np.exp(logits).sum(axis=0))
    log_sum_exp = np.where(np.isneginf(kept), np.float32(0.0), kept - _logit_to_log_mass(mass_codes))
    return logits - log_sum_exp, log_sum_exp


def _pack(planes: Iterable[npt.NDArray[np.uint8]]) -> bytes:
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    frames = [compressor.compress(plane.tobytes()) for plane in planes]
    return struct.pack(f"<B{len(frames)}I", len(frames), *map(len, frames)) + b"".join(frames)


def _unpack(data: bytes | memoryview) -> Planes:
    count = data[0]
    sizes = struct.unpack_from(f"<{count}I", data, 1)
    decompressor = zstandard.ZstdDecompressor()
    planes, start = [], 1 + 4 * count
    for size in sizes:
        planes.append(np.frombuffer(decompressor.decompress(data[start : start + size]), np.uint8))
        start += size
    return planes
