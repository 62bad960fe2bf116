"""One concept, one home: what may stand in one module of the package only, found in its source."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Concept:
    """Something that one module defines and all others import.

    Attributes:
        homes: The files that may hold it, relative to the package.
        stands_in: Whether a node of the syntax tree is an instance of it.
    """

    homes: tuple[str, ...]
    stands_in: Callable[[ast.AST], bool]


def _is_minus_100(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _is_constant(node.operand, 100)


def _is_constant(node: ast.AST, *values: object) -> bool:
    return isinstance(node, ast.Constant) and node.value in values


def _is_ignored_label(node: ast.AST) -> bool:
    return _is_minus_100(node) or (isinstance(node, ast.Name) and node.id in ("IGNORE_INDEX", "IGNORED_LABEL"))


def _compares_labels(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and any(map(_is_ignored_label, [node.left, *node.comparators]))


def _loads_by_name(node: ast.AST) -> bool:
    """`AutoTokenizer.from_pretrained` and the like; a model's weights are loaded where they are used."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "from_pretrained"
        and isinstance(node.value, ast.Name)
        and any(kind in node.value.id for kind in ("Tokenizer", "Processor", "AutoConfig"))
    )


def _reads(*names: str) -> Callable[[ast.AST], bool]:
    """An attribute of one of these names, or its name as text, as `getattr` takes it."""
    return lambda node: (isinstance(node, ast.Attribute) and node.attr in names) or _is_constant(node, *names)


def _names_a_head_transform(node: ast.AST) -> bool:
    """The name that a model family gives the scale or the soft-cap of its logits, as text or as an attribute of a config."""
    names = ("logits_scaling", "lm_head_multiplier", "output_multiplier", "final_logit_softcapping")
    return _is_constant(node, *names) or (isinstance(node, ast.Attribute) and node.attr in names)


CONCEPTS = {
    "the prompt encoder": Concept(("data/chat.py",), _reads("apply_chat_template")),
    "loading by name": Concept(("hub.py",), _loads_by_name),
    "a model's head": Concept(("losses/head.py",), _names_a_head_transform),
    "a model's context length": Concept(("hub.py",), _reads("max_position_embeddings")),
    "supervised positions": Concept(("data/tokenization.py", "losses/fused.py"), _compares_labels),
    "the ignored label": Concept(("data/tokenization.py", "losses/fused.py"), _is_minus_100),
}


def strays(package: Path) -> Iterator[str]:
    """Each place outside its home: `concept: file:line`."""
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))
        for name, concept in CONCEPTS.items():
            if file not in concept.homes:
                yield from (f"{name}: {file}:{node.lineno}" for node in nodes if concept.stands_in(node))  # type: ignore[attr-defined]
