"""A stage's folder says what made it, resumes its own work, and refuses another's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill.data.files import read_json, write_json
from trl_reasoning_distill.data.manifest import StageRun, describe_input, git_state, installed_versions, read_manifest


def start(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> StageRun:
    return StageRun("verify", folder, {"n": 1, "output_dir": str(folder), **(config or {})}, **options)


def finish(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> None:
    with start(folder, config, **options) as run:
        run.finish({"rows": 3}, "3 rows")


def test_a_finished_stage_says_what_made_it(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")
    with start(
        tmp_path / "out", {"traces": "in"}, inputs={"traces": tmp_path / "in.jsonl", "model": "org/name"}, seed=7
    ) as run:
        assert not run.is_finished
        assert os.listdir(tmp_path / "out") == ["run.json"]
        run.finish({"rows": 3, "share": 0.5}, "3 rows")
        assert run.is_finished
    assert os.listdir(tmp_path / "out") == ["manifest.json"]
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.stage, manifest.status, manifest.seed, manifest.result) == ("verify", "finished", 7, "3 rows")
    assert manifest.counts == {"rows": 3, "share": 0.5}
    assert manifest.config["n"] == 1
    assert manifest.inputs["model"] == {"path": "org/name", "hash": None}
    assert len(str(manifest.inputs["traces"]["hash"])) == 32
    assert manifest.versions["python"] == sys.version.split()[0]
    assert manifest.wall_seconds >= 0
    assert manifest.started.endswith("+00:00")


def test_the_same_run_again_is_finished(tmp_path: Path) -> None:
    finish(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with start(tmp_path, {"dry_run": False, "overwrite": False}) as run:
        assert run.is_finished
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_killed_stage_is_unfinished_and_resumes(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom trl_reasoning_distill.data.manifest import StageRun\n"
        "with StageRun('verify', sys.argv[1], {'n': 1, 'output_dir': sys.argv[1]}):\n"
        "    open(sys.argv[1] + '/part.jsonl', 'w').close()\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with pytest.raises(FileNotFoundError, match="has not finished"):
        read_manifest(tmp_path)
    with start(tmp_path) as run:
        assert run.is_resumed
        assert not run.is_finished
        assert (tmp_path / "part.jsonl").exists()


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_folder_of_another_configuration_is_refused_and_the_difference_is_named(
    tmp_path: Path, is_finished: bool
) -> None:
    if is_finished:
        finish(tmp_path)
    else:
        start(tmp_path).__enter__()
    state = "a finished" if is_finished else "an unfinished"
    with pytest.raises(ValueError, match=rf"holds {state} run of another configuration \(n was 1, is 2\).*--overwrite"):
        start(tmp_path, {"n": 2}).__enter__()


def test_a_folder_of_another_stage_is_refused(tmp_path: Path) -> None:
    finish(tmp_path)
    with pytest.raises(ValueError, match="of the stage 'verify', not 'sft'"):
        StageRun("sft", tmp_path, {}).__enter__()


def test_a_changed_input_is_another_run_but_a_moved_one_is_not(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("1")
    out = tmp_path / "out"
    finish(out, {"traces": str(source)}, inputs={"traces": source})
    moved = source.rename(tmp_path / "moved.jsonl")
    with start(out, {"traces": str(moved)}, inputs={"traces": moved}) as run:
        assert run.is_finished
    moved.write_text("2")
    with pytest.raises(ValueError, match="the content of traces changed"):
        start(out, {"traces": str(moved)}, inputs={"traces": moved}).__enter__()


def test_overwrite_clears_an_earlier_run(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "old.jsonl").touch()
    with start(tmp_path, {"n": 2}, overwrite=True) as run:
        assert not run.is_finished
        assert os.listdir(tmp_path) == ["run.json"]


def test_overwrite_does_not_clear_a_folder_that_no_stage_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with start(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "thesis.tex").exists()


def test_other_ranks_see_the_same_and_write_nothing(tmp_path: Path) -> None:
    with start(tmp_path / "out", is_main=False) as run:
        run.finish({}, "")
    assert not (tmp_path / "out").exists()
    finish(tmp_path / "out")
    with start(tmp_path / "out", is_main=False) as run:
        assert run.is_finished


def test_values_that_json_does_not_know_become_text_and_secrets_stay_out(tmp_path: Path) -> None:
    finish(tmp_path, {"path": Path("a"), "api_key": "hush", "eos_token": "</s>"})
    config = read_manifest(tmp_path).config
    assert config["path"] == "a"
    assert config["eos_token"] == "</s>"
    assert "hush" not in (tmp_path / "manifest.json").read_text()


def test_the_time_of_making_does_not_change_an_input(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    before = describe_input(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", {**manifest, "started": "later"})
    assert describe_input(tmp_path) == before
    (tmp_path / "rows.jsonl").write_text("{ }\n")
    assert describe_input(tmp_path) != before


def test_a_manifest_of_something_else_counts_as_content_and_is_refused_as_a_manifest(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"temperatures": [1]})
    with pytest.raises(ValueError, match="is not a stage's manifest"):
        read_manifest(tmp_path)
    before = describe_input(tmp_path)
    write_json(tmp_path / "manifest.json", {"temperatures": [2]})
    assert describe_input(tmp_path) != before


def test_reading_the_manifest_of_no_stage_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no stage's result"):
        read_manifest(tmp_path)


def test_versions_and_git_state(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"torch", "trl", "trl-reasoning-distill"} <= installed_versions().keys()
    monkeypatch.chdir(tmp_path)
    git_state.cache_clear()
    assert git_state() is None
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "a").touch()
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "add", "a"], check=True)
    subprocess.run(["git", *identity, "commit", "-q", "-m", "one"], check=True)
    git_state.cache_clear()
    clean = git_state()
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("x")
    git_state.cache_clear()
    dirty = git_state()
    git_state.cache_clear()
    assert dirty == {**clean, "dirty": True}
