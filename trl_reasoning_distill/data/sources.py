"""Named problem sources: `load_problems("gsm8k", split="train", limit=1000)`.

A source is a `SourceSpec`: where its rows lie, and one function that makes a problem's fields from a row. Beside the named ones,
`jsonl` (or a path) reads a file and `hub:ORGANISATION/NAME` reads any dataset of the hub, both with a column map:

    load_problems("jsonl", path="mine.jsonl", columns={"question": "prompt", "answer": "target"})
    load_problems("hub:openai/gsm8k", config="main", split="test", columns={"question": "question", "answer": "answer"}, answer_rule="gsm8k")

A row that cannot be a problem is left out, counted, and named with its reason: `read_source` returns these, `load_problems` logs them.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from trl_reasoning_distill.data.files import read_jsonl
from trl_reasoning_distill.data.formatting import ReasoningFormat, last_boxed
from trl_reasoning_distill.data.schema import Problem
from trl_reasoning_distill.data.synthetic import FAMILIES, SOURCE_NAME, iter_problems

logger = logging.getLogger(__name__)

Fields = Mapping[str, Any]
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_SHUFFLE_BUFFER = 10_000
_OPEN_THOUGHTS = ReasoningFormat("openthoughts", "<|begin_of_thought|>", "<|end_of_thought|>")


class SourceUnavailableError(ValueError):
    """The rows of a source cannot be had here: no such file, or the hub is out of reach."""


@dataclass(frozen=True)
class SourceSpec:
    """A source of problems.

    Attributes:
        name: What it is called in recipes.
        read_row: Makes a problem's fields (`question`, `answer`, and if it has them `solution`, `kind`, `id`) from a row; raises
            `ValueError` or `KeyError` with the reason if the row is bad.
        hub_id: Dataset on the hub.
        splits: Our name of a split to (the hub's name of it, its file under `data_dir`); the first is the default.
        config: The hub dataset's configuration.
        streaming: Whether the hub's rows are streamed, because the dataset is too large to download for a sample.
    """

    name: str
    read_row: Callable[[Fields], dict[str, Any]]
    hub_id: str
    splits: Mapping[str, tuple[str, str]]
    config: str | None = None
    streaming: bool = False


@dataclass(frozen=True)
class RejectedRow:
    """A row that is no problem: where it stands, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class SourceRead:
    """What was read from a source, and what was left out."""

    problems: list[Problem]
    rejected: list[RejectedRow] = field(default_factory=list)


# --- One function per source: a row of theirs to the fields of a `Problem` ---


def remove_calculator_marks(text: str) -> str:
    """GSM8K's text without its calculator marks: `48/2 = <<48/2=24>>24` becomes `48/2 = 24`."""
    return _CALCULATOR_MARK.sub("", text)


def _gsm8k(row: Fields) -> dict[str, Any]:
    solution, marker, answer = row["answer"].rpartition("####")
    if not marker:
        raise ValueError("the answer has no #### line")
    steps = solution.count("<<")
    return {
        "question": row["question"],
        "answer": answer.strip().replace(",", ""),
        "solution": remove_calculator_marks(solution).strip(),
        "kind": f"{min(steps, 8)}{'+' if steps >= 8 else ''} steps",
    }


def _gsm_hard(row: Fields) -> dict[str, Any]:
    return {"question": row["input"], "answer": _number(row["target"])}


def _svamp(row: Fields) -> dict[str, Any]:
    body = row["Body"].strip()
    if body[-1:].isalnum():
        body += "."
    return {
        "question": f"{body} {row['Question'].strip()}",
        "answer": _number(row["Answer"]),
        "kind": row["Type"].replace("Divison", "Division"),  # one row is misspelt
        "id": f"svamp-{row['ID']}",
    }


def _math500(row: Fields) -> dict[str, Any]:
    return {
        "question": row["problem"],
        "answer": row["answer"],
        "solution": row["solution"],
        "kind": row["subject"],
        "id": f"math500-{row['unique_id']}",
    }


def _numinamath_qwq(row: Fields) -> dict[str, Any]:
    return {
        "question": row["prompt"],
        "answer": row["ground_truth"],
        "solution": row["response"] if row.get("correct", True) else None,
    }


def _openthoughts(row: Fields) -> dict[str, Any]:
    turns = [turn["value"] for turn in row["conversations"]]
    if len(turns) != 2:
        raise ValueError(f"a conversation of {len(turns)} turns, not 2")
    parsed = _OPEN_THOUGHTS.parse(turns[1])
    if parsed.reasoning is None or parsed.answer is None:
        raise ValueError("the reply has no <|begin_of_thought|>…<|end_of_thought|>")
    solution = parsed.answer.replace("<|begin_of_solution|>", "").replace("<|end_of_solution|>", "").strip()
    return {"question": turns[0], "answer": _boxed(solution), "solution": parsed.reasoning}


def _openr1_math(row: Fields) -> dict[str, Any]:
    return {
        "question": row["problem"],
        "answer": row["answer"],
        "solution": row.get("solution"),
        "kind": row.get("problem_type") or "",
        "id": f"openr1-{row['uuid']}" if row.get("uuid") else None,
    }


def _mapped(row: Fields, columns: Mapping[str, str], answer_rule: str) -> dict[str, Any]:
    """A row of any file, by its column map."""
    fields = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row or ours in ("question", "answer")}
    answer = fields["answer"]
    fields["answer"] = None if answer is None else ANSWER_RULES[answer_rule](_text(answer))
    return fields


def _number(value: Any) -> str:
    """A number as its shortest exact decimal: `-9867630.0` becomes `-9867630`."""
    try:
        number = Decimal(str(value).replace(",", "").strip())
    except InvalidOperation:
        raise ValueError(f"the answer {value!r:.40} is not a number") from None
    if not number.is_finite():
        raise ValueError(f"the answer {value!r} is not a finite number")
    return format(number.to_integral_value() if number == number.to_integral_value() else number.normalize(), "f")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value)
    raise ValueError(f"the answer is a {type(value).__name__} ({value!r:.40}), not text or a number")


def _boxed(text: str) -> str | None:
    box = last_boxed(text)
    return text[box[1] : box[2]].strip() if box else None


ANSWER_RULES: Mapping[str, Callable[[str], str | None]] = {
    "as_is": str.strip,
    "gsm8k": lambda text: text.rpartition("####")[2].strip().replace(",", ""),
    "boxed": _boxed,
}
"""How the answer's column becomes the answer: as it stands, after GSM8K's `####`, or from the last `\\boxed{}`."""

SOURCES: Mapping[str, SourceSpec] = {
    spec.name: spec
    for spec in (
        SourceSpec(
            "gsm8k",
            _gsm8k,
            "openai/gsm8k",
            {"train": ("train", "gsm8k/train.jsonl"), "test": ("test", "gsm8k/test.jsonl")},
            config="main",
        ),
        SourceSpec("gsm_hard", _gsm_hard, "reasoning-machines/gsm-hard", {"test": ("train", "gsm_hard/test.jsonl")}),
        SourceSpec(
            "svamp",
            _svamp,
            "ChilleD/SVAMP",
            {"test": ("test", "svamp/svamp.jsonl"), "train": ("train", "svamp/train.jsonl")},
        ),
        SourceSpec("math500", _math500, "HuggingFaceH4/MATH-500", {"test": ("test", "math/math500.jsonl")}),
        SourceSpec(
            "numinamath_qwq",
            _numinamath_qwq,
            "PrimeIntellect/NuminaMath-QwQ-CoT-5M",
            {"train": ("train", "numinamath_qwq/train.jsonl")},
            streaming=True,
        ),
        SourceSpec(
            "openthoughts",
            _openthoughts,
            "open-thoughts/OpenThoughts-114k",
            {"train": ("train", "openthoughts/train.jsonl")},
            streaming=True,
        ),
        SourceSpec(
            "openr1_math",
            _openr1_math,
            "open-r1/OpenR1-Math-220k",
            {"train": ("train", "openr1_math/train.jsonl")},
            config="default",
            streaming=True,
        ),
    )
}
SOURCE_NAMES = (SOURCE_NAME, *SOURCES, "jsonl")
_DEFAULT_COLUMNS = {
    "question": "question",
    "answer": "answer",
    "solution": "solution",
    "kind": "kind",
    "id": "id",
    "source": "source",
}


def load_problems(
    source: str, *, split: str | None = None, limit: int | None = None, seed: int = 0, **options: Any
) -> list[Problem]:
    """Read problems from a named source, a file, or the hub.

    Args:
        source: One of `SOURCE_NAMES`, a path to a `.jsonl`, `.json`, `.csv` or `.parquet` file, or `hub:ORGANISATION/NAME`.
        split: Which part; the source's first if `None`.
        limit: At most this many: a sample that `seed` draws, in the source's order. A larger limit draws the same and more.
        seed: Of the sample; for `synthetic_arithmetic`, of the problems themselves.
        options: `data_dir` (named sources: a folder with local copies, instead of the hub); `path`, `columns` and `answer_rule`
            (files and the hub: ours to their column names, and one of `ANSWER_RULES`); `config` (the hub); `steps` and `families`
            (`synthetic_arithmetic`).

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
    return read.problems


def read_source(
    source: str, *, split: str | None = None, limit: int | None = None, seed: int = 0, **options: Any
) -> SourceRead:
    """`load_problems` that also returns the rows it left out, each with its reason."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}; leave it out for all problems.")
    options = {name: value for name, value in options.items() if value is not None}
    if source == SOURCE_NAME:
        return _read_synthetic(source, split, limit, seed, **_checked(source, options, {"steps", "families"}))
    if source in SOURCES:
        spec = SOURCES[source]
        split = _known_split(spec, split)
        data_dir = _checked(source, options, {"data_dir"}).get("data_dir")
        rows = (
            _local_rows(spec, split, data_dir)
            if data_dir
            else _hub_rows(spec.hub_id, spec.config, spec.splits[split][0], spec.streaming, seed)
        )
        read = _collect(f"{source}-{split}", source, rows, spec.read_row, limit, seed)
    elif source.startswith("hub:"):
        options = _checked(source, options, {"columns", "answer_rule", "config"})
        name, split = source.removeprefix("hub:"), split or "train"
        rows = _hub_rows(name, options.pop("config", None), split, False, seed)
        read = _collect(f"{name}-{split}", name, rows, _column_reader(**options), limit, seed)
    else:
        path = _path_of(source, options)
        options = _checked(source, options, {"columns", "answer_rule"})
        read = _collect(path.stem, path.stem, _file_rows(path), _column_reader(**options), limit, seed)
    if not read.problems:
        first = read.rejected[0] if read.rejected else None
        found = f"{first.where}: {first.reason}" if first else "it has no rows"
        raise ValueError(
            f"{source} holds no problem ({found}). Check the source, and `columns` if it is a file of your own."
        )
    return read


def _read_synthetic(
    source: str,
    split: str | None,
    limit: int | None,
    seed: int,
    steps: Sequence[int] = (2, 3, 4),
    families: Sequence[str] = FAMILIES,
) -> SourceRead:
    if limit is None:
        raise ValueError(f"{source} is endless: say how many problems with `limit`.")
    return SourceRead(list(islice(iter_problems(split or "train", seed=seed, steps=steps, families=families), limit)))


def _collect(
    prefix: str,
    source: str,
    rows: Sequence[Fields] | Iterable[Fields],
    read_row: Callable[[Fields], dict[str, Any]],
    limit: int | None,
    seed: int,
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
        where = f"{prefix}, row {index}"
        try:
            problem = _problem(row, read_row, source, prefix, index if isinstance(rows, Sequence) else None)
            if problem.id in found:
                raise ValueError(f"its id {problem.id!r} stands twice")
        except KeyError as error:
            rejected.append(RejectedRow(where, f"no column {error}; it has {sorted(row)}"))
        except (ValueError, TypeError, AttributeError) as error:
            rejected.append(RejectedRow(where, str(error)))
        else:
            found[problem.id] = (index, problem)
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


def _column_reader(
    columns: Mapping[str, str] | None = None, answer_rule: str = "as_is"
) -> Callable[[Fields], dict[str, Any]]:
    if unknown := sorted(set(columns or {}) - set(_DEFAULT_COLUMNS)):
        raise ValueError(
            f"columns names {unknown}; a problem has {sorted(_DEFAULT_COLUMNS)}, each mapped to a column of the file."
        )
    if answer_rule not in ANSWER_RULES:
        raise ValueError(f"Unknown answer_rule {answer_rule!r}; there are {sorted(ANSWER_RULES)}.")
    return partial(_mapped, columns={**_DEFAULT_COLUMNS, **(columns or {})}, answer_rule=answer_rule)


def _local_rows(spec: SourceSpec, split: str, data_dir: str) -> list[Fields]:
    path = Path(data_dir) / spec.splits[split][1]
    if not path.is_file():
        raise SourceUnavailableError(
            f"data_dir has no copy of {spec.name}'s {split} split: no file {path}. Put it there, or leave data_dir out to read {spec.hub_id} from the hub."
        )
    return _file_rows(path)


def _file_rows(path: Path) -> list[Fields]:
    if path.suffix == ".jsonl":
        return list(read_jsonl(path))
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}, not a list of rows.")
        return rows
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle))
    if path.suffix == ".parquet":
        from datasets import Dataset

        return Dataset.from_parquet(str(path)).to_list()
    raise ValueError(f"{path} is neither .jsonl, .json, .csv nor .parquet.")


def _hub_rows(
    hub_id: str, config: str | None, split: str, streaming: bool, seed: int
) -> Sequence[Fields] | Iterable[Fields]:
    import datasets

    try:
        rows = datasets.load_dataset(hub_id, config, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceUnavailableError(
            f"Cannot read the {split} split of {hub_id} from the hub: {reason}. Check the name and the network, or give a local copy with data_dir (named sources) or path (jsonl)."
        ) from error
    return rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER) if streaming else _Rows(rows)


class _Rows(Sequence[Fields]):
    """A `datasets.Dataset`, which is not registered as the `Sequence` that it is."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]


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
    if source == "jsonl" or path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
        if not path.is_file():
            raise SourceUnavailableError(f"No file {path}.")
        return path
    close = difflib.get_close_matches(source, SOURCE_NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"Unknown source {source!r}; there are {list(SOURCE_NAMES)}, paths to files, and hub:ORGANISATION/NAME.{hint}"
    )
