"""Options that `generate` and `evaluate` share: which problems, how they are asked, and how tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_reasoning_distill.data.formatting import ReasoningFormat
    from trl_reasoning_distill.data.schema import Problem
    from trl_reasoning_distill.teacher.engines import SamplingConfig

OF_THE_SOURCE = "source"
"""As `response_format`: the format of the source's own answers."""


@dataclass
class ProblemArguments:
    """Which problems."""

    source: str = field(
        default="",
        metadata={
            "help": "A named source (gsm8k, math500, synthetic_arithmetic, …), a path to a file, or hub:ORGANISATION/NAME. Required."
        },
    )
    split: str | None = field(default=None, metadata={"help": "Which part of the source; default: its first."})
    limit: int | None = field(
        default=None, metadata={"help": "At most this many problems, a sample drawn with problem_seed."}
    )
    problem_seed: int = field(
        default=0, metadata={"help": "Seed of that sample, and of the problems synthetic_arithmetic makes."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with local copies of named sources, instead of the hub."}
    )
    source_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Further options of the source, such as {"steps": [1, 2]} or {"columns": {"question": "prompt"}}.'
        },
    )

    def __post_init__(self) -> None:
        from trl_reasoning_distill.teacher.engines import parse_mapping

        if not self.source:
            raise ValueError("source is missing: say which problems, such as --source gsm8k, --source problems.jsonl.")
        if isinstance(self.source_options, str):
            self.source_options = parse_mapping(self.source_options, "source_options")

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
class PromptArguments:
    """How they are asked."""

    response_format: str = field(
        default="think",
        metadata={
            "help": "How reasoning and answer are written: think, gsm8k, boxed, final_answer, plain, or source: as the source writes them."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "Replaces the format's own system prompt; an empty text sends none."}
    )

    def __post_init__(self) -> None:
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
class SamplingArguments:
    """How tokens are chosen."""

    max_new_tokens: int = field(default=512, metadata={"help": "A completion is cut here."})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the most likely token (greedy)."})
    top_p: float = field(
        default=1.0, metadata={"help": "Keep the smallest set of tokens with this probability; 1 keeps all."}
    )
    top_k: int = field(default=0, metadata={"help": "Keep this many tokens; 0 keeps all."})
    seed: int = field(default=0, metadata={"help": "Seed of sampled completions."})

    def __post_init__(self) -> None:
        self.make_sampling()

    def make_sampling(self) -> SamplingConfig:
        """The checked sampling settings.

        Raises:
            ValueError: If one is out of range.
        """
        from trl_reasoning_distill.teacher.engines import SamplingConfig

        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_p, self.top_k)
