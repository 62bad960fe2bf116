"""Temporary seed of formatting: deepened by the data room."""
from __future__ import annotations
from dataclasses import dataclass


@dataclass(frozen=True)
class ParsedResponse:
    reasoning: str | None
    answer: str | None
    well_formed: bool


@dataclass(frozen=True)
class ReasoningFormat:
    name: str
    open_tag: str = "<think>"
    close_tag: str = "</think>"

    @classmethod
    def preset(cls, name: str) -> "ReasoningFormat":
        return cls(name)

    def render(self, reasoning: str, answer: str) -> str:
        return f"{self.open_tag}\n{reasoning}\n{self.close_tag}\n\n{answer}"

    def parse(self, text: str) -> ParsedResponse:
        head, sep, tail = text.partition(self.close_tag)
        return ParsedResponse(head, tail.strip() or None, bool(sep))
