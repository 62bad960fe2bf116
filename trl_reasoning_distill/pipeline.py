"""`trl-distill run RECIPE`: the stages of a recipe in order, each a process of its own, skipping what is done.

A recipe is a folder with a `recipe.yaml` and a YAML of options per stage:

    summary: Teach a tiny student on a laptop.
    stages:
      - generate                                        # the script generate with generate.yaml
      - verify
      - {name: sft_control, script: sft}                # the script sft with sft_control.yaml
      - {name: again, script: evaluate, config: e.yaml}

The stages name each other's outputs by plain paths, `runs/RECIPE/STAGE`, so that each YAML also works by itself with
`accelerate launch recipes/<script>.py --config …`. `--runs_dir` puts another folder in place of that leading `runs`.

A stage is done if its manifest is there, its options are those of its last run here, and its inputs hash to what its manifest
says. Anything else is left to the stage: it resumes its own unfinished work, and refuses a folder of another configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_reasoning_distill import launch
from trl_reasoning_distill.config_files import read_config
from trl_reasoning_distill.data.files import read_json, write_json
from trl_reasoning_distill.data.manifest import MANIFEST_NAME, StageManifest, describe_input, read_manifest
from trl_reasoning_distill.scripts import STAGES
from trl_reasoning_distill.scripts.command import Command, check_known
from trl_reasoning_distill.shipped import RECIPE_NAME

RECORD_NAME = "pipeline.json"
RUNS = "runs"
_STOPPED = (130, 143, -2, -15)
"""Exit codes of a stage that a signal stopped, as it leaves by itself or as the system has it."""


@dataclass(frozen=True)
class RecipeStage:
    """One stage of a recipe.

    Attributes:
        name: Its name in this recipe, and of its folder below `runs/RECIPE/`.
        script: The stage's script.
        source: Its YAML in the recipe.
        options: What the YAML says, with `--runs_dir` put in place.
        config_path: The YAML to launch it with: `source`, or a file with `options` among the results if they differ.
    """

    name: str
    script: str
    source: Path
    options: dict[str, Any]
    config_path: Path

    @property
    def output_dir(self) -> Path:
        """Where the stage writes."""
        return Path(self.options["output_dir"])

    @property
    def words(self) -> list[str]:
        """The stage's command line."""
        return ["--config", str(self.config_path)]


def main(args: Sequence[str] | None = None) -> None:
    """Run `trl-distill run`.

    Raises:
        ValueError: If the recipe or an option of one of its stages is wrong; nothing has been started then.
        SystemExit: With exit code 1 if a stage failed, 130 or 143 if it was stopped.
    """
    arguments, launcher_words = _parse(args)
    recipe = Path(arguments.recipe)
    stages = _choose(read_recipe(recipe, arguments.runs_dir), arguments.only, getattr(arguments, "from"))
    for item in stages:
        checked_command(item)
    run_folder = Path(arguments.runs_dir) / recipe.resolve().name
    if arguments.dry_run:
        _look_ahead(stages, run_folder, launcher_words, arguments.overwrite)
        return
    _run_all(stages, run_folder, launcher_words, arguments.overwrite)
    for item in stages:
        if item.script == "report":
            print(f"\nreport: {item.output_dir / 'report.html'}")


def read_recipe(recipe: Path, runs_dir: str = RUNS) -> list[RecipeStage]:
    """Read a recipe's stages.

    Args:
        recipe: Its folder.
        runs_dir: The folder to put in place of the leading `runs` of paths in the stages' YAMLs.

    Raises:
        FileNotFoundError: If there is no such recipe, or a stage's YAML is missing.
        ValueError: If `recipe.yaml` is not as this module's docstring has it, or a stage writes elsewhere than to `runs/RECIPE/NAME`.
    """
    path = recipe / RECIPE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"No {RECIPE_NAME} in {recipe}. `trl-distill recipes` lists the recipes that come with this package, and "
            "`trl-distill recipes copy NAME FOLDER` makes a copy to run."
        )
    content = read_config(path)
    check_known(content, ["summary", "stages"], str(path))
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: `stages` must be a list of stages, found {entries!r}.")
    stages = [_read_stage(recipe, entry, runs_dir) for entry in entries]
    names = [item.name for item in stages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two stages have the name {name!r}; give one a `name` of its own.")
    return stages


def checked_command(item: RecipeStage) -> Command:
    """Refuse unknown and missing options in a stage's YAML, before the first stage of a recipe is started."""
    return Command([], item.options, str(item.source)).checked(item.script, warn=False)


def is_done(
    item: RecipeStage, run_folder: Path, describe: Callable[[str], Mapping[str, Any]] = describe_input
) -> StageManifest | None:
    """The manifest of a stage that need not run again; `None` if it must run."""
    record = _read_record(run_folder).get(item.name, {})
    try:
        manifest = read_manifest(item.output_dir)
    except FileNotFoundError:
        return None
    if record != {"options": _effective(item), "fingerprint": manifest.fingerprint}:
        return None
    if any(describe(str(value["path"]))["hash"] != value["hash"] for value in manifest.inputs.values()):
        return None
    return manifest


def _run_all(stages: Sequence[RecipeStage], run_folder: Path, launcher_words: list[str], overwrite: bool) -> None:
    for number, item in enumerate(stages, start=1):
        label = f"[{number}/{len(stages)}] {item.name}"
        manifest = is_done(item, run_folder)
        if manifest is not None:
            print(f"{label}: done before | {manifest.result}", flush=True)
            continue
        print(f"{label}: {shlex.join(_shown(item, launcher_words))}", flush=True)
        if item.config_path != item.source:
            write_json(item.config_path, item.options)  # JSON is YAML, and says each type exactly
        start = time.perf_counter()
        code = launch.run_command(_command(item, launcher_words, overwrite))
        seconds = _clock(time.perf_counter() - start)
        if code:
            _stop(label, code, seconds)
        manifest = read_manifest(item.output_dir)
        record = _read_record(run_folder)
        record[item.name] = {"options": _effective(item), "fingerprint": manifest.fingerprint}
        write_json(run_folder / RECORD_NAME, record)
        print(f"{label}: done in {seconds} | {manifest.result}", flush=True)


def _look_ahead(stages: Sequence[RecipeStage], run_folder: Path, launcher_words: list[str], overwrite: bool) -> None:
    """Say what would run, and let each stage say what it would do, as far as its inputs exist."""
    refused = []
    for item in stages:
        if is_done(item, run_folder) is not None:
            print(f"{item.name}: done before", flush=True)
            continue
        words = [*_shown(item, launcher_words), *(["--overwrite"] if overwrite else [])]
        unfinished = unfinished_inputs(item, run_folder)
        waits = f" (waits for {', '.join(unfinished)})" if unfinished else ""
        print(f"{item.name}: {shlex.join(words)}{waits}", flush=True)
        if not unfinished and not _dry_run(item):
            refused.append(item.name)
    if refused:
        raise SystemExit(1)


def unfinished_inputs(item: RecipeStage, run_folder: Path) -> list[str]:
    """The stages of this run that a stage reads from and that have not finished."""
    values: list[Any] = [value for name, value in item.options.items() if name != "output_dir"]
    stages: dict[str, None] = {}
    for value in values:  # grows while it is read
        if isinstance(value, list | dict):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and (path := Path(value.rpartition("=")[2])).is_relative_to(run_folder):
            stages |= dict.fromkeys(path.relative_to(run_folder).parts[:1])
    return [name for name in stages if not (run_folder / name / MANIFEST_NAME).is_file()]


def _dry_run(item: RecipeStage) -> bool:
    """Let a stage print its plan, in this process; whether it could."""
    environment = dict(os.environ)
    try:
        launch.run_in_process(item.script, Command(["--dry_run"], item.options, str(item.source)))
    except SystemExit as stop:  # the stage has printed why
        return not stop.code
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return True


def _stop(label: str, code: int, seconds: str) -> None:
    again = shlex.join(["trl-distill", *sys.argv[1:]])
    stopped = code in _STOPPED
    how = "stopped" if stopped else f"failed with exit code {code}; the lines above say why"
    print(f"{label}: {how}, after {seconds}. What is done stays done; go on with: {again}", file=sys.stderr, flush=True)
    raise SystemExit(128 + abs(code) % 128 if stopped else 1)


def _parse(args: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="trl-distill run",
        usage="trl-distill run RECIPE [--runs_dir DIR] [--only STAGE …] [--from STAGE] [--overwrite] [--dry_run] [launcher options]",
        description="Run the stages of a recipe in order, skipping what is done; the first failure stops it.",
        epilog="Launcher options: any of `accelerate launch`, and --accelerate_config NAME for one of accelerate_configs/. "
        "Without one, stages run on one GPU if there is one, else on the CPU.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="Folder of a recipe, such as recipes/quickstart.")
    parser.add_argument(
        "--runs_dir", default=RUNS, help="Where the recipe's folder of results goes. (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="Run only these stages.")
    parser.add_argument("--from", metavar="STAGE", help="Begin with this stage.")
    parser.add_argument(
        "--overwrite", action="store_true", help="Clear and redo stages whose options or inputs have changed."
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Check the recipe, and say what each stage would do as far as its inputs exist.",
    )
    own = [flag for action in parser._actions for flag in action.option_strings]
    launcher_words, own_words = launch.split_launch_options(sys.argv[2:] if args is None else args, own)
    return parser.parse_args(own_words), launcher_words


def _choose(stages: list[RecipeStage], only: list[str] | None, first: str | None) -> list[RecipeStage]:
    names = [item.name for item in stages]
    check_known([*(only or []), *([first] if first else [])], names, "--only/--from")
    if first:
        stages = stages[names.index(first) :]
    return [item for item in stages if only is None or item.name in only]


def _read_stage(recipe: Path, entry: Any, runs_dir: str) -> RecipeStage:
    values: Any = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ValueError(f"{recipe / RECIPE_NAME}: a stage is a name or a mapping with `name`, found {entry!r}.")
    check_known(values, ["name", "script", "config"], f"{recipe / RECIPE_NAME}, stage {values['name']}")
    name: str = values["name"]
    script = str(values.get("script", name))
    check_known([script], list(STAGES), f"{recipe / RECIPE_NAME}, script of stage {name}")
    path = recipe / values.get("config", f"{name}.yaml")
    content = read_config(path)
    expected = f"{RUNS}/{recipe.resolve().name}/{name}"
    if content.get("output_dir") != expected:
        raise ValueError(
            f"{path}: output_dir must be {expected!r}, found {content.get('output_dir')!r}: other stages look for it there."
        )
    moved = _move(content, runs_dir)
    moved_path = Path(runs_dir, recipe.resolve().name, "configs", f"{name}.yaml")
    return RecipeStage(name, script, path, moved, path if moved == content else moved_path)


def _move(value: Any, runs_dir: str) -> Any:
    """Put `runs_dir` in place of the leading `runs/` of a path, also in `name=path` and inside lists and mappings."""
    if isinstance(value, list):
        return [_move(item, runs_dir) for item in value]
    if isinstance(value, dict):
        return {key: _move(item, runs_dir) for key, item in value.items()}
    if isinstance(value, str):
        name, equals, path = value.rpartition("=")
        if path.startswith(f"{RUNS}/"):
            return f"{name}{equals}{Path(runs_dir, path.removeprefix(f'{RUNS}/')).as_posix()}"
    return value


def _effective(item: RecipeStage) -> dict[str, Any]:
    """A stage's options as JSON gives them back, so that they compare equal to a record on disk."""
    return json.loads(json.dumps(item.options))


def _read_record(run_folder: Path) -> dict[str, Any]:
    path = run_folder / RECORD_NAME
    return read_json(path) if path.is_file() else {}


def _command(item: RecipeStage, launcher_words: list[str], overwrite: bool) -> list[str]:
    words = [*item.words, *(["--overwrite"] if overwrite else [])]
    return launch.stage_command(item.script, words, launcher_words if STAGES[item.script].accelerated else None)


def _shown(item: RecipeStage, launcher_words: list[str]) -> list[str]:
    """The command that does the same by hand."""
    if not STAGES[item.script].accelerated:
        return ["trl-distill", item.script, *item.words]
    launcher = [
        os.path.relpath(word) if Path(word).is_relative_to(Path.cwd()) else word
        for word in launch.complete_launch_options(launcher_words)
    ]
    return ["accelerate", "launch", *launcher, f"recipes/{item.script}.py", *item.words]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{seconds:.1f} s"
