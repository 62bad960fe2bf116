"""Write the tables of options into `docs/stages/*.md`, from the source of the stages: `make fmt` runs this, a test compares.

A page holds `<!-- options -->` where its stage's table stands; what follows it, up to the next blank line, is replaced.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from trl_reasoning_distill.scripts import STAGES, source

PAGES = Path(__file__).resolve().parent / "stages"
MARK = "<!-- options -->"


def table(stage: str) -> str:
    """The options that this package adds, one a line: name, type with bounds or choices, default, meaning."""
    options = source.read_options(source.script_path(stage))
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for option in options:
        if option.package == "trl_reasoning_distill":
            names = ", ".join(f"`{name}`" for name in option.names)
            default = (
                "required" if option.default is None else "–" if option.default == "None" else f"`{option.default}`"
            )
            cells = (names, f"`{option.type}`", default, option.help)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def updated(page: Path) -> str:
    """A page with its table as the source has it now."""
    text = page.read_text(encoding="utf-8")
    return re.sub(rf"{MARK}\n(?:\|.*\n)*", lambda _: f"{MARK}\n{table(page.stem)}\n", text)


def main() -> None:
    """Write all tables."""
    for page in sorted(PAGES.glob("*.md")):
        if page.stem in STAGES and (text := updated(page)) != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{page}: options written anew\n")


if __name__ == "__main__":
    main()
