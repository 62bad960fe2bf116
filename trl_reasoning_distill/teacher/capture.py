"""The teacher reads each row once, and what it says at the supervised positions goes into a store.

Rows are worked off in units of fixed size. A unit is written as a small lossless store of its own, all or nothing, so that a
killed run loses at most the unit each process was at, and any number of processes can go on. When all units are there, the
first process joins them, in the order of the rows. What a unit holds depends on its rows alone, never on who made it: the
final store is the same, byte for byte, for any number of processes and any history of kills.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from tqdm import tqdm

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.normalization import ROW_NUMBER
from trl_reasoning_distill.data.row_check import RowCheck, advise
from trl_reasoning_distill.data.tokenization import supervised_positions, tokenize_example
from trl_reasoning_distill.teacher.context import TEACHER_PROMPT, anchored
from trl_reasoning_distill.teacher.scoring import Reader
from trl_reasoning_distill.teacher.store import StoreError, TopKStore, TopKStoreWriter
from trl_reasoning_distill.teacher.store.codec import Encoding

if TYPE_CHECKING:
    from accelerate import PartialState

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class CaptureConfig:
    """What is captured, and in what portions.

    Attributes:
        top_k: M, tokens per record.
        temperatures: Temperatures that the log-sum-exp is taken at; 1 is always among them.
        encoding: `"compact"` or `"lossless"`.
        max_length: Rows with more tokens, for the teacher or the student, are left out and counted. `None`: no limit.
        unit_rows: Rows per unit of work: at most this much is done again after a kill.
        assistant_only: Supervise only what the chat template marks as the assistant's.
        chat_template_kwargs: Variables for the chat template.
        reasoning_format: Preset of how the completions are written, by which a thought is found.
        malformed_thoughts: `"drop"` leaves rows out whose thought is not well formed, and counts them; `"train"` captures them. To be set
            as for training.
    """

    top_k: int = 25
    temperatures: tuple[float, ...] = (1.0, 2.0)
    encoding: Encoding = "compact"
    max_length: int | None = None
    unit_rows: int = 512
    assistant_only: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    reasoning_format: str = "think"
    malformed_thoughts: str = "drop"

    def __post_init__(self) -> None:
        ReasoningFormat.preset(self.reasoning_format)  # raises with the list of presets
        if self.malformed_thoughts not in ("drop", "train"):
            raise ValueError(f"malformed_thoughts={self.malformed_thoughts!r}: choose drop or train.")
        if self.top_k < 1 or self.unit_rows < 1:
            raise ValueError(f"top_k and unit_rows are ≥ 1, found {self.top_k} and {self.unit_rows}.")
        if any(temperature <= 0 for temperature in self.temperatures):
            raise ValueError(f"temperatures are > 0, found {self.temperatures}.")
        object.__setattr__(self, "temperatures", tuple(sorted({1.0, *map(float, self.temperatures)})))


@dataclasses.dataclass(frozen=True)
class CaptureResult:
    """The store that was made, and how many rows did not go into it.

    Attributes:
        store: The store.
        too_long: Rows left out because they have more than `max_length` tokens.
        not_anchored: Rows left out because under the teacher's prompt the completion has other tokens.
        malformed: Rows left out because their thought is not well formed.
    """

    store: TopKStore
    too_long: int
    not_anchored: int
    malformed: int = 0


@dataclasses.dataclass(frozen=True)
class AnchoredRow:
    """A row as the student reads it, as the teacher reads it, and where in the latter the supervised tokens stand.

    `example` is its text, with the teacher's prompt if that is another one; `malformed` says what is wrong with its thought.
    """

    example: Row
    input_ids: list[int]
    labels: list[int]
    teacher_ids: list[int]
    positions: list[int]
    malformed: str | None = None


def capture(
    reader: Callable[[], Reader],
    tokenizer: Any,
    rows: Sequence[Row],
    output: Path,
    config: CaptureConfig,
    *,
    fingerprint: Mapping[str, Any],
    state: PartialState | None = None,
) -> CaptureResult:
    """Capture rows into the store at `output`; goes on where an earlier run of the same capture stopped.

    Args:
        reader: Makes the teacher; called only if there is something left to read.
        tokenizer: The teacher's tokenizer, with the chat template that the student will be trained with.
        rows: Rows of text, as `data.tokenization.tokenize_example` takes them.
        output: Folder of the store. Units under way lie beside it, in `parts`.
        config: What to capture.
        fingerprint: What makes the records, for the manifest. A store or unit with another one is refused.
        state: Ranks of this launch; `None` for one process. All ranks must see the same files.

    Raises:
        ValueError: If no row is left to capture, or something at `output` was made by another capture.
    """
    rank, world = (state.process_index, state.num_processes) if state else (0, 1)
    output = Path(output)
    parts = output.parent / "parts"
    fingerprint = {**fingerprint, **_describe(config), "dataset": _rows_hash(rows)}
    starts = range(0, len(rows), config.unit_rows)
    is_whole = (output / "manifest.json").exists()
    left = [] if is_whole else [unit for unit in range(len(starts)) if not _is_done(parts, unit, fingerprint)]
    _wait(state)  # every rank has seen the same units before anyone writes one
    if mine := left[rank::world]:
        teacher = reader()
        units = {unit: rows[starts[unit] : starts[unit] + config.unit_rows] for unit in mine}
        with _Progress(sum(map(len, units.values())), world, disable=rank > 0) as progress:
            for unit, unit_rows in units.items():
                tokens = _write_unit(teacher, tokenizer, unit_rows, parts, unit, config, fingerprint)
                progress.advance(len(unit_rows), tokens)
    _wait(state)
    if rank == 0:
        if not is_whole:
            _join(parts, len(starts), output, config, fingerprint)
        shutil.rmtree(parts, ignore_errors=True)
    _wait(state)
    store = TopKStore.open(output)
    store.check_compatible(fingerprint, remedy="Give another output folder.")
    return CaptureResult(store, **store.fingerprint["left_out"])


def _write_unit(
    teacher: Reader,
    tokenizer: Any,
    rows: Sequence[Row],
    parts: Path,
    unit: int,
    config: CaptureConfig,
    fingerprint: Mapping[str, Any],
) -> int:
    """Let the teacher read a unit and write it down; returns the tokens read."""
    left_out = dict.fromkeys(_LEFT_OUT, 0)
    kept: list[AnchoredRow] = []
    check = row_check(tokenizer, config)
    for row in rows:
        anchored = anchor_row(tokenizer, row, config, check)
        if anchored is None:
            left_out["not_anchored"] += 1
        elif anchored.malformed is not None:
            left_out["malformed"] += 1
        elif is_too_long(anchored, config, teacher.context_length):
            left_out["too_long"] += 1
        else:
            kept.append(anchored)
    records = teacher.read([one.teacher_ids for one in kept], [one.positions for one in kept])
    folder = _unit_folder(parts, unit)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    with TopKStoreWriter(
        folder,
        top_k=config.top_k,
        temperatures=config.temperatures,
        encoding="lossless",
        fingerprint={**fingerprint, _READER: dict(teacher.provenance), "left_out": left_out},
    ) as writer:
        for anchored, its_records in zip(kept, records, strict=True):
            writer.add(anchored.input_ids, anchored.labels, its_records, anchored.example)
    return sum(len(one.teacher_ids) for one in kept)


def _join(parts: Path, units: int, output: Path, config: CaptureConfig, fingerprint: Mapping[str, Any]) -> None:
    """Join all units into the store, in the order of the rows."""
    stores = [TopKStore.open(_unit_folder(parts, unit), cache_blocks=2) for unit in range(units)]
    counts = [store.fingerprint["left_out"] for store in stores]
    left_out = {name: sum(count[name] for count in counts) for name in _LEFT_OUT}
    if not sum(map(len, stores)):
        raise ValueError(
            f"No supervised token to capture in {sum(store.rows for store in stores) + sum(left_out.values())} rows: "
            f"{left_out['too_long']} are longer than max_length = {config.max_length} or the teacher's context, "
            f"{left_out['not_anchored']} have other completion tokens under the teacher's prompt, {left_out['malformed']} a malformed thought."
        )
    with TopKStoreWriter(
        output,
        top_k=config.top_k,
        temperatures=config.temperatures,
        encoding=config.encoding,
        fingerprint={**fingerprint, _READER: _reader_of(stores, parts), "left_out": left_out},
    ) as writer:
        for store in tqdm(stores, unit="unit", desc="join", disable=len(stores) < 16):
            for number, row in enumerate(store):
                records = store.read(np.arange(row.offset, row.offset + row.count))
                writer.add(row.input_ids, row.labels, records, store.example(number))


def _reader_of(stores: Sequence[TopKStore], parts: Path) -> dict[str, Any]:
    """What the units' readers found out about their teacher, the same for all: a server may have been started anew between two."""
    first = stores[0].fingerprint[_READER]
    for store in stores[1:]:
        if store.fingerprint[_READER] != first:
            raise StoreError(
                f"The units in {parts} were not read by one teacher: {stores[0].path.name} by {first}, {store.path.name} by "
                f"{store.fingerprint[_READER]}. Remove those of one of them and run the stage again."
            )
    return first


def row_check(tokenizer: Any, config: CaptureConfig) -> RowCheck:
    """The check that a training does of the same rows."""
    form = ReasoningFormat.preset(config.reasoning_format)
    return RowCheck(tokenizer, form, (config.chat_template_kwargs or {}).get("chat_template"))


def anchor_row(tokenizer: Any, row: Row, config: CaptureConfig, check: RowCheck | None = None) -> AnchoredRow | None:
    """Tokenize a row for student and teacher; `None` if the supervised tokens are not the same for both.

    Raises:
        ValueError: If the chat template refuses the row, or changes what it trains, with its number.
    """
    options: dict[str, Any] = {
        "assistant_only": config.assistant_only,
        "chat_template_kwargs": config.chat_template_kwargs,
    }
    example = {name: row[name] for name in _TEXT_COLUMNS if row.get(name) is not None}
    where = f"Row {row.get(ROW_NUMBER, '?')}"
    try:
        student = tokenize_example(tokenizer, example, **options)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    finding = (check or row_check(tokenizer, config))(example, student)
    if finding.damage is not None:
        raise ValueError(
            f"The chat template drops or doubles what a row trains. {where}: it {finding.damage}. {advise(tokenizer.chat_template)}"
        )
    malformed = finding.malformed if config.malformed_thoughts == "drop" else None
    teacher = student
    if row.get(TEACHER_PROMPT) is not None:
        if "prompt" not in row:
            raise ValueError(
                f"Another prompt for the teacher needs rows with `prompt` and `completion`; found {sorted(row)}."
            )
        for_teacher = anchored(tokenizer, example, row[TEACHER_PROMPT], student, **options)
        if for_teacher is None:
            return None
        teacher = for_teacher
        example[TEACHER_PROMPT] = row[TEACHER_PROMPT]
    positions = supervised_positions(teacher.labels)
    return AnchoredRow(example, student.input_ids, student.labels, teacher.input_ids, positions, malformed)


def is_too_long(row: AnchoredRow, config: CaptureConfig, context_length: int | None) -> bool:
    """Whether a row has more tokens, for student or teacher, than `max_length` or the teacher's context."""
    limit = min(config.max_length or sys.maxsize, context_length or sys.maxsize)
    return max(len(row.input_ids), len(row.teacher_ids)) > limit


_READER = "reader"
_LEFT_OUT = ("too_long", "not_anchored", "malformed")
_TEXT_COLUMNS = ("prompt", "completion", "messages", "text", "tools", "chat_template_kwargs")


def _is_done(parts: Path, unit: int, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a unit is there and whole. One that another capture made is refused; a damaged one is made again."""
    try:
        store = TopKStore.open(_unit_folder(parts, unit))
        for _ in store.verify():
            pass
    except StoreError:
        return False
    store.check_compatible(fingerprint, remedy=f"Remove {parts}, or give another output folder.")
    return True


def _unit_folder(parts: Path, unit: int) -> Path:
    return parts / f"{unit:06d}"


def _describe(config: CaptureConfig) -> dict[str, Any]:
    """The settings that decide what is in the store, as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    of_rows = ("reasoning_format", *(["malformed_thoughts"] if config.malformed_thoughts == "drop" else []))
    return {name: value for name, value in values.items() if name not in ("encoding", *of_rows)}


def _rows_hash(rows: Sequence[Row]) -> str:
    digest = xxhash.xxh3_128()
    for row in rows:
        read = {name: value for name, value in row.items() if name != ROW_NUMBER}
        digest.update(json.dumps(read, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _wait(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()


class _Progress:
    """Rows of this process with an ETA, and tokens per second of all."""

    def __init__(self, rows: int, world: int, *, disable: bool) -> None:
        self._bar, self._world, self._tokens = tqdm(total=rows, unit="row", desc="capture", disable=disable), world, 0
        self._started = time.monotonic()

    def advance(self, rows: int, tokens: int) -> None:
        self._tokens += tokens * self._world
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(rows)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
