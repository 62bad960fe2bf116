"""What the training stages share: their data, the model, resuming, saving, and the line they end with."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.normalization import (
    SHAPES,
    Reading,
    Rows,
    load_hub_rows,
    load_rows,
    normalize,
    number_rows,
    rows_file,
)
from trl_reasoning_distill.processes import InterruptedBySignal
from trl_reasoning_distill.scripts.planning import describe_training, sample_rows
from trl_reasoning_distill.scripts.stage import TrainingStageArguments, is_main_process

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_reasoning_distill.scripts.arguments import AccuracyArguments
    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, StudentConfig
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer


FINAL_MODEL = "final_model"
MERGED_MODEL = "merged_model"


@dataclass
class TrainingDataArguments(TrainingStageArguments):
    """Where the rows of a training come from."""

    dataset_path: str | None = field(
        default=None,
        metadata={
            "help": "File of rows (JSON Lines, JSON, CSV or Parquet, also compressed), or the folder of the stage that wrote train.jsonl."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the hub, instead of dataset_path."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the hub dataset."})
    data_shape: str = field(
        default="auto",
        metadata={
            "help": f"Shape of the rows: {', '.join(SHAPES)}; auto looks at all of them; none takes only what needs no converting."
        },
    )
    generations_per_row: int = field(
        default=1, metadata={"help": "Correct generations taken of each row, where it holds several (openr1_math)."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "At most so many rows, drawn with data_seed or seed: for a quick test."}
    )
    eval_path: str | None = field(
        default=None, metadata={"help": "JSONL file of rows for evaluation, or the folder of a stage that wrote them."}
    )
    eval_share: float = field(
        default=0.0,
        metadata={"help": "Share of the rows that is held out for evaluation, drawn with data_seed or seed."},
    )

    def __post_init__(self) -> None:
        if self.dataset_path and self.dataset_name:
            raise ValueError(
                f"Both dataset_path ({self.dataset_path}) and dataset_name ({self.dataset_name}) are given; give one."
            )
        if not 0.0 <= self.eval_share < 1.0:
            raise ValueError(f"eval_share={self.eval_share}: must be at least 0 and below 1.")
        if self.eval_share and self.eval_path:
            raise ValueError("Both eval_share and eval_path are given; give one.")
        if self.generations_per_row < 1 or (self.max_samples is not None and self.max_samples < 1):
            raise ValueError(
                f"generations_per_row={self.generations_per_row} and max_samples={self.max_samples} must be at least 1."
            )

    def load(self) -> Rows | None:
        """The rows as they are published, before any are held out; `None` if neither a path nor a name is given."""
        if self.dataset_name:
            return number_rows(load_hub_rows(self.dataset_name, self.dataset_split, self.dataset_config))
        return number_rows(load_rows(self.dataset_path)) if self.dataset_path else None

    def normalize(self, rows: Rows, reading: Reading, seed: int, name: str) -> Dataset:
        """At most `max_samples` of the rows, as rows to train on; prints what was read and what was left out."""
        if self.max_samples is not None and self.max_samples < len(rows):
            rows = _drawn(rows, self.max_samples, seed)
        dataset, line = normalize(rows, reading, name)
        if is_main_process():
            print(line, flush=True)
        return dataset

    def load_required(self) -> Rows:
        """The rows, of a training that has no other source of them.

        Raises:
            ValueError: If neither a path nor a name is given.
        """
        rows = self.load()
        if rows is None:
            raise ValueError(
                "There is nothing to train on: give dataset_path (a file of rows or a stage's folder) or dataset_name."
            )
        return rows

    def split(self, rows: Rows, config: ReasoningSFTConfig, seed: int) -> tuple[Dataset, Dataset | None]:
        """The rows to train on and those for evaluation, if any."""
        reading = Reading(
            ReasoningFormat.preset(config.reasoning_format),
            self.data_shape,
            generations=self.generations_per_row,
            every_reply=config.assistant_only_loss,
            needs_reply=getattr(config, "needs_reply", True),
            text_field=config.dataset_text_field,
        )
        train = self.normalize(rows, reading, seed, self.dataset_path or self.dataset_name or "the store")
        if self.eval_path:
            reading = dataclasses.replace(reading, needs_reply=True)
            return train, self.normalize(load_rows(self.eval_path), reading, seed, self.eval_path)
        if not self.eval_share:
            return train, None
        parts = train.train_test_split(test_size=self.eval_share, seed=seed)
        return parts["train"], parts["test"]


def _drawn(rows: Rows, count: int, seed: int) -> Rows:
    """So many of the rows, drawn at random; the same ones of a file and of a dataset."""
    from datasets import Dataset

    if not isinstance(rows, list):
        return rows.shuffle(seed=seed).select(range(count))
    order = Dataset.from_dict({"index": range(len(rows))}).shuffle(seed=seed).select(range(count))
    return [rows[index] for index in order["index"]]


def run_training(
    stage: str,
    trainer_class: type[ReasoningSFTTrainer],
    data: TrainingDataArguments,
    config: ReasoningSFTConfig,
    model: StudentConfig,
    *,
    rows: Rows,
    inputs: Mapping[str, str | os.PathLike[str]],
    accuracy: AccuracyArguments | None = None,
) -> None:
    """Train, save the model (see `save_results`), write the manifest, and print one line.

    A run that was killed goes on from its newest valid checkpoint; those that are not are named, with the reason.

    Args:
        stage: Name of the stage.
        trainer_class: The trainer.
        data: Where the rows come from.
        config: The trainer's configuration.
        model: The model, its adapter and quantisation.
        rows: All rows, before any are held out.
        inputs: Further inputs of the stage, for its manifest.
        accuracy: What is measured at each evaluation.
    """
    from accelerate import PartialState

    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.processes import check_launch, let_deepspeed_shard_on_cpus
    from trl_reasoning_distill.trainer.callbacks import StopOnSignal

    if not model.model_name_or_path:
        raise ValueError(
            "model_name_or_path is missing: say which model is trained, on the command line or in the YAML."
        )
    state = PartialState()
    check_launch(state)
    let_deepspeed_shard_on_cpus()
    seed = config.data_seed if config.data_seed is not None else config.seed
    rows, scale = sample_rows(rows, data.max_samples) if data.dry_run else (rows, 1.0)
    train_rows, eval_rows = data.split(rows, config, seed)
    if config.eval_strategy != "no" and eval_rows is None:
        raise ValueError(f"eval_strategy={config.eval_strategy} without evaluation rows: give eval_share or eval_path.")
    if accuracy is not None:
        accuracy.check(config)
    if data.dry_run:
        plan = describe_training(trainer_class, config, model, train_rows, eval_rows, state.num_processes, scale)
        if state.is_main_process:
            judged = f", judged by {len(rows):,} rows, each for {scale:.1f}" if scale > 1 else ""
            print(f"{stage}: {model.model_name_or_path} would be trained, into {config.output_dir}{judged}\n{plan}")
        return
    output_dir = Path(str(config.output_dir))
    paths = {"model_name_or_path": model.model_name_or_path, **inputs}
    paths |= {name: rows_file(path) for name in ("dataset_path", "eval_path") if (path := getattr(data, name))}
    paths |= {"dataset_name": data.dataset_name} if data.dataset_name else {}
    settings = {**dataclasses.asdict(data), **config.to_dict(), **dataclasses.asdict(model)}
    settings |= dataclasses.asdict(accuracy) if accuracy is not None else {}
    run = StageRun(
        stage, output_dir, settings, paths, config.seed, overwrite=data.overwrite, is_main=state.is_main_process
    )
    with run:
        state.wait_for_everyone()
        if run.is_finished:
            if state.is_main_process:
                print(f"{stage}: nothing to do, {output_dir} holds this run's result")
            return
        trainer = make_trainer(trainer_class, config, model, train_rows, eval_rows)
        if accuracy is not None:
            accuracy.attach(trainer, eval_rows)
        if state.is_main_process:
            for name, report in trainer.reports.items():
                print(f"{stage}: {name} rows: {report}", flush=True)
        checkpoint = trainer.find_checkpoint(
            config.resume_from_checkpoint or True, required=bool(config.resume_from_checkpoint)
        )
        if state.is_main_process:
            lines = [f"skipped {line}" for line in checkpoint.skipped]
            lines += [f"going on from {checkpoint.path}"] if checkpoint.path else []
            for line in lines:
                print(f"{stage}: {line}", flush=True)
        with StopOnSignal(trainer) as stop:
            trainer.train(resume_from_checkpoint=checkpoint.path)
        if stop.number is not None:
            state.wait_for_everyone()
            if state.is_main_process:
                print(f"{stage}: saved checkpoint-{trainer.state.global_step}", flush=True)
            raise InterruptedBySignal(stop.number)
        if eval_rows is not None and not is_evaluated(trainer):
            trainer.evaluate()
        save_results(trainer, output_dir, model)
        if state.is_main_process:
            counts, result = summarize(trainer)
            run.finish(counts, result)
            print(f"{stage}: {result}")
        if config.push_to_hub:
            trainer.push_to_hub(dataset_name=data.dataset_name)
        trainer.accelerator.end_training()


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
