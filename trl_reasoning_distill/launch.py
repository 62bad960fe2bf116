"""Starting a stage: in this process, or on any number of processes with `accelerate launch`."""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trl_reasoning_distill.config_files import read_config
from trl_reasoning_distill.processes import COMMAND_VARIABLE, end_with_launcher, on_interruption
from trl_reasoning_distill.scripts import source
from trl_reasoning_distill.scripts.command import Command, check_known
from trl_reasoning_distill.shipped import shipped_folder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

CONFIG_FOLDER = shipped_folder("accelerate_configs")
_SCRIPTS = "trl_reasoning_distill.scripts"


def split_launch_options(args: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line into what `accelerate launch` takes and the rest; options that both know are not the launcher's.

    Args:
        args: The words.
        own: The flags that are not the launcher's.

    Returns:
        The launcher's words and the others.

    Raises:
        ValueError: If an option is nobody's, with the nearest of all.
    """
    launcher_flags = source.launcher_flags()
    launcher_words: list[str] = []
    own_words: list[str] = []
    target = own_words
    for word in args:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            target = own_words
            if flag not in own:
                flag = "--" + flag[2:].replace("-", "_")  # accelerate takes both spellings; we look for one
                check_known([flag], [*own, *launcher_flags], "command line")
                word, target = f"{flag}{equals}{value}", launcher_words
        target.append(word)
    return launcher_words, own_words


def stage_command(name: str, args: Sequence[str], launcher_words: Sequence[str] | None) -> list[str]:
    """The command that starts a stage.

    Args:
        name: Name of the stage's script.
        args: The stage's options.
        launcher_words: Options for `accelerate launch`; `None` to start one plain process.
    """
    python = [sys.executable, "-m"]
    if launcher_words is None:
        return [*python, _SCRIPTS, name, *args]
    return [
        *python,
        f"{__package__}.launch",
        "--quiet",
        *complete_launch_options(launcher_words),
        "-m",
        _SCRIPTS,
        name,
        *args,
    ]


def complete_launch_options(words: Sequence[str]) -> list[str]:
    """Resolve `--accelerate_config NAME`, and fill in what `accelerate launch` would otherwise guess or drop.

    Without a config it is `cpu` or `single_gpu`, whichever fits this machine. A config for one process drops `--num_processes 2` in
    silence, so `--multi_gpu` is added to it, which means "several processes", also on the CPU.
    """
    words = list(words)
    path = _take_option(words, "--accelerate_config")
    config_file = _take_option(words, "--config_file") or str(
        resolve_accelerate_config(path or default_accelerate_config())
    )
    config = read_config(config_file)
    processes = int(_option_value(words, "--num_processes") or config.get("num_processes") or 1)
    kinds = ("--multi_gpu", "--use_deepspeed", "--use_fsdp", "--tpu", "--use_megatron_lm")
    if processes > 1 and config.get("distributed_type", "NO") == "NO" and not any(kind in words for kind in kinds):
        words.append("--multi_gpu")
    if config.get("use_cpu") and not _option_value(words, "--num_cpu_threads_per_process"):
        # Left to itself accelerate asks for the number of physical cores, which some containers cannot tell, and warns.
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _usable_cores() // processes))
        words += ["--num_cpu_threads_per_process", threads]
    return ["--config_file", config_file, *words]


def resolve_accelerate_config(name: str) -> Path:
    """The file of an accelerate config: a path, or the name of one in `accelerate_configs/`.

    Raises:
        ValueError: If it is neither, with the names there are.
    """
    for path in (Path(name), CONFIG_FOLDER / f"{name}.yaml", Path("accelerate_configs") / f"{name}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))) or "none"
    raise ValueError(f"No accelerate config {name!r}: it is neither a file nor one of accelerate_configs/ ({names}).")


def default_accelerate_config() -> str:
    """`"single_gpu"` if this machine has a CUDA device that the installed torch can use, else `"cpu"`."""
    return "single_gpu" if cuda_device_count() else "cpu"


def cuda_device_count() -> int:
    """Number of visible CUDA devices, counted without importing torch; 0 if the installed torch is built for the CPU."""
    if metadata.version("torch").endswith("+cpu"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    devices = sum(line.startswith("GPU ") for line in listing.stdout.splitlines()) if listing.returncode == 0 else 0
    return min(devices, len(visible.split(","))) if visible is not None else devices


def run_in_process(name: str, command: Command) -> None:
    """Run a stage's `main` in this process."""
    importlib.import_module(f"{_SCRIPTS}.{name}").main(command)


def run_command(command: Sequence[str]) -> int:
    """Run a command to its end and return its exit code; signals to stop are the child's to answer, and are waited for.

    Were this process to die of them, the child would go on by itself.
    """
    typed = os.environ.get(COMMAND_VARIABLE, shlex.join(["trl-distill", *sys.argv[1:]]))
    environment = os.environ | {COMMAND_VARIABLE: typed}
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int) -> None:
        if process is not None:
            process.send_signal(number)

    with on_interruption(hand_on):
        process = subprocess.Popen(command, env=environment)
        return process.wait()


def _take_option(words: list[str], flag: str) -> str | None:
    """Remove `--flag value` or `--flag=value` from the words and return the value."""
    for index, word in enumerate(words):
        if word == flag:
            if index + 1 == len(words):
                raise ValueError(f"{flag} needs a value.")
            value = words[index + 1]
            del words[index : index + 2]
            return value
        if word.startswith(f"{flag}="):
            del words[index]
            return word.partition("=")[2]
    return None


def _option_value(words: Sequence[str], flag: str) -> str | None:
    return _take_option(list(words), flag)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """`accelerate launch` without its tracebacks, which would bury the line in which the stage says what was wrong.

    SIGTERM and SIGINT are handed on to the processes of the launch, and the launch ends when they have ended. torch's own agent would
    kill them 30 seconds later, in the middle of a checkpoint.
    """
    import psutil

    end_with_launcher()
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")  # torchrun's --signals_to_handle
    from accelerate.commands.launch import main as accelerate_launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    heard: list[int] = []

    def hand_on(number: int) -> None:
        heard.append(number)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    with on_interruption(hand_on):
        try:
            accelerate_launch()
        except ChildFailedError as error:
            if not heard:
                _exit_with_first_failure(error)
        except SystemExit:
            if not heard:
                raise
    if heard:
        raise SystemExit(128 + heard[0])


def _exit_with_first_failure(error: ChildFailedError) -> NoReturn:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: the process of rank {rank} was killed by {name} (out of memory, if nobody sent it).",
            file=sys.stderr,
        )
    raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None


if __name__ == "__main__":
    main()
