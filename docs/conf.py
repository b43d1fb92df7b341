"""How Sphinx builds these pages: `make docs`, or `sphinx-build -W docs docs/_build/html`.

Nothing is fetched while building or reading: no intersphinx, MathJax from an installed package, no fonts.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from functools import cached_property
from typing import Any, Literal, get_origin

from docutils import nodes
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

from mdm_interp import config

project = "mdm_interp"
author = "The mdm_interp authors"
release = version = importlib.metadata.version("mdm-interp")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
extensions += ["sphinx.ext.mathjax", "sphinx-mathjax-offline"]  # in this order: the second says where MathJax is
exclude_patterns = ["_build"]
myst_enable_extensions = ["attrs_block", "deflist", "dollarmath"]
myst_dmath_allow_space = myst_dmath_allow_digits = False  # as on GitHub
myst_fence_as_directive = ["math"]  # GitHub draws ```math, too
myst_heading_anchors = 3
highlight_language = "none"
python_maximum_signature_line_length = 100
default_role = "code"  # docstrings have code between single backticks

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"mdm_interp {release}"
html_static_path = ["_static"]
html_css_files = ["pictures.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False

LEFT_OUT = {"model_config", "model_post_init"}
"""Members that pydantic adds to every config."""
FIELDS, COLON = ("attribute", "data", "property"), "\ue000"
"""Napoleon takes what comes before a colon in a field's docstring for its type: it is shown something else."""

CHOICES = {
    name: str(kind).removeprefix("typing.") for name, kind in vars(config).items() if get_origin(kind) is Literal
}
"""What a config's fields may be, by the name of the choice."""


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what pydantic adds and what a module imports from other packages; have functions and properties without
    docstring too. Fields without one are in their class' signature."""
    foreign = what == "module" and not str(getattr(obj, "__module__", "mdm_interp")).startswith("mdm_interp")
    if foreign or name in LEFT_OUT:
        return True
    named = callable(obj) or isinstance(obj, (property, cached_property))
    return False if skipped and named and not name.startswith("_") else None


def as_written(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """Give signatures as the source has them, shapes included; evaluated, annotations are long."""
    if signature is None or what not in ("function", "method", "class"):
        return None
    found, empty = inspect.signature(obj), inspect.Signature.empty
    parameters = list(found.parameters.values())
    if what == "method" and parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    if what == "class" and issubclass(obj, BaseModel):
        kinds = [inspect.get_annotations(base) for base in reversed(obj.__mro__)]
        written = {field: CHOICES.get(kind, kind) for of_base in kinds for field, kind in of_base.items()}
        parameters = [parameter.replace(annotation=written[parameter.name]) for parameter in parameters]
    returns = found.return_annotation
    bare = found.replace(parameters=parameters, return_annotation=empty)
    return stringify_signature(bare), None if returns in (empty, None) or what == "class" else str(returns)


def as_markdown(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read docstrings as Markdown as much as reStructuredText: an indented block after a blank line is a formula or
    code, and code between backticks may be followed by a letter."""
    written: list[str] = []
    inside = False
    for number, line in enumerate(lines):
        before = next((earlier for earlier in reversed(lines[:number]) if earlier.strip()), None)
        indented = line.startswith("    ")
        if line.strip() and not indented:
            inside = False
        elif indented and not inside and before is not None and not lines[number - 1].strip():
            inside = not before.startswith(" ")
            written += ["::", ""] if inside else []
        if not inside:
            line = re.sub(r"(?<![\w`])(`[^`]+`)(?=\w)", r"\1\\ ", line)
            line = re.sub(r"\bdocs/theory\.md\b", ":doc:`docs/theory.md </theory>`", line)
        written.append(line)
    if what in FIELDS:
        written = [line.replace(":", COLON) for line in written]
    lines[:] = written


def with_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def link_numbers(app: Sphinx, doctree: nodes.document) -> None:
    """Lead from a formula's number in the text, (3.2), to the formula with that \\tag. Sphinx would number them itself,
    but GitHub shows what it is given."""
    numbered = {}
    for formula in doctree.findall(nodes.math_block):
        for number in re.findall(r"\\tag\{(.+?)\}", formula.astext()):
            formula["ids"].append(f"formula-{number}")
            numbered[f"({number})"] = f"formula-{number}"
    for text in list(doctree.findall(nodes.Text)) if numbered else []:
        if isinstance(text.parent, (nodes.math, nodes.math_block, nodes.literal)):
            continue
        parts = [part for part in re.split(r"(\(\d+\.\d+\))", text) if part]
        linked = [
            nodes.reference("", part, refid=numbered[part], internal=True) if part in numbered else nodes.Text(part)
            for part in parts
        ]
        text.parent.replace(text, linked)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", as_written)
    app.connect("autodoc-process-docstring", as_markdown, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", with_colons, priority=900)
    app.connect("doctree-read", link_numbers)
