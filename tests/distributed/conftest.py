"""Prints what was measured: the largest differences between one process and several."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line per cell that ran, also with several workers."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = [dict(report.user_properties) for report in reports if report.when == "call"]
    rows = [row for row in rows if "differences" in row]
    if not rows:
        return
    terminalreporter.section("largest differences to one process")
    for row in rows:
        loss, weight = row["differences"]
        terminalreporter.write_line(f"{row['cell']:16} {row['backend']:8} loss {loss:.1e}  weight {weight:.1e}")
