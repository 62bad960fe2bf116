"""Options that several stages share: problems, prompts, sampling, accuracy while training, selection, and what scores rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl_reasoning_distill.options import (
    Count,
    CountOrZero,
    JsonMapping,
    NonNegative,
    Options,
    PositiveShare,
    Share,
    option,
)
from trl_reasoning_distill.teacher.sampling import LoadingOptions, ServerOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from datasets import Dataset

    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.data.schema import Problem, TrainingRow, VerifiedTrace
    from trl_reasoning_distill.teacher.sampling import SamplingConfig
    from trl_reasoning_distill.teacher.scoring import Reader
    from trl_reasoning_distill.teacher.selection import SelectionConfig
    from trl_reasoning_distill.trainer.accuracy import HeldOutProblem
    from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
    from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer


OF_THE_SOURCE = "source"
"""As `response_format`: the format of the source's own answers."""


@dataclass(kw_only=True)
class ProblemArguments(Options):
    """Which problems."""

    source: str = option(
        help="A named source (gsm8k, math500, synthetic_arithmetic, …), a path to a file, or hub:ORGANISATION/NAME."
    )
    split: str | None = option(None, "Which part of the source; default: its first.")
    limit: Count | None = option(None, "At most this many problems, a sample drawn with problem_seed.")
    problem_seed: CountOrZero = option(0, "Seed of that sample, and of the problems synthetic_arithmetic makes.")
    data_dir: str | None = option(None, "Folder with local copies of named sources, instead of the hub.")
    source_options: JsonMapping | None = option(
        None, 'Further options of the source, such as {"steps": [1, 2]} or {"columns": {"question": "prompt"}}.'
    )

    def load(self) -> list[Problem]:
        """The problems.

        Raises:
            ValueError: If the source is unknown or cannot be had.
        """
        from trl_reasoning_distill.data.sources import load_problems

        options = dict(self.source_options or {})  # type: ignore[arg-type]  # a string was parsed above
        if self.data_dir is not None:
            options["data_dir"] = self.data_dir
        return load_problems(self.source, split=self.split, limit=self.limit, seed=self.problem_seed, **options)


@dataclass
class PromptArguments(Options):
    """How they are asked."""

    response_format: str = option(
        "think",
        "How reasoning and answer are written: think, gsm8k, boxed, final_answer, plain, or source: as the source writes them.",
    )
    system_prompt: str | None = option(None, "Replaces the format's own system prompt; an empty text sends none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.response_format != OF_THE_SOURCE:
            self.make_format()

    def make_format(self, source: str | None = None) -> ReasoningFormat:
        """The format with its system prompt.

        Args:
            source: Name of the source of the problems, whose own format `source` stands for.

        Raises:
            ValueError: For an unknown format, or a source without a format of its own.
        """
        from trl_reasoning_distill.data.formatting import ReasoningFormat
        from trl_reasoning_distill.data.sources import SOURCES

        name = self.response_format
        if name == OF_THE_SOURCE:
            if source is None or source not in SOURCES:
                raise ValueError(
                    f"response_format=source needs a named source with a format of its own ({', '.join(SOURCES)}), found {source!r}; name the format."
                )
            name = SOURCES[source].response_format
        changes = {} if self.system_prompt is None else {"system_prompt": self.system_prompt or None}
        return ReasoningFormat.preset(name, **changes)


@dataclass
class SamplingArguments(Options):
    """How tokens are chosen."""

    max_new_tokens: Count = option(512, "A completion is cut here.")
    temperature: NonNegative = option(0.0, "0 takes the most likely token (greedy).")
    top_p: PositiveShare = option(1.0, "Keep the smallest set of tokens with this probability; 1 keeps all.")
    top_k: CountOrZero = option(0, "Keep this many tokens; 0 keeps all.")
    seed: CountOrZero = option(0, "Seed of sampled completions.")
    stop: list[str] | None = option(
        None,
        "A completion ends before these texts. Default: where the model begins a question of its own; an empty text: nowhere.",
    )

    def make_sampling(self) -> SamplingConfig:
        """The checked sampling settings.

        Raises:
            ValueError: If one is out of range.
        """
        from trl_reasoning_distill.teacher.sampling import SamplingConfig

        stop = None if self.stop is None else tuple(text for text in self.stop if text)
        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_p, self.top_k, stop)


@dataclass
class AccuracyArguments(Options):
    """Accuracy in the training loop."""

    accuracy_problems: CountOrZero = option(
        0, "Held-out problems answered and verified at each evaluation (eval_math_accuracy); 0: none."
    )
    accuracy_source: str | None = option(
        None, "Source of these problems, as of the evaluate stage; default: the evaluation rows, by `answer`."
    )
    accuracy_source_options: JsonMapping | None = option(
        None, 'Options of accuracy_source, such as {"split": "test", "data_dir": "…"}.'
    )
    accuracy_max_new_tokens: Count = option(512, "Such an answer is cut here.")
    accuracy_batch_size: Count | None = option(
        None, "Answers written at once on each device. Default: per_device_eval_batch_size."
    )

    def check(self, config: ReasoningSFTConfig) -> None:
        """Refuse settings that would fail at the first evaluation, hours from now.

        Raises:
            ValueError: If there are no evaluations, or the best checkpoint is to be chosen by what is not measured.
        """
        if self.accuracy_problems and config.eval_strategy == "no":
            raise ValueError(
                f"accuracy_problems={self.accuracy_problems} with eval_strategy=no: it is measured at evaluations; set eval_strategy and eval_steps."
            )
        metric = config.metric_for_best_model or ""
        if "math_" in metric and not self.accuracy_problems:
            raise ValueError(
                f"metric_for_best_model={metric!r} is measured on held-out problems: set accuracy_problems."
            )

    def attach(self, trainer: ReasoningSFTTrainer, eval_rows: Dataset | None) -> None:
        """Add the callback to a trainer, if it is asked for.

        Raises:
            ValueError: If there is no problem with an answer.
        """
        if not self.accuracy_problems:
            return
        from trl_reasoning_distill.trainer.accuracy import AccuracyCallback

        AccuracyCallback(
            self.load(eval_rows, trainer.format, trainer.args.seed),
            trainer.format,
            max_new_tokens=self.accuracy_max_new_tokens,
            batch_size=self.accuracy_batch_size,
            chat_template_kwargs=trainer.args.template_variables,
        ).attach(trainer)

    def load(self, eval_rows: Dataset | None, form: ReasoningFormat, seed: int) -> list[HeldOutProblem]:
        """The problems: of the source, or the evaluation rows that name their answer."""
        from trl_reasoning_distill.data.sources import load_problems
        from trl_reasoning_distill.trainer.accuracy import HeldOutProblem

        if self.accuracy_source is None:
            return _from_rows(eval_rows or [], self.accuracy_problems)
        options = dict(self.accuracy_source_options or {})  # type: ignore[arg-type]  # a string was parsed above
        problems = load_problems(self.accuracy_source, limit=self.accuracy_problems, seed=seed, **options)
        return [
            HeldOutProblem(form.messages(item.question), item.answer) for item in problems if item.answer is not None
        ]


def _from_rows(rows: Iterable[Mapping[str, Any]], count: int) -> list[HeldOutProblem]:
    """The first `count` rows that have an answer, each asked with its own prompt; a question asked twice counts once."""
    from trl_reasoning_distill.trainer.accuracy import HeldOutProblem

    found: dict[str, HeldOutProblem] = {}
    for row in rows:
        prompt, answer = row.get("prompt"), row.get("answer")
        if isinstance(prompt, list) and answer is not None and len(found) < count:
            found.setdefault(str(prompt), HeldOutProblem(prompt, str(answer)))
    if not found:
        raise ValueError(
            "accuracy_problems: no evaluation row has a `prompt` of messages and an `answer` to verify against. Give accuracy_source, such as "
            "gsm8k, or rows that the verify or select stage wrote."
        )
    return list(found.values())


@dataclass
class SelectionArguments(Options):
    """Which of a problem's traces become training rows, and how they are written."""

    strategy: str = option(
        "first", "first, shortest, median, agreed, diverse, consensus (majority vote without a gold answer) or all."
    )
    per_problem: Count = option(1, "At most this many traces per problem.")
    response_format: str | None = option(None, "The format the traces are in; default: what the stage before says.")
    target_format: str | None = option(None, "Write the training rows in this format instead: think, gsm8k, boxed, …")
    system_prompt: str | None = option(
        None, "System prompt of the training rows; default: the format's own, none if empty."
    )
    max_pass_rate: PositiveShare = option(1.0, "Leave out problems of which a larger share of the traces is right.")
    easy_share: Share = option(
        1.0,
        "Thin out easy problems: the share to keep of those that are always solved, fewer of the often solved.",
    )
    min_agreement: Share = option(0.5, "For consensus without a gold answer: the majority's least share.")

    def __post_init__(self) -> None:
        super().__post_init__()
        from trl_reasoning_distill.data.formatting import ReasoningFormat

        for name in (self.response_format, self.target_format):
            if name is not None:
                ReasoningFormat.preset(name)
        self.make_config("think")

    def make_config(self, format_name: str) -> SelectionConfig:
        """What to select, from traces in the format `format_name`.

        Raises:
            ValueError: If an option is out of its range.
        """
        from trl_reasoning_distill.data.formatting import ReasoningFormat
        from trl_reasoning_distill.teacher.selection import SelectionConfig

        prompt = {} if self.system_prompt is None else {"system_prompt": self.system_prompt or None}
        return SelectionConfig(
            strategy=self.strategy,
            per_problem=self.per_problem,
            source_format=ReasoningFormat.preset(format_name, **prompt),
            target_format=ReasoningFormat.preset(self.target_format, **prompt) if self.target_format else None,
            max_pass_rate=self.max_pass_rate,
            min_agreement=self.min_agreement,
            easy_share=self.easy_share,
        )


def make_selection(
    traces: Iterable[VerifiedTrace], selection: SelectionArguments, format_name: str
) -> tuple[list[TrainingRow], dict[str, int]]:
    """Select.

    Returns:
        The rows of `train.jsonl`; the counts of the selection, and `rows`.

    Raises:
        ValueError: If nothing is left to train on, with what became of the traces.
    """
    from trl_reasoning_distill.teacher.selection import select_traces

    selected = select_traces(traces, selection.make_config(format_name))
    if not selected.rows:
        raise ValueError(
            f"No trace is fit to train on: {selected.counts}. If most are malformed, the traces are in another format than "
            f"{format_name!r} (set response_format); if most are cut, raise the teacher's max_new_tokens."
        )
    return selected.rows, {**selected.counts, "rows": len(selected.rows)}


def write_selection(
    traces: Iterable[VerifiedTrace], selection: SelectionArguments, format_name: str, output_dir: Path
) -> dict[str, int]:
    """Select, write `train.jsonl`, and return the counts; see `make_selection`."""
    from trl_reasoning_distill.data.files import write_jsonl

    rows, counts = make_selection(traces, selection, format_name)
    write_jsonl(output_dir / "train.jsonl", (row.to_row() for row in rows))
    return counts


def describe_selection(counts: Mapping[str, int]) -> str:
    """What was kept and what was left out, in one line."""
    reasons = {
        "cut": "cut",
        "malformed": "malformed",
        "too_easy": "of too easy problems",
        "thinned_out": "of easy problems",
        "not_rendered": "not to be rendered",
    }
    left_out = ", ".join(f"{counts[key]} {text}" for key, text in reasons.items() if counts[key])
    kept = f"{counts['problems_kept']} problems kept of {counts['problems']}"
    rows = f" ({counts['rows']} rows)" if counts["rows"] != counts["problems_kept"] else ""
    return f"{kept}{rows}" + (f"; left out: {left_out}" if left_out else "")


def read_format_name(folder: Path) -> str:
    """The response format that the manifest of an earlier stage names; `think` if there is none."""
    from trl_reasoning_distill.data.manifest import read_manifest

    try:
        name = read_manifest(folder).config.get("response_format")
    except FileNotFoundError:
        name = None
    return name or "think"


_OF_THIS_PROCESS = ("dtype", "device_map", "attn_implementation", "quantization", "max_batch_tokens")


@dataclass
class ReaderArguments(ServerOptions, LoadingOptions):
    """What scores the rows, and its options. An option that means nothing to the chosen engine is refused unless it still holds its default."""

    engine: Literal["transformers", "openai"] = option(
        "transformers",
        "What scores: transformers (this process), or openai (a server that gives prompt log-probs, such as vLLM; T = 1 only).",
    )
    teacher_tokenizer: str | None = option(
        None, "Folder or hub name of the teacher's tokenizer. Default: the teacher itself."
    )
    max_batch_tokens: Count = option(
        16384, "[transformers] Tokens per batch, padding included; lower it when memory runs out."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        of_servers = {one.name for one in fields(ServerOptions)}
        for one in fields(self):
            value = getattr(self, one.name)
            is_of_another = one.name in (of_servers if self.engine == "transformers" else _OF_THIS_PROCESS)
            if is_of_another and value != one.default:
                raise ValueError(
                    f"{one.name}={value!r} means nothing to the {self.engine!r} engine; remove it, or choose another engine."
                )

    def load_tokenizer(self, model: str, chat_template_path: str | None) -> Any:
        """The tokenizer of the teacher `model`; see `hub.load_tokenizer`."""
        from trl_reasoning_distill.hub import load_tokenizer

        name = self.teacher_tokenizer or model
        revision, trust = self.model_revision, self.trust_remote_code
        return load_tokenizer(name, revision=revision, chat_template=chat_template_path, trust_remote_code=trust)

    def make_reader(self, model: str, tokenizer: Any, top_k: int, temperatures: Sequence[float]) -> Reader:
        """Load the teacher, or examine its server.

        Raises:
            ValueError: If the model cannot be loaded, or the server cannot give what is asked for.
        """
        from trl_reasoning_distill.teacher.scoring import ServerReader, TransformersReader

        if self.engine == "openai":
            return ServerReader(
                self.base_url,
                model,
                tokenizer,
                top_k,
                temperatures,
                api_key_env=self.api_key_env,
                concurrency=self.concurrency,
                request_timeout=self.request_timeout,
                max_retries=self.max_retries,
            )
        from trl_reasoning_distill.teacher.sampling.transformers import TransformersEngine

        engine = TransformersEngine.from_pretrained(
            model,
            revision=self.model_revision,
            dtype=self.dtype,
            device_map=self.device_map,
            attn_implementation=self.attn_implementation,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
        )
        return TransformersReader(engine.model, tokenizer, top_k, temperatures, max_batch_tokens=self.max_batch_tokens)

    def fingerprint(self, model: str, model_hash: str | None, tokenizer: Any, device: str) -> dict[str, Any]:
        """What decides the records, for the store's manifest; what a server is found to be comes from its reader."""
        from trl_reasoning_distill.data.manifest import installed_versions
        from trl_reasoning_distill.data.tokenization import chat_template_fingerprint, tokenizer_fingerprint

        made_with: dict[str, Any] = {"engine": self.engine, "teacher": model}
        if self.teacher_tokenizer is not None:
            made_with["tokenizer_name"] = self.teacher_tokenizer
        packages = ["tokenizers", "transformers"]
        if self.engine == "transformers":
            packages += ["bitsandbytes", "torch"]
            commit = tokenizer.init_kwargs.get("_commit_hash")
            made_with |= {
                "revision": model_hash or commit or self.model_revision,
                "dtype": "float32" if self.dtype == "auto" and device == "cpu" else self.dtype,
                "quantization": self.quantization,
                "attn_implementation": self.attn_implementation,
                "max_batch_tokens": self.max_batch_tokens,
            }
        return made_with | {
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "chat_template": chat_template_fingerprint(tokenizer),
            "versions": {name: version for name, version in installed_versions().items() if name in packages},
        }
