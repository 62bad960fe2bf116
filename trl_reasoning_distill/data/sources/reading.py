"""Rows to problems: `load_problems`, and `read_source`, which also tells what it left out."""

from __future__ import annotations

import difflib
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trl_reasoning_distill.data.row_files import is_row_file, read_rows
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.sources.base import (
    Fields,
    Refusal,
    RejectedRow,
    SourceRead,
    SourceSpec,
    SourceUnavailableError,
)
from trl_reasoning_distill.data.sources.columns import column_reader, published_reader
from trl_reasoning_distill.data.sources.registry import SOURCE_NAMES, SOURCES
from trl_reasoning_distill.data.synthetic import FAMILIES, SOURCE_NAME, iter_problems

_SHUFFLE_BUFFER = 10_000


def local_rows(spec: SourceSpec, split: str, data_dir: str) -> Sequence[Fields]:
    """The rows of a named source's local copy.

    Raises:
        SourceUnavailableError: If there is none.
    """
    path = Path(data_dir) / spec.splits[split].file
    if not path.is_file():
        raise SourceUnavailableError(
            f"data_dir has no copy of {spec.name}'s {split} split: no file {path}. "
            f"Put it there, or leave data_dir out to read {spec.hub_id} from the hub."
        )
    return read_rows(path)


def spec_rows(spec: SourceSpec, split: str, seed: int, *, sampled: bool) -> Iterable[Fields]:
    """The rows of a named source on the hub."""
    where = spec.splits[split]
    return hub_rows(
        where.hub_id or spec.hub_id,
        where.hub_split,
        seed,
        config=None if where.hub_id else spec.config,
        revision=None if where.hub_id else spec.revision,
        streaming=spec.streaming,
        sampled=sampled,
    )


def hub_rows(
    hub_id: str,
    split: str,
    seed: int,
    *,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    sampled: bool = True,
) -> Iterable[Fields]:
    """The rows of a hub dataset.

    Args:
        hub_id: Its name.
        split: The hub's name of the split.
        seed: Of a stream's order.
        config: The dataset's configuration.
        revision: The dataset's revision.
        streaming: Fetch rows as they are asked for, in an order that `seed` draws if only some of them are wanted.
        sampled: Whether only some of them are wanted.

    Raises:
        SourceUnavailableError: If they cannot be had.
    """
    import datasets

    options = {"revision": revision} if revision else {}
    try:
        rows = datasets.load_dataset(hub_id, config, split=split, streaming=streaming, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceUnavailableError(
            f"Cannot read the {split} split of {hub_id} from the hub: {reason}. Check the name and the network, "
            "or give a local copy with data_dir (named sources) or path (jsonl)."
        ) from error
    if not streaming:
        return _Rows(rows)
    return rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER) if sampled else rows


class _Rows(Sequence[Fields]):
    """A `datasets.Dataset`, which is not registered as the `Sequence` that it is."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __iter__(self) -> Any:
        return iter(self._dataset)  # reads in blocks, many times faster than row by row


logger = logging.getLogger(__name__)

PROBLEMS_NAME = "problems.jsonl"
"""The file of problems in the folder of a stage that writes them."""

Admit = Callable[[Problem], Refusal | None]


def load_problems(
    source: str, *, split: str | None = None, limit: int | None = None, seed: int = 0, **options: Any
) -> list[Problem]:
    """Read problems from a named source, a file, or the hub.

    Args:
        source: One of `SOURCE_NAMES`, a path to a file of rows (see `data.row_files`), or `hub:ORGANISATION/NAME`.
        split: Which part; the source's first if `None`.
        limit: At most this many: a sample that `seed` draws, in the source's order. A larger limit draws the same and more.
        seed: Of the sample; for `synthetic_arithmetic`, of the problems themselves.
        options: `data_dir` (named sources: a folder with local copies, instead of the hub); `path`, `columns` and `answer_rule`
            (files and the hub: ours to their column names, and one of `ANSWER_RULES`); `config` and `streaming` (the hub); `steps` and
            `families` (`synthetic_arithmetic`).

    Raises:
        SourceUnavailableError: If the rows cannot be had.
        ValueError: For an unknown source, split or option, or if no row is a problem.
    """
    read = read_source(source, split=split, limit=limit, seed=seed, **options)
    if read.rejected:
        reasons = Counter(row.reason for row in read.rejected).most_common(3)
        logger.warning(
            "%s: %d rows are no problems and were left out: %s. First: %s.",
            source,
            len(read.rejected),
            "; ".join(f"{count} × {reason}" for reason, count in reasons),
            read.rejected[0].where,
        )
    unanswered = sum(problem.answer is None for problem in read.problems)
    if unanswered:
        logger.warning(
            "%s: %d of %d problems have no answer: they can be generated from, but what is written cannot be judged.",
            source,
            unanswered,
            len(read.problems),
        )
    return read.problems


def read_source(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    admit: Admit | None = None,
    show_progress: bool = False,
    **options: Any,
) -> SourceRead:
    """`load_problems` that also returns the rows it left out, each with its reason.

    Args:
        source: As `load_problems`.
        split: As `load_problems`.
        limit: As `load_problems`.
        seed: As `load_problems`.
        admit: Asked about each problem that is well formed; it counts towards the limit only if nothing is said against it.
        show_progress: A bar with the time left.
        options: As `load_problems`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}; leave it out for all problems.")
    options = {name: value for name, value in options.items() if value is not None}
    name, prefix, rows, read_row = _open(source, split, limit, seed, options)
    total = limit or (len(rows) if isinstance(rows, Sequence) else None)
    unit = "problem" if limit else "row"
    with tqdm(total=total, desc=f"read {name}", unit=unit, disable=not show_progress, dynamic_ncols=True) as bar:
        read = _collect(prefix, name, rows, read_row, limit, seed, admit, bar)
    if not read.problems and all(row.cause == "bad_row" for row in read.rejected):
        first = read.rejected[0] if read.rejected else None
        found = f"{first.where}: {first.reason}" if first else "it has no rows"
        raise ValueError(
            f"{source} holds no problem ({found}). Check the source, and `columns` if it is a file of your own."
        )
    return read


def _open(
    source: str, split: str | None, limit: int | None, seed: int, options: dict[str, Any]
) -> tuple[str, str, Iterable[Fields], Callable[[Fields], dict[str, Any]]]:
    """The source's name, what its problems' ids begin with, its rows, and what makes a problem of a row."""
    if source == SOURCE_NAME:
        options = _checked(source, options, {"steps", "families"})
        return source, source, _synthetic_rows(split or "train", limit, seed, **options), dict
    if source in SOURCES:
        spec = SOURCES[source]
        split = _known_split(spec, split)
        data_dir = _checked(source, options, {"data_dir"}).get("data_dir")
        rows = local_rows(spec, split, data_dir) if data_dir else spec_rows(spec, split, seed, sampled=bool(limit))
        return source, f"{source}-{split}", rows, spec.read_row
    if source.startswith("hub:"):
        options = _checked(source, options, {"columns", "answer_rule", "config", "streaming"})
        name, split = source.removeprefix("hub:"), split or "train"
        where = {key: options.pop(key) for key in ("config", "streaming") if key in options}
        rows = hub_rows(name, split, seed, sampled=bool(limit), **where)
        return name, f"{name}-{split}", rows, column_reader(**options)
    path = _path_of(source, options)
    options = _checked(source, options, {"columns", "answer_rule"})
    name = path.name.partition(".")[0]
    return name, name, read_rows(path), column_reader(**options) if options else published_reader


def _synthetic_rows(
    split: str,
    limit: int | None,
    seed: int,
    steps: Sequence[int] = (2, 3, 4),
    families: Sequence[str] = FAMILIES,
) -> Iterator[Fields]:
    if limit is None:
        raise ValueError(f"{SOURCE_NAME} is endless: say how many problems with `limit`.")
    problems = iter_problems(split, seed=seed, steps=steps, families=families)
    return (problem.to_row() for problem in islice(problems, 100 * limit))  # an end, should all be refused


def _collect(
    prefix: str,
    source: str,
    rows: Iterable[Fields],
    read_row: Callable[[Fields], dict[str, Any]],
    limit: int | None,
    seed: int,
    admit: Admit | None,
    bar: tqdm,
) -> SourceRead:
    """Turn rows into at most `limit` problems with distinct ids, and keep account of the others."""
    numbered: Iterator[tuple[int, Fields]] = enumerate(rows)
    if limit is not None and isinstance(rows, Sequence):
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        numbered = ((index, rows[index]) for index in order)
    found: dict[str, tuple[int, Problem]] = {}
    rejected = []
    for index, row in numbered:
        try:
            problem = _problem(row, read_row, source, prefix, index if isinstance(rows, Sequence) else None)
            if problem.id in found:
                raise ValueError(f"its id {problem.id!r} stands twice")
            refusal = admit(problem) if admit else None
        except KeyError as error:
            refusal = Refusal("bad_row", f"no column {error}; it has {sorted(row)}")
        except (ValueError, TypeError, AttributeError) as error:
            refusal = Refusal("bad_row", str(error))
        if refusal:
            rejected.append(
                RejectedRow(f"{prefix}, row {index}", refusal.reason, refusal.cause, row, detail=refusal.detail)
            )
        else:
            found[problem.id] = (index, problem)
        bar.update(limit is None or not refusal)
        if len(found) == limit:
            break
    return SourceRead([problem for _, problem in sorted(found.values(), key=lambda item: item[0])], rejected)


def _problem(
    row: Fields, read_row: Callable[[Fields], dict[str, Any]], source: str, prefix: str, index: int | None
) -> Problem:
    fields = {name: value for name, value in read_row(row).items() if value is not None}
    fields["question"] = str(fields.get("question", "")).strip()
    if not fields["question"]:
        raise ValueError("the question is empty")
    if fields.get("answer") == "":
        raise ValueError("the answer is empty")
    # Rows of a stream come shuffled, so their number names nothing; the question does.
    number = (
        f"{index:06d}" if index is not None else hashlib.blake2b(fields["question"].encode(), digest_size=8).hexdigest()
    )
    identity = str(fields.get("id", f"{prefix}-{number}"))
    return Problem.from_row({"answer": None, "source": source, **fields, "id": identity}, "the row")


def _known_split(spec: SourceSpec, split: str | None) -> str:
    if split is not None and split not in spec.splits:
        raise ValueError(f"{spec.name} has the splits {list(spec.splits)}, not {split!r}.")
    return split or next(iter(spec.splits))


def _checked(source: str, options: Mapping[str, Any], allowed: set[str]) -> dict[str, Any]:
    if unknown := sorted(set(options) - allowed):
        raise ValueError(f"The source {source!r} does not take {unknown}; it takes {sorted(allowed)}.")
    return dict(options)


def _path_of(source: str, options: dict[str, Any]) -> Path:
    """The file that `jsonl` with a `path`, or a path itself, names; the error for every unknown source is raised here."""
    path = Path(options.pop("path", "") if source == "jsonl" else source)
    if source == "jsonl" and not path.name:
        raise ValueError("The source 'jsonl' needs `path`, the file to read.")
    if path.is_dir() and (path / PROBLEMS_NAME).is_file():
        return path / PROBLEMS_NAME
    if source == "jsonl" or is_row_file(path):
        if not path.is_file():
            raise SourceUnavailableError(f"No file {path}.")
        return path
    close = difflib.get_close_matches(source, SOURCE_NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"Unknown source {source!r}; there are {list(SOURCE_NAMES)}, paths to files, and hub:ORGANISATION/NAME.{hint}"
    )
