"""Exact draws, 1,000 for each of 100 problems: seconds for every closed-form or enumerated model.

Usage: python benchmarks/zoo_draws.py [MODEL ...]
The goal is 2 s each and 10 s for spike_and_slab with 12 features; the median of three runs counts.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

import zoo
from inference.errors import BadInput, NoExactPosterior
from zoo.model import Model

DRAWS, PROBLEMS, REPEATS, GOAL = 1000, 100, 3, 2.0


def seconds(model: Model) -> float:
    """Median time of a call of `draw`, log q included."""
    guide = model.exact()
    x = model.simulate(PROBLEMS, seed=1)[1]
    times = []
    for k in range(REPEATS):
        began = time.perf_counter()
        guide.draw(x, draws=DRAWS, chains=1, seed=k)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def line(name: str, model: Model, goal: float) -> None:
    """One row of the table; quadrature and references have no goal."""
    try:
        kind = model.exact().kind
        if kind == "reference":
            return
        took = seconds(model)
    except (NoExactPosterior, BadInput) as error:
        print(f"{name:28} {str(error)[:60]}")
        return
    bound = goal if kind in ("closed_form", "enumeration") else None
    verdict = "" if bound is None else "ok" if took < bound else f"over {bound:g} s"
    print(f"{name:28} {kind.replace('_', ' '):12} {took:8.3f} s  {verdict}", flush=True)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)  # threads that wait for a busy core can cost a hundred times more
    print(f"{DRAWS} x {PROBLEMS} exact draws, one thread")
    chosen = sys.argv[1:] or list(zoo.MODELS)
    for name in chosen:
        line(name, zoo.MODELS[name](), GOAL)
    if "spike_and_slab" in chosen:
        line("spike_and_slab, K = 12", zoo.SpikeAndSlab(latents=12), 10.0)


if __name__ == "__main__":
    main()
