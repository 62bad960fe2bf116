"""Map a captured store to a student with another vocabulary or another tokenizer.

    trl-distill align --store runs/x/capture --student Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/x/align

Between different tokenizers the teacher's distributions over its tokens become distributions over the student's, given the same bytes,
for one temperature; `docs/concepts/alignment.md` has the maths and what is kept for common pairs. For one tokenizer the ids become
the student's, what it does not have is left to the tail, and nothing is lost where an embedding is padded (Qwen2.5 7B and 0.5B).

Writes `output_dir/store`; then `distill` with `teacher_logits: output_dir`.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.scripts.stage import StageArguments, parse_stage, stage_main

if TYPE_CHECKING:
    from trl import TrlParser

    from trl_reasoning_distill.teacher.store import TopKStore


@dataclass
class AlignArguments(StageArguments):
    """The teacher's store and the student it is for."""

    store: str = field(default="", metadata={"help": "The teacher's store: the capture stage's folder. Required."})
    student: str = field(default="", metadata={"help": "The student: folder or hub name of a model. Required."})
    student_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    teacher_tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of the teacher's tokenizer. Default: the teacher that the store names."},
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Tokens kept per position. Default: as many as the store has."}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Between different tokenizers: the kd_temperature to train at, one that the store has. Default: the highest of these."
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Chat template to use instead of the student's: a .jinja file, or a model with one."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a hub model. Off unless you trust it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("store", "student"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it with --{name} or in the YAML.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is at least 1, found {self.top_k}.")


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    return TrlParser((AlignArguments,), prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    (options,) = parse_stage(make_parser(), args)

    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.hub import load_tokenizer
    from trl_reasoning_distill.teacher.store import TopKStore
    from trl_reasoning_distill.teacher.store.alignment import align_store
    from trl_reasoning_distill.teacher.store.coverage import describe_coverage

    store = TopKStore.open(options.store)
    teacher_name = options.teacher_tokenizer or store.tokenizer_name
    trust = options.trust_remote_code
    student = load_tokenizer(
        options.student,
        revision=options.student_revision,
        chat_template=options.chat_template_path,
        trust_remote_code=trust,
    )
    teacher = load_tokenizer(teacher_name, trust_remote_code=trust)
    vocab_size = _vocab_size(options)
    if options.dry_run:
        _print_plan(store, teacher, student, vocab_size, options)
        return
    with StageRun(
        "align",
        options.output_dir,
        dataclasses.asdict(options),
        {"store": str(store.path), "student": options.student},
        overwrite=options.overwrite,
    ) as run:
        if run.is_finished:
            print(f"align: nothing to do, {options.output_dir} holds this run's result")
            return
        output = Path(options.output_dir) / "store"
        shutil.rmtree(output, ignore_errors=True)  # a killed run left it; aligning takes minutes, so it starts again
        report = align_store(
            store,
            student,
            output,
            teacher_tokenizer=teacher,
            top_k=options.top_k,
            temperature=options.temperature,
            student_vocab_size=vocab_size,
            progress=True,
        )
        result = (
            f"{report.kept_positions:,} of {report.positions:,} positions kept ({report.kept_share:.1%}) · "
            f"{report.kept_mass:.4f} of {report.teacher_mass:.4f} Top-{store.top_k} mass kept there · "
            f"{report.mapped_ids:,} of {report.teacher_ids:,} ids have a twin · "
            f"for temperatures {', '.join(f'{t:g}' for t in report.temperatures)}"
        )
        print(describe_coverage(report.coverage))
        run.finish({"positions": report.positions, "kept_positions": report.kept_positions}, result)
        print(f"align: {result}")


def _vocab_size(options: AlignArguments) -> int | None:
    """Rows of the student's embedding, if the student has a model configuration and not only a tokenizer."""
    from trl_reasoning_distill.hub import find_config

    trust = options.trust_remote_code
    config = find_config(options.student, revision=options.student_revision, trust_remote_code=trust)
    return None if config is None else config.get_text_config().vocab_size


def _print_plan(store: TopKStore, teacher: Any, student: Any, vocab_size: int | None, options: AlignArguments) -> None:
    """What is kept of the first rows, by class of token, and two rows with the positions that get a record marked."""
    from trl_reasoning_distill.data.examples import describe_examples
    from trl_reasoning_distill.data.tokenization import IGNORE_INDEX, supervised_positions
    from trl_reasoning_distill.scripts.planning import EXAMPLES
    from trl_reasoning_distill.teacher.records import MISSING_ID
    from trl_reasoning_distill.teacher.store.alignment import StoreAligner
    from trl_reasoning_distill.teacher.store.coverage import describe_coverage

    aligner = StoreAligner(store, student, teacher, vocab_size, options.top_k, options.temperature)
    rows = list(aligner.rows(range(min(100, store.rows))))
    report = aligner.report()
    print(
        f"align: {report.mapped_ids:,} of {report.teacher_ids:,} teacher ids have a twin; {report.kept_share:.1%} of the supervised "
        f"positions of the first {len(rows)} of {store.rows:,} rows would have a record, "
        f"for temperatures {', '.join(f'{t:g}' for t in report.temperatures)}"
    )
    print(describe_coverage(report.coverage))
    examples = []
    for row in rows[:EXAMPLES]:
        has_record = row.records.ids[:, 0] != MISSING_ID
        recorded = {t for t, has in zip(supervised_positions(row.labels), has_record, strict=True) if has}
        labels = [i if t in recorded else IGNORE_INDEX for t, i in enumerate(row.input_ids)]
        examples.append({"input_ids": list(row.input_ids), "labels": labels})
    print(describe_examples(examples, student))


if __name__ == "__main__":
    main()
