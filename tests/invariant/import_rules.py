"""Who may import whom: the rules as data, and a checker that reads source and one that imports it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "trl_reasoning_distill"


@dataclass(frozen=True)
class Rule:
    """What a room may import.

    Attributes:
        internal: Modules of this package, by prefix; a room may always import itself.
        banned: Top-level packages that it must not import, not even inside a function.
        only: If set, the only packages that it may import besides the standard library.
    """

    internal: tuple[str, ...]
    banned: frozenset[str] = frozenset()
    only: frozenset[str] | None = None


HEAVY = frozenset({"torch", "transformers", "trl"})
TRL = frozenset({"trl"})
SHARED = ("options",)  # how an option is written: of the standard library alone, for any folder
LIVE_TEACHER = ("teacher.context", "teacher.scoring", "teacher.sampling")  # asked in the training step

RULES = {
    "data": Rule(internal=("extras", "folders", "terminal"), banned=HEAVY),
    "verification": Rule(internal=("data", "extras"), banned=HEAVY),
    "teacher": Rule(
        internal=("data", "verification", "losses.head", "losses.topk", "extras", "hub", "processes"), banned=TRL
    ),
    "losses": Rule(internal=(), only=frozenset({"torch", "triton"})),
    "trainer": Rule(
        internal=(
            "losses",
            "teacher.store",
            "teacher.records",
            *LIVE_TEACHER,
            "data",
            "verification",
            "extras",
            "hub",
            "processes",
        )
    ),
    "evaluation": Rule(
        internal=("verification", "data", "teacher.sampling", "processes", "extras", "terminal"), banned=TRL
    ),
    "scripts": Rule(
        internal=(
            "data",
            "verification",
            "teacher",
            "losses",
            "trainer",
            "evaluation",
            "extras",
            "hub",
            "processes",
            "terminal",
            "config_files",
        )
    ),
    "processes": Rule(internal=(), only=frozenset({"accelerate", "psutil", "torch"})),
    "hub": Rule(internal=(), only=frozenset({"transformers"})),
    "extras": Rule(internal=(), only=frozenset()),
    "options": Rule(internal=(), only=frozenset()),
    "terminal": Rule(internal=(), only=frozenset({"rich"})),
    "doctor": Rule(
        internal=("scripts", "pipeline", "processes", "data", "hub", "teacher.store.vocabulary", "losses", "terminal"),
        banned=TRL,
    ),
    "folders": Rule(internal=(), only=frozenset({"filelock", "psutil"})),
    "config_files": Rule(internal=(), only=frozenset({"ruamel"})),
    "shipped": Rule(internal=("config_files",), only=frozenset()),
    "launch": Rule(
        internal=("scripts", "shipped", "processes", "config_files"), banned=HEAVY - {"torch"}
    ),  # only in the launcher's own process
    "pipeline": Rule(internal=("scripts", "launch", "data", "shipped", "config_files"), banned=HEAVY),
    "cli": Rule(internal=("scripts", "launch", "pipeline", "shipped", "doctor.command", "terminal"), banned=HEAVY),
}


def violations(package: Path) -> list[str]:
    """Imports that break the rules, as `file:line imports module`, from the source of every module."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        room = relative.parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # the package's own lazy names; a test of the public names covers them
        if room not in RULES:
            found.append(f"{relative}: the room {room!r} has no import rule")
            continue
        allowed = (room, *SHARED, *RULES[room].internal)
        for line, module, is_typing_only in _imports(path, package):
            if not _is_allowed(module, allowed, RULES[room], is_typing_only):
                found.append(f"{relative}:{line} imports {module}")
    return found


def loaded_by(modules: list[str], cwd: Path) -> set[str]:
    """Top-level packages that are loaded after importing `modules` in a fresh interpreter that finds the package in `cwd` first."""
    code = "import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(json.dumps(list(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    command = [sys.executable, "-c", code, *modules]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


def modules_of(package: Path, *rooms: str) -> list[str]:
    """Dotted names of every module in some rooms."""
    paths = [path for room in rooms for path in sorted((package / room).rglob("*.py"))]
    return [
        ".".join([PACKAGE, *path.relative_to(package).with_suffix("").parts]).removesuffix(".__init__")
        for path in paths
    ]


def _imports(path: Path, package: Path) -> Iterator[tuple[int, str, bool]]:
    """Every import of a file: line, absolute module (`package.module.name` for `from package.module import name`), typing only?"""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = path.relative_to(package.parent).parts[: -node.level]
                module = ".".join([*parts, *([module] if module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", id(node) in typing_only


def _is_allowed(module: str, allowed: tuple[str, ...], rule: Rule, is_typing_only: bool) -> bool:
    top, _, rest = module.partition(".")
    if top == PACKAGE:
        return any(rest == prefix or rest.startswith(f"{prefix}.") for prefix in allowed)
    if is_typing_only or top in sys.stdlib_module_names:
        return True
    return top not in rule.banned and (rule.only is None or top in rule.only)
