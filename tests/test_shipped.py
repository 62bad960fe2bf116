"""Recipes and accelerate configs reach a user who has only the wheel."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from trl_reasoning_distill import cli
from trl_reasoning_distill.pipeline import read_recipe
from trl_reasoning_distill.shipped import copy_recipe, find_recipe, shipped_recipes

REPOSITORY = Path(__file__).parent.parent
RECIPES = [recipe.name for recipe in shipped_recipes()]


def test_every_recipe_folder_is_listed_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["recipes"])
    text = capsys.readouterr().out
    for recipe in shipped_recipes():
        assert recipe.summary
        assert f"{recipe.name} " in text
        assert recipe.summary in text
    assert sorted(path.parent.name for path in REPOSITORY.glob("recipes/*/recipe.yaml")) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_runs_by_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["recipes", "copy", name, "mine"])
    copied, original = read_recipe(Path("mine")), read_recipe(find_recipe(name).path)
    assert [item.name for item in copied] == [item.name for item in original]
    for item in copied:
        assert str(item.output_dir).startswith("runs/mine/")
        text = item.source.read_text()
        assert f"runs/{name}" not in text
        assert f"recipes/{name}" not in text


def test_a_copy_brings_the_files_that_its_yaml_names(tmp_path: Path) -> None:
    copied = copy_recipe("quickstart", tmp_path / "mine")
    (generate,) = (item for item in read_recipe(copied) if item.name == "generate")
    assert (Path(generate.options["teacher"]) / "model.safetensors").is_file()


def test_a_copy_that_builds_on_another_recipe_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart_gkd"):
        cli.main(["recipes", "copy", name, f"recipes/{name}"])
        needs_other = "trl-distill recipes copy quickstart recipes/quickstart`" in capsys.readouterr().out
        assert needs_other == (name == "quickstart_gkd")
    (gkd,) = (item for item in read_recipe(Path("recipes/quickstart_gkd")) if item.name == "gkd")
    assert (Path(gkd.options["model_name_or_path"]) / "model.safetensors").is_file()


def test_a_copy_never_overwrites_and_a_typo_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is there already"):
        copy_recipe("quickstart", tmp_path)
    with pytest.raises(ValueError, match="quickstart"):
        copy_recipe("quickstrat", tmp_path / "mine")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    pytest.importorskip("hatchling", reason="pip install hatchling: what builds the package")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_wheel_holds_recipes_and_configs_and_no_tests(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    package = "trl_reasoning_distill"
    assert {f"{package}/py.typed", f"{package}/evaluation/templates/report.html.j2"} <= names
    assert {f"{package}/recipes/{name}/recipe.yaml" for name in RECIPES} <= names
    assert f"{package}/recipes/quickstart/models/teacher/model.safetensors" in names
    assert f"{package}/accelerate_configs/zero3.yaml" in names
    assert not [
        name
        for name in names
        if name.startswith(("tests/", "benchmarks/", "docs/", "examples/")) or "__pycache__" in name
    ]
    code = (
        "from trl_reasoning_distill import cli, launch, shipped; cli.main(['recipes']); "
        "print(shipped.__file__, launch.resolve_accelerate_config('zero2'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in RECIPES)
    assert f"{tmp_path}/{package}/shipped.py {tmp_path}/{package}/accelerate_configs/zero2.yaml" in result.stdout


def test_the_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    wanted = {
        "trl_reasoning_distill",
        "recipes",
        "accelerate_configs",
        "examples",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert wanted <= tops
    assert not tops & {"tests", "benchmarks", "docs", "runs"}
