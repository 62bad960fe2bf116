r"""Answers of several parts, read without sympy: tuples, intervals and their unions, sets, lists, matrices.

`(3, \frac{1}{2})` has ordered parts, `\{1, 2\}` and `1, 2` have parts in any order, `(0,9) \cup (9,36)` and matrices have parts with
parts. What cannot be decided part by part (an interval against an inequality, `\sqrt{8}` against `2\sqrt{2}`) is left to algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Equal = Callable[[str, str], bool | None]
"""Whether a predicted part equals a gold part; `None` if only algebra can tell."""

_MAX_LENGTH = 500
_MAX_PARTS = 50
_MAX_DEPTH = 3
_INVISIBLE = re.compile(r"(\\\\)|\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;!: ]|[~$]|\\[()\[\]](?![A-Za-z])")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_AND = re.compile(r",? ?(?:\\(?:text|mbox|textnormal) ?\{,? ?(?:and|or) ?\}|(?<=[\d}) ])(?:and|or)(?=[\d\\( -]))")
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[clr|]+\})?(.*)\\end\{\1\}", re.DOTALL)
_ARRAY_BRACKETS = re.compile(r"[(\[](\\begin\{array\}.*\\end\{array\})[)\]]", re.DOTALL)
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")


@dataclass(frozen=True)
class Structure:
    """Parts, and what they make.

    Attributes:
        kind: The brackets, such as `"(]"`; `"{}"` for sets and lists; `"union"`; `"matrix"` of `"row"`s.
        parts: Texts, or structures in their turn.
    """

    kind: str
    parts: tuple[str | Structure, ...]

    @property
    def is_ordered(self) -> bool:
        return self.kind not in ("{}", "union")


def parse_structure(text: str) -> Structure | None:
    """Read a text of several parts; `None` if it is one piece, too long, or ambiguous (`(1,234)`)."""
    if len(text) > _MAX_LENGTH:
        return None
    text = _INVISIBLE.sub(r"\1", text).replace("{,}", "").strip().removesuffix(".").strip()
    bracketed = _ARRAY_BRACKETS.fullmatch(text)
    matrix = _MATRIX.fullmatch(bracketed[1] if bracketed else text)
    if matrix is not None:
        return _matrix(matrix[2])
    if _THOUSANDS.search(text):
        return None
    text = _AND.sub(",", text)
    pieces = _split(text, "\\cup")
    if pieces is None or "" in pieces:
        return None
    if len(pieces) > 1:
        intervals = [_bracketed(piece) for piece in pieces]
        return Structure("union", tuple(part for part in intervals if part)) if all(intervals) else None
    return _bracketed(text)


def structures_equal(prediction: Structure, gold: Structure, equal: Equal) -> bool | None:
    """Whether two structures agree part by part; `None` if only algebra can tell."""
    if prediction.kind != gold.kind:
        return None
    if prediction.is_ordered:
        if len(prediction.parts) != len(gold.parts):
            return False if _all_known(prediction, gold, equal) else None
        return _all(_parts_equal(a, b, equal) for a, b in zip(prediction.parts, gold.parts, strict=True))
    # Each part needs a twin on the other side: `1, 1` is the set of 1.
    outcomes = [[_parts_equal(a, b, equal) for b in gold.parts] for a in prediction.parts]
    rows, columns = outcomes, [list(column) for column in zip(*outcomes, strict=True)]
    return _all(True if any(twins) else (None if None in twins else False) for twins in (*rows, *columns))


def _all(outcomes: object) -> bool | None:
    """`False` if any is, else `None` if any is, else `True`."""
    found = list(outcomes)  # type: ignore[call-overload]
    return False if False in found else (None if None in found else True)


def _parts_equal(a: str | Structure, b: str | Structure, equal: Equal) -> bool | None:
    if isinstance(a, Structure) and isinstance(b, Structure):
        return structures_equal(a, b, equal)
    return equal(a, b) if isinstance(a, str) and isinstance(b, str) else None


def _all_known(a: Structure, b: Structure, equal: Equal) -> bool:
    """Whether every part could be compared with every other, so that another number of parts is another answer."""
    return all(_parts_equal(x, y, equal) is not None for x in a.parts for y in b.parts)


def _matrix(body: str) -> Structure | None:
    if "\\begin" in body or len(body) > _MAX_LENGTH:
        return None
    rows = body.replace("\\hline", "").strip().removesuffix("\\\\").split("\\\\")
    return Structure(
        "matrix", tuple(Structure("row", tuple(cell.strip() for cell in row.split("&"))) for row in rows[:_MAX_PARTS])
    )


def _bracketed(text: str, depth: int = 1) -> Structure | None:
    """A tuple, an interval, a set or a list."""
    text = text.strip()
    kind, inner, least = "{}", text, 2
    if text.startswith("\\{") and text.endswith("\\}"):
        inner, least = text[2:-2], 1
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        kind, inner = text[0] + text[-1], text[1:-1]
    parts = _split(inner, ",")
    if parts is None and kind != "{}":  # `(1,2),(3,4)`: the first bracket does not close with the last
        kind, parts = "{}", _split(text, ",")
    if parts is None or "" in parts or not least <= len(parts) <= _MAX_PARTS:
        return None
    nests = depth < _MAX_DEPTH
    return Structure(kind, tuple((nests and part[0] in "([" and _bracketed(part, depth + 1)) or part for part in parts))


def _split(text: str, separator: str) -> list[str] | None:
    """Split where no bracket is open; `None` if the brackets do not nest."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if depth == 0 and text.startswith(separator, position):
            parts.append(text[start:position].strip())
            position += len(separator)
            start = position
            continue
        depth += (text[position] in _OPEN) - (text[position] in _CLOSE)
        if depth < 0:
            return None
        position += 1
    return None if depth else [*parts, text[start:].strip()]
