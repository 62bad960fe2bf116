"""Generate chains of thought: the teacher answers problems, n samples for each.

    accelerate launch recipes/generate.py --config recipes/quickstart/generate.yaml
    trl-distill generate --teacher Qwen/Qwen2.5-7B-Instruct --source gsm8k --num_samples 4 --temperature 0.8 --output_dir runs/x/generate

Writes `problems.jsonl` (what was asked), `traces.jsonl` (what was written: question, gold answer, completion, how it
ended, tokens, seed) and, where a server refused or failed, `failures.jsonl` to `output_dir`. A killed run goes on where it stopped, also with another number of processes, and makes
the same traces. `until_verified: 1` with `max_samples: 8` draws further samples only for problems without a right one yet.
It ends with what that took: tokens, time, and with the server's prices what it cost. Then run `verify`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_reasoning_distill.options import Count, NonNegative, option
from trl_reasoning_distill.scripts.arguments import ProblemArguments, PromptArguments, SamplingArguments
from trl_reasoning_distill.scripts.planning import Plan, describe_prompts_of
from trl_reasoning_distill.scripts.stage import Outcome, Stage, StageArguments, parser_of, settings_of, stage_main
from trl_reasoning_distill.teacher.sampling import EngineArguments

if TYPE_CHECKING:
    from accelerate import PartialState

    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.data.schema import Problem

_FEW = 4


@dataclass(kw_only=True)
class GenerateArguments(StageArguments):
    """The teacher, and how often it is asked."""

    teacher: str = option(help="The teacher: folder or hub name of a model or adapter; for a server, its name there.")
    num_samples: Count = option(1, "Samples per problem.")
    until_verified: Count | None = option(
        None, "Draw further samples for a problem until this many are right, at most max_samples."
    )
    max_samples: Count = option(8, "Most samples per problem with until_verified.")
    few_shot: str | None = option(
        None,
        "Source or JSONL of problems with solution and answer, shown to the teacher as earlier turns. Default: zero-shot.",
    )
    instruct: bool = option(
        False, "Ask for think tags in a system prompt, which a teacher that was not trained on them needs."
    )
    num_few_shot: Count | None = option(
        None, "How many of few_shot are shown, drawn with problem_seed; default: 4 of a source, all of a file."
    )
    input_price: NonNegative = option(0.0, "What a million prompt tokens cost, for the summary.")
    output_price: NonNegative = option(0.0, "What a million written tokens cost, for the summary.")


make_parser = parser_of(GenerateArguments, ProblemArguments, PromptArguments, SamplingArguments, EngineArguments)


class Generate(Stage):
    """Let a teacher answer problems."""

    name = "generate"
    is_parallel = True

    def __init__(
        self,
        options: GenerateArguments,
        source: ProblemArguments,
        prompt: PromptArguments,
        sampling: SamplingArguments,
        engine: EngineArguments,
        state: PartialState,
    ) -> None:
        from trl_reasoning_distill.teacher.generation import GenerationConfig, instructed

        self.options, self.sampling, self.engine, self.state = options, sampling, engine, state
        self.output_dir, self.seed = options.output_dir, sampling.seed
        response_format = prompt.make_format(source.source)
        self.config = GenerationConfig(
            num_samples=options.num_samples,
            until_verified=options.until_verified,
            max_samples=options.max_samples,
            seed=sampling.seed,
            sampling=sampling.make_sampling(),
            response_format=instructed(response_format) if options.instruct else response_format,
            few_shot=tuple(_load_few_shot(options, source)),
        )
        self.problems = source.load()
        self.settings = settings_of(options, source, prompt, sampling, engine)
        self.settings["response_format"] = self.config.response_format.name
        self.inputs = {"teacher": options.teacher, "source": source.source}
        self.inputs |= {"few_shot": options.few_shot} if options.few_shot else {}

    def plan(self) -> Plan:
        """How much would be asked, and the first prompts."""
        from trl_reasoning_distill.teacher.generation import build_messages

        config, count = self.config, len(self.problems)
        most = max(config.num_samples, config.max_samples) if config.until_verified else config.num_samples
        samples = f"{config.num_samples} to {most}" if most > config.num_samples else f"{most}"
        limit = config.sampling.max_new_tokens
        line = (
            f"generate: {self.options.teacher} would be asked for {samples} samples for each of {count:,} problems, and write at most "
            f"{count * most * limit:,} tokens"
        )
        conversations = [
            build_messages(each.question, config.response_format, config.few_shot) for each in self.problems
        ]
        prompts, _ = describe_prompts_of(self.options.teacher, conversations, self.engine, limit)
        return Plan(f"{line}\n{prompts}", rows=count, tokens=count * most * limit)

    def run(self, run: StageRun) -> Outcome:
        """Generate; on all ranks."""
        from trl_reasoning_distill.teacher.generation import generate

        options = self.options
        counts = generate(self.problems, self.engine.make_engine(options.teacher), self.config, self.output_dir)
        if not self.state.is_main_process:
            return {}, ""
        cost = (counts["prompt_tokens"] * options.input_price + counts["tokens"] * options.output_price) / 1e6
        failed = f"{counts['failed']} without an answer (see failures.jsonl) · " if counts["failed"] else ""
        return counts | ({"cost": round(cost, 6)} if cost else {}), (
            f"{counts['traces']} traces for {counts['problems']} problems · {failed}{counts['cut']} cut at {self.sampling.max_new_tokens} tokens · "
            f"{counts['tokens']:,} tokens in {timedelta(seconds=round(counts['seconds']))} ({counts['tokens_per_second']:,.0f} tokens/s)"
            + (f" · cost {cost:,.2f}" if cost else "")
        )


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


main = stage_main(Generate, make_parser)

if __name__ == "__main__":
    main()
