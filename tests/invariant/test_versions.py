"""The versions that are declared, tested and told are the same ones."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import trl_reasoning_distill

UNTESTED_BELOW = {"torch"}
"""Whose lowest tested version is above the declared one; constraints-lowest.txt says why."""

NOT_IN_LOWEST = {"vllm", "docs", "dev", "all"}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(project: dict[str, Any], without: set[str]) -> dict[str, Requirement]:
    """The dependencies and those of the extras by name, but for the extras `without` and the package itself."""
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in without}
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    found = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}
    return {name: requirement for name, requirement in found.items() if name != project["name"]}


def pins(file: Path) -> dict[str, Version]:
    """What a constraints file pins."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_the_lowest_set_is_what_is_declared(project: dict[str, Any], repository: Path) -> None:
    declared = {
        name: min(Version(part.version) for part in requirement.specifier if part.operator == ">=")
        for name, requirement in requirements(project, NOT_IN_LOWEST).items()
    }
    lowest = pins(repository / "constraints-lowest.txt")
    for name in UNTESTED_BELOW:
        assert lowest.pop(name) >= declared.pop(name)
    assert lowest == declared


def test_the_tested_set_fits_what_is_declared(project: dict[str, Any], repository: Path) -> None:
    tested = pins(repository / "constraints.txt")
    for name, requirement in requirements(project, {"all"}).items():
        if name not in ("vllm", "triton"):  # one is not installed with the others, the other follows from torch
            assert str(tested[name]) in requirement.specifier, name


def test_the_version_is_told_the_same_everywhere(project: dict[str, Any], repository: Path) -> None:
    citation = (repository / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE).group(1) == project["version"]
    changelog = re.findall(r"^## (.+)$", (repository / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changelog[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(project['version'])} – \d{{4}}-\d\d-\d\d", changelog[1])
    assert trl_reasoning_distill.__version__ == project["version"]
