"""`trl-distill doctor RECIPE`: predict memory, disk and time, and look for what goes wrong in silence."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_reasoning_distill.doctor.facts import Finding, Resources, StageFacts, UnknownModelError, read_facts
from trl_reasoning_distill.doctor.hazards import check_disk, check_recipe, check_stage
from trl_reasoning_distill.doctor.memory import GIB, Sharding
from trl_reasoning_distill.doctor.plan import (
    CARDS,
    SHARDINGS,
    Card,
    StagePlan,
    cheapest,
    count_rows,
    find_card,
    plan_stage,
)
from trl_reasoning_distill.pipeline import RUNS, RecipeStage, check_options, read_recipe
from trl_reasoning_distill.terminal import takes_colour

RED_EXIT, YELLOW_EXIT = 1, 3


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
    stages, plans, findings = examine(items, sharding, card, most_ranks=options.most_ranks)
    if options.json:
        print(json.dumps(_as_json(plans, findings), indent=1))
    else:
        print(render(stages, plans, findings, sharding, card, colour=takes_colour()))
    levels = {finding.level for finding in findings}
    if "red" in levels:
        raise SystemExit(RED_EXIT)
    if options.strict and "yellow" in levels:
        raise SystemExit(YELLOW_EXIT)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="trl-distill doctor",
        description="Look at a recipe before anything is launched: predicted memory per rank, disk, steps and time, and hazards. "
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
) -> tuple[list[StageFacts], dict[str, StagePlan], list[Finding]]:
    """Look at every stage, and at what lies between them.

    Args:
        items: The recipe's stages.
        sharding: How trainings are launched.
        card: The GPU; `None` for a CPU.
        most_ranks: GPUs that the cheapest configuration may use.

    Returns:
        The stages with their options, what each will take, and what was found.
    """
    stages: list[StageFacts] = []
    findings: list[Finding] = []
    for item in items:
        try:
            check_options(item)
            stages.append(read_facts(item))
        except ValueError as error:
            findings.append(Finding("red", item.name, str(error)))
    resources = Resources()
    rows = count_rows(stages)
    completion_tokens = next((facts.get("max_new_tokens") for facts in stages if facts.item.script == "generate"), None)
    plans: dict[str, StagePlan] = {}
    for facts in stages:
        findings += check_stage(facts, resources)
        try:
            plans[facts.name] = plan_stage(
                facts,
                resources,
                rows=rows[facts.name],
                sharding=sharding,
                card=card,
                completion_tokens=completion_tokens,
            )
        except UnknownModelError:
            continue
        if card is not None:
            findings += _check_memory(facts, plans[facts.name], resources, card, most_ranks)
    findings += check_recipe(stages, resources)
    folder = items[0].output_dir.parent
    findings.append(check_disk(folder, sum(plan.disk for plan in plans.values())))
    return stages, plans, findings


def _check_memory(
    facts: StageFacts, plan: StagePlan, resources: Resources, card: Card, most_ranks: int
) -> list[Finding]:
    if plan.memory is None:
        return []
    needed, has = plan.memory.on_gpu, card.memory
    text = f"{needed / GIB:.1f} GiB of {has / GIB:.1f} on {card.name}"
    found = []
    if needed > has:
        hint = "a smaller max_batch_tokens, quantization: 4bit, or device_map: auto"
        if facts.is_training:
            hint = "LoRA (use_peft), gradient_checkpointing, a smaller batch or max_length"
        found.append(Finding("red", facts.name, f"does not fit: {text}. Try {hint}."))
    else:
        found.append(Finding("yellow" if needed > 0.9 * has else "green", facts.name, f"fits: {text}."))
    if facts.is_training:
        best = cheapest(facts, resources, card, most_ranks)
        if best is None:
            found.append(
                Finding(
                    "red", facts.name, f"fits on no more than {most_ranks} × {card.name}, whatever the configuration."
                )
            )
        else:
            name, ranks, memory = best
            found.append(
                Finding(
                    "green", facts.name, f"cheapest that fits: {name} on {ranks} ({memory.on_gpu / GIB:.1f} GiB each)."
                )
            )
    return found


def render(
    stages: Sequence[StageFacts],
    plans: dict[str, StagePlan],
    findings: Sequence[Finding],
    sharding: Sharding,
    card: Card | None,
    *,
    colour: bool,
) -> str:
    """The doctor's page for a terminal."""
    where = f"{sharding.ranks} × {card.name if card else 'CPU'}, {sharding.kind if sharding.kind != 'none' else 'unsharded'}"
    lines = [
        f"launch: {where}",
        "",
        f"{'stage':<16}{'rows':>10}{'steps':>9}{'tokens':>10}{'time':>10}{'memory':>10}{'disk':>9}",
    ]
    for facts in stages:
        plan = plans.get(facts.name)
        if plan is None:
            lines.append(f"{facts.name:<16}{'not known: no configuration of its model':>58}")
            continue
        cells = [
            _number(plan.rows),
            _number(plan.steps) if facts.is_training else "",
            (_number(plan.tokens, short=True) if plan.memory else "")
            + ("~" if plan.is_assumed and plan.tokens else ""),
            _clock(plan.seconds),
            f"{plan.memory.on_gpu / GIB if card else plan.memory.tensors / GIB:.2f} G" if plan.memory else "",
            f"{plan.disk / GIB:.2f} G" if plan.disk else "",
        ]
        lines.append(
            f"{facts.name:<16}"
            + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (10, 9, 10, 10, 10, 9), strict=True))
        )
        if facts.is_training and plan.memory:
            parts = {name: value for name, value in asdict(plan.memory).items() if value}
            lines.append(
                "  " + " · ".join(f"{name.replace('_', ' ')} {value / GIB:.2f}" for name, value in parts.items())
            )
    if any(plan.is_assumed for plan in plans.values()):
        lines.append("~ the rows do not exist yet: their length is assumed, half of max_new_tokens and a prompt")
    lines.append("")
    order = {"red": 0, "yellow": 1, "green": 2}
    lines += [finding.line(colour=colour) for finding in sorted(findings, key=lambda finding: order[finding.level])]
    return "\n".join(lines)


def _as_json(plans: dict[str, StagePlan], findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "stages": {name: asdict(plan) for name, plan in plans.items()},
        "findings": [asdict(finding) for finding in findings],
    }


def _number(value: int | None, *, short: bool = False) -> str:
    if value is None:
        return "?"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if short and value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:,}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
