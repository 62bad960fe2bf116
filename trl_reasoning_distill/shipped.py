"""The folders that come with the package: `recipes/` and `accelerate_configs/`.

In a checkout they stand beside the package, in a wheel inside it.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from trl_reasoning_distill.config_files import read_config

_PACKAGE = Path(__file__).resolve().parent
_TEXT = (".yaml", ".md", ".jinja", ".sbatch", ".sh")
RECIPE_NAME = "recipe.yaml"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package."""

    name: str
    summary: str
    path: Path


def shipped_folder(name: str) -> Path:
    """Where `recipes` or `accelerate_configs` stands."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def shipped_recipes() -> list[ShippedRecipe]:
    """The recipes that come with the package, by name."""
    found = []
    for path in sorted(shipped_folder("recipes").glob(f"*/{RECIPE_NAME}")):
        summary = str(read_config(path).get("summary", ""))
        found.append(ShippedRecipe(path.parent.name, summary, path.parent))
    return found


def find_recipe(name: str) -> ShippedRecipe:
    """The shipped recipe of this name.

    Raises:
        ValueError: If there is none, with the names there are.
    """
    recipes = {recipe.name: recipe for recipe in shipped_recipes()}
    if name not in recipes:
        raise ValueError(f"No recipe {name!r} comes with this package; there are {', '.join(recipes)}.")
    return recipes[name]


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a recipe for a user to edit, and make its own paths those of the copy.

    A recipe names its results `runs/NAME/…` and its own files `recipes/NAME/…`; in the copy these become `runs/TARGET/…` and the
    target's path, so that original and copy never write into one folder.

    Raises:
        ValueError: If there is no such recipe.
        FileExistsError: If the target is there already.
    """
    recipe = find_recipe(name)
    if target.exists():
        raise FileExistsError(f"{target} is there already; give a folder that is not, or remove it first.")
    shutil.copytree(recipe.path, target, ignore=shutil.ignore_patterns("__pycache__"))
    for path in sorted(target.rglob("*")):
        if path.suffix in _TEXT and path.is_file():
            text = path.read_text(encoding="utf-8")
            moved = text.replace(f"recipes/{name}", target.as_posix()).replace(
                f"runs/{name}", f"runs/{target.resolve().name}"
            )
            path.write_text(moved, encoding="utf-8")
    return target


def other_recipes(recipe: Path) -> list[str]:
    """Shipped recipes whose files or results the YAMLs of a recipe's folder name, but for its own."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(recipe.glob("*.yaml")))
    named = set(re.findall(r"\b(?:recipes|runs)/([\w-]+)/", text)) - {recipe.resolve().name}
    return [other.name for other in shipped_recipes() if other.name in named]
