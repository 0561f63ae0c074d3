"""The documentation site, made by `make docs`. Its source is the repository's root."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import diagnostics  # noqa: E402
import inference  # noqa: E402
import zoo  # noqa: E402
from inference.checkpoint import versions  # noqa: E402

project = "neuroguide"
author = "The neuroguide authors"
release = versions()["neuroguide"]
copyright = "the neuroguide authors, Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "tutorials/*.ipynb", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["build", "runs", ".venv", "**/.ipynb_checkpoints", "docs/templates"]

# ----------------------------------------------------------------------------- pages and notebooks

nb_execution_mode = "off"  # tutorials are kept with their outputs; `make tutorials` runs them
myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 3
highlight_language = "text"
html_math_renderer = "mathml"  # needs neither network nor script
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = "neuroguide"
html_static_path = ["static"]
html_css_files = ["neuroguide.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 6,
}

# -------------------------------------------------------------------------------- reference of API

autosummary_generate = True
autosummary_imported_members = True
autosummary_ignore_module_all = False
templates_path = [str(HERE / "templates")]  # autosummary would look for it in the root
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_use_ivar = True
napoleon_custom_sections = [("Differences", "notes_style")]


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda entry: inspect.isclass(entry) and issubclass(entry, kinds)


def _protocol(entry: Any) -> bool:
    return bool(getattr(entry, "_is_protocol", False))


def _rest(entry: Any) -> bool:
    return inspect.isclass(entry) or inspect.isfunction(entry)


SECTIONS = {  # of a package's page: title to what belongs there, the first that fits
    "zoo": {
        "Models": _is(zoo.Model),
        "Exact posteriors": _is(inference.Guide),
        "What they are made of": _rest,
    },
    "inference": {
        "Guides": lambda e: e in inference.GUIDES.values() or _is(inference.Guide)(e),
        "Objectives": _is(inference.Objective),
        "Costs of reliability": _is(inference.Cost),
        "What a guide may have": _protocol,
        "Errors and warnings": _is(Exception),
        "Fitting, and what guides are made of": _rest,
    },
    "diagnostics": {
        "Errors and warnings": _is(Exception),
        "Functions and classes": _rest,
    },
}


def sections(package: Any) -> dict[str, list[str]]:
    """Public names of a package by section, each once."""
    found: dict[str, list[str]] = {title: [] for title in SECTIONS[package.__name__]}
    for name in package.__all__:
        entry = getattr(package, name)
        if not str(getattr(entry, "__module__", "")).startswith(package.__name__):
            continue  # it has its page where it comes from
        for title, belongs in SECTIONS[package.__name__].items():
            if belongs(entry):
                found[title].append(name)
                break
    return {title: names for title, names in found.items() if names}


def pictures() -> list[str]:
    """Modules of pictures."""
    public = [getattr(diagnostics, name) for name in diagnostics.__all__]
    return [local(m.__name__) for m in public if inspect.ismodule(m)]


def local(name: str) -> str:
    """The name within its package."""
    return name.split(".", 1)[1]


autosummary_context = {
    "sections": {p.__name__: sections(p) for p in (zoo, inference, diagnostics)},
    "tables": {"zoo": ["data"], "inference": [], "diagnostics": pictures()},
    "metrics": [
        local(f"{m.compute.__module__}.{m.compute.__name__}") for m in diagnostics.METRICS.values()
    ],
}

# ------------------------------------------------------------------- docstrings are text, not RST


def _blocks(lines: list[str]) -> Iterator[str]:
    """Indented formulas after a blank line become literal blocks; elsewhere | and * are letters."""
    block: int | None = None  # indent that a literal block goes beyond
    table = False
    for k, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        table = bool(line.strip()) and (table or line.lstrip().startswith("==="))
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None and line.strip():
            after = next((t for t in lines[k + 1 :] if t.strip()), "")
            deeper = len(after) - len(after.lstrip()) > indent
            if deeper and k + 1 < len(lines) and not lines[k + 1].strip():
                block = indent
                yield _escaped(line)
                yield ""
                yield " " * indent + "::"
                continue
        yield line if block is not None or table else _escaped(line)


def _escaped(line: str) -> str:
    """Letters that RST would take for markup, outside code and directives."""
    if line.lstrip().startswith((">>>", "...", "..")):
        return line
    line = re.sub(r"(?<=: )([A-Z])\.$", r"\1\\.", line)  # "neurons: N." is no list
    pieces = re.split(r"(`+[^`]*`+)", line)
    plain = [re.sub(r"(?<!\\)([|]|(?<!\*)\*(?!\*)|_(?=\W|$))", r"\\\1", p) for p in pieces[::2]]
    pieces[::2] = plain
    return "".join(pieces)


def _docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = list(_blocks(lines))


def _mathml(display: str) -> tuple[Callable[[Any, Any], None], None]:
    """How a page shows a node of mathematics."""

    def visit(page: Any, node: Any) -> None:
        page.body.append(convert(node.astext(), display=display))
        raise SkipNode

    return visit, None


def setup(app: Any) -> None:
    """Hand docstrings over before napoleon reads them, and show mathematics."""
    app.connect("autodoc-process-docstring", _docstring, priority=100)
    app.add_html_math_renderer("mathml", _mathml("inline"), _mathml("block"))
