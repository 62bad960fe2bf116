"""What a user typed for a stage: the words of the command line and the keys of the YAML, with names that exist.

Both are read once per process, from the source of the stage's script alone: a mistyped, missing or renamed option is answered before
anything heavy is imported. `stage` then gives them to the real parser, which has the last word on values.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from trl_reasoning_distill.config_files import environment_of, read_config
from trl_reasoning_distill.scripts import source
from trl_reasoning_distill.terminal import printable

USAGE_ERROR = 2
"""Exit code of a mistake in the options, as argparse has it; any other mistake of the user's exits with 1."""

RENAMED: Mapping[str, Mapping[str, str]] = {
    "generate": {"model": "teacher"},
    "capture": {"model": "teacher", "tokenizer": "teacher_tokenizer", "top_k": "store_top_k"},
    "align": {"top_k": "store_top_k"},
    "sft": {"max_samples": "limit"},
    "distill": {"max_samples": "limit", "top_k": "kd_top_k"},
    "gkd": {"max_samples": "limit", "top_k": "kd_top_k", "teacher_tokenizer_name_or_path": "teacher_tokenizer"},
}
"""Names of version 0.1.0 that are still taken, with a warning, by stage."""

POSITIONAL: Mapping[str, Sequence[str]] = {"data": ("action",), "report": ("runs",), "store": ("action", "path")}
"""Options whose names may be left out, where their values come first."""

_GRACE_SECONDS = 15.0


@dataclass(frozen=True)
class Command:
    """A stage's options as they were given.

    Attributes:
        words: The command line, without `--config`.
        config: What the YAML says.
        where: The YAML's path, for messages.
    """

    words: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    where: str = "config"

    @classmethod
    def read(cls, args: Sequence[str]) -> Command:
        """Take `--config FILE` out of a command line, and read the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read, or `--config` is given twice.
        """
        path, words = split_config(args)
        return cls(words) if path is None else cls(words, read_config(path), path)

    @property
    def options(self) -> dict[str, Any]:
        """The YAML's keys that are options."""
        return {name: value for name, value in self.config.items() if name != "env"}

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that the YAML sets."""
        return environment_of(self.config, self.where)

    def checked(self, stage: str, *, warn: bool = True) -> Command:
        """The same with the names that options have now.

        Args:
            stage: The stage that shall take them, or the path of its script.
            warn: Whether to say which old names were used.

        Raises:
            ValueError: If an option is unknown, doubled or missing, or the YAML sets a variable that it may not.
        """
        renamed = self._renamed(stage, warn=warn)
        assert renamed.environment is not None  # checks it
        options = source.read_options(source.script_path(stage))
        check_known(renamed.options, [name for option in options for name in option.names], renamed.where)
        flags = [word for word in renamed.words if word.startswith("--")]
        known = source.known_flags(options)
        check_known([flag for flag in flags if flag.partition("=")[0] not in known], known, "command line")
        given = renamed.options.keys() | {_bare(flag) for flag in flags}
        check_given([option.name for option in options if option.default is None and not given & {*option.names}])
        return renamed

    def _renamed(self, stage: str, *, warn: bool) -> Command:
        stage = Path(stage).stem
        table = RENAMED.get(stage, {})
        old = dict.fromkeys(name for name in [*self.config, *map(_bare, self.words)] if name in table)
        words = [_rename_flag(word, table) for word in self.words]
        for name in old:
            if name in self.config and table[name] in self.config:
                raise ValueError(f"{self.where}: {name!r} is now called {table[name]!r}, and both are given; give one.")
            if warn and is_main_process():
                print(
                    f"warning: {stage}: {name!r} is now called {table[name]!r}; the old name will go.", file=sys.stderr
                )
        return Command(words, {table.get(name, name): value for name, value in self.config.items()}, self.where)


def read_command(stage: str, args: Sequence[str], prog: str, *, epilog: str = "", warn: bool = True) -> Command:
    """Read a stage's command line and YAML; answer `--help` and mistakes at once.

    Args:
        stage: Name of the stage, or the path of its script.
        args: The command line.
        prog: The command as its help shows it.
        epilog: What the help ends with.
        warn: Whether to say which old names were used.

    Raises:
        SystemExit: After the help, with code 0; after an unknown or missing option or an unreadable config, with code 2.
    """
    words = list(args)
    for position, name in enumerate(POSITIONAL.get(Path(stage).stem, ())):
        if len(words) > 2 * position and not words[2 * position].startswith("-"):
            words.insert(2 * position, f"--{name}")
    if "-h" in words or "--help" in words:
        if is_main_process():
            show(source.help_of(stage, prog, epilog))
        raise SystemExit(0)
    try:
        return Command.read(words).checked(stage, warn=warn)
    except (ValueError, FileNotFoundError) as error:
        exit_with(error, USAGE_ERROR)


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


def check_known(names: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse option names that are not known, with the nearest known one.

    Raises:
        ValueError: Naming the first unknown option, how many more there are, and where they stand.
    """
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    first = unknown[0].partition("=")[0]
    near = difflib.get_close_matches(_bare(first), dict.fromkeys(map(_bare, known)), n=1, cutoff=0.6)
    dashes = first[: len(first) - len(first.lstrip("-"))]
    hint = f" Did you mean {dashes + near[0]!r}?" if near else " See --help for the options there are."
    others = f" (and {len(unknown) - 1} more: {', '.join(unknown[1:])})" if len(unknown) > 1 else ""
    raise ValueError(f"{where}: unknown option {first!r}{others}.{hint}")


def check_given(missing: Sequence[str]) -> None:
    """Refuse a command without options that it needs, all of them at once.

    Raises:
        ValueError: If one is missing.
    """
    if missing:
        names = ", ".join(missing[:-1]) + " and " * (len(missing) > 1) + missing[-1]
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        flags = " ".join(f"--{name} …" for name in missing)
        raise ValueError(f"{names} {verb} missing: give {them} on the command line ({flags}) or in the YAML.")


def is_main_process() -> bool:
    """True on the first process of a launch, read from the environment so that it costs no import."""
    return os.environ.get("RANK", "0") == "0"


def show(text: str) -> None:
    """Print a long text that may well be piped into `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit


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
    print(printable(f"{where}{line}{advice}"), file=sys.stderr, flush=True)
    raise SystemExit(code) from (error if isinstance(error, BaseException) else None)


def _bare(flag: str) -> str:
    """`kd_top_k` of `--kd-top-k=3`; any other word as it is."""
    return flag.lstrip("-").partition("=")[0].replace("-", "_") if flag.startswith("-") else flag


def _rename_flag(word: str, table: Mapping[str, str]) -> str:
    if not word.startswith("--") or _bare(word) not in table:
        return word
    _, equals, value = word.partition("=")
    return f"--{table[_bare(word)]}{equals}{value}"
