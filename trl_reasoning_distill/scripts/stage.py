"""What every stage script shares: its common options, strict parsing of YAML and command line, and errors of one line.

A stage script is a dataclass of options, a parser, and a `main`:

    @dataclass
    class SelectArguments(StageArguments):
        verified: str = field(default=None, metadata={"help": "Folder that the verify stage wrote."})

    def make_parser(prog: str | None = None) -> TrlParser:
        return TrlParser(SelectArguments, prog=prog)

    @stage_main
    def main(args: list[str] | None = None) -> None:
        (options,) = parse_stage(make_parser(), args)
        ...

`TrlParser` turns flat YAML keys into argparse defaults: command line over YAML over dataclass. `parse_stage` adds what it leaves
out: an unknown key, on either side, is one line with a suggestion; a key that is given twice is refused; YAML values pass
through the same converters and choices as the command line's; numbers and booleans are those of YAML 1.2 (`1e-5` is a number,
`no` is a word).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import yaml

from trl_reasoning_distill.data.files import DiskFullError
from trl_reasoning_distill.extras import MissingExtraError
from trl_reasoning_distill.processes import InterruptedBySignal, end_with_launcher, interrupt, on_interruption
from trl_reasoning_distill.scripts import options

if TYPE_CHECKING:
    from os import PathLike

    from accelerate import PartialState
    from trl import TrlParser

    from trl_reasoning_distill.data.manifest import StageRun


_GRACE_SECONDS = 15.0

_MODEL_OPTIONS = (
    *("model", "models", "model_name_or_path", "student", "teacher", "teacher_model_name_or_path"),
    *(
        "tokenizer",
        "teacher_tokenizer",
        "teacher_tokenizer_name_or_path",
        "chat_template_path",
        "adapter",
        "store",
        "path",
    ),
)
"""Options that name what `trust_remote_code` trusts; a store names the teacher whose tokenizer is loaded."""

COMMAND_VARIABLE = "TRD_COMMAND"
"""The environment variable in which `trl-distill` tells its stages what the user typed."""

USAGE_ERROR = 2
"""Exit code of a mistake in the options, as argparse has it; any other mistake of the user's exits with 1."""


@dataclass
class TrainingStageArguments:
    """Options of every stage. Training stages take `output_dir` from `TrainingArguments`, so it is not here."""

    dry_run: bool = field(
        default=False, metadata={"help": "Check the options and the inputs, say what would be done, and stop."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Clear the output folder of an earlier run first, whatever made it."}
    )


@dataclass
class StageArguments(TrainingStageArguments):
    """Options of every stage that is not a training."""

    output_dir: str = field(default="", metadata={"help": "Folder for what this stage makes. Required."})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError(
                "output_dir is missing: say where this stage shall write, with --output_dir or in the YAML."
            )


def parse_stage(parser: TrlParser, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `--config FILE` and the command line into the parser's dataclasses, strictly.

    Args:
        parser: A `TrlParser` over the stage's dataclasses.
        args: The command line; `sys.argv[1:]` if `None`.

    Returns:
        One instance for each dataclass of the parser, in order.

    Raises:
        SystemExit: With exit code 2 and one line on stderr, if an option is unknown, doubled, missing or out of its range.
    """
    from trl_reasoning_distill.processes import share_cpus

    share_cpus()  # before any dataclass asks accelerate where it runs
    parser.allow_abbrev = False  # an abbreviation that is unique today is ambiguous with tomorrow's options
    parser.error = _raise_error  # type: ignore[method-assign]  # argparse's own prints the usage: 200 lines for a training
    try:
        config_path, arguments = split_config(sys.argv[1:] if args is None else args)
        if config_path is not None:
            apply_config(parser, read_config(config_path), config_path)
        *values, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        check_known([word for word in unknown if word.startswith("-")] or unknown, option_names(parser), "command line")
    except (ValueError, FileNotFoundError) as error:
        exit_with(error, USAGE_ERROR)
    chosen = {name: value for part in values for name, value in vars(part).items()}
    if chosen.get("trust_remote_code"):
        warn_of_remote_code([f"{name} {chosen[name]}" for name in _MODEL_OPTIONS if chosen.get(name)])
    return tuple(values)


def warn_of_remote_code(models: Sequence[str]) -> None:
    """Say loudly, on the main process, that these models' own code is about to run; nothing for no model."""
    if models and is_main_process():
        text = f"WARNING: trust_remote_code is on: Python code that comes with {', '.join(models)} WILL RUN on this machine, with your rights."
        print(text, file=sys.stderr, flush=True)


def split_config(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take `--config FILE` or `--config=FILE` out of a command line.

    Returns:
        The path (`None` without one) and the other words.
    """
    paths, others = [], []
    words = iter(args)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise ValueError("--config needs a path.")
            paths.append(path)
        elif word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        else:
            others.append(word)
    if len(paths) > 1:
        raise ValueError(f"--config is given {len(paths)} times ({', '.join(paths)}); give one file.")
    return (paths[0] if paths else None), others


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of flat options.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, not a mapping, or has a key twice; with file and line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No config file at {path}.")
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(
            f"{path}{f', line {mark.line + 1}' if mark else ''}: {error.problem or error.context}."
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({error}).") from None
    if config is None:
        return {}
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"{path}: expected a mapping of option names to values, found {type(config).__name__}.")
    return config


def apply_config(parser: TrlParser, config: Mapping[str, Any], where: str) -> None:
    """Make the values of a config file the parser's defaults, and set its `env` variables.

    Raises:
        ValueError: If a key is unknown, or a value does not fit its option.
    """
    values = dict(config)
    environment = values.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{where}: `env` must be a mapping of variables to values, found {environment!r}.")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    check_known(values, actions, where)
    parser.set_defaults_with_config(
        **{key: _convert(parser, actions[key], value, where) for key, value in values.items()}
    )
    os.environ.update({key: str(value) for key, value in environment.items()})


def check_known(names: Sequence[str] | Mapping[str, Any], known: Sequence[str] | Mapping[str, Any], where: str) -> None:
    """Refuse option names that are not known, with the nearest known one.

    Raises:
        ValueError: Naming the first unknown option, how many more there are, and where they stand.
    """
    bare = {name.lstrip("-").partition("=")[0].replace("-", "_"): None for name in known}
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    first = unknown[0].partition("=")[0]
    near = difflib.get_close_matches(first.lstrip("-").replace("-", "_"), bare, n=1, cutoff=0.6)
    dashes = first[: len(first) - len(first.lstrip("-"))]
    hint = f" Did you mean {dashes + near[0]!r}?" if near else " See --help for the options there are."
    others = f" (and {len(unknown) - 1} more: {', '.join(unknown[1:])})" if len(unknown) > 1 else ""
    raise ValueError(f"{where}: unknown option {first!r}{others}.{hint}")


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """All long options of a parser, as they are typed."""
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def stage_main(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Make a stage's `main` kind: help and mistyped options before anything heavy is loaded, errors of one line.

    What a user can cause (a wrong value, a missing file or extra, Ctrl-C) becomes one line on stderr. The exit code is 2 for an
    option, 1 for any other mistake, 130 after Ctrl-C and 143 after SIGTERM. Set `TRD_DEBUG=1` to see the traceback.
    """
    script = main.__code__.co_filename

    @functools.wraps(main)
    def guarded(args: list[str] | None = None) -> None:
        try:
            answer_early(
                script, sys.argv[1:] if args is None else args, f"accelerate launch recipes/{Path(script).name}"
            )
            end_with_launcher()
            with on_interruption(interrupt):
                main(args)
        except DiskFullError as error:
            exit_with(error, 1, advice=f" Then go on with: {_command()}")
        except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, MissingExtraError) as error:
            exit_with(error, 1)
        except KeyboardInterrupt as stop:
            signal_name, code = (
                (str(stop), stop.exit_code) if isinstance(stop, InterruptedBySignal) else ("Ctrl-C", 130)
            )
            exit_with(f"Stopped by {signal_name}; what was made is kept. Go on from here with: {_command()}", code)

    return guarded


def answer_early(script: str, args: Sequence[str], prog: str) -> None:
    """Print a stage's help, or refuse its unknown options, from the source of its script alone.

    Returns in silence if there is nothing to say, or if the source cannot be read: the real parser comes after.

    Raises:
        SystemExit: After the help, with code 0; after an unknown option or an unreadable config, with code 2.
    """
    try:
        stage_options = options.read_options(script)
    except options.UnreadableOptionsError:
        return
    if "-h" in args or "--help" in args:
        if is_main_process():
            print(options.format_help(stage_options, prog, options.docstring(script)))
        raise SystemExit(0)
    try:
        config_path, words = split_config(args)
        if config_path is not None:
            names = [option.name for option in stage_options]
            check_known([key for key in read_config(config_path) if key != "env"], names, config_path)
        flags = [word for word in words if word.startswith("--")]
        known = options.known_flags(stage_options)
        check_known([flag for flag in flags if flag.partition("=")[0] not in known], known, "command line")
    except (ValueError, FileNotFoundError) as error:
        exit_with(error, USAGE_ERROR)


def is_main_process() -> bool:
    """True on the first process of a launch, read from the environment so that it costs no import."""
    return os.environ.get("RANK", "0") == "0"


def _command() -> str:
    """What the user typed, to be typed again."""
    return os.environ.get(COMMAND_VARIABLE, "the same command again")


def _raise_error(message: str) -> NoReturn:
    raise ValueError(message)


def exit_with(error: BaseException | str, code: int, *, advice: str = "") -> NoReturn:
    """Leave with an exit code and one line on stderr, which `advice` ends; with `TRD_DEBUG=1` raise the error itself.

    Most errors strike all processes of a launch alike, and the launcher ends the others as soon as one has left. So the main process
    speaks first, and another one only if it is still there after `_GRACE_SECONDS`: then the error was its own.
    """
    if os.environ.get("TRD_DEBUG", "0") not in ("", "0") and isinstance(error, BaseException):
        raise error
    where = ""
    if not is_main_process():
        time.sleep(_GRACE_SECONDS)
        where = f"process {os.environ['RANK']}: "
    line = error if isinstance(error, str) else f"error: {error}"
    print(f"{where}{line}{advice}", file=sys.stderr, flush=True)
    raise SystemExit(code) from (error if isinstance(error, BaseException) else None)


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


class _StrictLoader(yaml.SafeLoader):
    """YAML without the traps of version 1.1: no doubled keys, `1e-5` is a number, and only `true` and `false` are booleans."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


class Folder(Protocol):
    """The options that say where a stage writes."""

    output_dir: str
    overwrite: bool


def settings_of(*parts: Any) -> dict[str, Any]:
    """The options of several dataclasses as one mapping."""
    return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}


@contextlib.contextmanager
def open_run(
    stage: str,
    options: Folder,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str | PathLike[str]],
    seed: int | None = None,
    state: PartialState | None = None,
) -> Iterator[StageRun | None]:
    """Open a stage's folder, on all ranks together.

    Args:
        stage: Name of the stage.
        options: Its folder, and whether to clear it.
        settings: All its options, for the manifest.
        inputs: As `StageRun`.
        seed: The stage's seed.
        state: The launch, if the stage runs on several processes.

    Yields:
        The run; `None` if the folder holds its result already, which is said.

    Raises:
        ValueError: If the folder holds another run.
    """
    from trl_reasoning_distill.data.manifest import StageRun

    is_main = state is None or state.is_main_process
    run = StageRun(stage, options.output_dir, settings, inputs, seed, overwrite=options.overwrite, is_main=is_main)
    with run:
        if state is not None:
            state.wait_for_everyone()
        if run.is_finished and is_main:
            print(f"{stage}: nothing to do, {options.output_dir} holds this run's result")
        yield None if run.is_finished else run
