"""The pages in docs/: their examples run as they stand, their commands are real."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

import neuroguide

ROOT = Path(__file__).parent.parent
COMMANDS = ROOT / "docs" / "command_line.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
WITH_EXAMPLES = [p for p in PAGES if EXAMPLES.search(p.read_text())]


def name_of(path):
    return str(path.relative_to(ROOT / "docs"))


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=name_of)
def test_examples_run_top_to_bottom(path, tmp_path):
    """In a process of its own for each page, with warnings as errors."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(EXAMPLES.findall(path.read_text())))
    command = [sys.executable, "-W", "error", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pages_with_examples_are_found():
    """A pattern that matches nothing would test nothing."""
    found = set(map(name_of, WITH_EXAMPLES))
    assert {"concepts.md", "how_to/guide.md", "papers/chen2023.md"} <= found


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_scripts_that_are_named_exist(path):
    """Every `benchmarks/x.py` and `tests/x.py`, and every option that follows a script's name."""
    for script, options in re.findall(r"((?:benchmarks|tests)/\w+\.py)([^`\n]*)", path.read_text()):
        assert (ROOT / script).exists(), script
        source = (ROOT / script).read_text()
        for option in re.findall(r"(--[a-z-]+)", options):
            assert option in source, f"{script} {option}"


def command_line():
    """The page of the command line, as typer writes it."""
    command = get_command(neuroguide.app)
    title = {"name": "neuroguide", "title": "The command line"}
    text = get_docs_for_click(obj=command, ctx=Context(command, info_name="neuroguide"), **title)
    return unescape(text).rstrip() + "\n"


def test_the_page_of_the_command_line_is_current():
    """`python tests/test_docs.py` brings it up to date."""
    assert COMMANDS.read_text() == command_line()


if __name__ == "__main__":
    COMMANDS.write_text(command_line())
