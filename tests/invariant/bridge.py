"""Where the package touches what TRL and transformers do not promise to keep, found in its source."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import transformers
import trl

BRIDGE = "trainer/trl_bridge.py"
GKD = "trainer/gkd/"
LIBRARIES = ("trl", "transformers")
DOCUMENTED = ("transformers.utils", "transformers.utils.peft_utils", "transformers.masking_utils")
"""Modules of transformers whose names its documentation teaches to import from there, or that the package root does not have."""
TRLS_OWN_WAY = ("_name", "_paper", "_tag_names", "_VALID_DICT_FIELDS")
"""Class attributes that TRL's trainers and configurations have for a subclass to set."""


def touches(package: Path) -> Iterator[str]:
    """Each import of an undocumented module, and each private attribute of a library's class, outside of the bridge: `file:line name`."""
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        if file != BRIDGE:
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            yield from (f"{file}:{line} {name}" for line, name in _imports(tree) if not _may_import(file, name))
            if file.startswith("trainer/") and not file.startswith(GKD):
                yield from (f"{file}:{line} {name}" for line, name in _private_attributes(tree))


def _may_import(file: str, module: str) -> bool:
    library = module.partition(".")[0]
    if library == "trl":
        return module == library or file == f"{GKD}base.py"
    return module == library or module in DOCUMENTED


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        else:
            continue
        yield from ((node.lineno, name) for name in modules if name.partition(".")[0] in LIBRARIES)


def _private_attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private attributes of other objects, and those of one's own that a base class of TRL's or transformers' defines."""
    theirs = private_names()
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = [node for one in classes for node in one.body if isinstance(node, ast.FunctionDef)]
    for node in [*methods, *(node for node in ast.walk(tree) if isinstance(node, ast.Attribute))]:
        name = node.attr if isinstance(node, ast.Attribute) else node.name
        if not name.startswith("_") or name.startswith("__") or name in TRLS_OWN_WAY:
            continue
        owner = ast.unparse(node.value) if isinstance(node, ast.Attribute) else "self"
        if name in theirs or owner not in ("self", "cls", "super()", "type(self)"):
            yield node.lineno, f"{owner}.{name}"


@functools.cache
def private_names() -> set[str]:
    """Private attributes and methods of the classes that the trainers and their configurations stand on."""
    found: set[str] = set()
    for base in (trl.SFTTrainer, trl.SFTConfig, transformers.Trainer, transformers.TrainingArguments):
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(base)))):  # type: ignore[arg-type]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - set(TRLS_OWN_WAY)
