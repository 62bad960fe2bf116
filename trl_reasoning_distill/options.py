"""An option of a stage or a trainer, written once: type, bounds, default and help.

    @dataclass
    class Arguments(Options):
        kd_top_k: Count = option(10, "Number of the teacher's ids used per position, most likely first.")
        kd_temperature: Positive = option(2.0, "Temperature of both distributions in the divergence.")
        overlong: Literal["drop", "truncate"] = option("drop", "What happens to rows longer than max_length.")
        store: str = option(help="The teacher's store.")              # required; the dataclass is `kw_only` then

A bound is an `Annotated` type, which dataclasses, `TrlParser` and type checkers read as the plain type. `--help`
(`scripts.source`) and the tables of `docs/stages/` are read from the same lines. YAML and Python pass values around argparse,
so `check_options` looks at every value; a subclass of TRL's dataclasses calls it in its own `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import os
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Rule = TypeVar("Rule")

_CHECKED_ELSEWHERE = ("transformers", "trl")
"""Packages whose dataclasses check their own fields."""


@dataclass(frozen=True)
class Bounds:
    """Where a number must lie: at least `ge`, more than `gt`, at most `le`, less than `lt`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def admits(self, value: float) -> bool:
        """Whether a number lies there; NaN lies nowhere."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        signs = (("≥", self.ge), (">", self.gt), ("≤", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)


@dataclass(frozen=True, eq=False)  # a union hashes its parts, and a table may have no hash
class OneOf:
    """The value is a name in a table, which may grow; for a fixed set write `Literal`."""

    names: Collection[str]

    def admits(self, value: str) -> bool:
        """Whether the table has this name now."""
        return value in self.names


@dataclass(frozen=True)
class AlsoMapping:
    """The words `name=value` of a command line may be a mapping in YAML."""


@dataclass(frozen=True)
class Json:
    """A mapping; as text, which is all that a command line has, it is JSON and `check_options` reads it."""


Count = Annotated[int, Bounds(ge=1)]
CountOrZero = Annotated[int, Bounds(ge=0)]
Positive = Annotated[float, Bounds(gt=0)]
NonNegative = Annotated[float, Bounds(ge=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]
PositiveShare = Annotated[float, Bounds(gt=0, le=1)]
NamedWords = Annotated[list[str], AlsoMapping()]
JsonMapping = Annotated[dict[str, Any] | str, Json()]


def option(default: Any = dataclasses.MISSING, help: str = "", *, aliases: Collection[str] = ()) -> Any:  # noqa: A002  # argparse's word
    """A dataclass field that is an option.

    Args:
        default: Its default; a list or mapping is copied for each instance. Without one the option is required.
        help: What it means, in a sentence or two. Type, bounds, choices and default are added where it is shown.
        aliases: Other names that mean the same on the command line and in YAML.
    """
    metadata = {"help": help.replace("%", "%%")}  # argparse formats it
    if aliases:
        metadata["aliases"] = [f"--{alias}" for alias in aliases]  # type: ignore[assignment]
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base of a dataclass of options: it checks itself."""

    def __post_init__(self) -> None:
        check_options(self)


def check_options(options: Any) -> None:
    """Refuse a value of the wrong type, outside of its bounds, or that is none of the choices.

    Only fields that TRL's and transformers' own dataclasses declare are left out: those check themselves.

    Args:
        options: An instance of a dataclass; call this in its `__post_init__`.

    Raises:
        ValueError: With the option, its value, and what it must be.
    """
    for name, hint in _own_hints(type(options)).items():  # type: ignore[arg-type]
        value = getattr(options, name)
        if isinstance(value, str) and _rules(hint, Json):
            value = parse_mapping(value, name)
            setattr(options, name, value)
        if not _fits(value, hint):
            near = difflib.get_close_matches(str(value), _choices(hint), n=1)
            found = "" if _fits(value, _plain(hint)) else f", found {type(value).__name__}"
            advice = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`{name}={value!r}`: must be {describe(hint)}{found}.{advice}")


def parse_mapping(text: str, name: str) -> dict[str, Any]:
    """A mapping given as JSON on a command line.

    Raises:
        ValueError: If it is not a JSON object; `name` is the option's.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={text!r:.80} is not JSON ({error}); write it like '{{\"key\": 1}}'.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}={text!r:.80} is JSON, but not an object; write it like '{{\"key\": 1}}'.")
    return value


def describe(hint: Any) -> str:
    """A type with its bounds or choices, as a message and `--help` put it: `a whole number ≥ 1`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for table in _rules(hint, OneOf):
            return f"one of {', '.join(map(repr, table.names))}"
        kind = "a mapping" if _rules(hint, Json) else describe(arguments[0])
        return " ".join([kind, *map(str, _rules(hint, Bounds))])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in arguments if part is not type(None)))
    if origin is list:
        return f"a list of {_PLURALS.get(arguments[0], 'values')}"
    return _NAMES.get(origin or hint, getattr(hint, "__name__", str(hint)))


def short(hint: Any) -> str:
    """A type with its bounds or choices, in the fewest signs: `int ≥ 1 | None`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind = "mapping" if _rules(hint, Json) else short(arguments[0])
        return " ".join([kind, *map(str, _rules(hint, Bounds))])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(short, arguments))
    return "None" if hint is type(None) else hint.__name__ if isinstance(hint, type) and not arguments else str(hint)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "words"}


@functools.cache
def _own_hints(options_class: type[Any]) -> dict[str, Any]:
    """The types of the fields that are ours to check."""
    declared: dict[str, bool] = {}
    for base in reversed(options_class.__mro__):
        is_ours = base.__module__.partition(".")[0] not in _CHECKED_ELSEWHERE
        declared |= dict.fromkeys(inspect.get_annotations(base), is_ours)
    hints = get_type_hints(options_class, include_extras=True)
    names = [field.name for field in dataclasses.fields(options_class) if field.init and declared[field.name]]
    return {name: hints[name] for name in names}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, and within its bounds. What is not known here is left to the class itself."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if isinstance(value, Mapping) and _rules(hint, AlsoMapping):
            return True
        rules = [rule for rule in arguments[1:] if hasattr(rule, "admits")]
        return _fits(value, arguments[0]) and all(rule.admits(value) for rule in rules)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if hint in _ACCEPTED:
        return isinstance(value, _ACCEPTED[hint]) and not (isinstance(value, bool) and hint in (int, float))
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


_ACCEPTED: dict[Any, Any] = {int: int, float: (int, float), bool: bool, str: (str, os.PathLike), Any: object}


def _plain(hint: Any) -> Any:
    """A type without bounds and choices: what is wrong with a value of this type is not its type."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_plain(part) for part in get_args(hint))]  # noqa: UP007  # made at run time
    return Union[tuple(map(type, get_args(hint)))] if get_origin(hint) is Literal else hint  # noqa: UP007


def _choices(hint: Any) -> list[str]:
    """The words that an option takes, if it takes only some."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    if get_origin(hint) in (Union, types.UnionType):
        return [name for part in get_args(hint) for name in _choices(part)]
    return [name for table in _rules(hint, OneOf) for name in table.names]


def _rules(hint: Any, kind: type[Rule]) -> list[Rule]:
    """What an annotation, or a part of a union, carries of one kind."""
    if get_origin(hint) in (Union, types.UnionType):
        return [rule for part in get_args(hint) for rule in _rules(part, kind)]
    return [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, kind)]
