"""What a benchmark hands to the table of `run_all.py`: numbers by name, in a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["FILE", "record"]

FILE = "NEUROGUIDE_RECORD"  # environment variable: path of the file; nothing is kept without it


def record(name: str, value: float, each: Iterable[float] = ()) -> None:
    """Keep one quantity.

    Args:
        name: what it is; `results.py` finds it by this name.
        value: the number of the table.
        each: what it is the mean or median of: rounds, seeds or observations. Their range is shown.
    """
    where = os.environ.get(FILE)
    if not where:
        return
    path = Path(where)
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = {"value": float(value), "each": [float(v) for v in each]}
    path.write_text(json.dumps(kept, indent=1))
