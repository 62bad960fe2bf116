"""Map a captured store to a student with another vocabulary or another tokenizer.

    trl-distill align --store runs/x/capture --student Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/x/align

Between different tokenizers the teacher's distributions over its tokens become distributions over the student's, given the same bytes,
for one temperature; `docs/concepts/alignment.md` has the maths and what is kept for common pairs. For one tokenizer the ids become
the student's, what it does not have is left to the tail, and nothing is lost where an embedding is padded (Qwen2.5 7B and 0.5B).

Writes `output_dir/store`; then `distill` with `teacher_logits: output_dir`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trl_reasoning_distill.options import Count, Positive, option
from trl_reasoning_distill.scripts.planning import EXAMPLES, Plan
from trl_reasoning_distill.scripts.stage import Outcome, Stage, StageArguments, parser_of, settings_of, stage_main

if TYPE_CHECKING:
    from trl_reasoning_distill.data.manifest import StageRun


@dataclass(kw_only=True)
class AlignArguments(StageArguments):
    """The teacher's store and the student it is for."""

    store: str = option(help="The teacher's store: the capture stage's folder.")
    student: str = option(help="The student: folder or hub name of a model.")
    student_revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    teacher_tokenizer: str | None = option(
        None, "Folder or hub name of the teacher's tokenizer. Default: the teacher that the store names."
    )
    store_top_k: Count | None = option(None, "Tokens kept per position. Default: as many as the store has.")
    chat_template_path: str | None = option(
        None, "Chat template to use instead of the student's: a .jinja file, or a model with one."
    )
    temperature: Positive | None = option(
        None,
        "Between different tokenizers: the kd_temperature to train at, one that the store has. Default: the highest of these.",
    )
    trust_remote_code: bool = option(False, "Run code that comes with a hub model. Off unless you trust it.")


make_parser = parser_of(AlignArguments)


class Align(Stage):
    """Map a store to a student's ids."""

    name = "align"

    def __init__(self, options: AlignArguments) -> None:
        from trl_reasoning_distill.hub import load_tokenizer
        from trl_reasoning_distill.teacher.store import TopKStore

        self.options, self.output_dir = options, options.output_dir
        self.store = TopKStore.open(options.store)
        trust = options.trust_remote_code
        self.student = load_tokenizer(
            options.student,
            revision=options.student_revision,
            chat_template=options.chat_template_path,
            trust_remote_code=trust,
        )
        self.teacher = load_tokenizer(options.teacher_tokenizer or self.store.tokenizer_name, trust_remote_code=trust)
        self.vocab_size = _vocab_size(options)
        self.settings = settings_of(options)
        self.inputs = {"store": str(self.store.path), "student": options.student}

    def plan(self) -> Plan:
        """What is kept of the first rows, by class of token, and two rows with the positions that get a record marked."""
        from trl_reasoning_distill.data.examples import describe_examples
        from trl_reasoning_distill.data.tokenization import IGNORE_INDEX, supervised_positions
        from trl_reasoning_distill.teacher.records import MISSING_ID
        from trl_reasoning_distill.teacher.store.alignment import StoreAligner
        from trl_reasoning_distill.teacher.store.coverage import describe_coverage

        store, options = self.store, self.options
        aligner = StoreAligner(
            store, self.student, self.teacher, self.vocab_size, options.store_top_k, options.temperature
        )
        rows = list(aligner.rows(range(min(100, store.rows))))
        report = aligner.report()
        line = (
            f"align: {report.mapped_ids:,} of {report.teacher_ids:,} teacher ids have a twin; {report.kept_share:.1%} of the supervised "
            f"positions of the first {len(rows)} of {store.rows:,} rows would have a record, "
            f"for temperatures {', '.join(f'{t:g}' for t in report.temperatures)}"
        )
        examples = []
        for row in rows[:EXAMPLES]:
            has_record = row.records.ids[:, 0] != MISSING_ID
            recorded = {t for t, has in zip(supervised_positions(row.labels), has_record, strict=True) if has}
            labels = [i if t in recorded else IGNORE_INDEX for t, i in enumerate(row.input_ids)]
            examples.append({"input_ids": list(row.input_ids), "labels": labels})
        parts = [line, describe_coverage(report.coverage), describe_examples(examples, self.student)]
        disk = sum(entry["bytes"] for entry in store.manifest["shards"])
        return Plan("\n".join(parts), rows=store.rows, disk=disk)

    def run(self, run: StageRun) -> Outcome:
        """Align."""
        from trl_reasoning_distill.teacher.store.alignment import align_store
        from trl_reasoning_distill.teacher.store.coverage import describe_coverage

        output = Path(self.output_dir) / "store"
        shutil.rmtree(output, ignore_errors=True)  # a killed run left it; aligning takes minutes, so it starts again
        report = align_store(
            self.store,
            self.student,
            output,
            teacher_tokenizer=self.teacher,
            top_k=self.options.store_top_k,
            temperature=self.options.temperature,
            student_vocab_size=self.vocab_size,
            progress=True,
        )
        print(describe_coverage(report.coverage))
        return {"positions": report.positions, "kept_positions": report.kept_positions}, (
            f"{report.kept_positions:,} of {report.positions:,} positions kept ({report.kept_share:.1%}) · "
            f"{report.kept_mass:.4f} of {report.teacher_mass:.4f} Top-{self.store.top_k} mass kept there · "
            f"{report.mapped_ids:,} of {report.teacher_ids:,} ids have a twin · "
            f"for temperatures {', '.join(f'{t:g}' for t in report.temperatures)}"
        )


def _vocab_size(options: AlignArguments) -> int | None:
    """Rows of the student's embedding, if the student has a model configuration and not only a tokenizer."""
    from trl_reasoning_distill.hub import find_config

    trust = options.trust_remote_code
    config = find_config(options.student, revision=options.student_revision, trust_remote_code=trust)
    return None if config is None else config.get_text_config().vocab_size


main = stage_main(Align, make_parser)

if __name__ == "__main__":
    main()
