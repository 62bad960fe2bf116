"""YAML by the rules of version 1.2: no number that could be two, no key twice, no code, no bomb."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_reasoning_distill.config_files import ENVIRONMENT, MOST_VALUES, environment_of, read_config


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "a.yaml"


def read(path: Path, text: str) -> Any:
    path.write_text(text, encoding="utf-8")
    return read_config(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("12", 12),
        ("+12", 12),
        ("0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("1e", "1e"),
        ("2.7.1", "2.7.1"),
        ("true", True),
        ("yes", "yes"),
        ("on", "on"),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("'0100'", "0100"),
        ("'1:30'", "1:30"),
    ],
)
def test_scalars(path: Path, text: str, value: object) -> None:
    found = read(path, f"key: {text}\n")["key"]
    assert found == value
    assert type(found) is type(value)


NUMBERS_IN_DOUBT = [
    "0100",
    "-012",
    "08",
    "00",
    "1:30",
    "190:20:30",
    "190:20:30.15",
    "1_000",
    "1_0.5",
    "0b11",
    "0x1_F",
    "0o18",
    "00.5",
]


@pytest.mark.parametrize("text", NUMBERS_IN_DOUBT)
@pytest.mark.parametrize(
    "document", ["a: 1\nkey: {}\n", "%YAML 1.1\n---\nkey: {}\n", "a: 2\nkey: [1, {}]\n", "a: 1\n{}: 2\n"]
)
def test_a_number_that_could_be_another_is_refused_with_its_line(path: Path, text: str, document: str) -> None:
    line = document.split("{}")[0].count("\n") + 1
    with pytest.raises(ValueError, match=rf"a\.yaml, line {line}: '{text}' is one number to YAML 1\.1"):
        read(path, document.format(text))


@given(
    st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
    | st.text(string.printable, max_size=8)
)
def test_what_json_writes_is_read_as_it_is(path: Path, value: Any) -> None:
    import json

    assert read(path, json.dumps({"key": value, "list": [value]})) == {"key": value, "list": [value]}


def bomb(levels: int) -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    names = string.ascii_lowercase
    lines += [f"{names[n]}: &{names[n]} [{', '.join([f'*{names[n - 1]}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", 'line 2: found duplicate key "a"\\.$'),
        ("b: {a: 1, a: 2}\n", 'line 1: found duplicate key "a"'),
        ("- a\n", r"expected a mapping of option names to values, found \['a'\]"),
        ("1: 2\n", "expected a mapping of option names to values, found 1"),
        ("a: [3\n", r"line \d: "),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("a: &a [*a]\n", "line 1: an anchor stands inside itself"),
        (bomb(9), f"line 4: more than {MOST_VALUES:,} values, anchors written out"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_no_config_is_one_line(path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(path, text)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


def test_anchors_are_read_while_they_stay_small(path: Path) -> None:
    assert read(path, "b: &b {x: 1}\na: {<<: *b, y: 2}\n")["a"] == {"x": 1, "y": 2}
    assert len(read(path, bomb(3))["c"]) == 10


def test_other_encodings_are_one_line(path: Path) -> None:
    assert read(path, "\ufeffa: 1\n") == {"a": 1}
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match="not YAML in UTF-8"):
        read_config(path)
    with pytest.raises(FileNotFoundError, match="No config file at"):
        read_config(path.with_name("none.yaml"))


REFUSED = [
    *("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "PATH", "BASH_ENV", "ENV", "GIT_SSH_COMMAND", "GIT_EXTERNAL_DIFF"),
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_MODULES_CACHE", "WANDB_API_KEY", "WANDB_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"),
    *("NCCL_NET_PLUGIN", "NCCL_CONF_FILE", "TORCHINDUCTOR_CACHE_DIR", "CC", "EDITOR", "PAGER", "RANK", "TRD_COMMAND", "omp_num_threads"),
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_variables_that_could_run_code_or_hold_a_secret_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.yaml: `env` may not set {name}: "):
        environment_of({"env": {"OMP_NUM_THREADS": 1, name: "x"}}, "x.yaml")


def test_variables_that_tune_are_taken_as_text() -> None:
    assert environment_of({"env": {"OMP_NUM_THREADS": 2, "WANDB_PROJECT": "p"}}, "x") == {
        "OMP_NUM_THREADS": "2",
        "WANDB_PROJECT": "p",
    }
    assert environment_of({}, "x") == environment_of({"env": None}, "x") == {}
    for wrong in (3, {"OMP_NUM_THREADS": [1]}, ["OMP_NUM_THREADS"]):
        with pytest.raises(ValueError, match="`env` must be a mapping"):
            environment_of({"env": wrong}, "x")


def test_no_variable_of_the_list_is_one_that_loads_code() -> None:
    assert not [
        name
        for name in ENVIRONMENT
        if "PLUGIN" in name or "TOKEN" in name.split("_") or "KEY" in name or name.endswith("PATH")
    ]
