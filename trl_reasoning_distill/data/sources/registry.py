"""The named sources. A new one is a `SourceSpec` in one of the modules below, or in a module of its own that is added here."""

from __future__ import annotations

from collections.abc import Mapping

from trl_reasoning_distill.data.sources import competition, grade_school, reasoning
from trl_reasoning_distill.data.sources.base import SourceSpec
from trl_reasoning_distill.data.synthetic import SOURCE_NAME

SOURCES: Mapping[str, SourceSpec] = {
    spec.name: spec for module in (grade_school, competition, reasoning) for spec in module.SPECS
}
SOURCE_NAMES = (SOURCE_NAME, *SOURCES, "jsonl")

BENCHMARKS: tuple[tuple[str, str], ...] = tuple(
    (spec.name, split) for spec in SOURCES.values() for split in spec.benchmarks
)
"""Source and split of every evaluation set."""
