"""Two ranks against one at the same global batch: time per step, and whether the results agree.

A rank of two has half the batch. On one machine with few cores the ranks share memory bandwidth and
caches, and wait for each other at every step: where a step is short, that costs more than it gives.
Each rank has one thread, so that one process with as many threads as there are ranks is the fair
opponent beside one with a single thread.

Run: python benchmarks/parallel.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch.distributions import kl_divergence

import inference
import zoo
from inference import parallel

SIZES = {  # hidden widths, problems per step of all ranks together, steps
    "small": ((64, 64), 256, 200),
    "large": ((1024, 1024, 1024), 4096, 30),
}


def measure(size: str, seed: int, device: str) -> dict[str, float]:
    """One fit: ms per step, and KL(q || p) in nats; the first fit of a process warms it up."""
    hidden, batch, steps = SIZES[size]
    with parallel.group(device):
        model = zoo.FactorAnalysis()
        x, exact = model.observations()[:200], model.exact()
        knobs: dict[str, Any] = {"batch_size": batch // parallel.world(), "progress": False}
        warm = inference.FullCovarianceEncoder(model, hidden=hidden)
        inference.fit(model, warm, steps=5, device=device, **knobs)
        guide = inference.FullCovarianceEncoder(model, hidden=hidden)
        began = time.perf_counter()
        inference.fit(model, guide, steps=steps, seed=seed, device=device, **knobs)
        taken = (time.perf_counter() - began) / steps * 1e3
        with torch.no_grad():
            x = x.to(next(guide.parameters()).device)
            kl = kl_divergence(guide.distribution(x), exact.distribution(x)).mean()
    return {"ms": taken, "kl": float(kl)}


def run(size: str, seed: int, device: str, *, ranks: int, threads: int) -> dict[str, float]:
    """The same in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, "--rank-of", size, str(seed), device]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Two ranks against one.")
    parser.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5, help="seeds, interleaved")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    if chosen.rank_of:
        size, seed, device = chosen.rank_of
        found = measure(size, int(seed), device)
        if parallel.launched()[0] == 0:
            print(json.dumps(found))
        return
    ways = {"1 rank": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks": (2, 1)}
    print(
        f"{os.cpu_count()} cores; medians of ms per step, means of KL(q || p) with standard error"
    )
    print(f"{'size':6} {'ranks':18} {'ms':>8} {'least':>8} {'KL, nats':>9} {'se':>7}")
    for size in chosen.sizes:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for seed in range(chosen.rounds):
            for name, (ranks, threads) in ways.items():
                rows[name].append(run(size, seed, chosen.device, ranks=ranks, threads=threads))
        for name, found in rows.items():
            ms, kl = ([f[k] for f in found] for k in ("ms", "kl"))
            se = statistics.stdev(kl) / len(kl) ** 0.5 if len(kl) > 1 else float("nan")
            row = (
                f"{statistics.median(ms):8.2f} {min(ms):8.2f} {statistics.mean(kl):9.4f} {se:7.4f}"
            )
            print(f"{size:6} {name:18} {row}", flush=True)


if __name__ == "__main__":
    main()
