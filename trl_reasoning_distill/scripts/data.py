"""Prepare problems: a mixture of sources as one set that every later stage reads; and look at what is in one.

    trl-distill data prepare --mixture '{"gsm8k": 3000, "svamp": 500}' --output_dir runs/x/data
    trl-distill data preview --mixture '{"gsm8k": 3000}' --tokenizer Qwen/Qwen2.5-0.5B --max_length 1024
    trl-distill data preview --dataset runs/x/verify --tokenizer Qwen/Qwen2.5-0.5B --chart lengths.png

`prepare` takes each question once, leaves out what stands in an evaluation set, and writes `problems.jsonl` (for `generate` and
`evaluate`), `train.jsonl` (for the trainings, from the problems that have a worked solution) and `rejected.jsonl` (every row that was left
out, and why). `preview` prints counts, lengths, how many rows fit into `max_length`, a histogram, and samples.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.scripts.arguments import PromptArguments
from trl_reasoning_distill.scripts.stage import (
    TrainingStageArguments,
    is_main_process,
    open_run,
    parse_stage,
    settings_of,
    stage_main,
)

if TYPE_CHECKING:
    from trl import TrlParser

    from trl_reasoning_distill.data.mixture import Mixture
    from trl_reasoning_distill.data.preview import Item

ACTIONS = ("prepare", "preview")
_EXAMPLES = 2  # of a dry run


@dataclass
class DataArguments(TrainingStageArguments):
    """Which problems, how many of each, and what is left out."""

    action: str = field(default="prepare", metadata={"help": "prepare or preview; also as the first word."})
    output_dir: str = field(default="", metadata={"help": "[prepare] Folder for what this stage makes. Required."})
    mixture: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Source to count, or to {"count" or "weight", "split", "fallback", …}. Required to prepare.'},
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "[preview] A stage's folder, or a JSONL file of problems or training rows, instead of a mixture."
        },
    )
    total: int | None = field(default=None, metadata={"help": "Problems in all, for sources with a weight."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples and of the order."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with local copies of named sources, instead of the hub."}
    )
    deduplicate: str = field(
        default="near",
        metadata={"help": "Leave out equal questions (exact), also nearly equal ones (near), or none (off)."},
    )
    near_duplicate_threshold: float = field(
        default=0.8, metadata={"help": "Share of word 3-grams that nearly equal questions have in common (Jaccard)."}
    )
    decontaminate: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "Leave out problems of these evaluation sets: all, none, or names such as gsm8k:test math500."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or hub name of a tokenizer, to give lengths in its tokens."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens; the table says how many rows fit."})
    samples: int = field(default=1, metadata={"help": "Rows of each source to print."})
    chart: str | None = field(
        default=None, metadata={"help": "File for the histogram as a picture, such as lengths.png; needs matplotlib."}
    )

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"{self.action!r} is nothing that can be done with data; choose {' or '.join(ACTIONS)}.")
        if isinstance(self.mixture, str):
            try:
                self.mixture = json.loads(self.mixture)
            except json.JSONDecodeError as error:
                raise ValueError(f"mixture is not JSON ({error}): {self.mixture!r:.80}") from None
        if self.dataset is None and (not isinstance(self.mixture, dict) or not self.mixture):
            raise ValueError('mixture is missing: map sources to counts, such as {"gsm8k": 3000, "svamp": 500}.')
        if self.dataset is not None and (self.mixture or self.action == "prepare"):
            raise ValueError("dataset is there to be previewed: `data preview --dataset PATH`, without a mixture.")
        if self.action == "prepare" and not self.output_dir:
            raise ValueError(
                "output_dir is missing: say where this stage shall write, with --output_dir or in the YAML."
            )
        if self.deduplicate not in ("near", "exact", "off"):
            raise ValueError(f"deduplicate={self.deduplicate!r}: choose near, exact or off.")
        if not self.decontaminate or ({"all", "none"} & set(self.decontaminate) and len(self.decontaminate) > 1):
            raise ValueError(f"decontaminate={self.decontaminate}: give all, none, or a list of evaluation sets.")


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    return TrlParser((DataArguments, PromptArguments), prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage; its first word may be the action."""
    words = list(sys.argv[1:] if args is None else args)
    if words and not words[0].startswith("--"):
        words.insert(0, "--action")
    options, prompt = parse_stage(make_parser(), words)
    if not is_main_process():
        return
    if options.action == "preview":
        _preview(_dataset_items(options.dataset) if options.dataset else _mixture_items(options, prompt), options)
    else:
        _prepare(options, prompt)


def _prepare(options: DataArguments, prompt: PromptArguments) -> None:
    from trl_reasoning_distill.data.files import write_jsonl
    from trl_reasoning_distill.data.mixture import worked_rows
    from trl_reasoning_distill.data.sources import PROBLEMS_NAME

    response_format = prompt.make_format()
    settings = settings_of(options, prompt)
    for name in ("action", "dataset", "tokenizer", "max_length", "samples", "chart"):
        settings.pop(name)  # what is shown is no part of what is made
    inputs = {"data_dir": options.data_dir} if options.data_dir else {}
    if options.dry_run:
        mixture = _load(options)
        rows, not_rendered = worked_rows(mixture.problems, response_format)
        mixture.rejected.extend(not_rendered)
        print(
            f"data: {len(mixture.problems):,} problems and {len(rows):,} training rows would be written to {options.output_dir}"
        )
        options.samples = max(options.samples, math.ceil(_EXAMPLES / max(1, len(mixture.counts))))
        _preview(_items(mixture, rows), options)
        print(f"\n{describe_left_out(mixture)}")
        return
    with open_run("data", options, settings, inputs, options.seed) as run:
        if run is None:
            return
        mixture = _load(options)
        rows, not_rendered = worked_rows(mixture.problems, response_format)
        mixture.rejected.extend(not_rendered)
        write_jsonl(run.output_dir / PROBLEMS_NAME, (problem.to_row() for problem in mixture.problems))
        write_jsonl(run.output_dir / "rejected.jsonl", (row.to_row() for row in mixture.rejected))
        if rows:
            write_jsonl(run.output_dir / "train.jsonl", rows)
        _preview(_items(mixture, rows), options)
        left_out = mixture.left_out()
        print(f"\n{describe_left_out(mixture)}")
        causes = [f"{count:,} {cause}" for cause, count in left_out.items() if count and " " not in cause]
        result = (
            f"{len(mixture.problems):,} problems of {len(mixture.counts)} sources, {len(rows):,} training rows; "
            f"left out: {', '.join(causes) or 'none'}"
        )
        run.finish({"problems": len(mixture.problems), "rows": len(rows), **mixture.counts, **left_out}, result)
        print(f"data: {result}")


def describe_left_out(mixture: Mixture) -> str:
    """What was compared with, and what was left out for it."""
    sets = ", ".join(f"{name} ({size:,})" for name, size in mixture.evaluation_sets.items()) or "none"
    lines = [f"decontaminated against: {sets}"]
    lines += [f"  {count:,} {cause}" for cause, count in mixture.left_out().items() if count]
    return "\n".join(lines)


def _load(options: DataArguments) -> Mixture:
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


def _mixture_items(options: DataArguments, prompt: PromptArguments) -> list[Item]:
    from trl_reasoning_distill.data.mixture import worked_rows

    response_format = prompt.make_format()
    mixture = _load(options)
    return _items(mixture, worked_rows(mixture.problems, response_format)[0])


def _items(mixture: Mixture, rows: list[dict[str, Any]]) -> list[Item]:
    """Problems as the training rows they give, where they give one."""
    from trl_reasoning_distill.data.preview import problem_item, row_item

    written = {row["problem_id"]: row_item(row) for row in rows}
    return [written.get(problem.id) or problem_item(problem) for problem in mixture.problems]


def _dataset_items(dataset: str) -> list[Item]:
    """Training rows of a file or a stage's folder; its problems, if it has no training rows."""
    from trl_reasoning_distill.data.files import read_jsonl
    from trl_reasoning_distill.data.preview import problem_item, row_item
    from trl_reasoning_distill.data.schema import Problem
    from trl_reasoning_distill.data.sources import PROBLEMS_NAME

    path = Path(dataset)
    if path.is_dir():
        found = [path / name for name in ("train.jsonl", PROBLEMS_NAME) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither train.jsonl nor {PROBLEMS_NAME}.")
        path = found[0]
    rows = list(read_jsonl(path))
    if rows and "completion" in rows[0]:
        return [row_item(row) for row in rows]
    return [problem_item(Problem.from_row(row, f"{path}, row {number}")) for number, row in enumerate(rows, start=1)]


def _preview(items: list[Item], options: DataArguments) -> None:
    from trl_reasoning_distill.data.preview import make_preview

    tokenizer = None
    if options.tokenizer is not None:
        from trl_reasoning_distill.hub import load_tokenizer

        tokenizer = load_tokenizer(options.tokenizer)
    preview = make_preview(items, tokenizer, options.max_length, seed=options.seed)
    print(preview.to_text(options.samples))
    if options.chart:
        preview.plot(options.chart)
        print(f"chart: {options.chart}")


if __name__ == "__main__":
    main()
