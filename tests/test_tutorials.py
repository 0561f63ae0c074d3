"""The tutorials: they run from a clean state, say what they promise, and copy no code."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest

HERE = Path(__file__).parent.parent / "tutorials"
sys.path.insert(0, str(HERE))

from execute import LIMIT, answers, run, tutorials, with_answers  # noqa: E402

PATHS = tutorials()
LARGEST = 1_000_000  # bytes
each = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def outputs(notebook):
    return [o for c in code(notebook) for o in c.outputs]


def pictures(cell):
    return [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


def test_all_tutorials_are_there():
    assert [p.name[0] for p in PATHS] == list("12345678")


@each
def test_kept_outputs_are_of_one_clean_run(path):
    notebook = read(path)
    assert [c.execution_count for c in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert path.stat().st_size < LARGEST
    for o in outputs(notebook):
        assert o.output_type != "error"
        assert o.get("name") != "stderr", o.text
    text = path.read_text()
    assert not re.search(r"(/home/|/root/|/work/|/tmp/|site-packages)", text), "a machine's path"


@each
def test_it_opens_with_a_question_and_a_picture(path):
    first, second = read(path).cells[:2]
    assert re.match(rf"# {path.name[0]}\. \S", first.source)
    assert "?" in first.source
    assert pictures(second) or re.search(r"!\[[^]]+\]\(", first.source), "no picture at the top"


@each
def test_it_cites_equations_and_ends_with_three_exercises(path):
    notebook = read(path)
    told = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert "$$" in told
    assert "## Exercises" in told
    tail = told.split("## Exercises")[1]
    assert len(answers(notebook)) == tail.count("<details>") == 3
    for heading in ("## What you have seen", "## Where to go next"):
        assert heading in told


def test_no_code_is_copied_between_tutorials():
    """No function or class is defined twice, no statement of four lines or more appears twice."""
    seen = Counter()
    for path in PATHS:
        statements = set()
        for cell in code(read(path)):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    statements.add(node.name)
                text = ast.unparse(node)
                if node.end_lineno - node.lineno >= 3:
                    statements.add(text)
        seen.update(statements)
    assert not [text for text, n in seen.items() if n > 1]


def test_a_planted_failure_is_caught(tmp_path):
    """A check that cannot fail is none: a notebook with a bad cell, one with a bad answer."""
    from nbclient.exceptions import CellExecutionError

    bad = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(bad)
    told = "<details>\n<summary>Answer</summary>\n\n```python\nunknown\n```\n\n</details>"
    answer = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(told)])
    assert answers(answer) == [["unknown\n"]]
    with pytest.raises(CellExecutionError, match="NameError"):
        run(with_answers(answer))


@pytest.mark.slow
@each
def test_it_runs_from_a_clean_state(path):
    """With the code of its hidden answers, in a fresh kernel and an empty folder."""
    notebook = with_answers(read(path))
    seconds = run(notebook)
    assert seconds < LIMIT
    for o in outputs(notebook):
        assert o.get("name") != "stderr", o.text
