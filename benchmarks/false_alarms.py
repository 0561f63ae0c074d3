"""False alarms over many seeds: how often a copy of the exact posterior is found wrong.

Usage: python benchmarks/false_alarms.py [SEEDS]
For each metric but C2ST, the share of seeds in which `summary` puts the copy above the floor (three
standard errors) and in which it is off by the five standard errors that the tests allow; for SBC
and TARP, the share of p-values below .05 and .001.
"""

from __future__ import annotations

import sys
from collections import Counter

import torch

import diagnostics
import zoo
from inference.progress import bar

METRICS = {n: m for n, m in diagnostics.METRICS.items() if n != "c2st"}


def compared(model: zoo.Model, seed: int, counts: Counter[tuple[str, str]]) -> None:
    """Two problems, 4 x 250 draws."""
    x = model.observations()[:2]
    sizes = {"draws": 250, "chains": 4, "seed": seed}
    found = diagnostics.compare(model, {"copy": model.exact()}, x, metrics=METRICS, **sizes)
    table = diagnostics.summary(found).sel(guide="copy")
    for name in table.metric.values:
        excess, se = (float(table[k].sel(metric=name)) for k in ("excess", "excess_se"))
        if excess == excess:  # not NaN
            counts[str(name), "judged"] += 1
            counts[str(name), "3 se"] += not bool(table.at_floor.sel(metric=name))
            counts[str(name), "5 se"] += excess > 5 * se


def calibrated(model: zoo.Model, seed: int, counts: Counter[tuple[str, str]]) -> None:
    """200 problems, 49 draws; each quantity's p-value counts."""
    knobs = {"problems": 200, "seed": seed, "progress": False}
    for check in (diagnostics.sbc, diagnostics.tarp):
        p = diagnostics.sbc_test(check(model, model.exact(), draws=49, **knobs)).p_value.values
        counts[check.__name__, "judged"] += len(p)
        for level in (0.05, 0.001):
            counts[check.__name__, f"p < {level}"] += int((p < level).sum())


def main() -> None:
    """Print a line for each diagnostic."""
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    models = (zoo.FactorAnalysis(7, 3, seed=1), zoo.Product(), zoo.NoisyOr())
    counts: Counter[tuple[str, str]] = Counter()
    with bar("seeds", seeds) as advance:
        for seed in range(seeds):
            for model in models:
                compared(model, seed, counts)
                calibrated(model, seed, counts)
            advance()
    for name in dict.fromkeys(n for n, _ in counts):
        judged = counts[name, "judged"]
        shares = {k: v for (n, k), v in counts.items() if n == name and k != "judged"}
        text = ", ".join(f"{k}: {v / judged:.4f}" for k, v in shares.items())
        print(f"{name:22} {judged:6} judged   {text}", flush=True)


if __name__ == "__main__":
    main()
