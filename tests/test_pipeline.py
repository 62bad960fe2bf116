"""A recipe's stages run in order, stop at the first failure, and what is done is not done again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl_reasoning_distill import launch, pipeline
from trl_reasoning_distill.config_files import read_config
from trl_reasoning_distill.data.files import read_json
from trl_reasoning_distill.data.manifest import StageRun
from trl_reasoning_distill.scripts.command import Command, split_config

RECIPE = """\
summary: Three stages that stand for all.
stages:
  - generate
  - {name: check, script: verify}
  - {name: report, config: charts.yaml}
"""
STAGES = {
    "generate.yaml": "output_dir: runs/tiny/generate\nteacher: teacher\nnum_samples: 2\n",
    "check.yaml": "output_dir: runs/tiny/check\ntraces: runs/tiny/generate\n",
    "charts.yaml": "output_dir: runs/tiny/report\nevaluated: runs/tiny/check\n",
}
INPUTS = ("traces", "evaluated")


class Machine:
    """Stands for the processes: runs each command as a stage that writes one file and a manifest."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.commands: list[list[str]] = []
        self.codes: dict[str, int] = {}
        self.looked_at: list[str] = []
        self.refuses = False

    def look_ahead(self, script: str, command: Command) -> None:
        assert command.words == ["--dry_run"]
        self.looked_at.append(script)
        if self.refuses:
            raise SystemExit(1)

    def __call__(self, command: list[str]) -> int:
        words = command[command.index("trl_reasoning_distill.scripts") + 1 :]
        self.commands.append(list(command))
        config_path, rest = split_config(words[1:])
        assert config_path is not None
        options = read_config(config_path)
        overwrite = "--overwrite" in rest
        assert rest in ([], ["--overwrite"])
        name = Path(options["output_dir"]).name
        self.started.append(name)
        if self.codes.get(name):
            return self.codes[name]
        inputs = {key: options[key] for key in INPUTS if key in options}
        with StageRun(words[0], options["output_dir"], options, inputs, overwrite=overwrite) as run:
            (Path(options["output_dir"]) / "rows.txt").write_text(str(options.get("num_samples")))
            run.finish({}, f"made {name}")
        return 0


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "checked_command", lambda item: None)  # these YAMLs are no real stage's
    folder = tmp_path / "recipes" / "tiny"
    folder.mkdir(parents=True)
    for name, text in {"recipe.yaml": RECIPE, **STAGES}.items():
        (folder / name).write_text(text)
    return Path("recipes/tiny")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(launch, "run_command", machine)
    monkeypatch.setattr(launch, "run_in_process", machine.look_ahead)
    return machine


Run = Callable[..., str]


@pytest.fixture
def run(recipe: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: str) -> str:
        machine.started.clear()
        machine.commands.clear()
        pipeline.main([str(recipe), "--accelerate_config", "cpu", *args])
        return capsys.readouterr().out

    return run


def test_all_stages_run_in_order_and_the_report_is_named(run: Run, machine: Machine) -> None:
    text = run()
    assert machine.started == ["generate", "check", "report"]
    assert text.rstrip().endswith("report: runs/tiny/report/report.html")
    assert "[2/3] check: done in" in text
    assert "| made check" in text
    accelerated = ["trl_reasoning_distill.launch" in command for command in machine.commands]
    assert accelerated == [True, False, False]


def test_a_second_run_skips_everything(run: Run, machine: Machine) -> None:
    run()
    text = run()
    assert machine.started == []
    assert text.count("done before") == 3
    assert "report.html" in text


def test_a_changed_option_redoes_its_stage_and_those_whose_input_it_changes(
    run: Run, machine: Machine, recipe: Path
) -> None:
    run()
    (recipe / "generate.yaml").write_text(STAGES["generate.yaml"].replace("2", "3"))
    with pytest.raises(ValueError, match=r"num_samples was 2, is 3.*--overwrite"):
        run()
    run("--overwrite")
    assert machine.started == ["generate", "check"]  # check made the same as before, so the report stands
    run()
    assert machine.started == []


def test_a_stage_done_again_with_the_same_result_leaves_the_others_alone(
    run: Run, machine: Machine, recipe: Path
) -> None:
    run()
    (recipe / "generate.yaml").write_text(STAGES["generate.yaml"] + "seed: 1\n")
    run("--overwrite")
    assert machine.started == ["generate"]


def test_changed_files_redo_the_stages_that_read_them(run: Run, machine: Machine) -> None:
    run()
    Path("runs/tiny/check/rows.txt").write_text("by hand")
    run("--overwrite")
    assert machine.started == ["report"]


def test_a_stage_that_was_run_by_hand_is_asked_itself(run: Run, machine: Machine) -> None:
    run()
    Path("runs/tiny/pipeline.json").unlink()
    machine.codes = dict.fromkeys(("generate", "check", "report"), 0)
    run("--only", "generate")
    assert machine.started == ["generate"]
    assert read_json("runs/tiny/pipeline.json").keys() == {"generate"}


def test_the_first_failure_stops_and_the_next_run_goes_on_there(
    run: Run, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.codes = {"check": 1}
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 1
    assert machine.started == ["generate", "check"]
    assert "[2/3] check: failed with exit code 1" in capsys.readouterr().err
    machine.codes = {}
    run()
    assert machine.started == ["check", "report"]


def test_ctrl_c_has_its_own_exit_code(run: Run, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.codes = {"generate": 130}
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 130
    assert "generate: stopped" in capsys.readouterr().err


def test_only_and_from_choose(run: Run, machine: Machine) -> None:
    run("--only", "generate")
    assert machine.started == ["generate"]
    run("--from", "check")
    assert machine.started == ["check", "report"]
    with pytest.raises(ValueError, match=r"unknown option 'chek'. Did you mean 'check'"):
        run("--only", "chek")


def test_a_dry_run_starts_nothing_and_shows_commands_that_work_by_hand(run: Run, machine: Machine) -> None:
    text = run("--dry_run")
    assert machine.started == []
    assert machine.looked_at == ["generate"]
    assert not Path("runs").exists()
    assert "recipes/generate.py --config recipes/tiny/generate.yaml" in text
    assert "check: trl-distill verify --config recipes/tiny/check.yaml (waits for generate)" in text
    assert "report.yaml" not in text
    run("--only", "generate")
    machine.looked_at.clear()
    assert "generate: done before" in run("--dry_run")
    assert machine.looked_at == ["verify"], "its input is there now"
    machine.refuses = True
    with pytest.raises(SystemExit):
        run("--dry_run")
    run()
    assert run("--dry_run").splitlines() == [f"{name}: done before" for name in ("generate", "check", "report")]


def test_another_runs_dir_moves_every_path(run: Run, machine: Machine) -> None:
    text = run("--runs_dir", "elsewhere/deep")
    assert not Path("runs").exists()
    assert (Path("elsewhere/deep/tiny/report") / "manifest.json").is_file()
    assert machine.commands[1][-2:] == ["--config", "elsewhere/deep/tiny/configs/check.yaml"]
    assert read_config("elsewhere/deep/tiny/configs/check.yaml")["traces"] == "elsewhere/deep/tiny/generate"
    assert "report: elsewhere/deep/tiny/report/report.html" in text
    run("--runs_dir", "elsewhere/deep")
    assert machine.started == []


@pytest.mark.parametrize(
    ("value", "moved"),
    [
        ("runs/a/b", "x/a/b"),
        ("base=runs/a", "base=x/a"),
        (["one=runs/a", "two=hub/model"], ["one=x/a", "two=hub/model"]),
        ({"path": "runs/a"}, {"path": "x/a"}),
        ("data/runs/a", "data/runs/a"),
        ("running", "running"),
        (3, 3),
    ],
)
def test_what_runs_dir_moves(value: Any, moved: Any) -> None:
    assert pipeline._move(value, "x") == moved


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("recipe.yaml", "summary: x\n", "`stages` must be a list of stages, found None"),
        ("recipe.yaml", "stage: [generate]\n", "unknown option 'stage'. Did you mean 'stages'"),
        ("recipe.yaml", "stages: [3]\n", "a stage is a name or a mapping with `name`, found 3"),
        ("recipe.yaml", "stages: [generate, generate]\n", "two stages have the name 'generate'"),
        ("recipe.yaml", "stages: [{name: generate, scrip: sft}]\n", "Did you mean 'script'"),
        ("recipe.yaml", "stages: [{name: check, script: verfy}]\n", "unknown option 'verfy'. Did you mean 'verify'"),
        (
            "generate.yaml",
            "output_dir: runs/other/generate\n",
            "output_dir must be 'runs/tiny/generate', found 'runs/other/generate'",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_starts(
    run: Run, machine: Machine, recipe: Path, file: str, text: str, message: str
) -> None:
    (recipe / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        run()
    assert machine.started == []


def test_a_missing_yaml_is_named(run: Run, recipe: Path) -> None:
    (recipe / "check.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"No config file at recipes/tiny/check\.yaml"):
        run()


def test_an_unknown_or_missing_option_of_a_late_stage_is_refused_first(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    item = pipeline.RecipeStage("generate", "generate", path, {"num_sample": 1, "env": {}}, path)
    with pytest.raises(ValueError, match=r"g\.yaml: unknown option 'num_sample'. Did you mean 'num_samples'"):
        pipeline.checked_command(item)
    item = pipeline.RecipeStage("generate", "generate", path, {"output_dir": "x", "model": "old name"}, path)
    with pytest.raises(ValueError, match=r"^source is missing"):
        pipeline.checked_command(item)
