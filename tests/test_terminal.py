"""What is shown to a terminal: tables that line up, and nothing that it would obey."""

from __future__ import annotations

import io

import pytest

from trl_reasoning_distill.terminal import printable, show, table, text

HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9b31me\u202ef\u2066g\u200bh\ufeffi\ud800"


def test_nothing_in_a_text_is_obeyed() -> None:
    shown = printable(HOSTILE)
    assert (
        "".join(character for character in shown if character.isascii() and character.isalpha()) == "aJbtitlecdmefghi"
    )
    assert not set(shown) & set("\x1b\x07\r\x9b\u202e\u2066\u200b\ufeff\ud800")
    assert printable("a\r\nb\tc") == "a\nb   c"


@pytest.mark.parametrize("columns", [None, 40])
def test_tables_and_texts_show_what_they_hold(columns: int | None) -> None:
    out = io.StringIO()
    rows = [["short", "1"], ["[bold]mark", "22,000"], [HOSTILE, "3"]]
    show(table(["name", "rows"], rows), "[red]no markup[/red] :smile:", text("red", "red"), file=out, columns=columns)
    written = out.getvalue()
    assert "\x1b" not in written
    assert "[bold]mark" in written
    assert "[red]no markup[/red] :smile:" in written
    lines = written.splitlines()
    if columns is None:
        assert lines[1].index("1") == lines[2].index("22,000") + len("22,00")
    else:
        assert max(map(len, lines)) <= columns


def test_a_long_line_is_whole_in_a_file() -> None:
    out = io.StringIO()
    show("x" * 500, file=out)
    assert out.getvalue() == "x" * 500 + "\n"
