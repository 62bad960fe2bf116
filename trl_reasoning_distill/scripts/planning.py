"""What a stage would do, in numbers and in two examples: of the rows of a training, and of the prompts of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_reasoning_distill.data.row_sets import Rows
    from trl_reasoning_distill.teacher.sampling import EngineArguments
    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, StudentConfig
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer

DRY_RUN_ROWS = 2000
"""A dry run of more rows judges by a sample of them."""

EXAMPLES = 2

Conversation = Sequence[dict[str, str]]


@dataclass
class Plan:
    """What a stage would do: `--dry_run` prints it, and the doctor adds memory, time and hazards.

    Attributes:
        text: For a reader: counts, and examples.
        rows: Rows or problems that it reads; `None` where that is not known.
        makes: The most rows that it leaves for the next stage, where these are not the rows it reads.
        tokens: Tokens that go through its models in all, at most.
        steps: Optimizer steps of a training.
        disk: Bytes that it writes.
        looked_at: Rows of a training that were looked at, where they are too many to look at all.
        left_out: Why rows of these would be left out, and how many.
    """

    text: str = ""
    rows: int | None = None
    makes: int | None = None
    tokens: int | None = None
    steps: int | None = None
    disk: int = 0
    looked_at: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def record_bytes(top_k: int, encoding: str = "compact") -> float:
    """Bytes of one record of a store, measured on stores of natural text."""
    return (1.8 if encoding == "compact" else 6.5) * top_k


def sample_rows(rows: Rows, wanted: int | None) -> tuple[Rows, float]:
    """As many rows as a dry run takes the time for, spread evenly, and how many of the `wanted` ones (`None`: all) each stands for."""
    wanted = min(len(rows), wanted or len(rows))
    if wanted <= DRY_RUN_ROWS:
        return rows, 1.0
    step = math.ceil(len(rows) / DRY_RUN_ROWS)
    sampled = rows[::step] if isinstance(rows, list) else rows.select(range(0, len(rows), step))
    return sampled, wanted / len(sampled)


def plan_training(
    trainer_class: type[ReasoningSFTTrainer],
    config: ReasoningSFTConfig,
    model: StudentConfig,
    train_rows: Dataset,
    eval_rows: Dataset | None,
    ranks: int,
    scale: float,
) -> Plan:
    """What becomes of the rows, steps and tokens, and two examples. On all ranks; reads no weight, writes nothing.

    Args:
        trainer_class: The trainer.
        config: Its configuration.
        model: The model that would be trained.
        train_rows: Rows to train on.
        eval_rows: Rows for evaluation.
        ranks: Processes of this launch.
        scale: How many rows each of `train_rows` stands for.
    """
    from trl import get_peft_config

    from trl_reasoning_distill.trainer.preparation import prepare_data

    config.preview_examples = EXAMPLES
    datasets = {"train_dataset": train_rows, "eval_dataset": eval_rows}
    name, revision = str(model.model_name_or_path), model.model_revision
    prepared = prepare_data(trainer_class, config, name, revision, peft_config=get_peft_config(model), **datasets)
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    rows = round(len(prepared.rows) * scale)
    steps = optimizer_steps(rows, batch * ranks, accumulation, float(config.num_train_epochs), config.max_steps)
    lines = [f"{name} rows: {report}" for name, report in prepared.reports.items()]
    lines += [
        f"{name} rows that the teacher cannot read: {counts['not_anchored']:,} with other tokens behind its prompt, {counts['too_long']:,} too long"
        for name, counts in prepared.left_out.items()
    ]
    tokens, supervised = (
        round(count * scale) for count in (prepared.tokens, prepared.reports["train"].supervised_tokens)
    )
    about = "about " if scale > 1 else ""
    lines.append(
        f"an epoch: {about}{rows:,}{' packed' * config.packing} rows, {tokens:,} tokens, {supervised:,} supervised"
    )
    batches = f"{batch} per device × {ranks} process{'es' * (ranks > 1)} × {accumulation} accumulated"
    lines.append(f"{steps:,} steps of {batch * ranks * accumulation:,} rows ({batches})")
    passes = steps * batch * ranks * accumulation / max(1, rows)
    report = prepared.reports["train"]
    return Plan(
        "\n".join([*lines, prepared.examples]),
        rows=rows,
        tokens=round(tokens * passes),
        steps=steps,
        looked_at=len(train_rows),
        left_out={
            "longer than max_length": report.overlong,
            "without a supervised token": report.unsupervised,
            "with a malformed thought": len(report.malformed),
        },
    )


def optimizer_steps(rows: int, batch: int, accumulation: int, epochs: float, max_steps: int) -> int:
    """How many steps a training takes, as `transformers` counts them; `batch` is that of all ranks."""
    if max_steps > 0:
        return max_steps
    return math.ceil(epochs * max(1, math.ceil(math.ceil(rows / batch) / accumulation)))


def describe_prompts_of(
    model: str, conversations: Sequence[Conversation], engine: EngineArguments, max_new_tokens: int, already: Any = ()
) -> tuple[str, list[str]]:
    """How long the prompts of a model are, and the first two as it reads them. Reads its tokenizer and configuration, no weights.

    Args:
        model: Its folder or hub name; a server's prompts are rendered by the server, so the messages are shown.
        conversations: What it would be asked.
        engine: How it would be run.
        max_new_tokens: What it may write.
        already: Examples that were shown of another model, which are not shown again.

    Returns:
        The text, and the examples.
    """
    from trl_reasoning_distill.data.chat import encode_prompt
    from trl_reasoning_distill.data.examples import describe_prompts
    from trl_reasoning_distill.hub import context_length, find_config, load_tokenizer

    first = conversations[:EXAMPLES]
    if engine.engine == "openai":
        where = engine.base_url or "$OPENAI_BASE_URL"
        counted, example = f"{model} at {where} renders the prompts itself", describe_prompts(first)
    else:
        options = dict(engine.chat_template_kwargs or {})  # type: ignore[arg-type]  # JSON was parsed in `__post_init__`
        tokenizer = load_tokenizer(model, revision=engine.model_revision, trust_remote_code=engine.trust_remote_code)
        sample = conversations[:: math.ceil(len(conversations) / DRY_RUN_ROWS)]
        lengths = [len(encode_prompt(tokenizer, messages, **options)) for messages in sample]
        scale = len(conversations) / len(sample)
        counted = f"{model}: prompts of {'about ' if scale > 1 else ''}{round(scale * sum(lengths)):,} tokens, the longest {max(lengths):,}"
        limit = context_length(
            find_config(model, revision=engine.model_revision, trust_remote_code=engine.trust_remote_code)
        )
        if limit is not None and (cramped := sum(length + max_new_tokens > limit for length in lengths)):
            counted += (
                f"; {round(scale * cramped):,} leave less than {max_new_tokens:,} of its {limit:,} tokens to write in"
            )
        example = describe_prompts(first, tokenizer, **options)
    return counted + ("" if example in already else f"\n{example}"), [*already, example]
