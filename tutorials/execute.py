"""Run the tutorials from a clean state: to check them, or to keep what they show.

python tutorials/execute.py                 run all, keep outputs and pictures
python tutorials/execute.py 3 5             those whose names begin so
python tutorials/execute.py --check 3       run them and their hidden answers, keep nothing
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import tempfile
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

HERE = Path(__file__).parent
LIMIT = 180  # seconds that one tutorial may take
ANSWER = re.compile(r"<details>.*?</details>", re.S)
ANSWERS = "# of a hidden answer"  # first line of their cells
CODE = re.compile(r"```python\n(.*?)```", re.S)


def tutorials(names: list[str] | None = None) -> list[Path]:
    """The notebooks, in order; those whose names begin with one of `names`."""
    wanted = tuple(names or [""])
    return [p for p in sorted(HERE.glob("*.ipynb")) if p.name.startswith(wanted)]


def answers(notebook: NotebookNode) -> list[list[str]]:
    """Code blocks of each hidden answer."""
    told = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    return [CODE.findall(found) for found in ANSWER.findall(told)]


def run(notebook: NotebookNode) -> float:
    """Execute in a fresh kernel in an empty folder; returns the seconds it took, answers apart.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        nbclient.exceptions.CellTimeoutError: it took longer than `LIMIT`.
    """
    for cell in notebook.cells:
        cell.metadata = NotebookNode(tags=cell.metadata["tags"]) if "tags" in cell.metadata else {}
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets:
        local = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})  # no ports
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, config=local, timeout=LIMIT, resources=where).execute()
    times = [cell.metadata.pop("execution", None) for cell in notebook.cells]
    own = [t for t, c in zip(times, notebook.cells, strict=True) if t and ANSWERS not in c.source]
    return sum(seconds(t["iopub.status.idle"]) - seconds(t["iopub.status.busy"]) for t in own)


def seconds(moment: str) -> float:
    """Seconds of a time of day."""
    return datetime.fromisoformat(moment).timestamp()


def lighter(notebook: NotebookNode) -> None:
    """Pictures in 256 colours, which is a third of the size."""
    for output in (o for c in notebook.cells for o in c.get("outputs", [])):
        picture = output.get("data", {}).get("image/png")
        if picture:
            with io.BytesIO() as file:
                whole = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
                whole.quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
                output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def with_answers(notebook: NotebookNode) -> NotebookNode:
    """The notebook with the code of its hidden answers at its end."""
    for code in (c for answer in answers(notebook) for c in answer):
        notebook.cells.append(nbformat.v4.new_code_cell(f"{ANSWERS}\n{code}"))
    return notebook


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="first letters of file names; all by default")
    parser.add_argument("--check", action="store_true", help="keep nothing")
    asked = parser.parse_args()
    for path in tutorials(asked.names):
        notebook = nbformat.read(path, as_version=4)
        seconds = run(with_answers(notebook) if asked.check else notebook)
        print(f"{path.name}: {seconds:.0f} s")
        if not asked.check:
            lighter(notebook)
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
