"""`trl-distill`: help and typos in no time, launcher options to the launcher, the rest to the stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trl_reasoning_distill import cli, launch
from trl_reasoning_distill.scripts import STAGES

GIVEN = ["--output_dir", "x", "--teacher", "t", "--source", "s"]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trl_reasoning_distill.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have been started."""
    commands: list[list[str]] = []
    monkeypatch.setattr(launch, "run_command", lambda command: commands.append(list(command)) or 0)
    return commands


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_lists_every_stage(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(list(args))
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ["run", "recipes", "doctor", *STAGES])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out[0].isdigit()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generat"], "trl-distill: unknown option 'generat'. Did you mean 'generate'?"),
        (
            ["generate", "--num_sample", "3"],
            "command line: unknown option '--num_sample'. Did you mean '--num_samples'?",
        ),
        (["generate", "--num_procesess", "3"], "Did you mean '--num_processes'?"),
        (["generate", "--config", "nowhere.yaml"], "No config file at nowhere.yaml."),
        (["generate", *GIVEN, "--accelerate_config", "zero9"], "No accelerate config 'zero9'"),
        (
            ["generate", "--output_dir", "x"],
            "teacher and source are missing: give them on the command line (--teacher … --source …)",
        ),
        (["run", "recipes/nowhere"], "No recipe.yaml in recipes/nowhere."),
        (["run", "recipes/nowhere", "--onyl", "sft"], "Did you mean '--only'?"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_started(
    launched: list[list[str]], capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(args)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not launched


def test_launcher_options_go_to_accelerate_in_any_order(launched: list[list[str]], tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    words = [
        "--num_processes",
        "4",
        *GIVEN,
        "--mixed_precision=bf16",
        "--config_file",
        str(config),
    ]
    cli.main(["generate", *words])
    (command,) = launched
    at = command.index("-m", 3)
    assert command[:3] == [sys.executable, "-m", "trl_reasoning_distill.launch"]
    assert command[3:at] == ["--quiet", "--config_file", str(config), "--num_processes", "4", "--mixed_precision=bf16"]
    assert command[at:] == ["-m", "trl_reasoning_distill.scripts", "generate", *GIVEN]


def test_a_stage_that_needs_no_launcher_runs_in_this_process(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(launch, "run_in_process", lambda name, command: here.append((name, command.words)))
    cli.main(["report", "a", "b", "--output_dir", "x"])
    assert here == [("report", ["--runs", "a", "b", "--output_dir", "x"])]
    cli.main(["report", "--output_dir", "x", "--accelerate_config", "cpu"])
    assert len(here) == len(launched) == 1


def test_the_exit_code_is_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run_command", lambda command: 3)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["generate", *GIVEN])
    assert exit_info.value.code == 3


def test_configs_are_found_by_name_and_by_path(repository: Path) -> None:
    for path in (repository / "accelerate_configs").glob("*.yaml"):
        assert launch.resolve_accelerate_config(path.stem) == path
        assert launch.resolve_accelerate_config(str(path)) == path


def test_a_config_for_one_process_does_not_drop_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = launch.complete_launch_options(["--accelerate_config=cpu", "--num_processes", "2"])
    assert words[0] == "--config_file"
    assert words[2:] == ["--num_processes", "2", "--multi_gpu", "--num_cpu_threads_per_process", "1"]
    assert "--multi_gpu" not in launch.complete_launch_options(["--accelerate_config", "cpu"])
    assert "--multi_gpu" not in launch.complete_launch_options(["--accelerate_config", "zero2"])


def test_a_flag_without_its_value_is_refused() -> None:
    with pytest.raises(ValueError, match="--accelerate_config needs a value"):
        launch.complete_launch_options(["--accelerate_config"])


@pytest.mark.parametrize(
    ("torch_version", "visible", "listing", "expected"),
    [
        ("2.13.0+cpu", None, "GPU 0: A\n", 0),
        ("2.13.0", "", "GPU 0: A\n", 0),
        ("2.13.0", None, "GPU 0: A\n  MIG 1g.10gb\nGPU 1: A\n", 2),
        ("2.13.0", "1", "GPU 0: A\nGPU 1: A\n", 1),
        ("2.13.0", None, None, 0),
    ],
)
def test_gpus_are_counted_without_torch(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    torch_version: str,
    visible: str | None,
    listing: str | None,
    expected: int,
) -> None:
    monkeypatch.setattr(launch.metadata, "version", lambda package: torch_version)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if listing is not None else str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if listing is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}END\n")
        program.chmod(0o755)
    assert launch.cuda_device_count() == expected
    assert launch.default_accelerate_config() == ("single_gpu" if expected else "cpu")


def test_a_stage_really_starts_under_accelerate_and_its_error_is_one_line(tmp_path: Path) -> None:
    result = run(
        "generate",
        "--output_dir",
        str(tmp_path / "out"),
        "--teacher",
        "t",
        "--source",
        "nothing",
        "--accelerate_config",
        "cpu",
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith("error: Unknown source 'nothing'")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [True, False])
def test_a_signal_is_the_childs_to_answer_and_is_waited_for(number: signal.Signals, to_all: bool) -> None:
    child = (
        "import time\nfrom trl_reasoning_distill.processes import interrupt, on_interruption\n"
        "with on_interruption(interrupt):\n"
        "    try: print('ready', flush=True); time.sleep(60)\n"
        "    except KeyboardInterrupt as stop: time.sleep(0.5); print('saved', flush=True); raise SystemExit(stop.exit_code)"
    )
    parent = "import sys; from trl_reasoning_distill import launch; print(launch.run_command([sys.executable, '-c', sys.argv[1]]))"
    process = subprocess.Popen(
        [sys.executable, "-c", parent, child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if to_all:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert (output, error) == (f"saved\n{128 + number}\n", "")


@pytest.mark.distributed
def test_two_processes_say_it_once(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "out"), "--teacher", "t", "--source", "s", "--temperature=-1"]
    result = run("generate", *words, "--accelerate_config", "cpu", "--num_processes", "2")
    assert result.returncode == 2
    assert result.stderr.count("error: `temperature=-1.0`") == 1
    assert "Traceback" not in result.stderr


def test_the_installed_module_answers_a_typo_without_a_launch() -> None:
    result = run("distill", "--learning_rat", "1e-4")
    assert result.returncode == 2
    assert result.stderr == "error: command line: unknown option '--learning_rat'. Did you mean '--learning_rate'?\n"
