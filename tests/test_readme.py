"""The README tells only what is so: its examples run as they stand, its tables are current."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import inference
import neuroguide
import zoo
from diagnostics import METRICS
from zoo.table import rows

PATH = Path(__file__).parent.parent / "README.md"
README = PATH.read_text()


def markdown(*rows):
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def tables():
    """The README's tables, made from the code's."""
    models = [("model", "latents", "observation", "exact posterior", "source", "what it is")]
    models += [
        (f"`{r.name}`", r.latents, r.observation, r.truth, r.paper, r.title)
        for r in rows(zoo.MODELS)
    ]
    guides = [(f"`{n}`", what) for n, what in inference.GUIDES.rows()]
    objectives = [(f"`{n}`", what) for n, what in inference.OBJECTIVES.rows()]
    metrics = [(f"`{n}`", m.title, m.why) for n, m in METRICS.items()]
    return {
        "models": markdown(*models),
        "guides": markdown(("guide", "what it is"), *guides),
        "objectives": markdown(("objective", "what it is"), *objectives),
        "metrics": markdown(("metric", "title", "what it sees"), *metrics),
    }


def with_tables(text):
    for title, table in tables().items():
        mark = f"<!-- {title} -->\n", f"\n<!-- /{title} -->"
        pattern = re.escape(mark[0]) + ".*?" + re.escape(mark[1])
        text, count = re.subn(pattern, lambda _: table.join(mark), text, flags=re.S)  # noqa: B023
        assert count == 1, title
    return text


def test_tables_are_those_of_the_code():
    """`python tests/test_readme.py` brings them up to date."""
    assert with_tables(README) == README


@pytest.mark.slow
def test_python_examples_run_verbatim(capsys, tmp_path, monkeypatch):
    """All of them in one namespace, top to bottom. About 60 s."""
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(examples) >= 2
    namespace = {}
    for code in examples:
        exec(compile(code, "README.md", "exec"), namespace)
    shown = capsys.readouterr().out
    assert "mean_field_encoder" in shown
    value = namespace["table"].value
    assert float(value.sel(guide="full_covariance_encoder", metric="c2st")) < 0.6
    assert float(value.sel(guide="mean_field_encoder", metric="c2st")) > 0.7


def test_commands_are_real():
    """Every `neuroguide` line in a shell block names a command and options that exist."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if "neuroguide " in line]
    assert commands
    for words in commands:
        words = words[[w.endswith("neuroguide") for w in words].index(True) + 1 :]
        shown = CliRunner().invoke(neuroguide.app, [words[0], "--help"])
        assert shown.exit_code == 0, words
        for option in (w for w in words if w.startswith("--")):
            assert option in shown.output, words


if __name__ == "__main__":
    PATH.write_text(with_tables(README))
