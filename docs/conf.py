"""Sphinx makes the site and the manual pages of this: see `make docs`. The pages themselves are plain Markdown."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbdkitpy

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

project = "nbdkitpy"
author = "the nbdkitpy authors"
copyright = author  # the name is Sphinx's
release = version = nbdkitpy.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
# The source directory is the whole repository, as READMEs stand where people look for them.
include_patterns = [
    "*.md",
    "docs/*.md",
    "systemd/*.md",
    "benchmarks/*.md",
    "fuzz/*.md",
    "plugins/*/*/*.md",
    "filters/*/*/*.md",
]
root_doc = "docs/index"
highlight_language = "none"  # of blocks that do not say what they are
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|enum|os|socket|ssl|threading|typing)\b.*"),  # Python's own is not looked for
    # Signatures have these, but nobody needs to name them.
    ("py:.*", r"(\w+\.)*(_\w+|T|Conformance|FilterLayer|OptionAnswer|Parameters|Request|Where)"),
    ("py:class", r"list\[tuple\[int"),  # a type that is cut in two
]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False

html_theme = "alabaster"
html_theme_options = {"description": "Network block devices, from Python", "fixed_sidebar": True}
html_extra_path = ["site"]


def units() -> Iterator[tuple[str, str, str]]:
    """Yield kind, name and module of each plugin and filter that comes with the package."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for kind in ("plugin", "filter"):
        yield from ((kind, name, module) for name, module in groups[f"nbdkitpy.{kind}s"].items())


def manual_page(kind: str, name: str, module: str) -> tuple[str, str, str, list[str], int]:
    """Return what Sphinx wants to know of the manual page of a unit, which is its README."""
    classes: list[type[nbdkitpy.Backend]] = []
    getattr(importlib.import_module(module), f"register_{kind}s")(classes.append)
    (description,) = [cls.description for cls in classes if cls.name == name]
    summary = description[0].lower() + description[1:].rstrip(".")
    return f"{kind}s/{module.replace('.', '/')}/README", f"nbdkitpy-{name}-{kind}", summary, [author], 1


man_pages = [
    ("docs/options", "nbdkitpy", "serve network block devices", [author], 1),
    ("docs/service", "nbdkitpy-service", "run nbdkitpy as a service", [author], 1),
    *(manual_page(*unit) for unit in units()),
]
man_make_section_directory = False


def setup(app: Sphinx) -> None:
    """Register what is done to pages."""
    app.connect("autodoc-process-docstring", _with_sections)
    app.connect("missing-reference", _public_name)
    app.connect("doctree-resolved", _without_links)


def _with_sections(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    # Reads Args: and Raises:. In place of the extension, which takes what stands before a colon for a type where an
    # attribute is described.
    from sphinx.ext.napoleon import Config, GoogleDocstring

    if lines[:1] and lines[0].startswith("Alias for field number"):  # of a NamedTuple: nothing that is not seen
        lines.clear()
    elif what not in ("attribute", "data"):
        lines[:] = GoogleDocstring(lines, Config(), app, what, name, obj, options).lines()


def _public_name(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> nodes.Element | None:
    # Signatures name classes by the module that they are written in, the reference by the one they are imported from.
    module, _, name = node["reftarget"].rpartition(".")
    for public in ("nbdkitpy", "nbdkitpy.testing"):
        if module.startswith("nbdkitpy.") and module != public and name in importlib.import_module(public).__all__:
            domain = env.get_domain("py")
            target = f"{public}.{name}"
            found: nodes.Element | None = domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", target, node, contnode
            )
            return found
    return None


def _without_links(app: Sphinx, page: nodes.document, name: str) -> None:
    # In a manual page there is nothing that a link to another page could lead to, but an empty <> would be shown.
    from docutils import nodes

    if app.builder.name == "man":
        for link in list(page.findall(nodes.reference)):
            if link.get("internal"):
                link.replace_self(link.children)
