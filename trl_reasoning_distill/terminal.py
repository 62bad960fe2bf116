"""What a terminal is shown: colour where it takes it, tables that fit, and nothing that it would obey.

Text that comes from data, models or servers goes through `printable`, which `text`, `table` and `show` do by themselves.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

BOLD, DIM, RED, GREEN, YELLOW, MAGENTA, CYAN = "1", "2", "31", "32", "33", "35", "36"
_NO_TERMINAL = 10_000
"""Columns of a file or a pipe, where nothing needs to fit."""


def takes_colour() -> bool:
    """Whether the standard output is a terminal whose user has not set `NO_COLOR` (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def paint(text: str, style: str, colour: bool) -> str:
    """A text in a style (the numbers of an ANSI sequence, such as `"1;4"`), if `colour`."""
    return f"\x1b[{style}m{text}\x1b[0m" if colour and style and text else text


def printable(text: str) -> str:
    """A text without what could move the cursor, rename the window or turn the writing round."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    return re.sub(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]",
        "\N{REPLACEMENT CHARACTER}",
        text,
    )


def text(content: str, style: str = "") -> Text:
    """A text for `show` and `table`, in a style of rich such as `"bold red"`; nothing in it is markup."""
    from rich.text import Text

    return Text(printable(content), style)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for position, name in enumerate(header):
        made.add_column(text(name), justify="right" if position else "left", no_wrap=not position)
    for row in rows:
        made.add_row(*map(text, row))
    return made


def wrapped(content: str, columns: int, style: str = "", *, colour: bool, prefix: str = "") -> list[str]:
    """A text wrapped into lines that each fill so many columns, wide characters counted as two; none for an empty text.

    Args:
        content: The text.
        columns: Width of the lines.
        style: A style of rich.
        colour: Whether to write the style's escape codes.
        prefix: What each line begins with.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(color_system="standard" if colour else None, force_terminal=colour, legacy_windows=False)
    lines = []
    for wrapped_line in text(content.strip("\n")).wrap(console, columns - len(prefix)) if content.strip() else ():
        line = Text(prefix + wrapped_line.plain.rstrip(), style)
        with console.capture() as written:
            console.print(line, end="", soft_wrap=True)
        lines.append(written.get() + " " * (columns - line.cell_len))
    return lines


def show(*parts: RenderableType, file: IO[str] | None = None, columns: int | None = None) -> None:
    """Print texts and tables, one below the other; a plain string is made printable.

    Args:
        parts: What to print.
        file: Where; the standard output if `None`.
        columns: To wrap at, instead of the terminal's own; nothing is wrapped in a file or a pipe.
    """
    from rich.console import Console

    out = file or sys.stdout
    on_terminal = out is sys.stdout and sys.stdout.isatty()
    console = Console(
        file=out,
        width=columns or (width() if on_terminal else _NO_TERMINAL),
        force_terminal=on_terminal,
        no_color=not takes_colour(),
        highlight=False,
        markup=False,
        emoji=False,
    )
    for part in parts:
        console.print(
            text(part) if isinstance(part, str) else part, soft_wrap=columns is None and isinstance(part, str)
        )


def shown(*parts: RenderableType) -> str:
    """What `show` prints into a file, as a text without trailing blanks."""
    out = io.StringIO()
    show(*parts, file=out)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))
