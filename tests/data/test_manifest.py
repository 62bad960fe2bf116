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


def files(folder: Path) -> list[str]:
    """What a user sees there."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


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
        assert files(tmp_path / "out") == ["run.json"]
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
        with start(tmp_path):
            pass
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


def make(folder: Path, *names: str, finish: bool = True) -> None:
    """A run that makes some files."""
    with start(folder) as run:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("made")
        if finish:
            run.finish({}, "")


@pytest.mark.parametrize("is_finished", [True, False])
def test_overwrite_removes_what_the_earlier_run_has_made_and_nothing_else(tmp_path: Path, is_finished: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    make(tmp_path, "rows.jsonl", "final_model/model.safetensors", finish=is_finished)
    if is_finished:
        (tmp_path / "later.txt").touch()
    with start(tmp_path, {"n": 2}, overwrite=True) as run:
        assert not run.is_finished
        kept = ["later.txt"] * is_finished
        assert files(tmp_path) == sorted(["notes", "run.json", "thesis.tex", *kept])
        (tmp_path / "rows.jsonl").touch()
        run.finish({}, "")
    assert (tmp_path / "notes" / "a.txt").exists()
    assert read_manifest(tmp_path).outputs == ["rows.jsonl"]


def test_a_manifest_that_leads_elsewhere_removes_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    make(tmp_path / "out", "rows.jsonl")
    manifest = read_json(tmp_path / "out" / "manifest.json")
    names = ["../precious", str(tmp_path / "precious"), "rows.jsonl"]
    write_json(tmp_path / "out" / "manifest.json", manifest | {"outputs": names})
    with start(tmp_path / "out", {"n": 2}, overwrite=True):
        assert files(tmp_path / "out") == ["run.json"]
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("name", ["manifest.json", "run.json"])
@pytest.mark.parametrize("content", [{"name": "web", "icons": []}, ["a"], {"stage": "build"}])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_another_program_is_left_alone(tmp_path: Path, name: str, content: Any, overwrite: bool) -> None:
    write_json(tmp_path / name, content)
    (tmp_path / "index.html").touch()
    with pytest.raises(ValueError, match=rf"holds a {name} that no stage .*Give another output_dir") as error:
        start(tmp_path, overwrite=overwrite).__enter__()
    assert "--overwrite" not in str(error.value)
    assert files(tmp_path) == ["index.html", name]
    assert read_json(tmp_path / name) == content


def test_a_run_of_0_1_0_that_lists_no_files_is_not_guessed_at(tmp_path: Path) -> None:
    make(tmp_path, "rows.jsonl")
    manifest = read_json(tmp_path / "manifest.json")
    del manifest["outputs"]
    write_json(tmp_path / "manifest.json", manifest)
    assert read_manifest(tmp_path).outputs is None
    with pytest.raises(ValueError, match=r"made by version 0\.1\.0.*by hand"):
        start(tmp_path, {"n": 2}, overwrite=True).__enter__()
    assert (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("output", "how"), [("in", "is"), (".", "holds"), ("in/out", "lies in"), ("link", "is"), ("in/../in", "is")]
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_where_an_input_lies_is_refused_before_anything_is_touched(
    tmp_path: Path, output: str, how: str, overwrite: bool
) -> None:
    make(tmp_path / "in", "traces.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"The output folder .* {how} an input, traces = "):
        start(tmp_path / output, inputs={"traces": tmp_path / "in"}, overwrite=overwrite).__enter__()
    assert sorted(tmp_path.rglob("*")) == before


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
