"""An option is written once: its field, its check, its parser and its message agree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pytest
from trl import ModelConfig, TrlParser

from trl_reasoning_distill.options import (
    Bounds,
    Count,
    JsonMapping,
    NamedWords,
    OneOf,
    Positive,
    Share,
    check_options,
    describe,
    option,
    short,
)

TABLE = {"forward_kl": 1, "jsd": 2}


@dataclass(kw_only=True)
class Base:
    store: str = option(help="Where 100% of it is. Required.")


@dataclass(kw_only=True)
class Arguments(Base):
    top_k: Count | None = option(None, "Ids kept.", aliases=["k"])
    temperature: Positive = option(2.0, "T.")
    share: Share = option(0.5, "A share.")
    overlong: Literal["drop", "truncate"] | None = option("drop", "What happens.")
    divergence: Annotated[str, OneOf(TABLE)] = option("jsd", "Which.")
    preset: Annotated[str, OneOf(MappingProxyType(TABLE))] | None = option(None, "None of them, or one.")
    names: list[str] = option(["all"], "Several.")
    models: NamedWords = option([], "Named.")
    columns: JsonMapping | None = option(None, "Mapping or JSON.")
    scale: bool = option(True, "Whether.")

    def __post_init__(self) -> None:
        check_options(self)


def test_a_parser_reads_the_plain_types() -> None:
    parser = TrlParser((Arguments,))
    (parsed,) = parser.parse_args_and_config(["--store", "s", "--k", "3", "--models", "a=b", "--no_scale"])
    assert parsed == Arguments(store="s", top_k=3, models=["a=b"], scale=False)
    assert "Where 100% of it is" in parser.format_help()


def test_a_list_is_copied_for_each_instance() -> None:
    Arguments(store="s").names.append("more")
    assert Arguments(store="s").names == ["all"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 0}, r"`top_k=0`: must be a whole number ≥ 1\.$"),
        ({"top_k": 2.7}, r"`top_k=2\.7`: must be a whole number ≥ 1, found float\.$"),
        ({"top_k": True}, r"found bool"),
        ({"temperature": float("nan")}, r"`temperature=nan`: must be a number > 0\.$"),
        ({"temperature": "2"}, r"found str"),
        ({"share": 1.5}, r"must be a number ≥ 0 and ≤ 1\.$"),
        ({"overlong": "drp"}, r"`overlong='drp'`: must be one of 'drop', 'truncate'\. Did you mean 'drop'\?"),
        ({"overlong": 3}, r"must be one of 'drop', 'truncate', found int"),
        ({"divergence": "kl"}, r"must be one of 'forward_kl', 'jsd'"),
        ({"preset": "jds"}, r"must be one of 'forward_kl', 'jsd'\. Did you mean 'jsd'\?"),
        ({"names": "all"}, r"must be a list of words, found str"),
        ({"names": [1]}, r"must be a list of words"),
        ({"columns": 3}, r"must be a mapping, found int"),
        ({"columns": "a: b"}, r"columns='a: b' is not JSON .*; write it like"),
        ({"columns": "[1]"}, r"is JSON, but not an object"),
        ({"scale": "no"}, r"must be true or false, found str"),
        ({"store": 2024}, r"must be text, found int"),
        ({"store": None}, r"must be text, found NoneType"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_can(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arguments(**{"store": "s", **values})


def test_what_fits_is_taken() -> None:
    Arguments(store=Path("s"), models={"a": "b"}, columns={"a": 1}, temperature=1, overlong=None)  # type: ignore[arg-type]


def test_json_of_a_command_line_becomes_the_mapping() -> None:
    assert Arguments(store="s", columns='{"question": "prompt"}').columns == {"question": "prompt"}


def test_a_table_that_grows_is_looked_at_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "mine", 3)
    assert Arguments(store="s", divergence="mine").divergence == "mine"


def test_fields_of_others_are_theirs_to_check() -> None:
    @dataclass
    class Student(ModelConfig):
        rank: Count = option(8, "Rank.")

        def __post_init__(self) -> None:
            check_options(self)

    Student(lora_r="of TRL")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`rank=0`"):
        Student(rank=0)


def test_types_in_words_and_in_signs() -> None:
    hint = Annotated[int, Bounds(ge=1, lt=9)] | None
    assert (describe(hint), short(hint)) == ("a whole number ≥ 1 and < 9", "int ≥ 1 and < 9 | None")
    assert (describe(JsonMapping | None), short(JsonMapping)) == ("a mapping", "mapping")
    assert short(Literal["drop", "truncate"]) == "drop | truncate"
