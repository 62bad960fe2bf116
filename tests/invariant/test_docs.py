"""Every link between the pages leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
FOLDERS = ("docs", "recipes")


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
