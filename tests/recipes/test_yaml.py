"""Every recipe that ships parses with the parsers of its stages."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from trl_reasoning_distill import launch, pipeline
from trl_reasoning_distill.config_files import read_config
from trl_reasoning_distill.pipeline import read_recipe
from trl_reasoning_distill.scripts.stage import parse_stage
from trl_reasoning_distill.shipped import RECIPE_NAME

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.parent for path in REPOSITORY.glob(f"recipes/*/{RECIPE_NAME}"))


def test_every_recipe_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert RECIPES
    for recipe in RECIPES:
        assert f'"recipes" / "{recipe.name}"' in tests, recipe.name


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
def test_its_readme_says_what_it_takes_and_what_it_gives(recipe: Path) -> None:
    text = (recipe / "README.md").read_text(encoding="utf-8")
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    for part in ("Hardware, time and memory", "result", "Variations"):
        assert any(part.lower() in heading.lower() for heading in headings), f"no section on {part}"
    assert f"trl-distill run recipes/{recipe.name}" in text
    for item in read_recipe(recipe):
        assert f"`{item.name}`" in text, item.name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_dry_run_plans_every_stage(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(launch, "run_in_process", lambda name, words: None)  # their models and data are elsewhere
    pipeline.main([f"recipes/{recipe.name}", "--runs_dir", str(tmp_path), "--dry_run"])
    planned = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert planned == [item.name for item in read_recipe(recipe)]
    assert list(tmp_path.iterdir()) == []
