"""What the training stages share: their data, the model, resuming, saving, and the line they end with."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.published import Reading, check_shape
from trl_reasoning_distill.data.row_sets import Rows, load_hub_rows, load_rows, normalize, number_rows, rows_file
from trl_reasoning_distill.options import Bounds, Count, option
from trl_reasoning_distill.processes import InterruptedBySignal
from trl_reasoning_distill.scripts.command import is_main_process
from trl_reasoning_distill.scripts.planning import Plan, plan_training, sample_rows
from trl_reasoning_distill.scripts.stage import Outcome, Stage, TrainingStageArguments, settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import PartialState
    from datasets import Dataset

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
        None,
        "File of rows (JSON Lines, JSON, CSV or Parquet, also compressed), or the folder of the stage that wrote train.jsonl.",
    )
    dataset_name: str | None = option(None, "Dataset on the hub, instead of dataset_path.")
    dataset_config: str | None = option(None, "Configuration of the hub dataset.")
    dataset_split: str = option("train", "Split of the hub dataset.")
    data_shape: str = option(
        "auto",
        "Shape of the rows, such as openthoughts, openr1_math, numinamath_qwq, s1k, alpaca, gsm8k, messages, prompt_completion; auto looks at all "
        "of them; none takes only what needs no converting.",
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
        check_shape(self.data_shape)
        if self.dataset_path and self.dataset_name:
            raise ValueError(
                f"Both dataset_path ({self.dataset_path}) and dataset_name ({self.dataset_name}) are given; give one."
            )
        if self.eval_share and self.eval_path:
            raise ValueError("Both eval_share and eval_path are given; give one.")

    def load(self) -> Rows | None:
        """The rows as they are published, before any are held out; `None` if neither a path nor a name is given."""
        if self.dataset_name:
            return number_rows(load_hub_rows(self.dataset_name, self.dataset_split, self.dataset_config))
        return number_rows(load_rows(self.dataset_path)) if self.dataset_path else None

    def normalize(self, rows: Rows, reading: Reading, seed: int, name: str) -> Dataset:
        """At most `limit` of the rows, as rows to train on; prints what was read and what was left out."""
        if self.limit is not None and self.limit < len(rows):
            rows = _drawn(rows, self.limit, seed)
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
        self.train_rows, self.eval_rows = data.split(rows, config, seed)
        paths = {name: rows_file(path) for name in ("dataset_path", "eval_path") if (path := getattr(data, name))}
        self.inputs = {"model_name_or_path": model.model_name_or_path, **self.further_inputs(), **paths}
        self.inputs |= {"dataset_name": data.dataset_name} if data.dataset_name else {}
        self.settings = settings_of(data) | config.to_dict() | settings_of(model, accuracy)

    def trainer_class(self) -> type[ReasoningSFTTrainer]:
        """The trainer."""
        raise NotImplementedError

    def load_rows(self) -> Rows:
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
    history, report = trainer.state.log_history, trainer.reports.get("train")  # none with skip_prepare_dataset
    counts: dict[str, int | float] = {"steps": trainer.state.global_step}
    if report is not None:
        counts |= {"rows": report.rows, "overlong_rows": report.overlong}
    counts |= {
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
