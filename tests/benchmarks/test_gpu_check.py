"""`make gpu-check` on tiny shapes and a CPU: its sections run, and what they find is written down."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def gpu_check(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_check", repository / "benchmarks" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, output: Path, *sections: str) -> dict[str, Any]:
    check = module.main(["--quick", "--output", str(output), "--only", *sections])
    assert not any("error" in figures for figures in check.figures.values()), check.lines
    assert json.loads(output.with_suffix(".json").read_text()) == json.loads(json.dumps(check.figures))
    page = output.with_suffix(".md").read_text()
    assert all(f"## {name}" in page for name in check.figures)
    return check.figures


def test_the_sections_of_the_loss_and_of_capture(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LOSSES", ("three matmuls", "ours SFT + KD", "ours live full KL", "Liger fused CE"))
    figures = run(gpu_check, tmp_path / "gpu", "Machine", "Kernels", "Exactness", "Loss", "Capture")
    assert list(figures) == ["Machine", "Kernels", "Exactness", "Loss, H = 64", "Capture"]
    for kernel in figures["Kernels"].values():
        assert max(kernel["errors"].values()) < 5e-3
    for dtype, limit in (("float32", 1e-6), ("bfloat16", 5e-3), ("float16", 1e-3)):
        assert max(figures["Exactness"][dtype]["gradient"]) < limit
        assert figures["Exactness"][dtype]["repeatable"]
    assert figures["Loss, H = 64"]["ours SFT + KD"]["ms"] > 0


@pytest.mark.slow
def test_every_section(gpu_check: ModuleType, tmp_path: Path) -> None:
    figures = run(gpu_check, tmp_path / "gpu", "")
    assert {"Training step", "Memory"} <= figures.keys()


def test_a_section_that_fails_says_so_and_the_next_goes_on(gpu_check: ModuleType, tmp_path: Path) -> None:
    check = gpu_check.Check("cpu", True, tmp_path / "gpu", seconds=60)

    def fails(_: Any) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    check.section("First", fails)
    check.section("Second", lambda check: {"found": 1})
    late = gpu_check.Check("cpu", True, tmp_path / "gpu", seconds=-1)
    late.section("Third", fails)
    assert check.figures == {"First": {"error": "RuntimeError: no such kernel"}, "Second": {"found": 1}}
    assert "failed: RuntimeError: no such kernel" in check.lines
    assert late.lines == ["Third: skipped, out of time"]
