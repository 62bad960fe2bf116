"""The report's charts: matplotlib figures as SVG that follows the page's theme, light or dark.

The figures are drawn in a few marker colours, which are replaced by the page's CSS variables (`var(--ink)`, `var(--series-1)`);
text stays text. What remains holds no external name, no identifier that is not used, and no script, so that many charts can
be on one page, and each carries a sentence that describes it.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from trl_reasoning_distill.data.files import read_json
from trl_reasoning_distill.evaluation.compare import Accuracy, PairedDifference
from trl_reasoning_distill.evaluation.findings import printable
from trl_reasoning_distill.evaluation.scores import run_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0102{number:02x}" for number in range(1, 9))
ERRORS = tuple(f"#0103{number:02x}" for number in range(1, 8))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}
_VARIABLES |= {color: f"--series-{number}" for number, color in enumerate(SERIES, start=1)}
_VARIABLES |= {color: f"--error-{number}" for number, color in enumerate(ERRORS, start=1)}

_WIDTH = 3.9  # inches; the page shows it at its own width, and a phone at nearly that
_ROW = 0.3  # inches per row of a chart with names on its left
_MAX_LABEL = 22
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trl-reasoning-distill",  # the same data, the same file
    "text.parse_math": False,  # a model named "$x$" is a name
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


def accuracy_chart(models: Mapping[str, Accuracy], colors: Mapping[str, str]) -> str:
    """Accuracy per model, with its interval, in percent."""

    def draw(axes: Axes) -> None:
        for row, (name, result) in enumerate(models.items()):
            value, (low, high) = 100 * result.accuracy, (100 * limit for limit in result.ci95)
            axes.barh(row, value, height=0.56, color=colors[name])
            axes.plot([low, high], [row, row], color=INK, linewidth=1.3, solid_capstyle="butt")
            axes.text(max(value, high) + 2, row, f"{value:.1f} %", va="center", fontweight="bold")
        _name_rows(axes, list(models))
        axes.set_xlim(0, 118)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])

    shown = "; ".join(f"{n} {100 * r.accuracy:.1f} % ({_interval(r.ci95)})" for n, r in models.items())
    return _svg(draw, f"Accuracy with 95 % intervals. {shown}.", rows=len(models))


def difference_chart(pairs: Mapping[str, PairedDifference]) -> str:
    """Paired differences with their intervals, in percentage points; those that are not significant are drawn hollow."""

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        for row, pair in enumerate(pairs.values()):
            axes.plot([100 * limit for limit in pair.ci95], [row, row], color=INK, linewidth=1.3)
            if pair.is_significant:
                axes.plot(100 * pair.difference, row, "o", color=INK, markersize=6)
            else:  # hollow; the line shows through, as white would not fit every theme
                axes.plot(100 * pair.difference, row, "o", color=INK, markersize=6, fillstyle="none")
            axes.text(
                100 * pair.difference,
                row - 0.26,
                f"{100 * pair.difference:+.1f}".replace("-", "−"),
                ha="center",
                va="bottom",
                size=8,
            )
        _name_rows(axes, [name.replace("_vs_", " − ") for name in pairs], limit=2 * _MAX_LABEL)
        axes.set_xlabel("points of accuracy")
        axes.margins(x=0.08)

    shown = "; ".join(f"{name}: {100 * p.difference:+.1f} points ({_interval(p.ci95)})" for name, p in pairs.items())
    return _svg(draw, f"Paired differences with 95 % intervals. {shown}.", rows=1.25 * len(pairs) + 0.6)


def kind_chart(
    kinds: Mapping[str, tuple[float, float]], names: tuple[str, str], colors: Mapping[str, str], dimension: str = "kind"
) -> str:
    """Accuracy of two models per part of the problems, joined by a line; `kinds` maps to the two accuracies, 0 to 1."""

    def draw(axes: Axes) -> None:
        for row, values in enumerate(kinds.values()):
            axes.plot([100 * value for value in values], [row, row], color=GRID, linewidth=3, zorder=1)
        for column, name in enumerate(names):
            points = [100 * values[column] for values in kinds.values()]
            axes.scatter(points, range(len(kinds)), s=30, color=colors[name], label=_shorten(name), zorder=2)
        _name_rows(axes, list(kinds))
        axes.set_xlim(-4, 104)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        _legend(axes)

    shown = "; ".join(f"{kind}: {100 * a:.0f} % and {100 * b:.0f} %" for kind, (a, b) in kinds.items())
    return _svg(draw, f"Accuracy of {names[0]} and {names[1]} by {dimension}. {shown}.", rows=len(kinds) + 1.2)


def error_chart(shares: Mapping[str, Mapping[str, float]], colors: Mapping[str, str]) -> str:
    """Shares of the kinds of errors per model as one bar each; `colors` names the kinds that are shown, in order."""

    def draw(axes: Axes) -> None:
        for row, by_kind in enumerate(shares.values()):
            start = 0.0
            for kind, color in colors.items():
                width = 100 * by_kind.get(kind, 0.0)
                axes.barh(row, width, left=start, height=0.56, color=color, label=kind if row == 0 else None)
                start += width
        _name_rows(axes, list(shares))
        axes.set_xlim(left=0)
        axes.set_xlabel("% of all answers")
        _legend(axes)

    shown = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {100 * by_kind.get(kind, 0.0):.1f} %" for kind in colors)
        for name, by_kind in shares.items()
    )
    return _svg(draw, f"Kinds of errors. {shown}.", rows=len(shares) + 2.2)


def curve_chart(
    label: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], colors: Mapping[str, str]
) -> str:
    """One logged quantity over optimizer steps; `curves` maps a run's name to its steps and values."""

    def draw(axes: Axes) -> None:
        for name, (steps, values) in curves.items():
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, color=colors[name], linewidth=1.6, marker=marker, label=_shorten(name))
        axes.set_xlabel("optimizer steps")
        axes.margins(x=0.02)
        if len(curves) > 1:
            _legend(axes)

    shown = "; ".join(
        f"{name}: {values[0]:.3g} at step {steps[0]:g}, {values[-1]:.3g} at step {steps[-1]:g}"
        for name, (steps, values) in curves.items()
    )
    return _svg(draw, f"{label} over training. {shown}.", height=2.1)


def _svg(draw: Callable[[Axes], None], description: str, *, rows: float = 0, height: float | None = None) -> str:
    """Draw a figure and return it as an `<svg>` element to be placed in a page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):  # type: ignore[dict-item]
        figure = Figure(figsize=(_WIDTH, height or _ROW * rows + 0.45), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _embed(buffer.getvalue(), description)


def _embed(svg: str, description: str) -> str:
    """Turn matplotlib's file into an element of the page: no prologue, no unused ids, the theme's colours, a description."""
    svg = svg[svg.index("<svg") :]
    body = svg[svg.index(">") + 1 :]
    view_box = re.search(r'viewBox="[\d. ]+"', svg)
    assert view_box is not None
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([\w.-]+)"', lambda match: match.group() if match.group(1) in used else "", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would style the whole page
    body = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", body)
    body = re.sub(r"font-family: [^;\"]*; ?|font-weight: ; ", "", body)  # the page's own font
    for marker, variable in _VARIABLES.items():
        body = body.replace(marker, f"var({variable})")
    return f'<svg {view_box.group()} role="img"><title>{escape(printable(description))}</title>{body}'


def _name_rows(axes: Axes, names: Sequence[str], limit: int = _MAX_LABEL) -> None:
    """Name the rows of a chart, the first on top."""
    axes.set_yticks(range(len(names)), [_shorten(name, limit) for name in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.grid(False, axis="y")


def _legend(axes: Axes) -> None:
    axes.figure.legend(loc="outside lower center", ncols=3, handlelength=1.0, columnspacing=1.2)


def _shorten(name: str, limit: int = _MAX_LABEL) -> str:
    """A name that fits; of a path the end is kept."""
    name = " ".join(printable(name).split())
    return name if len(name) <= limit else "…" + name[1 - limit :]


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


Paths = Mapping[str, "str | os.PathLike[str]"]

CURVES = {
    "eval_math_accuracy": "Accuracy on held-out problems during training",
    "sft_loss": "SFT loss, nats per token",
    "kd_loss": "KD loss, nats per token (× T²)",
    "kd_weight": "KD weight α",
    "kl_loss": "KL to the reference, nats per token",
    "kl_coef": "Coefficient of the KL to the reference",
    "top1_agreement": "Share of tokens where student and teacher agree",
    "loss": "Loss as a whole",
    "eval_loss": "Loss on held-out rows",
}
"""What is drawn of a training's `log_history`, where it was logged: key to title."""


def draw_curves(training: Paths, model_colors: Mapping[str, str]) -> list[dict[str, str]]:
    """The charts of what was logged in the trainings, each with its title."""
    histories = {name: read_log_history(Path(path)) for name, path in training.items()}
    others = (color for color in SERIES if color not in model_colors.values())
    colors = {name: model_colors.get(run_of(name)[0]) or next(others, INK) for name in histories}
    drawn = []
    for key, title in CURVES.items():
        curves = {}
        for name, history in histories.items():
            logged = [(entry["step"], entry[key]) for entry in history if math.isfinite(entry.get(key, math.nan))]
            if logged:
                curves[name] = ([step for step, _ in logged], [value for _, value in logged])
        if curves:
            drawn.append({"title": title, "chart": curve_chart(title, curves, colors)})
    return drawn


def read_log_history(folder: Path) -> list[dict[str, Any]]:
    """`log_history` of a training's `trainer_state.json`, of its newest checkpoint if it has not ended."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
    for candidate in (folder, *reversed(checkpoints)):
        if (candidate / "trainer_state.json").is_file():
            history: list[dict[str, Any]] = read_json(candidate / "trainer_state.json")["log_history"]
            return history
    raise FileNotFoundError(f"No trainer_state.json in {folder} or in a checkpoint of it: is it a training's output?")
