"""Pages from templates: every value escaped, whatever a model wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trl_reasoning_distill.evaluation import findings
from trl_reasoning_distill.extras import require_extra


def render(template: str, page: Mapping[str, Any]) -> str:
    """A template of this package, filled in; by its name as HTML or as Markdown, and every value escaped for that."""
    jinja2 = require_extra("report", "jinja2")
    markup = require_extra("report", "markupsafe").Markup
    is_html = template.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trl_reasoning_distill", "evaluation/templates"),
        autoescape=is_html,
        finalize=_html if is_html else _markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": findings.percent,
        "points": findings.points,
        "interval": findings.percent_interval,
        "p_value": findings.p_value,
        "describe": findings.describe_pair,
        "outcome": findings.outcome_of,
        "size": _size,
        "duration": _duration,
        "svg": markup,  # only ever used for our own charts
    }
    text: str = environment.get_template(template).render(page)
    return text


def printable(value: Any) -> Any:
    """A text without the characters that no file or page can hold: control characters and halves of surrogate pairs."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", value)


def _html(value: Any) -> Any:
    """A text whose percent signs stay beside their numbers."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if type(value) is str else value  # our charts are Markup, not str


def _markdown(value: Any) -> Any:
    """A text in which nothing is Markdown or HTML, on one line."""
    if not isinstance(value, str):
        return value
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(value.split()))


def _size(count: float) -> str:
    """`2345678` bytes as `2.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    """`4000` seconds as `1 h 7 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
