"""The pages of the documentation: which there are, and what is in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Directories that hold what was made, not what was written.
MADE = re.compile(r"\.(?!ci$).*|build|dist|htmlcov|__pycache__|.*\.egg-info")


def repository_files() -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(ROOT):
        subdirectories[:] = [name for name in subdirectories if not MADE.fullmatch(name)]
        yield from (Path(directory, name) for name in files if not name.startswith(".coverage"))


MARKDOWN = sorted(path for path in repository_files() if path.suffix == ".md")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """The text of a page without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def headings(path: Path, level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", prose(path), re.MULTILINE)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def section_of(path: Path, heading: str) -> str:
    """What stands on a page under a heading of the second level."""
    return path.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
