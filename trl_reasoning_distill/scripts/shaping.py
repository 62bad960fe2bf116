"""Datasets in the shapes that reasoning data comes in, made training rows (see `data.conversion`)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.data.conversion import SHAPES, convert_rows, detect_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset

    from trl_reasoning_distill.data.formatting import ReasoningFormat

_TRL_SHAPES = ({"prompt", "completion"}, {"text"}, {"input_ids"})


def shape_of(row: Mapping[str, Any], wanted: str) -> str | None:
    """The shape to convert a dataset from, or `None` to leave its rows to TRL.

    `"auto"` leaves what TRL takes as it is: prompt and completion, text, tokens, and conversations that are not OpenThoughts'.

    Raises:
        ValueError: For an unknown shape, or rows of none.
    """
    if wanted not in ("auto", "none", *SHAPES):
        raise ValueError(f"Unknown data_shape {wanted!r}; there are auto, none, {', '.join(SHAPES)}.")
    if wanted != "auto":
        return None if wanted == "none" else wanted
    if any(columns <= row.keys() for columns in _TRL_SHAPES):
        return None
    shape = detect_shape(row)
    return None if shape == "sharegpt" else shape


def shape_dataset(rows: Dataset, shape: str, form: ReasoningFormat, per_row: int) -> tuple[Dataset, str]:
    """Training rows from a dataset of one shape, and one line on what became of it.

    Raises:
        ValueError: If no row can be learnt from, with the reasons.
    """
    from datasets import Features, Value

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        columns = batch.keys()
        converted = convert_rows(
            (dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)),
            shape,
            form,
            per_row=per_row,
        )
        empty: dict[str, Any] = {"prompt": [], "completion": [], "answer": None}
        made = [{**row, "rejected": None} for row in converted.rows]
        made += [{**empty, "rejected": reason} for _, reason in converted.rejected]
        return {name: [row[name] for row in made] for name in ("prompt", "completion", "answer", "rejected")}

    messages = [{"role": Value("string"), "content": Value("string")}]
    text = Value("string")
    result = rows.map(
        convert,
        batched=True,
        batch_size=200,
        remove_columns=rows.column_names,
        features=Features({"prompt": messages, "completion": messages, "answer": text, "rejected": text}),
        desc=f"Reading {shape}",
    )
    reasons = Counter(reason for reason in result["rejected"] if reason is not None)
    kept = result.select([index for index, reason in enumerate(result["rejected"]) if reason is None])
    why = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(3))
    line = f"{len(kept):,} rows from {len(rows):,} of shape {shape}, {sum(reasons.values()):,} left out{f': {why}' if why else ''}"
    if not len(kept):
        raise ValueError(f"No row can be learnt from ({line}).")
    return kept.remove_columns("rejected"), line
