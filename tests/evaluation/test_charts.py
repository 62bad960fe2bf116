"""Charts as elements of a page: themed, described, self-contained, and safe with any name."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from trl_reasoning_distill.evaluation import charts
from trl_reasoning_distill.evaluation.compare import Accuracy, PairedDifference

MODELS = {"base": Accuracy(0.1, (0.05, 0.16), 100), "distilled": Accuracy(0.5, (0.4, 0.6), 100)}
COLORS = dict(zip(MODELS, charts.SERIES, strict=False))
PAIR = PairedDifference("distilled", "base", 0.4, (0.3, 0.5), 1e-9, "mcnemar_exact", 100, 45, 5)
HOSTILE = '<script>alert(1)</script> $\\frac$ & "q" \x00\ud800{{7*7}}'

CHARTS = {
    "accuracy": lambda: charts.accuracy_chart(MODELS, COLORS),
    "difference": lambda: charts.difference_chart({"distilled_vs_base": PAIR}),
    "kind": lambda: charts.kind_chart({"a-2": (0.1, 0.4), "b-3": (0.3, 0.2)}, ("base", "distilled"), COLORS),
    "error": lambda: charts.error_chart({"base": {"format": 0.2}}, {"format": charts.ERRORS[0]}),
    "curve": lambda: charts.curve_chart("KD loss", {"base": ([1, 2], [0.5, 0.4]), "distilled": ([1], [0.3])}, COLORS),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_fits_a_page_in_any_theme(name):
    svg = CHARTS[name]()
    root = ElementTree.fromstring(svg)  # well-formed
    assert root.get("role") == "img"
    assert root.get("viewBox")
    assert root.get("width") is None
    assert root.findtext("title")
    assert "var(--ink)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that does not follow the theme"
    assert not re.search(r"https?:|<style|<metadata|<script|font-family|xmlns", svg)
    identifiers = re.findall(r' id="([^"]+)"', svg)
    assert all(f"#{identifier}" in svg for identifier in identifiers)


def test_the_description_tells_the_numbers():
    assert "distilled 50.0 % (40.0 to 60.0)" in charts.accuracy_chart(MODELS, COLORS)
    assert "distilled_vs_base: +40.0 points (30.0 to 50.0)" in charts.difference_chart({"distilled_vs_base": PAIR})


def test_bars_and_points_stand_where_the_numbers_are():
    """Half the accuracy, half the length: read back from the drawing."""
    svg = charts.accuracy_chart(
        {"a": Accuracy(0.25, (0.2, 0.3), 9), "b": Accuracy(0.5, (0.4, 0.6), 9)}, dict.fromkeys("ab", charts.SERIES[0])
    )
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [^"]*"[^>]*style="fill: var\(--series-1\)', svg)
    (left_a, right_a), (left_b, right_b) = (map(float, bar) for bar in bars)
    assert left_a == left_b
    assert (right_b - left_b) == pytest.approx(2 * (right_a - left_a), rel=1e-4)


def test_hostile_names_are_text():
    svg = charts.accuracy_chart({HOSTILE: MODELS["base"]}, {HOSTILE: charts.SERIES[0]})
    root = ElementTree.fromstring(svg)
    assert not [element for element in root.iter() if "script" in element.tag]
    assert "{{7*7}}" in "".join(root.itertext())


def test_the_same_data_gives_the_same_chart():
    assert CHARTS["kind"]() == CHARTS["kind"]()
