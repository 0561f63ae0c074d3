"""What Poisson counts and relaxed Poisson counts cost, at the size of the iterative Poisson guide.

B = 200 problems, K = 512 neurons, one thread, float32:
1. counts: `inference.counts.poisson` against torch.poisson;
2. relaxed counts, a draw and its backward pass: `RelaxedPoisson` against the form that stores
   inter-arrival times, as many as the .999 quantile of the largest count asks for; with the bytes
   that autograd keeps from the draw to the backward pass.

Times are of this thread's processor, so that other work on the machine disturbs them less.

Run: python benchmarks/poisson_speed.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from scipy import stats
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from inference.counts import poisson
from inference.relaxed_poisson import INDICATORS, RelaxedPoisson
from inference.seeds import seeded

SHAPE, ROUNDS = (200, 512), 31
RATES = (0.001, 0.01, 0.1, 0.5, 1.0, 3.0, 8.0)
LOG_MEANS = (-4.0, -2.0, 0.0)

Run = Callable[[], object]


def plain(u: Tensor, tau: float, indicator: str) -> Tensor:
    """z with the inter-arrival times stored and all left to autograd."""
    longest = 1 + INDICATORS[indicator].reach * tau if indicator == "cubic" else 1.0
    n = int(stats.poisson.ppf(0.999, float(u.detach().exp().max()) * longest))
    gaps = torch.empty(n, *u.shape).exponential_()
    v = (1 - gaps.cumsum(0) / u.exp()) / tau
    if indicator == "sigmoid":
        return v.sigmoid().sum(0)
    w = (0.5 + 0.5 * v).clamp(0, 1)
    return (w * w * (3 - 2 * w)).sum(0)


def medians(runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, float], float]:
    """Median ms of each, in turn and each warm, and the median ratio of the last to the first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            began = time.thread_time()
            run()
            times[name].append((time.thread_time() - began) * 1e3)
    first, *_, last = times.values()
    ratio = statistics.median(b / a for a, b in zip(first, last, strict=True))
    return {name: statistics.median(t) for name, t in times.items()}, ratio


def kept(draw: Callable[[], Tensor]) -> float:
    """MB that autograd keeps for the backward pass, u and r themselves included."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        draw()
    return sum(seen.values()) / 1e6


def counts() -> None:
    print(f"Counts {SHAPE}, ms, medians of {ROUNDS}\nrates          torch.poisson  poisson  ratio")
    rates = {f"{r:g}": torch.full(SHAPE, r) for r in RATES}
    rates |= {f"exp(N({m:g}, 1))": torch.randn(SHAPE).add(m).exp() for m in LOG_MEANS}
    for name, r in rates.items():
        runs: dict[str, Run] = {"new": lambda r=r: poisson(r), "old": lambda r=r: torch.poisson(r)}
        ms, ratio = medians(runs, ROUNDS)
        print(f"{name:14s} {ms['old']:13.2f} {ms['new']:8.2f} {ratio:6.1f}")


def relaxed() -> None:
    print(f"\nRelaxed counts and gradient, rates exp(N(-2, 1)), {SHAPE}, ms (MB kept)")
    print("indicator  tau   stored arrivals   RelaxedPoisson  ratio of times, of MB")
    u = torch.randn(SHAPE).sub(2).requires_grad_()
    for indicator in INDICATORS:
        for tau in (0.05, 0.1, 0.5, 1.0):
            draws: dict[str, Callable[[], Tensor]] = {
                "new": lambda tau=tau, i=indicator: RelaxedPoisson(u, tau, i).rsample(),
                "old": lambda tau=tau, i=indicator: plain(u, tau, i),
            }
            runs: dict[str, Run] = {n: lambda d=d: d().sum().backward() for n, d in draws.items()}
            ms, ratio = medians(runs, 7)
            mb = {name: kept(draw) for name, draw in draws.items()}
            print(
                f"{indicator:8s} {tau:5.2f} {ms['old']:9.1f} ({mb['old']:6.1f}) "
                f"{ms['new']:8.2f} ({mb['new']:5.2f}) {ratio:8.0f} {mb['old'] / mb['new']:8.0f}"
            )


def main() -> None:
    torch.set_num_threads(1)
    with seeded(0):
        counts()
        relaxed()


if __name__ == "__main__":
    main()
