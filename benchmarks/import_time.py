"""Import time of zoo, inference and diagnostics beyond torch and Pyro.

Run: python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from record import record

CODE = """
import time
import torch, pyro
import pyro.infer, pyro.infer.autoguide
began = time.perf_counter()
import {what}
print(time.perf_counter() - began)
"""
ROUNDS = 7


def seconds(what: str) -> float:
    runs = [sys.executable, "-c", CODE.format(what=what)]
    times = [float(subprocess.check_output(runs)) for _ in range(ROUNDS)]
    record(what, statistics.median(times), times)
    return statistics.median(times)


def main() -> None:
    print(f"seconds beyond torch and Pyro, medians of {ROUNDS} fresh interpreters")
    for what in ("inference", "zoo", "diagnostics", "zoo, inference, diagnostics", "neuroguide"):
        print(f"{what:28} {seconds(what):.2f}")


if __name__ == "__main__":
    main()
