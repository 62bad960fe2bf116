"""Every recipe that ships parses with the parsers of its stages."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from trl_reasoning_distill.pipeline import RECIPE_NAME, RecipeStage, read_recipe
from trl_reasoning_distill.scripts.stage import parse_stage, read_config

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.parent for path in REPOSITORY.glob(f"recipes/*/{RECIPE_NAME}"))
STAGES = [pytest.param(item, id=f"{recipe.name}-{item.name}") for recipe in RECIPES for item in read_recipe(recipe)]


def test_there_are_recipes_and_each_has_a_summary() -> None:
    assert RECIPES
    for recipe in RECIPES:
        assert read_config(recipe / RECIPE_NAME).get("summary")


@pytest.mark.parametrize("item", STAGES)
def test_a_stage_of_a_recipe_parses(item: RecipeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    parser = importlib.import_module(f"trl_reasoning_distill.scripts.{item.script}").make_parser()
    parsed = parse_stage(parser, item.words)
    assert any(getattr(options, "output_dir", None) == item.options["output_dir"] for options in parsed)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_no_yaml_of_a_recipe_is_left_out(recipe: Path) -> None:
    used = {item.config_path for item in read_recipe(recipe)} | {recipe / RECIPE_NAME}
    assert set(recipe.glob("*.yaml")) == used
