"""What the doctor finds, in red, yellow and green."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["red", "yellow", "green"]
_COLOURS = {"red": "\033[31m", "yellow": "\033[33m", "green": "\033[32m"}


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
        word = f"{self.level:<6}"
        return (
            f"{_COLOURS[self.level]}{word}\033[0m {self.stage}: {self.message}"
            if colour
            else f"{word} {self.stage}: {self.message}"
        )
