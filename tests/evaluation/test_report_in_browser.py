"""The report in a real browser: nothing is said on the console, and it is drawn at desktop and phone width, light and dark."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from tests.evaluation.test_ablation import make_run
from tests.evaluation.test_report import HOSTILE, prediction
from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.evaluation.ablation import write_ablation_report
from trl_reasoning_distill.evaluation.report import write_report

pytestmark = pytest.mark.slow

DARK, LIGHT = 0, 1


@pytest.fixture(scope="module")
def chromium() -> str:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium; install one, such as the Debian package `chromium`")
    return path


def open_page(chromium: str, page: Path, tmp_path: Path, width: int, theme: int = LIGHT) -> tuple[list[str], bytes]:
    """What the page says on the console, and a picture of it."""
    picture = tmp_path / f"{width}-{theme}.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={theme}"]
    command += [f"--window-size={width},1200", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert picture.is_file(), done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], picture.read_bytes()


def width_of(png: bytes) -> int:
    return int.from_bytes(png[16:20], "big")


def test_reports_are_drawn_without_a_word_on_the_console(chromium: str, tmp_path: Path) -> None:
    hostile = HOSTILE.replace("\ud800", "")  # half of a surrogate pair, which no file in UTF-8 can hold
    rows = [
        prediction(
            model,
            problem,
            status,
            completion=hostile,
            question=hostile,
            extracted_answer=hostile,
            kind=hostile + str(problem),
        )
        for model, status in (("sft", "incorrect"), ("distilled", "correct"))
        for problem in range(4)
    ]
    write_jsonl(tmp_path / "predictions.jsonl", rows)
    write_report(tmp_path, tmp_path / "report", resamples=200)
    runs = [make_run(tmp_path / f"k{k}", top_k=k, right=30 + k) for k in (5, 10)]
    write_ablation_report(runs, tmp_path / "ablation", resamples=200)
    for page in (tmp_path / "report" / "report.html", tmp_path / "ablation" / "report.html"):
        pictures = []
        for width, theme in ((1280, LIGHT), (1280, DARK), (500, LIGHT)):  # chromium's windows are no narrower
            said, picture = open_page(chromium, page, tmp_path, width, theme)
            assert said == []
            assert width_of(picture) == width
            pictures.append(picture)
        assert pictures[0] != pictures[1], "dark is not light"


def test_the_check_would_notice(chromium: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "predictions.jsonl", [prediction("sft", 0, "correct")])
    write_report(tmp_path, tmp_path / "report", resamples=200)
    page = tmp_path / "report" / "report.html"
    page.write_text(page.read_text().replace("<main>", "<script>alert(1)</script><main>"))
    said, _ = open_page(chromium, page, tmp_path, 1280)
    assert any("Content Security Policy" in line for line in said)
