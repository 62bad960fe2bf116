"""Every link between the pages leads somewhere, and every name they speak of exists."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from trl_reasoning_distill.scripts import STAGES

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
FOLDERS = ("docs", "recipes")
BLOCK = re.compile(r"```.*?```", re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"(?<![\w./-])[a-z][a-z0-9]*_\w+(?![\w/]|\.\w)")
NAMES_OF_OTHERS = {"weights_only", "restore_callback_states_from_checkpoint"}  # of torch.load and TrainingArguments


def broken_links(root: Path) -> list[str]:
    """Relative links of the Markdown pages that lead nowhere, as `page: link`."""
    return [
        f"{page.relative_to(root)}: {link}"
        for page in _pages(root)
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in link and not link.startswith("mailto:") and not (page.parent / link).exists()
    ]


def _pages(root: Path) -> Iterator[Path]:
    yield from root.glob("*.md")
    for folder in FOLDERS:
        yield from (root / folder).rglob("*.md")


def test_no_link_is_broken(repository: Path) -> None:
    assert broken_links(repository) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("[here](docs/a.md#part) [there](https://example.org) [lost](docs/b.md)")
    (tmp_path / "docs" / "a.md").write_text("[back](../README.md) ![none](c.png)")
    assert broken_links(tmp_path) == ["README.md: docs/b.md", "docs/a.md: c.png"]


def test_the_tables_of_options_are_those_of_the_source(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("option_tables", repository / "docs" / "option_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for stage in STAGES:
        page = tables.PAGES / f"{stage}.md"
        text = page.read_text(encoding="utf-8")
        assert text.count(tables.MARK) == 1, f"{page} has no `{tables.MARK}`"
        assert text == tables.updated(page), f"{page} is not up to date: run `make fmt`"


def unknown_names(root: Path) -> list[str]:
    """Names such as `kd_weight` that a page speaks of and no code, recipe or test knows, as `page: name`."""
    sources = [
        path
        for folder in ("trl_reasoning_distill", "recipes", "accelerate_configs", "benchmarks", "tests")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".j2", ".sbatch") and path != Path(__file__)
    ]
    known = set(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in sources))) | NAMES_OF_OTHERS
    return [
        f"{page.relative_to(root)}: {name}"
        for page in _pages(root)
        for code in CODE.findall(_own_text(page))
        for name in NAME.findall(code)
        if name not in known
    ]


def _own_text(page: Path) -> str:
    """A page without its blocks of code, and without the column in which the migration page has other projects' names."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE) if page.name == "migration.md" else text


def test_no_page_speaks_of_a_name_that_is_gone(repository: Path) -> None:
    assert unknown_names(repository) == []


def test_a_name_that_is_gone_is_found(tmp_path: Path) -> None:
    (tmp_path / "trl_reasoning_distill").mkdir()
    (tmp_path / "trl_reasoning_distill" / "config.py").write_text("kd_weight: float = 1.0")
    (tmp_path / "README.md").write_text("`kd_weight: 3` and `kd_wait`\n```\n`kd_code`\n```\n")
    assert unknown_names(tmp_path) == ["README.md: kd_wait"]


INNER_IMPORT = re.compile(r"^(?:from|import) trl_reasoning_distill\.\S+.*$", re.MULTILINE)


def taught_inner_names(root: Path) -> list[str]:
    """Imports on a page or in an example that are not of a public name, as `page: import`."""
    files = [*_pages(root), *(root / "examples").glob("*.py")]
    return [
        f"{file.relative_to(root)}: {found}"
        for file in files
        for found in INNER_IMPORT.findall(file.read_text(encoding="utf-8"))
    ]


def test_pages_and_examples_teach_public_names(repository: Path) -> None:
    assert taught_inner_names(repository) == []


def test_an_inner_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("```python\nfrom trl_reasoning_distill.data.files import hash_path\n```\n")
    assert taught_inner_names(tmp_path) == ["README.md: from trl_reasoning_distill.data.files import hash_path"]


IMAGES = re.compile(r"\b(road|house|foretold|foretells?|torment|in peace|rooms)\b", re.IGNORECASE)
"""Words that stood for a stage, the code, a prediction or a file's folder; the field's own words say it."""


def images(root: Path) -> list[str]:
    """Where the package or a page uses one of them, as `file:line: text`."""
    files = [
        *(root / "trl_reasoning_distill").rglob("*.py"),
        *(root / "trl_reasoning_distill").rglob("*.j2"),
        *_pages(root),
    ]
    return [
        f"{file.relative_to(root)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if IMAGES.search(line)
    ]


def test_plain_words(repository: Path) -> None:
    assert images(repository) == []


def test_an_image_is_found(tmp_path: Path) -> None:
    (tmp_path / "trl_reasoning_distill").mkdir()
    (tmp_path / "trl_reasoning_distill" / "a.py").write_text("# as far as it can be foretold\nx = 'broadcast'\n")
    assert images(tmp_path) == ["trl_reasoning_distill/a.py:1: # as far as it can be foretold"]
