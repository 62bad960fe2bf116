"""What a terminal is shown: colour where it takes it, and nothing that it would obey."""

from __future__ import annotations

import os
import re
import sys

BOLD, DIM, RED, GREEN, YELLOW, MAGENTA, CYAN = "1", "2", "31", "32", "33", "35", "36"


def takes_colour() -> bool:
    """Whether the standard output is a terminal whose user has not said `NO_COLOR` (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, style: str, colour: bool) -> str:
    """A text in a style (the numbers of an ANSI sequence, such as `"1;4"`), if `colour`."""
    return f"\x1b[{style}m{text}\x1b[0m" if colour and style and text else text


def printable(text: str) -> str:
    """A text without what could move the cursor, rename the window or turn the writing round."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    return re.sub(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        "\N{REPLACEMENT CHARACTER}",
        text,
    )
