"""Map a captured store to a student with another vocabulary or another tokenizer.

    trl-distill align --store runs/x/capture --student Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/x/align

The teacher's ids become the student's: tokens of the same bytes, special tokens by their role. What the student does not have is
dropped from the records, and its mass stays in the tail. Between different tokenizers a token gets a record only where teacher and
student both have a token over the same bytes of the same text; `docs/concepts/alignment.md` has the shares that are kept for
common pairs. For one tokenizer with a padded embedding (Qwen2.5 7B and 0.5B) nothing is lost.

Writes `output_dir/store`; then `distill` with `teacher_logits: output_dir`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trl_reasoning_distill.options import Count, option
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
        """How much the two vocabularies share, how much of the first rows' positions, and two rows with those that get a record marked."""
        import numpy as np

        from trl_reasoning_distill.data.examples import describe_examples
        from trl_reasoning_distill.data.tokenization import IGNORE_INDEX, supervised_positions
        from trl_reasoning_distill.teacher.store.alignment import RowAligner

        store = self.store
        aligner = RowAligner(self.teacher, self.student, store.fingerprint, self.vocab_size)
        rows = [aligner.align(store.row(i), store.example(i)) for i in range(min(100, store.rows))]
        has_record = [sources >= 0 for _, _, sources in rows]
        counts = aligner.id_counts()
        line = (
            f"align: {counts['mapped_ids']:,} of {counts['teacher_ids']:,} teacher ids have a twin; "
            f"{np.mean(np.concatenate(has_record)):.1%} of the supervised positions of the first {len(rows)} of {store.rows:,} rows would have a record"
        )
        examples = []
        for (ids, labels, _), kept in zip(rows[:EXAMPLES], has_record, strict=False):
            supervised = supervised_positions(labels)
            recorded = {t for t, has in zip(supervised, kept, strict=True) if has}
            marked = [i if t in recorded else IGNORE_INDEX for t, i in enumerate(ids)]
            examples.append({"input_ids": ids, "labels": marked})
        disk = sum(entry["bytes"] for entry in store.manifest["shards"])
        return Plan(f"{line}\n{describe_examples(examples, self.student)}", rows=store.rows, disk=disk)

    def run(self, run: StageRun) -> Outcome:
        """Align."""
        from trl_reasoning_distill.teacher.store.alignment import align_store

        output = Path(self.output_dir) / "store"
        shutil.rmtree(output, ignore_errors=True)  # a killed run left it; aligning takes minutes, so it starts again
        report = align_store(
            self.store,
            self.student,
            output,
            teacher_tokenizer=self.teacher,
            top_k=self.options.store_top_k,
            student_vocab_size=self.vocab_size,
            progress=True,
        )
        return {"positions": report.positions, "kept_positions": report.kept_positions}, (
            f"{report.kept_positions:,} of {report.positions:,} positions kept ({report.kept_share:.1%}) · "
            f"{report.kept_mass:.4f} of {report.teacher_mass:.4f} Top-{self.store.top_k} mass kept there · "
            f"{report.mapped_ids:,} of {report.teacher_ids:,} ids have a twin"
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
