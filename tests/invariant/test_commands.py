"""Every command that a page shows is real: its stage, its options, its files."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest

from trl_reasoning_distill.doctor.command import make_parser
from trl_reasoning_distill.scripts import STAGES, source
from trl_reasoning_distill.scripts.command import check_known

REPOSITORY = Path(__file__).resolve().parents[2]
STARTS = ("trl-distill ", "accelerate launch ", "python benchmarks/", "sbatch ", "make ")
OTHER = ("run", "recipes", "chat")


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, indented or fenced, continued lines joined, variables before them left out."""
    lines, is_fenced = [], False
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            is_fenced = line.startswith("```bash")
        elif is_fenced or line.startswith("    "):
            words = line.split()
            while words and "=" in words[0] and not words[0].startswith("-"):
                words.pop(0)
            lines.append(" ".join(words))
    return [words for line in lines if line.startswith(STARTS) and (words := shlex.split(line, comments=True))]


PAGES = {
    str(page.relative_to(REPOSITORY)): page
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "recipes/*/README.md")
    for page in sorted(REPOSITORY.glob(pattern))
    if commands(page)
}


def check(words: list[str]) -> None:
    """Refuse a command that would not start."""
    if words[0] == "make":
        targets = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        assert len(words) == 1 or f"\n{words[1]}:" in targets, words
        return
    if words[0] == "python":
        text = Path(words[1]).read_text(encoding="utf-8") + (REPOSITORY / "benchmarks/harness.py").read_text()
        for word in words[2:]:
            name = word.removeprefix("--").partition("=")[0]
            assert not word.startswith("--") or f'"--{name}"' in text or f'"{name}":' in text, words
        return
    if words[0] in ("accelerate", "sbatch"):
        script = next(word for word in words if word.startswith("recipes/"))
        assert Path(script).is_file(), words
        words = words[words.index(script) + (words[0] == "sbatch") :]
        name = words[0] if script.endswith(".sbatch") else Path(script).stem
    else:
        name = words[1]
    name = "select" if name == "select_traces" else name
    if name == "doctor":
        make_parser().parse_args(words[2:])
        return
    if name not in STAGES:
        assert name in OTHER or name.startswith("-"), words
        return
    known = [
        *source.known_flags(source.read_options(source.script_path(name))),
        *source.launcher_flags(),
        "--accelerate_config",
        "--help",
    ]
    flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--config"]
    check_known(flags, known, str(words))
    for word, after in itertools.pairwise(words):
        if word == "--config" and after.startswith("recipes/"):
            assert Path(after).is_file(), words


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_are_real(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for words in commands(PAGES[page]):
        check(words)


def test_every_recipe_shows_its_commands() -> None:
    recipes = {path.parent.name for path in REPOSITORY.glob("recipes/*/README.md")}
    assert {f"recipes/{name}/README.md" for name in recipes} <= set(PAGES)


@pytest.mark.parametrize(
    "words",
    [
        ["trl-distill", "sft", "--learning_rat", "1"],
        ["trl-distill", "stf"],
        ["trl-distill", "sft", "--config", "recipes/quickstart/nothing.yaml"],
        ["make", "cake"],
        ["accelerate", "launch", "recipes/nothing.py"],
        ["python", "benchmarks/loss.py", "--fast"],
    ],
)
def test_the_check_would_notice(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((AssertionError, ValueError)):
        check(words)
