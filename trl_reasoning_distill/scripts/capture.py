"""Store what the teacher thinks of each token that the student will be trained on: its Top-K log-probabilities.

    accelerate launch recipes/capture.py --config recipes/quickstart/capture.yaml
    trl-distill capture --model Qwen/Qwen2.5-7B-Instruct --dataset runs/x/verify --output_dir runs/x/capture --num_processes 8

The teacher reads prompt and completion once, and for every token of the completion the `top_k` most likely tokens go into
`output_dir/store`, with what is needed for the exact tail at each of `temperatures`. About 43 bytes per token at `top_k: 25`.
With `engine: openai` a server reads, at T = 1. One store serves many students, `kd_temperature`s and smaller `top_k`s. A killed run goes on where it stopped, also with another
number of processes, and makes the same bytes.

A student with another vocabulary or tokenizer needs the `align` stage next; otherwise run `distill`.
For context distillation let the teacher read more than the student, such as worked examples: `teacher_context: few_shot`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.data.row_files import is_row_file, without_nulls
from trl_reasoning_distill.scripts.arguments import ReaderArguments
from trl_reasoning_distill.scripts.stage import StageArguments, parse_stage, stage_main
from trl_reasoning_distill.teacher.context import TeacherContextOptions

if TYPE_CHECKING:
    from trl import TrlParser

    from trl_reasoning_distill.teacher.capture import CaptureConfig


@dataclass
class CaptureArguments(TeacherContextOptions, StageArguments):
    """The teacher, the rows it reads, and what is kept of what it says."""

    model: str = field(
        default="",
        metadata={
            "help": "The teacher: folder or hub name of a model or adapter; for engine openai, its name on the server. Required."
        },
    )
    dataset: str = field(
        default="",
        metadata={
            "help": "Rows to read: folder of a verify or select stage, a .jsonl file, or a hub dataset. Required."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    limit: int | None = field(default=None, metadata={"help": "Read only the first so many rows."})
    top_k: int = field(default=25, metadata={"help": "Tokens kept per position; training can use fewer."})
    temperatures: list[float] | None = field(
        default=None,
        metadata={
            "help": "Temperatures that training may use: the tail is exact at these; 1 is always there. Default: 1 2; from a server 1, all "
            "it can tell."
        },
    )
    encoding: str = field(
        default="compact",
        metadata={"help": "compact (43 bytes per token at top_k 25) or lossless (float32, 2.5 times that)."},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Leave out, and count, rows with more tokens. Default: no limit but the teacher's context."},
    )
    assistant_only_loss: bool = field(
        default=False,
        metadata={"help": "Supervise only what the chat template marks as the assistant's; set it as for training."},
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Chat template to use instead of the teacher's: a .jinja file, or a model with one."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Variables for the chat template, such as {"enable_thinking": true}.'}
    )
    data_shape: str = field(
        default="auto", metadata={"help": "Shape of the rows, as of the training; auto looks at all of them."}
    )
    reasoning_format: str = field(
        default="think", metadata={"help": "Format that the completions are written in; set it as for training."}
    )
    malformed_thoughts: str = field(
        default="drop",
        metadata={
            "help": "Rows whose thought is not well formed: 'drop' or 'train'; set it as for training.",
            "choices": ["drop", "train"],
        },
    )
    unit_rows: int = field(
        default=512, metadata={"help": "Rows per unit of work: at most this much is done again after a kill."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_context()
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it with --{name} or in the YAML.")
        self.make_config()

    def make_config(self, engine: str = "transformers") -> CaptureConfig:
        """What to capture with an engine.

        Raises:
            ValueError: If an option is out of its range.
        """
        from trl_reasoning_distill.teacher.capture import CaptureConfig
        from trl_reasoning_distill.teacher.sampling import parse_mapping

        options = self.chat_template_kwargs
        return CaptureConfig(
            top_k=self.top_k,
            temperatures=tuple(self.temperatures or ((1.0,) if engine == "openai" else (1.0, 2.0))),
            encoding=self.encoding,  # type: ignore[arg-type]  # checked there
            max_length=self.max_length,
            unit_rows=self.unit_rows,
            assistant_only=self.assistant_only_loss,
            chat_template_kwargs=parse_mapping(options, "chat_template_kwargs")
            if isinstance(options, str)
            else options,
            reasoning_format=self.reasoning_format,
            malformed_thoughts=self.malformed_thoughts,
        )


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    return TrlParser((CaptureArguments, ReaderArguments), prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    options, reader = parse_stage(make_parser(), args)

    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.processes import launch_state
    from trl_reasoning_distill.teacher.capture import capture
    from trl_reasoning_distill.teacher.context import with_teacher_prompts

    state = launch_state()
    if reader.device_map and state.num_processes > 1:
        raise ValueError(
            f"device_map={reader.device_map!r} gives all devices to one process, but {state.num_processes} were launched. "
            f"Launch one process, or leave device_map out."
        )
    rows, config = with_teacher_prompts(load_rows(options), options), options.make_config(reader.engine)
    tokenizer = reader.load_tokenizer(options.model, options.chat_template_path)
    if options.dry_run:
        if state.is_main_process:
            _print_plan(rows, tokenizer, options.model, config, reader)
        return
    inputs = {"model": options.model, "dataset": options.dataset}
    settings = dataclasses.asdict(options) | dataclasses.asdict(reader)
    run = StageRun(
        "capture",
        options.output_dir,
        settings,
        inputs,
        overwrite=options.overwrite,
        is_main=state.is_main_process,
    )
    with run:
        state.wait_for_everyone()
        result = capture(
            lambda: reader.make_reader(options.model, tokenizer, config.top_k, config.temperatures),
            tokenizer,
            rows,
            Path(options.output_dir) / "store",
            config,
            fingerprint=reader.fingerprint(
                options.model, run.inputs["model"]["hash"], tokenizer, str(state.device.type)
            ),
            state=state,
        )
        if not state.is_main_process:
            return
        store = result.store
        size = sum(entry["bytes"] for entry in store.manifest["shards"])
        line = (
            f"{len(store):,} positions of {store.rows:,} rows · Top-{store.top_k} at T = "
            f"{', '.join(f'{t:g}' for t in store.temperatures)} · {size / len(store):.1f} bytes per position"
            + (f" · {result.too_long} rows too long" if result.too_long else "")
            + (f" · {result.not_anchored} rows not anchored" if result.not_anchored else "")
            + (f" · {result.malformed} rows with a malformed thought" if result.malformed else "")
        )
        if not run.is_finished:
            counts = {"positions": len(store), "rows": store.rows, "bytes": size}
            run.finish(
                counts
                | {"too_long": result.too_long, "not_anchored": result.not_anchored, "malformed": result.malformed},
                line,
            )
        print(f"capture: {line}")


def load_rows(options: Any) -> list[dict[str, Any]]:
    """The rows of `options.dataset`, ready to read: a stage's folder, a file of rows, or a hub dataset.

    Raises:
        ValueError: If there is no such dataset, or nothing can be learnt from any of its rows.
    """
    from trl_reasoning_distill.data import normalization
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.scripts.stage import is_main_process

    path = Path(options.dataset)
    if path.exists() or is_row_file(path):
        try:
            rows: Any = normalization.load_rows(path)[: options.limit]
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
    else:
        rows = normalization.load_hub_rows(options.dataset, options.dataset_split)
        rows = [without_nulls(row) for row in rows.select(range(min(options.limit or len(rows), len(rows))))]
    form = ReasoningFormat.preset(options.reasoning_format)
    reading = normalization.Reading(form, options.data_shape, every_reply=options.assistant_only_loss)
    read = normalization.normalize_rows(rows, reading)
    if not read.rows:
        raise ValueError(f"{options.dataset} holds no row to capture ({read}).")
    if read.rejected and is_main_process():
        print(f"capture: {options.dataset}: {read}", flush=True)
    return [{**row, normalization.ROW_NUMBER: number} for row, number in zip(read.rows, read.numbers, strict=True)]


def _print_plan(
    rows: list[dict[str, Any]], tokenizer: Any, model: str, config: CaptureConfig, reader: ReaderArguments
) -> None:
    """What a real run would do, and two rows as the teacher reads them, the tokens that get a record marked."""
    from trl_reasoning_distill.data.examples import describe_examples
    from trl_reasoning_distill.data.tokenization import IGNORE_INDEX
    from trl_reasoning_distill.hub import context_length, find_config
    from trl_reasoning_distill.scripts.planning import DRY_RUN_ROWS, EXAMPLES
    from trl_reasoning_distill.teacher.capture import anchor_row, is_too_long, row_check

    limit = None
    if reader.engine == "transformers":
        limit = context_length(
            find_config(model, revision=reader.model_revision, trust_remote_code=reader.trust_remote_code)
        )
    sample = rows[:: math.ceil(len(rows) / DRY_RUN_ROWS)]
    check = row_check(tokenizer, config)
    anchored = [one for one in (anchor_row(tokenizer, row, config, check) for row in sample) if one is not None]
    well_formed = [one for one in anchored if one.malformed is None]
    kept = [one for one in well_formed if not is_too_long(one, config, limit)]
    scale = len(rows) / len(sample)
    tokens = scale * sum(len(one.teacher_ids) for one in kept)
    records = scale * sum(len(one.positions) for one in kept)
    size = records * (1.8 * config.top_k if config.encoding == "compact" else 6.5 * config.top_k)
    about = "about " if scale > 1 else ""
    print(
        f"capture: {model} would read {about}{scale * len(kept):,.0f} of {len(rows):,} rows, {tokens:,.0f} tokens, and leave "
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
    print(describe_examples(examples, tokenizer))


if __name__ == "__main__":
    main()
