"""Prepare problems: one source, or a mixture of several, as one file that every later stage reads.

    trl-distill data --mixture '{"gsm8k": 3000, "gsm_hard": 1000}' --output_dir runs/x/data
    trl-distill generate --source runs/x/data/problems.jsonl …

Writes `problems.jsonl`, and `rejected.jsonl` with every row that was left out and its reason. Prints a table: problems, kinds,
lengths (in tokens, if `tokenizer` is given), and one sample of each source.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.scripts.stage import StageArguments, is_main_process, parse_stage, stage_main

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trl import TrlParser

    from trl_reasoning_distill.data.schema import Problem


@dataclass
class DataArguments(StageArguments):
    """Which problems, and how many of each."""

    mixture: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Source to count, or to {"count" or "weight", "split", "fallback", …}. Required.'},
    )
    total: int | None = field(default=None, metadata={"help": "Problems in all, for sources with a weight."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples and of the order."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with local copies of named sources, instead of the hub."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or hub name of a tokenizer, to give lengths in its tokens."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens; the table says how many problems fit."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mixture, str):
            try:
                self.mixture = json.loads(self.mixture)
            except json.JSONDecodeError as error:
                raise ValueError(f"mixture is not JSON ({error}): {self.mixture!r:.80}") from None
        if not isinstance(self.mixture, dict) or not self.mixture:
            raise ValueError('mixture is missing: map sources to counts, such as {"gsm8k": 3000, "svamp": 500}.')


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    return TrlParser((DataArguments,), prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    (options,) = parse_stage(make_parser(), args)
    if not is_main_process():
        return

    from trl_reasoning_distill.data.files import write_jsonl
    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.data.mixture import load_mixture

    mixture = load_mixture(options.mixture, total=options.total, seed=options.seed, data_dir=options.data_dir)
    print(preview(mixture.problems, _length_in(options.tokenizer), options.max_length if options.tokenizer else None))
    if options.dry_run:
        return
    inputs = {"data_dir": options.data_dir} if options.data_dir else {}
    with StageRun(
        "data", options.output_dir, dataclasses.asdict(options), inputs, options.seed, overwrite=options.overwrite
    ) as run:
        if run.is_finished:
            print(f"data: nothing to do, {options.output_dir} holds this run's result")
            return
        write_jsonl(run.output_dir / "problems.jsonl", (problem.to_row() for problem in mixture.problems))
        write_jsonl(run.output_dir / "rejected.jsonl", (dataclasses.asdict(row) for row in mixture.rejected))
        result = (
            f"{len(mixture.problems)} problems of {len(mixture.counts)} sources, {len(mixture.rejected)} rows left out"
        )
        run.finish({"problems": len(mixture.problems), "rejected": len(mixture.rejected)} | mixture.counts, result)
        print(f"data: {result}")


def preview(problems: Sequence[Problem], length: Callable[[str], int], max_length: int | None) -> str:
    """A table of the problems by source, with a sample of each.

    Args:
        problems: What to show.
        length: Length of a text.
        max_length: Count how many questions with their solution fit into so much; `None` leaves that column out.
    """
    by_source: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_source[problem.source].append(problem)
    unit = "chars" if max_length is None else "tokens"
    header = [
        "source",
        "problems",
        "kinds",
        "with answer",
        f"question {unit} (median, max)",
        f"solution {unit} (median, max)",
    ]
    rows = [header if max_length is None else [*header, f"fit {max_length}"]]
    for source, group in by_source.items():
        questions = [length(problem.question) for problem in group]
        solutions = [length(problem.solution or "") for problem in group]
        row = [
            source,
            str(len(group)),
            str(len({problem.kind for problem in group})),
            str(sum(problem.answer is not None for problem in group)),
            f"{statistics.median(questions):.0f}, {max(questions)}",
            f"{statistics.median(solutions):.0f}, {max(solutions)}",
        ]
        if max_length is not None:
            row.append(str(sum(q + s <= max_length for q, s in zip(questions, solutions, strict=True))))
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    samples = [f"{source}: {group[0].question[:200]!r} → {group[0].answer!r}" for source, group in by_source.items()]
    return "\n".join([*lines, "", *samples])


def _length_in(tokenizer: str | None) -> Callable[[str], int]:
    if tokenizer is None:
        return len
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
