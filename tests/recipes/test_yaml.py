"""Every recipe that ships parses with the parsers of its stages."""

from __future__ import annotations

import importlib
import itertools
import shlex
from pathlib import Path

import pytest
import torch

from trl_reasoning_distill import launch, pipeline
from trl_reasoning_distill.pipeline import read_recipe
from trl_reasoning_distill.scripts import STAGES, options
from trl_reasoning_distill.scripts.stage import check_known, parse_stage, read_config
from trl_reasoning_distill.shipped import RECIPE_NAME

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.parent for path in REPOSITORY.glob(f"recipes/*/{RECIPE_NAME}"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_stage_parses_and_no_yaml_is_left_out(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert read_config(recipe / RECIPE_NAME).get("summary")
    stages = read_recipe(recipe)
    for item in stages:
        parser = importlib.import_module(f"trl_reasoning_distill.scripts.{item.script}").make_parser()
        # A recipe for a GPU asks for bf16, which transformers refuses on a CPU that was not asked for
        words = ["--use_cpu", "true"] if item.options.get("bf16") and not torch.cuda.is_available() else []
        parsed = parse_stage(parser, item.words + words)
        assert any(getattr(options, "output_dir", None) == item.options["output_dir"] for options in parsed), item.name
    assert set(recipe.glob("*.yaml")) == {item.source for item in stages} | {recipe / RECIPE_NAME}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_dry_run_plans_every_stage(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    pipeline.main([f"recipes/{recipe.name}", "--runs_dir", str(tmp_path), "--dry_run"])
    planned = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert planned == [item.name for item in read_recipe(recipe)]
    assert list(tmp_path.iterdir()) == []


def _commands(page: Path) -> list[list[str]]:
    """The commands of a page that start a stage, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    split = [
        shlex.split(line, comments=True) for line in lines if line.startswith(("trl-distill ", "accelerate launch "))
    ]
    return [words for words in split if words]


@pytest.mark.parametrize("page", sorted(REPOSITORY.glob("recipes/*/README.md")), ids=lambda page: page.parent.name)
def test_the_readmes_commands_are_real(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their stages, options and files are there."""
    monkeypatch.chdir(REPOSITORY)
    commands = _commands(page)
    assert commands
    for words in commands:
        if words[0] == "accelerate":
            script = next(word for word in words if word.startswith("recipes/"))
            name, words = Path(script).stem, words[words.index(script) :]
        else:
            name = words[1]
        if name not in STAGES:
            assert name in ("run", "recipes", "doctor", "chat"), words
            continue
        known = [
            *options.known_flags(options.read_options(launch.script_path(name))),
            *options.launcher_flags(),
            "--accelerate_config",
        ]
        check_known(
            [word.partition("=")[0] for word in words if word.startswith("--") and word != "--config"],
            known,
            str(words),
        )
        assert all(Path(after).is_file() for word, after in itertools.pairwise(words) if word == "--config"), words
