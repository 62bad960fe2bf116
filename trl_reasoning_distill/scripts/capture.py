"""Store what the teacher thinks of each token that the student will be trained on: its Top-K log-probabilities.

    accelerate launch recipes/capture.py --config recipes/quickstart/capture.yaml
    trl-distill capture --teacher Qwen/Qwen2.5-7B-Instruct --dataset runs/x/verify --output_dir runs/x/capture --num_processes 8

The teacher reads prompt and completion once, and for every token of the completion the `store_top_k` most likely tokens go into
`output_dir/store`, with what is needed for the exact tail at each of `temperatures`. About 43 bytes per token at `store_top_k: 25`.
With `engine: openai` a server reads, at T = 1. One store serves many students, `kd_temperature`s and smaller `kd_top_k`s. A killed run goes on where it stopped, also with another
number of processes, and makes the same bytes.

A student with another vocabulary or tokenizer needs the `align` stage next; otherwise run `distill`.
For context distillation let the teacher read more than the student, such as worked examples: `teacher_context: few_shot`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_reasoning_distill.data import row_sets
from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.normalization import ROW_NUMBER, normalize_rows
from trl_reasoning_distill.data.published import Reading
from trl_reasoning_distill.data.row_files import is_row_file, without_nulls
from trl_reasoning_distill.options import Count, JsonMapping, Positive, option
from trl_reasoning_distill.scripts.arguments import ReaderArguments
from trl_reasoning_distill.scripts.planning import DRY_RUN_ROWS, EXAMPLES, Plan, record_bytes
from trl_reasoning_distill.scripts.stage import (
    Outcome,
    Stage,
    StageArguments,
    is_main_process,
    parser_of,
    settings_of,
    stage_main,
)
from trl_reasoning_distill.teacher.context import TeacherContextOptions

if TYPE_CHECKING:
    from accelerate import PartialState

    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.teacher.capture import CaptureConfig


@dataclass(kw_only=True)
class CaptureArguments(TeacherContextOptions, StageArguments):
    """The teacher, the rows it reads, and what is kept of its distribution."""

    teacher: str = option(
        help="The teacher: folder or hub name of a model or adapter; for engine openai, its name on the server."
    )
    dataset: str = option(help="Rows to read: folder of a verify or select stage, a .jsonl file, or a hub dataset.")
    dataset_split: str = option("train", "Split of a hub dataset.")
    limit: Count | None = option(None, "Read only the first so many rows.")
    store_top_k: Count = option(25, "Tokens kept per position; training can use fewer (kd_top_k).")
    temperatures: list[Positive] | None = option(
        None,
        "Temperatures that training may use: the tail is exact at these; 1 is always there. Default: 1 2; from a server 1, the only one "
        "that it answers for.",
    )
    encoding: Literal["compact", "lossless"] = option(
        "compact", "compact (43 bytes per token at store_top_k 25) or lossless (float32, 2.5 times that)."
    )
    max_length: Count | None = option(
        None, "Leave out, and count, rows with more tokens. Default: no limit but the teacher's context."
    )
    assistant_only_loss: bool = option(
        False, "Supervise only what the chat template marks as the assistant's; set it as for training."
    )
    chat_template_path: str | None = option(
        None, "Chat template to use instead of the teacher's: a .jinja file, or a model with one."
    )
    chat_template_kwargs: JsonMapping | None = option(
        None, 'Variables for the chat template, such as {"enable_thinking": true}.'
    )
    data_shape: str = option("auto", "Shape of the rows, as of the training; auto looks at all of them.")
    reasoning_format: str = option("think", "Format that the completions are written in; set it as for training.")
    malformed_thoughts: Literal["drop", "train"] = option(
        "drop", "Rows whose thought is not well formed: drop or train; set it as for training."
    )
    unit_rows: Count = option(512, "Rows per unit of work: at most this much is done again after a kill.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context()
        self.make_config()

    def make_config(self, engine: str = "transformers") -> CaptureConfig:
        """What to capture with an engine.

        Raises:
            ValueError: If an option is out of its range.
        """
        from trl_reasoning_distill.teacher.capture import CaptureConfig

        return CaptureConfig(
            top_k=self.store_top_k,
            temperatures=tuple(self.temperatures or ((1.0,) if engine == "openai" else (1.0, 2.0))),
            encoding=self.encoding,
            max_length=self.max_length,
            unit_rows=self.unit_rows,
            assistant_only=self.assistant_only_loss,
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]  # JSON was read by `check_options`
            reasoning_format=self.reasoning_format,
            malformed_thoughts=self.malformed_thoughts,
        )


make_parser = parser_of(CaptureArguments, ReaderArguments)


class Capture(Stage):
    """Score rows with a teacher, and store its most likely tokens."""

    name = "capture"
    is_parallel = True

    def __init__(self, options: CaptureArguments, reader: ReaderArguments, state: PartialState) -> None:
        from trl_reasoning_distill.teacher.context import with_teacher_prompts

        if reader.device_map and state.num_processes > 1:
            raise ValueError(
                f"device_map={reader.device_map!r} gives all devices to one process, but {state.num_processes} were launched. "
                f"Launch one process, or leave device_map out."
            )
        self.options, self.reader, self.state, self.output_dir = options, reader, state, options.output_dir
        self.rows, self.config = with_teacher_prompts(load_rows(options), options), options.make_config(reader.engine)
        self.tokenizer = reader.load_tokenizer(options.teacher, options.chat_template_path)
        self.settings = settings_of(options, reader)
        self.inputs = {"teacher": options.teacher, "dataset": options.dataset}

    def plan(self) -> Plan:
        """Counts, and two rows as the teacher reads them, the tokens that get a record marked."""
        from trl_reasoning_distill.data.examples import describe_examples
        from trl_reasoning_distill.data.tokenization import IGNORE_INDEX
        from trl_reasoning_distill.hub import context_length, find_config
        from trl_reasoning_distill.teacher.capture import anchor_row, is_too_long, row_check

        rows, config, reader = self.rows, self.config, self.reader
        limit = None
        if reader.engine == "transformers":
            trust = reader.trust_remote_code
            limit = context_length(
                find_config(self.options.teacher, revision=reader.model_revision, trust_remote_code=trust)
            )
        sample = rows[:: math.ceil(len(rows) / DRY_RUN_ROWS)]
        check = row_check(self.tokenizer, config)
        read = (anchor_row(self.tokenizer, row, config, check) for row in sample)
        anchored = [one for one in read if one is not None]
        well_formed = [one for one in anchored if one.malformed is None]
        kept = [one for one in well_formed if not is_too_long(one, config, limit)]
        scale = len(rows) / len(sample)
        tokens = scale * sum(len(one.teacher_ids) for one in kept)
        records = scale * sum(len(one.positions) for one in kept)
        size = records * record_bytes(config.top_k, config.encoding)
        about = "about " if scale > 1 else ""
        line = (
            f"capture: {self.options.teacher} would read {about}{scale * len(kept):,.0f} of {len(rows):,} rows, {tokens:,.0f} tokens, and leave "
            f"{records:,.0f} records, about {size / 1e6:,.1f} MB; left out: {scale * (len(well_formed) - len(kept)):,.0f} too long, "
            f"{scale * (len(anchored) - len(well_formed)):,.0f} with a malformed thought, "
            f"{scale * (len(sample) - len(anchored)):,.0f} with other tokens behind the teacher's prompt"
        )
        examples = []
        for one in kept[:EXAMPLES]:
            labels = [IGNORE_INDEX] * len(one.teacher_ids)
            for position in one.positions:
                labels[position] = one.teacher_ids[position]
            examples.append({"input_ids": one.teacher_ids, "labels": labels})
        text = f"{line}\n{describe_examples(examples, self.tokenizer)}"
        return Plan(text, rows=round(scale * len(kept)), tokens=round(tokens), disk=round(size))

    def run(self, run: StageRun) -> Outcome:
        """Capture; on all ranks."""
        from trl_reasoning_distill.teacher.capture import capture

        options, reader, config = self.options, self.reader, self.config
        revision = run.inputs["teacher"]["hash"]
        result = capture(
            lambda: reader.make_reader(options.teacher, self.tokenizer, config.top_k, config.temperatures),
            self.tokenizer,
            self.rows,
            Path(self.output_dir) / "store",
            config,
            fingerprint=reader.fingerprint(options.teacher, revision, self.tokenizer, str(self.state.device.type)),
            state=self.state,
        )
        if not self.state.is_main_process:
            return {}, ""
        store = result.store
        size = sum(entry["bytes"] for entry in store.manifest["shards"])
        counts = {"positions": len(store), "rows": store.rows, "bytes": size}
        counts |= {"too_long": result.too_long, "not_anchored": result.not_anchored, "malformed": result.malformed}
        return counts, (
            f"{len(store):,} positions of {store.rows:,} rows · Top-{store.top_k} at T = "
            f"{', '.join(f'{t:g}' for t in store.temperatures)} · {size / len(store):.1f} bytes per position"
            + (f" · {result.too_long} rows too long" if result.too_long else "")
            + (f" · {result.not_anchored} rows not anchored" if result.not_anchored else "")
            + (f" · {result.malformed} rows with a malformed thought" if result.malformed else "")
        )


def load_rows(options: Any) -> list[dict[str, Any]]:
    """The rows of `options.dataset`, ready to read: a stage's folder, a file of rows, or a hub dataset.

    Raises:
        ValueError: If there is no such dataset, or nothing can be learnt from any of its rows.
    """
    path = Path(options.dataset)
    if path.exists() or is_row_file(path):
        try:
            rows: Any = row_sets.load_rows(path)[: options.limit]
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
    else:
        dataset = row_sets.load_hub_rows(options.dataset, options.dataset_split)
        rows = [without_nulls(row) for row in dataset.select(range(min(options.limit or len(dataset), len(dataset))))]
    form = ReasoningFormat.preset(options.reasoning_format)
    reading = Reading(form, options.data_shape, every_reply=options.assistant_only_loss)
    read = normalize_rows(rows, reading)
    if not read.rows:
        raise ValueError(f"{options.dataset} holds no row to capture ({read}).")
    if read.rejected and is_main_process():
        print(f"capture: {options.dataset}: {read}", flush=True)
    return [{**row, ROW_NUMBER: number} for row, number in zip(read.rows, read.numbers, strict=True)]


main = stage_main(Capture, make_parser)

if __name__ == "__main__":
    main()
