"""What a reader takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from trl_reasoning_distill.teacher.records import TopKLogProbs


class Reader(Protocol):
    """Something that reads rows of token ids and says what it expected at the asked positions.

    Attributes:
        context_length: Most tokens in a row, or `None`.
        provenance: What it found out about its teacher that decides the records, as JSON values; for the store's manifest.
    """

    context_length: int | None
    provenance: Mapping[str, Any]

    def read(self, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[TopKLogProbs]:
        """Per row, one record per position t: the distribution of token t given the tokens before it."""
        ...
