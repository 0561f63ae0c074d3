"""What `fit` costs over the same training written by hand.

Two questions, both for the mean-field encoder on factor analysis (D = 8, F = 20):
1. the loop: `fit` against a bare PyTorch loop around the same objective and batches;
2. Pyro: the ELBO through Pyro's traces against the ELBO written with tensor operations.

Run: python benchmarks/loop_overhead.py
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import pyro
import torch
from record import record
from torch import Tensor

import inference
import zoo
from inference.loop import Batches

STEPS, ROUNDS = 400, 7


def by_fit(model: zoo.FactorAnalysis, x: Tensor, batch_size: int) -> None:
    guide = inference.MeanFieldEncoder(model)
    inference.fit(model, guide, x, steps=STEPS, batch_size=batch_size, progress=False)


def bare(model: zoo.FactorAnalysis, x: Tensor, batch_size: int) -> None:
    """A loop with nothing but the objective and the optimiser."""
    guide = inference.MeanFieldEncoder(model)
    objective, optimizer = inference.ELBO(), torch.optim.Adam(guide.parameters(), lr=3e-3)
    batches = Batches(guide, x, batch_size, 0)
    with pyro.settings.context(module_local_params=True):
        for step in range(STEPS):
            loss = objective(model, guide, batches(step)[0])["guide"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def plain(model: zoo.FactorAnalysis, x: Tensor, batch_size: int) -> None:
    """The ELBO by hand: reparameterised draw, three Gaussian log-densities, no Pyro."""
    guide = inference.MeanFieldEncoder(model)
    optimizer = torch.optim.Adam(guide.parameters(), lr=3e-3)
    w, mean, noise = model.loadings.detach(), model.mean.detach(), model.noise.detach()
    batches = Batches(guide, x, batch_size, 0)
    for step in range(STEPS):
        batch = batches(step)[0]
        q = guide.distribution(batch).base_dist
        e = torch.randn_like(q.loc)
        z = q.loc + q.scale * e
        log_q = -(0.5 * e.square() + q.scale.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
        log_z = -(0.5 * z.square() + 0.5 * math.log(2 * math.pi)).sum(-1)
        r = (batch - z @ w.T - mean) / noise
        log_x = -(0.5 * r.square() + noise.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
        loss = (log_q - log_z - log_x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def timed(run: Callable[[zoo.FactorAnalysis, Tensor, int], None], *args: object) -> float:
    began = time.perf_counter()
    run(*args)  # type: ignore[arg-type]
    return (time.perf_counter() - began) / STEPS * 1e3


def main() -> None:
    model = zoo.FactorAnalysis()
    x = model.simulate(20_000, seed=0)[1]
    print(f"{STEPS} steps, medians of {ROUNDS} interleaved rounds, ms per step")
    print("batch   fit  bare loop  plain torch  fit/bare  fit/plain")
    for batch_size in (256, 4096):
        rows = {f: [] for f in (by_fit, bare, plain)}
        for _ in range(ROUNDS):
            for f, times in rows.items():
                times.append(timed(f, model, x, batch_size))
        a, b, c = (statistics.median(t) for t in rows.values())
        ratios = [i / j for i, j in zip(rows[by_fit], rows[bare], strict=True)]
        loop = statistics.median(ratios)
        record(f"fit over bare, {batch_size}", loop, ratios)
        print(f"{batch_size:5d} {a:5.2f} {b:10.2f} {c:12.2f} {loop:9.2f} {a / c:10.2f}")


if __name__ == "__main__":
    main()
