"""`kill -9` at any moment, again and again: the stage goes on, and makes what it makes when nothing happens to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.chaos.conftest import Road
from tests.chaos.harness import finish, torment

KILLS = {"generate": 20, "verify": 10, "capture": 16, "sft": 14, "distill": 12, "gkd": 10, "evaluate": 12}
TWO_RANKS = 6  # 100 in all


@pytest.mark.parametrize(
    ("name", "kills"), [("generate", 2), ("capture", 2), ("evaluate", 1), ("sft", 2), ("distill", 1)]
)
def test_killed_and_gone_on(road: Road, tmp_path: Path, name: str, kills: int) -> None:
    torment(*road(name), tmp_path, kills)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KILLS)
def test_killed_many_times(road: Road, tmp_path: Path, name: str) -> None:
    torment(*road(name), tmp_path, KILLS[name], seed=1)


@pytest.mark.chaos
def test_two_processes_killed_at_once(road: Road, tmp_path: Path) -> None:
    stage, alone = road("generate")
    pair = dataclasses.replace(stage, ranks=2)
    whole = finish(pair, tmp_path / "whole")
    assert whole.contents["traces.jsonl"] == alone.contents["traces.jsonl"]
    torment(pair, whole, tmp_path, TWO_RANKS, seed=1)
