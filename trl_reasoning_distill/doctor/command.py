"""`trl-distill doctor RECIPE`: the stages' own plans, with memory, disk and time, and what goes wrong in silence."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from trl_reasoning_distill.doctor.costs import CARDS, SHARDINGS, Card, Costs, cheapest, costs_of, find_card
from trl_reasoning_distill.doctor.hazards import check_disk, check_left_out, check_recipe, check_stage
from trl_reasoning_distill.doctor.memory import GIB, Sharding
from trl_reasoning_distill.doctor.stages import (
    ExaminedStage,
    Finding,
    Level,
    Resources,
    UnknownModelError,
    count_rows,
)
from trl_reasoning_distill.pipeline import RUNS, RecipeStage, read_recipe
from trl_reasoning_distill.scripts.planning import Plan
from trl_reasoning_distill.terminal import show, table, text

RED_EXIT, YELLOW_EXIT = 1, 3
_LEVELS: Sequence[Level] = ("red", "yellow", "green")


def main(args: Sequence[str] | None = None) -> None:
    """Run `trl-distill doctor`.

    Raises:
        SystemExit: With code 1 if anything is red; with `--strict`, with code 3 if anything is yellow.
        FileNotFoundError: If there is no such recipe.
    """
    options = make_parser().parse_args(args)
    card = find_card(options.card) if options.card else None
    base = SHARDINGS.get(options.accelerate_config)
    if base is None:
        raise ValueError(f"--accelerate_config {options.accelerate_config!r}: the doctor knows {', '.join(SHARDINGS)}.")
    ranks = options.num_processes or (8 if base.kind != "none" and not base.offload else 1)
    sharding = Sharding(base.kind, ranks, base.offload)
    items = read_recipe(Path(options.recipe), options.runs_dir)
    costs, findings = examine(items, sharding, card, most_ranks=options.most_ranks)
    if options.json:
        content = {
            "stages": {name: asdict(each) for name, each in costs.items() if each is not None},
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(content, indent=1))
    else:
        print_page(costs, findings, sharding, card)
    levels = {finding.level for finding in findings}
    if "red" in levels:
        raise SystemExit(RED_EXIT)
    if options.strict and "yellow" in levels:
        raise SystemExit(YELLOW_EXIT)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="trl-distill doctor",
        description="Look at a recipe before anything is launched: memory per rank, disk, steps and time, and hazards. "
        "Reads configurations, tokenizers and data, never weights; runs on a CPU.",
        epilog="Exit code: 1 if anything is red; with --strict, 3 if anything is yellow.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="folder of a recipe, such as recipes/quickstart")
    parser.add_argument(
        "--card", help=f"the GPU it shall run on: {', '.join(CARDS)}, or its memory in GiB; without it, a CPU"
    )
    parser.add_argument(
        "--accelerate_config", default="single_gpu", help="one of accelerate_configs/ (default: %(default)s)"
    )
    parser.add_argument("--num_processes", type=int, help="GPUs of that launch (default: 8, or 1 where one is meant)")
    parser.add_argument(
        "--most_ranks", type=int, default=8, help="GPUs one has, for the cheapest configuration (default: %(default)s)"
    )
    parser.add_argument("--runs_dir", default=RUNS, help="where results go (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="leave with an error if anything is yellow, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def examine(
    items: Sequence[RecipeStage], sharding: Sharding, card: Card | None, *, most_ranks: int = 8
) -> tuple[dict[str, Costs | None], list[Finding]]:
    """Look at every stage, and at what lies between them.

    Args:
        items: The recipe's stages.
        sharding: How trainings are launched.
        card: The GPU; `None` for a CPU.
        most_ranks: GPUs that the cheapest configuration may use.

    Returns:
        What each stage takes (`None` where its model cannot be had), and what was found.
    """
    folder, resources = items[0].output_dir.parent, Resources()
    stages: list[ExaminedStage] = []
    plans: dict[str, Plan] = {}
    findings: list[Finding] = []
    for item in items:
        try:
            stages.append(ExaminedStage(item, folder))
        except ValueError as error:
            findings.append(Finding("red", item.name, str(error)))
    for stage in stages:
        found = check_stage(stage, resources)
        findings += found
        if not any("cannot be had" in finding.message for finding in found):
            plan, refused = _plan(stage, known={finding.message for finding in found})
            findings += refused
            if plan is not None:
                plans[stage.name] = plan
                findings += check_left_out(stage, plan)
    rows = count_rows(stages, plans)
    completion_tokens = next((stage.get("max_new_tokens") for stage in stages if stage.item.script == "generate"), None)
    costs: dict[str, Costs | None] = {}
    for stage in stages:
        known = (plans.get(stage.name), rows[stage.name], resources, sharding, card, completion_tokens)
        try:
            costs[stage.name] = costs_of(stage, *known)
        except UnknownModelError:
            costs[stage.name] = None
            continue
        if card is not None:
            findings += _check_memory(stage, costs[stage.name], resources, card, most_ranks)
    findings += check_recipe(stages, resources)
    findings.append(check_disk(folder, sum(each.disk for each in costs.values() if each is not None)))
    return costs, findings


def _plan(stage: ExaminedStage, known: set[str]) -> tuple[Plan | None, list[Finding]]:
    """The stage's own plan, or what it refuses and is not `known` yet."""
    try:
        return stage.plan(), []
    except (ValueError, OSError, ImportError) as error:
        text = str(error).strip() or type(error).__name__
        return None, [] if text in known else [Finding("red", stage.name, text)]


def _check_memory(
    stage: ExaminedStage, costs: Costs | None, resources: Resources, card: Card, most_ranks: int
) -> list[Finding]:
    if costs is None or costs.memory is None:
        return []
    needed, has = costs.memory.on_gpu, card.memory
    text = f"{needed / GIB:.1f} GiB of {has / GIB:.1f} on {card.name}"
    hint = "a smaller max_batch_tokens, quantization: 4bit, or device_map: auto"
    if stage.is_training:
        hint = "LoRA (use_peft), gradient_checkpointing, a smaller batch or max_length"
    found = [Finding("yellow" if needed > 0.9 * has else "green", stage.name, f"fits: {text}.")]
    if needed > has:
        found = [Finding("red", stage.name, f"does not fit: {text}. Try {hint}.")]
    if not stage.is_training:
        return found
    best = cheapest(stage, resources, card, most_ranks)
    if best is None:
        text = f"fits on no more than {most_ranks} × {card.name}, whatever the configuration."
        return [*found, Finding("red", stage.name, text)]
    name, ranks, memory = best
    text = f"cheapest that fits: {name} on {ranks} ({memory.on_gpu / GIB:.1f} GiB each)."
    return [*found, Finding("green", stage.name, text)]


def print_page(
    costs: Mapping[str, Costs | None], findings: Sequence[Finding], sharding: Sharding, card: Card | None
) -> None:
    """Print the doctor's page."""
    kind = sharding.kind if sharding.kind != "none" else "unsharded"
    rows = [[name, *_cells(each, on_gpu=card is not None)] for name, each in costs.items()]
    show(f"launch: {sharding.ranks} × {card.name if card else 'CPU'}, {kind}\n")
    show(table(["stage", "rows", "steps", "tokens", "time", "memory", "disk"], rows))
    for name, each in costs.items():
        if each is not None and each.steps and each.memory:
            parts = {part: value for part, value in asdict(each.memory).items() if value}
            sizes = " · ".join(f"{part.replace('_', ' ')} {value / GIB:.2f}" for part, value in parts.items())
            show(f"{name}, GiB: {sizes}")
    if any(each is None for each in costs.values()):
        show("? the configuration of its model is not known")
    if any(each is not None and each.is_assumed for each in costs.values()):
        show("~ the text does not exist yet: a prompt and half of max_new_tokens are assumed")
    show("")
    for finding in sorted(findings, key=lambda finding: _LEVELS.index(finding.level)):
        show(text(f"{finding.level:<6}", finding.level) + text(f" {finding.stage}: {finding.message}"))


def _cells(costs: Costs | None, *, on_gpu: bool) -> list[str]:
    if costs is None:
        return ["?"] * 6
    memory = costs.memory and (costs.memory.on_gpu if on_gpu else costs.memory.tensors)
    tokens = _short(costs.tokens) + "~" * bool(costs.is_assumed and costs.tokens) if costs.memory else ""
    return [
        "?" if costs.rows is None else f"{costs.rows:,}",
        "" if costs.steps is None else f"{costs.steps:,}",
        tokens,
        _clock(costs.seconds),
        f"{memory / GIB:.2f} G" if memory else "",
        f"{costs.disk / GIB:.2f} G" if costs.disk else "",
    ]


def _short(value: int | None) -> str:
    if value is None:
        return "?"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:,}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
