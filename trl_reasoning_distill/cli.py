"""`trl-distill`: the stages of `recipes/*.py` as one command, and `run` for a whole recipe.

    trl-distill run recipes/quickstart
    trl-distill sft --config recipes/quickstart/sft.yaml --learning_rate 1e-4
    trl-distill distill --config distill.yaml --accelerate_config zero3 --num_processes 8

A stage takes its own options and those of `accelerate launch` in any order. Nothing heavy is imported to show help or to refuse a
mistyped option.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from trl_reasoning_distill import launch
from trl_reasoning_distill.scripts import STAGES, source
from trl_reasoning_distill.scripts.command import RENAMED, USAGE_ERROR, check_known, exit_with, read_command, show
from trl_reasoning_distill.shipped import copy_recipe, other_recipes, shipped_recipes

_LAUNCHER_HELP = """\
launcher options:
  Any option of `accelerate launch`, such as --num_processes 8 or --config_file FILE, and
  --accelerate_config NAME for one of accelerate_configs/ (cpu, single_gpu, ddp, zero2, zero3, zero3_offload,
  zero3_nvme, fsdp2, multi_node)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run `trl-distill`.

    Raises:
        SystemExit: With the exit code, if it is not 0 or if only help was asked for.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command, *args = words or ["--help"]
    try:
        if command in ("-h", "--help"):
            show(overview())
        elif command == "--version":
            print(metadata.version("trl-reasoning-distill"))
        elif command == "run":
            from trl_reasoning_distill import pipeline

            pipeline.main(args)
        elif command == "recipes":
            recipes(args)
        elif command == "doctor":
            from trl_reasoning_distill.doctor.command import main as examine

            examine(args)
        else:
            check_known([command], [*STAGES, "run", "recipes", "doctor"], "trl-distill")
            run_stage(command, args)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        exit_with(error, USAGE_ERROR)


def recipes(args: Sequence[str]) -> None:
    """Run `trl-distill recipes`: list them, or copy one."""
    parser = argparse.ArgumentParser(
        prog="trl-distill recipes", description="List the recipes that come with this package, or copy one to edit."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    copy = actions.add_parser("copy", help="copy a recipe to a folder of one's own", description=copy_recipe.__doc__)
    copy.add_argument("name", metavar="NAME", help="name of the recipe")
    copy.add_argument("target", metavar="FOLDER", type=Path, help="folder to make")
    arguments = parser.parse_args(args)
    if arguments.action == "copy":
        target = copy_recipe(arguments.name, arguments.target)
        print(f"{target}: edit its YAML, then `trl-distill run {target}`; results go to runs/{target.resolve().name}/")
        for other in other_recipes(target):
            print(f"It builds on {other}: `trl-distill recipes copy {other} recipes/{other}`, and run that first.")
        return
    for recipe in shipped_recipes():
        print(f"{recipe.name:<20} {recipe.summary}")
    print("\n`trl-distill recipes copy NAME FOLDER` makes a copy to edit; `trl-distill run FOLDER` runs it.")


def overview() -> str:
    """The text of `trl-distill --help`."""
    lines = [f"  {name:<10} {entry.summary}" for name, entry in STAGES.items()]
    return "\n".join(
        [
            "usage: trl-distill COMMAND [--config FILE.yaml] [--option value …]",
            "",
            "Teach a small language model to reason like a large one.",
            "",
            "a whole recipe:",
            "  recipes    list the recipes that come with this package; `recipes copy NAME FOLDER` makes one's own",
            "  doctor     look before you launch: memory, disk, time and hazards of a recipe",
            "  run        run the stages of a recipe in order, skipping what is done: trl-distill run recipes/quickstart",
            "",
            "its stages, in order:",
            *lines,
            "",
            "`trl-distill COMMAND --help` shows every option with its default; `trl-distill --version` the version.",
        ]
    )


def run_stage(name: str, args: Sequence[str]) -> None:
    """Run one stage, under `accelerate launch` if it trains or generates, or if a launcher option is given.

    Raises:
        ValueError: If an option is unknown to both the stage and the launcher.
        SystemExit: With the stage's exit code, if it is not 0.
    """
    flags = source.known_flags(source.read_options(source.script_path(name)))
    old = [f"--{option}" for option in RENAMED.get(name, ())]
    launcher_words, stage_words = launch.split_launch_options(args, [*flags, "-h", *old])
    in_process = not launcher_words and not STAGES[name].accelerated
    command = read_command(name, stage_words, f"trl-distill {name}", epilog=_LAUNCHER_HELP, warn=in_process)
    if in_process:
        launch.run_in_process(name, command)
        return
    code = launch.run_command(launch.stage_command(name, stage_words, launcher_words))
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
