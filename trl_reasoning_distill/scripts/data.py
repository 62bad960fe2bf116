"""Prepare problems: a mixture of sources as one set that every later stage reads; and look at what is in one.

    trl-distill data prepare --mixture '{"gsm8k": 3000, "svamp": 500}' --output_dir runs/x/data
    trl-distill data preview --mixture '{"gsm8k": 3000}' --tokenizer Qwen/Qwen2.5-0.5B --max_length 1024
    trl-distill data preview --dataset runs/x/verify --tokenizer Qwen/Qwen2.5-0.5B --chart lengths.png

`prepare` takes each question once, leaves out what stands in an evaluation set, and writes `problems.jsonl` (for `generate` and
`evaluate`), `train.jsonl` (for the trainings, from the problems that have a worked solution) and `rejected.jsonl` (every row that was left
out, and why). `preview` prints counts, lengths, how many rows fit into `max_length`, a histogram, and samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_reasoning_distill.options import Count, CountOrZero, JsonMapping, PositiveShare, option
from trl_reasoning_distill.scripts.arguments import PromptArguments
from trl_reasoning_distill.scripts.command import check_given
from trl_reasoning_distill.scripts.planning import EXAMPLES, Plan
from trl_reasoning_distill.scripts.stage import (
    Outcome,
    Stage,
    TrainingStageArguments,
    parser_of,
    settings_of,
    stage_main,
)

if TYPE_CHECKING:
    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.data.mixture import Mixture
    from trl_reasoning_distill.data.preview import Item


@dataclass(kw_only=True)
class DataArguments(TrainingStageArguments):
    """Which problems, how many of each, and what is left out."""

    action: Literal["prepare", "preview"] = option("prepare", "prepare or preview; also as the first word.")
    output_dir: str = option("", "[prepare] Folder for what this stage makes. Required to prepare.")
    mixture: JsonMapping | None = option(
        None, 'Source to count, or to {"count" or "weight", "split", "fallback", …}. Required to prepare.'
    )
    dataset: str | None = option(
        None, "[preview] A stage's folder, or a JSONL file of problems or training rows, instead of a mixture."
    )
    total: Count | None = option(None, "Problems in all, for sources with a weight.")
    seed: CountOrZero = option(0, "Seed of the samples and of the order.")
    data_dir: str | None = option(None, "Folder with local copies of named sources, instead of the hub.")
    deduplicate: Literal["near", "exact", "off"] = option(
        "near", "Leave out equal questions (exact), also nearly equal ones (near), or none (off)."
    )
    near_duplicate_threshold: PositiveShare = option(
        0.8, "Share of word 3-grams that nearly equal questions have in common (Jaccard)."
    )
    decontaminate: list[str] = option(
        ["all"], "Leave out problems of these evaluation sets: all, none, or names such as gsm8k:test math500."
    )
    tokenizer: str | None = option(None, "Folder or hub name of a tokenizer, to give lengths in its tokens.")
    max_length: Count = option(1024, "Tokens; the table says how many rows fit.")
    samples: CountOrZero = option(1, "Rows of each source to print.")
    chart: str | None = option(None, "File for the histogram as a picture, such as lengths.png.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is None and not self.mixture:
            raise ValueError('mixture is missing: map sources to counts, such as {"gsm8k": 3000, "svamp": 500}.')
        if self.dataset is not None and (self.mixture or self.action == "prepare"):
            raise ValueError("dataset is there to be previewed: `data preview --dataset PATH`, without a mixture.")
        if self.action == "prepare" and not self.output_dir:
            check_given(["output_dir"])
        if not self.decontaminate or ({"all", "none"} & set(self.decontaminate) and len(self.decontaminate) > 1):
            raise ValueError(f"decontaminate={self.decontaminate}: give all, none, or a list of evaluation sets.")


make_parser = parser_of(DataArguments, PromptArguments)


class Data(Stage):
    """Prepare a mixture of sources, or look into one or into a dataset."""

    name = "data"

    def __init__(self, options: DataArguments, prompt: PromptArguments) -> None:
        self.options, self.prompt, self.output_dir = options, prompt, options.output_dir
        self.settings = settings_of(options, prompt)
        for name in ("action", "dataset", "tokenizer", "max_length", "samples", "chart"):
            del self.settings[name]  # what is shown is no part of what is made
        self.inputs = {"data_dir": options.data_dir} if options.data_dir else {}
        self.seed = options.seed
        self.writes = options.action == "prepare"

    def load(self) -> tuple[Mixture, list[dict[str, Any]]]:
        """The mixture, and the training rows of its problems that have a worked solution."""
        from trl_reasoning_distill.data.mixture import worked_rows

        mixture = load_options(self.options)
        rows, not_rendered = worked_rows(mixture.problems, self.prompt.make_format())
        mixture.rejected.extend(not_rendered)
        return mixture, rows

    def plan(self) -> Plan:
        """Counts, what is left out, and two rows; of a preview, the preview itself."""
        if self.options.action == "preview":
            items = _dataset_items(self.options.dataset) if self.options.dataset else _items(*self.load())
            return Plan(preview_text(items, self.options), rows=len(items))
        mixture, rows = self.load()
        count = len(mixture.problems)
        self.options.samples = max(self.options.samples, math.ceil(EXAMPLES / max(1, len(mixture.counts))))
        lines = [
            f"data: {count:,} problems and {len(rows):,} training rows would be written to {self.output_dir}",
            preview_text(_items(mixture, rows), self.options),
            f"\n{describe_left_out(mixture)}",
        ]
        return Plan("\n".join(lines), rows=count, makes=count)

    def run(self, run: StageRun) -> Outcome:
        """Prepare, and show what is left out."""
        from trl_reasoning_distill.data.files import write_jsonl
        from trl_reasoning_distill.data.sources import PROBLEMS_NAME

        mixture, rows = self.load()
        write_jsonl(run.output_dir / PROBLEMS_NAME, (problem.to_row() for problem in mixture.problems))
        write_jsonl(run.output_dir / "rejected.jsonl", (row.to_row() for row in mixture.rejected))
        if rows:
            write_jsonl(run.output_dir / "train.jsonl", rows)
        print(preview_text(_items(mixture, rows), self.options))
        left_out = mixture.left_out()
        print(f"\n{describe_left_out(mixture)}")
        causes = [f"{count:,} {cause}" for cause, count in left_out.items() if count and " " not in cause]
        counts = {"problems": len(mixture.problems), "rows": len(rows), **mixture.counts, **left_out}
        return counts, (
            f"{len(mixture.problems):,} problems of {len(mixture.counts)} sources, {len(rows):,} training rows; "
            f"left out: {', '.join(causes) or 'none'}"
        )


def describe_left_out(mixture: Mixture) -> str:
    """What was compared with, and what was left out for it."""
    sets = ", ".join(f"{name} ({size:,})" for name, size in mixture.evaluation_sets.items()) or "none"
    lines = [f"decontaminated against: {sets}"]
    lines += [f"  {count:,} {cause}" for cause, count in mixture.left_out().items() if count]
    return "\n".join(lines)


def load_options(options: DataArguments) -> Mixture:
    from trl_reasoning_distill.data.mixture import load_mixture

    assert isinstance(options.mixture, dict)
    listed: bool | list[str] = options.decontaminate
    if options.decontaminate in (["all"], ["none"]):
        listed = options.decontaminate == ["all"]
    return load_mixture(
        options.mixture,
        total=options.total,
        seed=options.seed,
        data_dir=options.data_dir,
        deduplicate=options.deduplicate != "off",
        near_duplicate_threshold=options.near_duplicate_threshold if options.deduplicate == "near" else None,
        decontaminate=listed,
        show_progress=True,
    )


def _items(mixture: Mixture, rows: list[dict[str, Any]]) -> list[Item]:
    """Problems as the training rows they give, where they give one."""
    from trl_reasoning_distill.data.preview import problem_item, row_item

    written = {row["problem_id"]: row_item(row) for row in rows}
    return [written.get(problem.id) or problem_item(problem) for problem in mixture.problems]


def _dataset_items(dataset: str) -> list[Item]:
    """Training rows of a file or a stage's folder, of whatever shape; its problems, if it has no training rows."""
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.data.normalization import normalize_rows
    from trl_reasoning_distill.data.preview import problem_item, row_item
    from trl_reasoning_distill.data.published import Reading
    from trl_reasoning_distill.data.row_files import read_rows
    from trl_reasoning_distill.data.sources import PROBLEMS_NAME, read_source

    path = Path(dataset)
    if path.is_dir():
        found = [path / name for name in ("train.jsonl", PROBLEMS_NAME) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither train.jsonl nor {PROBLEMS_NAME}.")
        path = found[0]
    if path.name != PROBLEMS_NAME:
        read = normalize_rows(read_rows(path), Reading(ReasoningFormat.preset("think")))
        if read.rows:
            print(f"{path}: {read}\n")
            return [row_item(row) for row in read.rows]
    return [problem_item(problem) for problem in read_source(str(path)).problems]


def preview_text(items: list[Item], options: DataArguments) -> str:
    """Counts, lengths and samples; draws the chart that is asked for."""
    from trl_reasoning_distill.data.preview import make_preview

    tokenizer = None
    if options.tokenizer is not None:
        from trl_reasoning_distill.hub import load_tokenizer

        tokenizer = load_tokenizer(options.tokenizer)
    preview = make_preview(items, tokenizer, options.max_length, seed=options.seed)
    chart = ""
    if options.chart:
        preview.plot(options.chart)
        chart = f"\nchart: {options.chart}"
    return preview.to_text(options.samples) + chart


main = stage_main(Data, make_parser)

if __name__ == "__main__":
    main()
