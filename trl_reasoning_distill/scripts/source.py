"""The options of a stage, read from source text and not by importing it.

Importing a training's configuration imports torch and transformers: seconds, for a `--help` or to hear of a mistyped key. What
these need, the names, types, defaults and help of dataclass fields, stands in the source; so it is read there, through
imports and base classes down to `transformers.TrainingArguments`, in about a tenth of a second. The real parser still has the
last word: this one only speaks first.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_origin

from trl_reasoning_distill import options as option_types
from trl_reasoning_distill.terminal import width

_ORIGINS = {
    "trl_reasoning_distill": "options of this stage",
    "trl": "options of TRL",
    "transformers": "options of transformers' TrainingArguments",
}


class UnreadableOptionsError(LookupError):
    """The source is written in a way that this reader does not follow: a mistake of ours, which a test finds."""


@dataclass(frozen=True)
class Option:
    """A dataclass field as an option of the command line.

    Attributes:
        name: The field's name.
        type: Its annotation, as it stands in the source.
        default: Its default, as it stands in the source; `None` if it is required.
        help: Its help text.
        package: Top-level package of the class that declares it.
        aliases: Other names for it.
    """

    name: str
    type: str
    default: str | None
    help: str
    package: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called in YAML."""
        return (self.name, *self.aliases)

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings that the stage's parser takes."""
        flags = [f"--{self.name}", f"--{self.name.replace('_', '-')}", *(f"--{alias}" for alias in self.aliases)]
        if self.default == "True" and self.type in ("bool", "bool | None"):
            flags += [f"--no_{self.name}", f"--no-{self.name.replace('_', '-')}"]
        return tuple(dict.fromkeys(flags))


def script_path(stage: str) -> str:
    """The file of a stage's script; a path is taken as it is."""
    return stage if stage.endswith(".py") else str(Path(__file__).parent / f"{stage}.py")


@functools.cache
def read_options(script: str) -> tuple[Option, ...]:
    """The options of a stage script, in the order of its dataclasses.

    Args:
        script: Path of a module whose `make_parser` calls `TrlParser` (or a class whose name ends so) on dataclasses.

    Raises:
        UnreadableOptionsError: If the source is written in a way that this reader does not follow.
    """
    path = Path(script)
    options: dict[str, Option] = {}
    for name in _parser_dataclasses(_parse(path), script):
        options.update(_fields(*_find_class(name, path)))
    return tuple(options.values())


def known_flags(options: Iterable[Option]) -> list[str]:
    """All spellings of the options, and those that every stage has."""
    return [*(flag for option in options for flag in option.flags), "--config", "--help"]


@functools.lru_cache(maxsize=1)
def launcher_flags() -> tuple[str, ...]:
    """The long options of `accelerate launch`, with underscores, read from its source as well; and our `--accelerate_config`."""
    path = _module_path("accelerate.commands.launch")
    calls = (
        node for node in ast.walk(_parse(path)) if isinstance(node, ast.Call) and _name(node.func) == "add_argument"
    )
    words = (word.value for call in calls for word in call.args if isinstance(word, ast.Constant))
    return ("--accelerate_config", *(word for word in words if isinstance(word, str) and word.startswith("--")))


def help_of(script: str, prog: str, epilog: str = "") -> str:
    """The text of `--help`: every option with type, meaning and default; ours first, then those of TRL and transformers.

    Args:
        script: Path of the stage's script, whose docstring it begins with.
        prog: The command.
        epilog: What it ends with.
    """
    path, options = script_path(script), read_options(script_path(script))
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--option value …]",
        description=inspect.cleandoc(ast.get_docstring(_parse(Path(path))) or ""),
        epilog=epilog,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=min(width(), 120)
        ),
        add_help=False,
    )
    common = parser.add_argument_group("for every stage")
    common.add_argument(
        "--config", metavar="FILE.yaml", help="The options below as flat YAML; the command line goes first."
    )
    common.add_argument("-h", "--help", action="store_true", help="Show this and stop.")
    for package in dict.fromkeys([*_ORIGINS, *(option.package for option in options)]):
        group = parser.add_argument_group(_ORIGINS.get(package, f"options of {package}"))
        for option in options:
            if option.package == package:
                default = "required" if option.default is None else f"default: {option.default}"
                text = f"{option.help.replace('%%', '%')} ({default})".strip().replace("%", "%%")
                group.add_argument(*(f"--{name}" for name in option.names), metavar=option.type, help=text)
    return parser.format_help()


def _parser_dataclasses(tree: ast.Module, script: str) -> list[str]:
    """Names of the dataclasses that `make_parser` is made of: the arguments of `parser_of`, or of the `TrlParser` that it calls."""
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    assigned = {node.targets[0].id: node.value for node in assignments if isinstance(node.targets[0], ast.Name)}
    made = assigned.get("make_parser")
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "make_parser"]
    for call in ast.walk(functions[0]) if functions else ():
        if isinstance(call, ast.Call) and (_name(call.func) or "").endswith("Parser") and call.args:
            made = assigned.get(_name(call.args[0]) or "", call.args[0])
    types = made.args if isinstance(made, ast.Call) else made.elts if isinstance(made, ast.Tuple) else [made]
    names = [name for name in map(_name, types) if name]
    if not names or len(names) < len(types):
        raise UnreadableOptionsError(f"{script} has no make_parser that calls TrlParser on named dataclasses.")
    return names


def _find_class(name: str, path: Path) -> tuple[ast.ClassDef, Path]:
    """The definition of `name` as the module at `path` sees it: its own, or one that it imports, even if only lazily."""
    tree = _parse(path)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, path
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _find_class(alias.name, _imported_path(statement, path))
    raise UnreadableOptionsError(f"{path} neither defines nor imports a class {name!r}.")


def _fields(definition: ast.ClassDef, path: Path) -> dict[str, Option]:
    """The fields of a dataclass, its bases' first; a field that is declared again keeps its place, as dataclasses have it."""
    options: dict[str, Option] = {}
    for base in reversed(definition.bases):
        name = _name(base)
        if name not in (None, "object", "Generic", "Protocol"):
            options.update(_fields(*_find_class(str(name), path)))
    package = _package(path)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            option = _option(node, node.target.id, package)
            if option is not None:
                options[option.name] = option
    return options


def _option(node: ast.AnnAssign, name: str, package: str) -> Option | None:
    annotation = _type_text(node.annotation)
    if annotation.startswith(("ClassVar", "typing.ClassVar")):
        return None
    keywords: dict[str | None, ast.expr] = {}
    default, text = node.value, ""
    if isinstance(node.value, ast.Call) and _name(node.value.func) in ("field", "option"):
        keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
        given = dict(zip(("default", "help"), node.value.args, strict=False)) | keywords
        default = given.get("default") or given.get("default_factory")
        text = _text(given["help"]) if "help" in given else _help_text(given.get("metadata"))
    if isinstance(keywords.get("init"), ast.Constant) and not ast.literal_eval(keywords["init"]):
        return None
    aliases = tuple(ast.literal_eval(keywords["aliases"])) if "aliases" in keywords else ()
    return Option(name, annotation, _default_text(default), " ".join(text.split()), package, aliases)


def _type_text(node: ast.expr) -> str:
    """The type as `--help` shows it: with its choices, and with bounds in place of their name in `options`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _type_text(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp):
        return f"{_type_text(node.left)} | {_type_text(node.right)}"
    arguments = node.slice.elts if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) else []
    if isinstance(node, ast.Subscript) and _name(node.value) == "Literal":
        return " | ".join(_text(choice) for choice in arguments or [node.slice])
    if isinstance(node, ast.Subscript) and _name(node.value) == "Annotated":
        bounds = [
            _bounds(rule) for rule in arguments[1:] if isinstance(rule, ast.Call) and _name(rule.func) == "Bounds"
        ]
        return " ".join([_type_text(arguments[0]), *bounds])
    alias = getattr(option_types, node.id, None) if isinstance(node, ast.Name) else None
    return option_types.short(alias) if get_origin(alias) is Annotated else ast.unparse(node)


def _bounds(call: ast.Call) -> str:
    return str(option_types.Bounds(**{str(one.arg): ast.literal_eval(one.value) for one in call.keywords}))


def _default_text(default: ast.expr | None) -> str | None:
    if default is None:
        return None
    if isinstance(default, ast.Lambda):
        return ast.unparse(default.body)
    text = ast.unparse(default)
    return {"list": "[]", "dict": "{}"}.get(text, text)


def _help_text(metadata: ast.expr | None) -> str:
    if isinstance(metadata, ast.Dict):
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "help":
                return " ".join(_text(value).split())
    return ""


def _text(value: ast.expr) -> str:
    """A string as far as the source alone tells it: the computed parts of an f-string stay as they are written."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(_text(part) for part in value.values)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _text(value.left) + _text(value.right)
    if isinstance(value, ast.FormattedValue):
        return f"{{{ast.unparse(value.value)}}}"
    return ast.unparse(value)


def _name(node: ast.AST | None) -> str | None:
    """`A` of the expressions `A` and `module.A`."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imported_path(node: ast.ImportFrom, path: Path) -> Path:
    """The file of the module that an import statement in the file `path` names."""
    if not node.level:
        return _module_path(node.module or "")
    folder = path.parents[node.level - 1]
    return _module_file(folder.joinpath(*(node.module or "").split(".")) if node.module else folder)


def _module_path(module: str) -> Path:
    """The file of a module, found without importing its parents (as `find_spec` would)."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise UnreadableOptionsError(f"No package {top!r}.")
    return _module_file(Path(next(iter(spec.submodule_search_locations))).joinpath(*rest))


def _module_file(stem: Path) -> Path:
    for candidate in (stem.with_suffix(".py"), stem / "__init__.py"):
        if candidate.is_file():
            return candidate
    raise UnreadableOptionsError(f"No module at {stem}.")


def _package(path: Path) -> str:
    """Name of the top-level package that a file lies in; the file's own name if it lies in none."""
    folders = [parent for parent in path.parents if (parent / "__init__.py").is_file()]
    return folders[-1].name if folders else path.stem
