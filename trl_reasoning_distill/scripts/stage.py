"""What every stage is: options, a plan of what it would do, and the doing.

    @dataclass(kw_only=True)
    class SelectArguments(StageArguments):
        verified: str = option(help="Folder that the verify stage wrote.")

    make_parser = parser_of(SelectArguments, SelectionArguments)

    class Select(Stage):
        name = "select"

        def __init__(self, options: SelectArguments, selection: SelectionArguments) -> None: ...   # reads what the plan needs
        def plan(self) -> Plan: ...
        def run(self, run: StageRun) -> Outcome: ...

    main = stage_main(Select, make_parser)

`main` reads the command line and the YAML (`scripts.command`), makes the dataclasses, prints the plan with `--dry_run`, and else opens the
folder, runs, and writes the manifest. Errors that a user can cause are one line. `TrlParser` turns flat YAML keys into
argparse defaults, command line over YAML over dataclass; `parse_stage` puts YAML values through the converters and choices of the
command line's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from trl_reasoning_distill.data.files import DiskFullError
from trl_reasoning_distill.extras import MissingExtraError
from trl_reasoning_distill.options import Options, option
from trl_reasoning_distill.processes import (
    COMMAND_VARIABLE,
    InterruptedBySignal,
    end_with_launcher,
    interrupt,
    launch_state,
    on_interruption,
    runs_on_cpus,
)
from trl_reasoning_distill.scripts.command import (
    USAGE_ERROR,
    Command,
    check_given,
    check_known,
    exit_with,
    is_main_process,
    read_command,
)
from trl_reasoning_distill.terminal import printable, takes_colour

if TYPE_CHECKING:
    from os import PathLike

    from accelerate import PartialState
    from trl import TrlParser

    from trl_reasoning_distill.data.manifest import StageRun
    from trl_reasoning_distill.scripts.planning import Plan

_MODEL_OPTIONS = (
    *("model", "models", "model_name_or_path", "student", "teacher", "teacher_model_name_or_path", "tokenizer"),
    *("teacher_tokenizer", "chat_template_path", "adapter", "store", "path"),
)
"""Options that name what `trust_remote_code` trusts; a store names the teacher whose tokenizer is loaded."""

Outcome = tuple[Mapping[str, int | float], str]
"""What a stage counts, for its manifest, and the line that it ends with."""


@dataclass(kw_only=True)
class TrainingStageArguments(Options):
    """Options of every stage. Training stages take `output_dir` from `TrainingArguments`, so it is not here."""

    dry_run: bool = option(False, "Check the options and the inputs, show what would be done, and stop.")
    overwrite: bool = option(False, "First remove what an earlier run of a stage has left in the output folder.")


@dataclass(kw_only=True)
class StageArguments(TrainingStageArguments):
    """Options of every stage that is not a training."""

    output_dir: str = option(help="Folder for what this stage makes.")


class Stage:
    """A stage with its options, and with as much of its inputs read as a plan of it needs.

    Attributes:
        name: The stage's name, which is its script's.
        is_parallel: Whether it runs on all processes of a launch, and is given the launch's state as its last argument; else it runs
            on the first alone.
        options: The dataclass with `dry_run` and `overwrite`.
        output_dir: Where it writes.
        writes: Whether it writes anything: else the plan is all that it does.
        settings: All its options, for the manifest.
        inputs: Name to the file, folder or hub id that it reads, for the manifest.
        seed: Its seed, if it has one.
    """

    name: ClassVar[str]
    is_parallel: ClassVar[bool] = False
    options: Any
    output_dir: str
    writes: bool = True
    settings: Mapping[str, Any]
    inputs: Mapping[str, str | PathLike[str]]
    seed: int | None = None

    def plan(self) -> Plan:
        """What it would do. On all ranks of a training; reads no weight, writes nothing."""
        raise NotImplementedError

    def run(self, run: StageRun) -> Outcome:
        """Do it, in an open folder."""
        raise NotImplementedError

    def after(self) -> None:
        """What follows the manifest; on all ranks, and each time, also if the folder holds the result already."""


def parser_of(*dataclass_types: type) -> Callable[..., TrlParser]:
    """A stage's `make_parser`, over the dataclasses of its options; a training imports its own when it is called."""

    def make_parser(prog: str | None = None) -> TrlParser:
        from trl import TrlParser

        return TrlParser(dataclass_types, prog=prog)  # type: ignore[arg-type]

    return make_parser


def stage_main(stage_class: type[Stage], make_parser: Callable[[], TrlParser]) -> Callable[..., None]:
    """A stage's `main`; see `command_main`.

    Args:
        stage_class: The stage.
        make_parser: Makes the parser of its options, which it is made of, in order.
    """

    @functools.wraps(make_parser)
    def work(command: Command) -> None:
        _run_stage(stage_class, make_parser(), command)

    main = command_main(work, inspect.getfile(stage_class))
    main.stage_class = stage_class  # type: ignore[attr-defined]  # the doctor asks it for its plan
    return main


def command_main(work: Callable[[Command], None], script: str | None = None) -> Callable[..., None]:
    """Make a `main` of what does a command's work: help and mistyped options before anything heavy is loaded, errors of one line.

    What a user can cause (a wrong value, a missing file or extra, Ctrl-C) becomes one line on stderr. The exit code is 2 for an
    option, 1 for any other mistake, 130 after Ctrl-C and 143 after SIGTERM. Set `TRD_DEBUG=1` to see the traceback.

    Args:
        work: Takes the command as it was read.
        script: The file with `make_parser`; that of `work` if `None`.
    """
    script = script or work.__code__.co_filename

    @functools.wraps(work)
    def main(args: Command | Sequence[str] | None = None) -> None:
        try:
            command = args
            if not isinstance(command, Command):
                prog = f"accelerate launch recipes/{Path(script).name}"
                command = read_command(script, sys.argv[1:] if command is None else command, prog)
            os.environ.update(command.environment)  # before anything heavy is imported, which reads it then
            end_with_launcher()
            with on_interruption(interrupt):
                work(command)
        except DiskFullError as error:
            exit_with(error, 1, advice=f" Then go on with: {_command()}")
        except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, MissingExtraError) as error:
            exit_with(error, 1)
        except KeyboardInterrupt as stop:
            name, code = (str(stop), stop.exit_code) if isinstance(stop, InterruptedBySignal) else ("Ctrl-C", 130)
            exit_with(f"Stopped by {name}; what was made is kept. Go on from here with: {_command()}", code)

    return main


def _run_stage(stage_class: type[Stage], parser: TrlParser, command: Command) -> None:
    parsed: list[Any] = [*parse_stage(parser, command)]
    state = launch_state() if stage_class.is_parallel else None
    if state is None and not is_main_process():
        return
    make: Callable[..., Stage] = stage_class
    stage = make(*parsed) if state is None else make(*parsed, state)
    if stage.options.dry_run or not stage.writes:
        plan = stage.plan()
        if is_main_process():
            print(plan.text if takes_colour() else printable(plan.text))
        return
    with open_run(stage, state) as run:
        if run is not None:
            counts, result = stage.run(run)
            run.finish(counts, result)
            if is_main_process():
                print(f"{stage.name}: {result}")
        stage.after()


def parse_stage(parser: TrlParser, args: Command | Sequence[str] | None = None) -> tuple[Any, ...]:
    """Make the parser's dataclasses of a command, strictly.

    Args:
        parser: A `TrlParser` over the stage's dataclasses.
        args: The command, or its words; `sys.argv[1:]` if `None`.

    Returns:
        One instance for each dataclass of the parser, in order.

    Raises:
        SystemExit: With exit code 2 and one line on stderr, if an option is unknown, doubled, missing or out of its range.
    """
    try:
        command = args if isinstance(args, Command) else Command.read(sys.argv[1:] if args is None else args)
        values = make_options(parser, command)
    except (ValueError, FileNotFoundError) as error:
        exit_with(error, USAGE_ERROR)
    chosen = {name: value for part in values for name, value in vars(part).items()}
    if chosen.get("trust_remote_code"):
        warn_of_remote_code([f"{name} {chosen[name]}" for name in _MODEL_OPTIONS if chosen.get(name)])
    return values


def make_options(parser: TrlParser, command: Command, defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """As `parse_stage`, for code that wants the error.

    Args:
        parser: A `TrlParser` over the stage's dataclasses.
        command: The words and the YAML.
        defaults: Takes the place of defaults of the dataclasses, where the parser has such an option.

    Raises:
        ValueError: If an option is unknown, doubled, missing or out of its range.
    """
    parser.allow_abbrev = False  # an abbreviation that is unique today is ambiguous with tomorrow's options
    parser.error = _raise_error  # type: ignore[method-assign]  # argparse's own prints the usage: 200 lines for a training
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # of an option that is on by default, not its `--no_…`
    del actions["help"]
    of_the_launch = {"use_cpu": True} if "use_cpu" in actions and runs_on_cpus() else {}
    parser.set_defaults(
        **{name: value for name, value in (of_the_launch | dict(defaults or {})).items() if name in actions}
    )
    names = {flag.lstrip("-"): action for action in actions.values() for flag in action.option_strings}
    check_known(command.options, [*actions, *(name for name in names if "-" not in name)], command.where)
    given = {
        names[key].dest: _convert(parser, names[key], value, command.where) for key, value in command.options.items()
    }
    parser.set_defaults_with_config(**given)
    flags = {word.partition("=")[0] for word in command.words}
    check_given([name for name, action in actions.items() if action.required and not flags & {*action.option_strings}])
    *values, unknown = parser.parse_args_into_dataclasses(
        command.words, return_remaining_strings=True, look_for_args_file=False
    )
    flags_of_parser = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    check_known([word for word in unknown if word.startswith("-")] or unknown, flags_of_parser, "command line")
    return tuple(values)


def warn_of_remote_code(models: Sequence[str]) -> None:
    """Warn loudly, on the main process, that these models' own code is about to run; nothing for no model."""
    if models and is_main_process():
        text = f"WARNING: trust_remote_code is on: Python code that comes with {', '.join(models)} WILL RUN on this machine, with your rights."
        print(text, file=sys.stderr, flush=True)


def settings_of(*parts: Any) -> dict[str, Any]:
    """The options of several dataclasses as one mapping."""
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


@contextlib.contextmanager
def open_run(stage: Stage, state: PartialState | None = None) -> Iterator[StageRun | None]:
    """Open a stage's folder, on all ranks together.

    Args:
        stage: The stage.
        state: The launch, if the stage runs on several processes.

    Yields:
        The run; `None` if the folder holds its result already, which is printed.

    Raises:
        ValueError: If the folder holds another run.
    """
    from trl_reasoning_distill.data.manifest import StageRun

    is_main = state is None or state.is_main_process
    run = StageRun(
        stage.name,
        stage.output_dir,
        stage.settings,
        stage.inputs,
        stage.seed,
        overwrite=stage.options.overwrite,
        is_main=is_main,
    )
    with run:
        if state is not None:
            state.wait_for_everyone()
        if run.is_finished and is_main:
            print(f"{stage.name}: nothing to do, {stage.output_dir} holds this run's result")
        yield None if run.is_finished else run


def _command() -> str:
    """What the user typed, to be typed again."""
    return os.environ.get(COMMAND_VARIABLE, "the same command again")


def _raise_error(message: str) -> NoReturn:
    raise ValueError(message)


def _convert(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value, put through the converter and the choices that the command line's words go through."""
    if value is None or isinstance(value, dict):
        return value
    if action.nargs == "+":
        if not isinstance(value, list):
            raise ValueError(f"{where}: {action.dest} takes a list, found {value!r}; write [{value}].")
        return [_convert_one(parser, action, item, where) for item in value]
    return value if isinstance(value, list) else _convert_one(parser, action, value, where)


def _convert_one(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, where: str) -> Any:
    if action.type is str:  # also the type of `str | int` and the like, whose numbers must stay numbers
        return value
    try:
        converted = parser._get_value(action, value if isinstance(value, str) else str(value))
        parser._check_value(action, converted)
    except argparse.ArgumentError as error:
        raise ValueError(f"{where}: {action.dest}: {error.message}.") from None
    return converted
