"""Generate chains of thought: the teacher answers problems, n samples for each.

    accelerate launch recipes/generate.py --config recipes/quickstart/generate.yaml
    trl-distill generate --model Qwen/Qwen2.5-7B-Instruct --source gsm8k --num_samples 4 --temperature 0.8 --output_dir runs/x/generate

Writes `problems.jsonl` (what was asked), `traces.jsonl` (what was written: question, gold answer, completion, how it
ended, tokens, seed) and, where a server refused or failed, `failures.jsonl` to `output_dir`. A killed run goes on where it stopped, also with another number of processes, and makes
the same traces. `until_verified: 1` with `max_samples: 8` draws further samples only for problems without a right one yet.
It ends with what that took: tokens, time, and with the server's prices what it cost. Then run `verify`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.scripts.arguments import ProblemArguments, PromptArguments, SamplingArguments
from trl_reasoning_distill.scripts.stage import StageArguments, open_run, parse_stage, settings_of, stage_main
from trl_reasoning_distill.teacher.sampling import EngineArguments

if TYPE_CHECKING:
    from trl import TrlParser

    from trl_reasoning_distill.data.schema import Problem
    from trl_reasoning_distill.teacher.generation import GenerationConfig

_FEW = 4


@dataclass
class GenerateArguments(StageArguments):
    """The teacher, and how often it is asked."""

    model: str = field(
        default="",
        metadata={
            "help": "The teacher: folder or hub name of a model or adapter; for a server, its name there. Required."
        },
    )
    num_samples: int = field(default=1, metadata={"help": "Samples per problem."})
    until_verified: int | None = field(
        default=None,
        metadata={"help": "Draw further samples for a problem until this many are right, at most max_samples."},
    )
    max_samples: int = field(default=8, metadata={"help": "Most samples per problem with until_verified."})
    few_shot: str | None = field(
        default=None,
        metadata={
            "help": "Source or JSONL of problems with solution and answer, shown to the teacher as earlier turns. Default: zero-shot."
        },
    )
    instruct: bool = field(
        default=False,
        metadata={"help": "Ask for think tags in a system prompt, which a teacher that was not trained on them needs."},
    )
    num_few_shot: int | None = field(
        default=None,
        metadata={
            "help": "How many of few_shot are shown, drawn with problem_seed; default: 4 of a source, all of a file."
        },
    )
    input_price: float = field(default=0.0, metadata={"help": "What a million prompt tokens cost, for the summary."})
    output_price: float = field(default=0.0, metadata={"help": "What a million written tokens cost, for the summary."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("model is missing: say which model is the teacher, with --model or in the YAML.")
        if self.num_few_shot is not None and self.num_few_shot < 1:
            raise ValueError(f"num_few_shot={self.num_few_shot}: at least 1; leave few_shot out for zero-shot prompts.")
        if self.input_price < 0 or self.output_price < 0:
            raise ValueError(
                f"Prices cannot be negative: input_price={self.input_price}, output_price={self.output_price}."
            )


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser of all options of this stage."""
    from trl import TrlParser

    dataclass_types = (GenerateArguments, ProblemArguments, PromptArguments, SamplingArguments, EngineArguments)
    return TrlParser(dataclass_types, prog=prog)  # type: ignore[arg-type]


@stage_main
def main(args: list[str] | None = None) -> None:
    """Run the stage."""
    options, source, prompt, sampling, engine = parse_stage(make_parser(), args)

    from trl_reasoning_distill.processes import launch_state
    from trl_reasoning_distill.teacher.generation import GenerationConfig, generate, instructed

    response_format = prompt.make_format(source.source)
    config = GenerationConfig(
        num_samples=options.num_samples,
        until_verified=options.until_verified,
        max_samples=options.max_samples,
        seed=sampling.seed,
        sampling=sampling.make_sampling(),
        response_format=instructed(response_format) if options.instruct else response_format,
        few_shot=tuple(_load_few_shot(options, source)),
    )
    problems = source.load()
    state = launch_state()
    if options.dry_run:
        if state.is_main_process:
            _print_plan(problems, config, options.model, engine)
        return
    settings = settings_of(options, source, prompt, sampling, engine)
    settings["response_format"] = config.response_format.name
    inputs = {"model": options.model, "source": source.source} | (
        {"few_shot": options.few_shot} if options.few_shot else {}
    )
    with open_run("generate", options, settings, inputs, sampling.seed, state) as run:
        if run is None:
            return
        counts = generate(problems, engine.make_engine(options.model), config, options.output_dir)
        if state.is_main_process:
            cost = (counts["prompt_tokens"] * options.input_price + counts["tokens"] * options.output_price) / 1e6
            failed = f"{counts['failed']} without an answer (see failures.jsonl) · " if counts["failed"] else ""
            result = (
                f"{counts['traces']} traces for {counts['problems']} problems · {failed}{counts['cut']} cut at {sampling.max_new_tokens} tokens · "
                f"{counts['tokens']:,} tokens in {timedelta(seconds=round(counts['seconds']))} ({counts['tokens_per_second']:,.0f} tokens/s)"
                + (f" · cost {cost:,.2f}" if cost else "")
            )
            run.finish(counts | ({"cost": round(cost, 6)} if cost else {}), result)
            print(f"generate: {result}")


def _load_few_shot(options: GenerateArguments, source: ProblemArguments) -> list[Problem]:
    """The examples that the prompts show; those of a source without a solution are passed over."""
    from trl_reasoning_distill.data.sources import SOURCES, Refusal, read_source

    if options.few_shot is None:
        return []
    is_file = Path(options.few_shot).exists()
    where: dict[str, Any] = {"data_dir": source.data_dir} if options.few_shot in SOURCES else {}
    return read_source(
        options.few_shot,
        limit=options.num_few_shot or (None if is_file else _FEW),
        seed=source.problem_seed,
        admit=lambda problem: None if problem.solution and problem.answer else Refusal("bad_row", "it has no solution"),
        **where,
    ).problems


def _print_plan(problems: list[Problem], config: GenerationConfig, model: str, engine: EngineArguments) -> None:
    """What a real run would do, and its first prompts."""
    from trl_reasoning_distill.scripts.planning import describe_prompts_of
    from trl_reasoning_distill.teacher.generation import build_messages

    most = max(config.num_samples, config.max_samples) if config.until_verified else config.num_samples
    samples = f"{config.num_samples} to {most}" if most > config.num_samples else f"{most}"
    limit = config.sampling.max_new_tokens
    print(
        f"generate: {model} would be asked for {samples} samples for each of {len(problems):,} problems, and write at most "
        f"{len(problems) * most * limit:,} tokens"
    )
    conversations = [build_messages(each.question, config.response_format, config.few_shot) for each in problems]
    print(describe_prompts_of(model, conversations, engine, limit)[0])


if __name__ == "__main__":
    main()
