"""What the doctor finds, in red, yellow and green."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trl_reasoning_distill.terminal import GREEN, RED, YELLOW, paint

Level = Literal["red", "yellow", "green"]
_STYLES = {"red": RED, "yellow": YELLOW, "green": GREEN}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: `"red"` fails or trains on the wrong thing; `"yellow"` may surprise, or could not be looked at; `"green"` is well.
        stage: Name of the stage, or of the recipe.
        message: What was found and, unless it is well, what to do.
    """

    level: Level
    stage: str
    message: str

    def line(self, *, colour: bool) -> str:
        """One line for a terminal."""
        return f"{paint(f'{self.level:<6}', _STYLES[self.level], colour)} {self.stage}: {self.message}"
