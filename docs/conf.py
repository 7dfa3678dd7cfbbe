"""Sphinx makes the site and the manual pages of this: see `make docs`. The pages themselves are plain Markdown."""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "nbdkitpy"
author = "the nbdkitpy authors"
copyright = author  # the name is Sphinx's
_found = re.search(r'^__version__ = "(.+)"$', (ROOT / "nbdkitpy" / "__init__.py").read_text(), re.MULTILINE)
assert _found is not None
release = version = _found[1]

extensions = ["myst_parser"]
# The source directory is the whole repository, as READMEs stand where people look for them.
include_patterns = ["*.md", "docs/*.md", "systemd/*.md", "benchmarks/*.md", "plugins/*/*/*.md", "filters/*/*/*.md"]
root_doc = "docs/index"
highlight_language = "none"  # of blocks that do not say what they are
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
nitpicky = True

html_theme = "alabaster"
html_theme_options = {"description": "Network block devices, from Python", "fixed_sidebar": True}

man_pages = [
    ("docs/options", "nbdkitpy", "serve network block devices", [author], 1),
    ("docs/service", "nbdkitpy-service", "run nbdkitpy as a service", [author], 1),
]
man_make_section_directory = False


def setup(app: Sphinx) -> None:
    """Register what is done to pages."""
    app.connect("doctree-resolved", _without_links)


def _without_links(app: Sphinx, page: nodes.document, name: str) -> None:
    # In a manual page there is nothing that a link to another page could lead to, but an empty <> would be shown.
    if app.builder.name == "man":
        for link in list(page.findall(nodes.reference)):
            if link.get("internal"):
                link.replace_self(link.children)
