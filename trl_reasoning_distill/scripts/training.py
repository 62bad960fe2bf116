"""What the training stages share: their data, the model, resuming, saving, and the line they end with."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trl_reasoning_distill.data.conversion import SHAPES, convert_rows, detect_shape
from trl_reasoning_distill.options import Bounds, Count, option
from trl_reasoning_distill.processes import InterruptedBySignal
from trl_reasoning_distill.scripts.command import is_main_process
from trl_reasoning_distill.scripts.planning import Plan, plan_training, sample_rows
from trl_reasoning_distill.scripts.stage import Outcome, Stage, TrainingStageArguments, settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import PartialState
    from datasets import Dataset

    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.scripts.arguments import AccuracyArguments
    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, StudentConfig
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer


FINAL_MODEL = "final_model"
MERGED_MODEL = "merged_model"


@dataclass(kw_only=True)
class TrainingDataArguments(TrainingStageArguments):
    """Where the rows of a training come from."""

    dataset_path: str | None = option(
        None, "JSONL file of training rows, or the folder of the stage that wrote train.jsonl."
    )
    dataset_name: str | None = option(None, "Dataset on the hub, instead of dataset_path.")
    dataset_config: str | None = option(None, "Configuration of the hub dataset.")
    dataset_split: str = option("train", "Split of the hub dataset.")
    data_shape: str = option(
        "auto",
        "Shape of the rows: openthoughts, openr1_math, numinamath_qwq, gsm8k, question_answer, sharegpt; none for TRL's own; auto looks.",
    )
    generations_per_row: Count = option(
        1, "Correct generations taken of each row, where it holds several (openr1_math)."
    )
    limit: Count | None = option(
        None, "At most so many rows, drawn with data_seed or seed; with num_train_epochs: 1 a quick test."
    )
    eval_path: str | None = option(None, "JSONL file of rows for evaluation, or the folder of a stage that wrote them.")
    eval_share: Annotated[float, Bounds(ge=0, lt=1)] = option(
        0.0, "Share of the rows that is held out for evaluation, drawn with data_seed or seed."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_path and self.dataset_name:
            raise ValueError(
                f"Both dataset_path ({self.dataset_path}) and dataset_name ({self.dataset_name}) are given; give one."
            )
        if self.eval_share and self.eval_path:
            raise ValueError("Both eval_share and eval_path are given; give one.")

    def load(self) -> Dataset | None:
        """The rows as they are stored, before any are held out; `None` if neither a path nor a name is given."""
        from datasets import load_dataset

        if self.dataset_name:
            return load_dataset(self.dataset_name, self.dataset_config, split=self.dataset_split)
        return load_rows(self.dataset_path) if self.dataset_path else None

    def shape(self, rows: Dataset, form: ReasoningFormat, seed: int) -> Dataset:
        """At most `limit` of the rows, as prompts and completions; says what was left out of another shape."""
        if self.limit is not None and self.limit < len(rows):
            rows = rows.shuffle(seed=seed).select(range(self.limit))
        shape = shape_of(rows[0], self.data_shape)
        if shape is None:
            return rows
        rows, line = shape_dataset(rows, shape, form, self.generations_per_row)
        if is_main_process():
            print(line, flush=True)
        return rows

    def load_required(self) -> Dataset:
        """The rows, of a training that has no other source of them.

        Raises:
            ValueError: If neither a path nor a name is given.
        """
        rows = self.load()
        if rows is None:
            raise ValueError(
                "There is nothing to train on: give dataset_path (a JSONL file or a stage's folder) or dataset_name."
            )
        return rows

    def split(self, rows: Dataset, form: ReasoningFormat, seed: int) -> tuple[Dataset, Dataset | None]:
        """The rows to train on and those for evaluation, if any."""
        rows = self.shape(rows, form, seed)
        if self.eval_path:
            return rows, self.shape(load_rows(self.eval_path), form, seed)
        if not self.eval_share:
            return rows, None
        parts = rows.train_test_split(test_size=self.eval_share, seed=seed)
        return parts["train"], parts["test"]


def rows_file(path: str | os.PathLike[str]) -> Path:
    """A JSONL file, or `train.jsonl` where `path` is a stage's folder."""
    return Path(path) / "train.jsonl" if Path(path).is_dir() else Path(path)


def load_rows(path: str | os.PathLike[str]) -> Dataset:
    """The rows of a JSONL file, or of `train.jsonl` in a stage's folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no row.
    """
    from datasets import Dataset

    from trl_reasoning_distill.data.files import read_jsonl

    file = rows_file(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"No training rows at {file}. Give a JSONL file, or the folder of the verify or select stage."
        )
    rows = Dataset.from_list(list(read_jsonl(file)))
    if not len(rows):
        raise ValueError(f"{file} holds no row: there is nothing to train on.")
    return rows


def check_evaluation(data: TrainingDataArguments, config: ReasoningSFTConfig, accuracy: AccuracyArguments) -> None:
    """Refuse what would fail at the first evaluation, hours from now.

    Raises:
        ValueError: If there are no rows to evaluate, or what is to be measured is not.
    """
    strategy = getattr(config.eval_strategy, "value", config.eval_strategy)
    if strategy != "no" and not (data.eval_path or data.eval_share):
        raise ValueError(f"eval_strategy={strategy} without evaluation rows: give eval_share or eval_path.")
    accuracy.check(config)


class TrainingStage(Stage):
    """A stage that trains a student. A subclass names its trainer, and what it reads besides rows and model.

    A run that was killed goes on from its newest valid checkpoint; those that are not valid are named, with the reason.
    """

    is_parallel = True

    def __init__(
        self,
        data: TrainingDataArguments,
        config: ReasoningSFTConfig,
        model: StudentConfig,
        accuracy: AccuracyArguments,
        state: PartialState,
    ) -> None:
        from trl_reasoning_distill.data.formatting import ReasoningFormat

        self.options, self.data, self.config, self.model, self.accuracy, self.state = (
            data,
            data,
            config,
            model,
            accuracy,
            state,
        )
        self.output_dir, self.seed = str(config.output_dir), config.seed
        self.trainer: ReasoningSFTTrainer | None = None
        if not model.model_name_or_path:
            raise ValueError(
                "model_name_or_path is missing: name the model that is trained, on the command line or in the YAML."
            )
        check_evaluation(data, config, accuracy)
        rows, self.scale = self.load_rows(), 1.0
        if data.dry_run:
            rows, self.scale = sample_rows(rows, data.limit)
        self.sample = len(rows)
        seed = config.data_seed if config.data_seed is not None else config.seed
        self.train_rows, self.eval_rows = data.split(rows, ReasoningFormat.preset(config.reasoning_format), seed)
        paths = {name: rows_file(path) for name in ("dataset_path", "eval_path") if (path := getattr(data, name))}
        self.inputs = {"model_name_or_path": model.model_name_or_path, **self.further_inputs(), **paths}
        self.inputs |= {"dataset_name": data.dataset_name} if data.dataset_name else {}
        self.settings = settings_of(data) | config.to_dict() | settings_of(model, accuracy)

    def trainer_class(self) -> type[ReasoningSFTTrainer]:
        """The trainer."""
        raise NotImplementedError

    def load_rows(self) -> Dataset:
        """All rows, before any are held out."""
        return self.data.load_required()

    def further_inputs(self) -> Mapping[str, str | os.PathLike[str]]:
        """What it reads besides rows and model, for the manifest."""
        return {}

    def plan(self) -> Plan:
        """What becomes of the rows, steps and tokens, and two examples."""
        plan = plan_training(
            self.trainer_class(),
            self.config,
            self.model,
            self.train_rows,
            self.eval_rows,
            self.state.num_processes,
            self.scale,
        )
        judged = f", judged by {self.sample:,} rows, each for {self.scale:.1f}" if self.scale > 1 else ""
        plan.text = f"{self.name}: {self.model.model_name_or_path} would be trained, into {self.output_dir}{judged}\n{plan.text}"
        return plan

    def run(self, run: StageRun) -> Outcome:
        """Train, and save the model (see `save_results`)."""
        from trl_reasoning_distill.trainer.callbacks import StopOnSignal

        config = self.config
        trainer = self.trainer = make_trainer(self.trainer_class(), config, self.model, self.train_rows, self.eval_rows)
        self.accuracy.attach(trainer, self.eval_rows)
        self._print(*(f"{name} rows: {report}" for name, report in trainer.reports.items()))
        checkpoint = trainer.find_checkpoint(
            config.resume_from_checkpoint or True, required=bool(config.resume_from_checkpoint)
        )
        self._print(*(f"skipped {line}" for line in checkpoint.skipped))
        self._print(*([f"going on from {checkpoint.path}"] if checkpoint.path else []))
        with StopOnSignal(trainer) as stop:
            trainer.train(resume_from_checkpoint=checkpoint.path)
        if stop.number is not None:
            self.state.wait_for_everyone()
            self._print(f"saved checkpoint-{trainer.state.global_step}")
            raise InterruptedBySignal(stop.number)
        if self.eval_rows is not None and not is_evaluated(trainer):
            trainer.evaluate()
        save_results(trainer, Path(self.output_dir), self.model)
        return summarize(trainer)

    def after(self) -> None:
        """Push to the hub, where that is asked for, and close the trackers."""
        if self.trainer is not None:
            if self.config.push_to_hub:
                self.trainer.push_to_hub(dataset_name=self.data.dataset_name)
            self.trainer.accelerator.end_training()

    def _print(self, *lines: str) -> None:
        for line in lines if self.state.is_main_process else ():
            print(f"{self.name}: {line}", flush=True)


def make_trainer(
    trainer_class: type[ReasoningSFTTrainer],
    config: ReasoningSFTConfig,
    model: StudentConfig,
    train_rows: Dataset,
    eval_rows: Dataset | None,
) -> ReasoningSFTTrainer:
    """The trainer with its model, loaded as the options say."""
    from trl import get_peft_config, get_quantization_config

    loading = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    config.model_init_kwargs = loading | dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
    return trainer_class(
        model.model_name_or_path,
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )


def is_evaluated(trainer: ReasoningSFTTrainer) -> bool:
    """Whether the last step of the training was evaluated."""
    return any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
    )


def save_results(trainer: ReasoningSFTTrainer, output_dir: Path, model: StudentConfig) -> None:
    """Save what a training leaves: the model, merged if asked for, its card, the log, and the last evaluation. On all ranks.

    Writes `final_model/`, `merged_model/` (with `merge`), `README.md`, `trainer_state.json`, `log.jsonl` and `eval_results.json`.
    """
    from trl_reasoning_distill.data.files import write_json, write_jsonl

    save_final_model(trainer, output_dir / FINAL_MODEL)
    trainer.create_model_card(model_name="-".join(output_dir.parts[-2:]))
    if trainer.is_world_process_zero():
        saved = [output_dir / FINAL_MODEL]
        if model.merge:
            from trl_reasoning_distill.trainer.merging import merge_adapter

            dtype, trust = model.dtype or "float32", trainer.args.trust_remote_code
            merge_adapter(saved[0], output_dir / MERGED_MODEL, dtype=dtype, trust_remote_code=trust)
            saved.append(output_dir / MERGED_MODEL)
        for folder in saved:
            shutil.copyfile(output_dir / "README.md", folder / "README.md")
        history = trainer.state.log_history
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
        write_jsonl(output_dir / "log.jsonl", history)
        evaluations = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
        last = [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]
        if last:  # the loss and the accuracy are two entries of one step
            write_json(
                output_dir / "eval_results.json", {name: value for entry in last for name, value in entry.items()}
            )
    trainer.accelerator.wait_for_everyone()


def save_final_model(trainer: ReasoningSFTTrainer, path: Path) -> None:
    """Save model and tokenizer, gathered from all ranks; the folder appears when it is whole. To be called on all ranks."""
    accelerator, partial = trainer.accelerator, path.with_name(f".{path.name}.partial")
    if trainer.is_fsdp_enabled:  # the default saves one shard per rank, which no `from_pretrained` reads
        accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; the manifest says the same in JSON
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    accelerator.wait_for_everyone()


def summarize(trainer: ReasoningSFTTrainer) -> tuple[dict[str, int | float], str]:
    """What the manifest counts, and the stage's line: how much was trained, and where the losses began and ended."""
    history, report = trainer.state.log_history, trainer.reports["train"]
    counts: dict[str, int | float] = {
        "steps": trainer.state.global_step,
        "rows": report.rows,
        "overlong_rows": report.overlong,
        "supervised_tokens_seen": trainer.supervised_tokens_seen,
        "tokens_seen": trainer.token_count.tokens,
    }
    line = [f"{counts['steps']:,} steps", f"{counts['supervised_tokens_seen']:,} supervised tokens"]
    for name in ("loss", "sft_loss", "kd_loss", "kl_loss", "eval_loss", "eval_kd_loss", "eval_math_accuracy"):
        values = [entry[name] for entry in history if name in entry]
        if values:
            counts[name] = values[-1]
            line.append(f"{name} {values[0]:.4f} → {values[-1]:.4f}" if len(values) > 1 else f"{name} {values[-1]:.4f}")
    return counts, " · ".join(line)


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
