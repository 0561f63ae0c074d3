"""Speed of the reservoir sampler: steps, share of the machine, effective draws, memory.

1. One step of 100 chains at N = 20,000 and D = 300, against the same circuit with a dense N x N
   W_rec, as published; both have the same noise, and the table says how far apart they end.
2. What else than its two matrix products a step costs, and GFLOP/s against a square product.
3. Effective draws per second of one posterior (factor analysis, D = 8), against a Langevin loop
   written by hand with the exact gradient, and NUTS. Each posterior's error stands beside it.
4. By how much memory grows while drawing, against the bytes of the draws kept (Linux only).

Usage: python benchmarks/reservoir_speed.py [THREADS]
Medians of interleaved rounds. One thread by default: threads that wait for a busy core can cost a
hundred times more.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import inference
import zoo
from diagnostics.chains import effective
from inference import NUTS, ReservoirSampler, Sampling
from inference.guide import Draws
from inference.onset import Onset
from inference.sampling import plan
from inference.seeds import seeded

PEAK = 2048  # width of the square product that stands for the machine's speed
NEURONS, LATENTS, CHAINS = 20_000, 300, 100
FEW, STEPS = 2, 20  # of the dense circuit, which is slow; of ours
NOISE, SIZE = (0.5, 10.0), 0.1  # so large that a few steps show any difference from the dense one
SHAPES = ((20_000, 300, 100), (4096, 64, 512), (4096, 10, 512), (2000, 10, 1000), (512, 2, 4000))

Works = Mapping[str, Callable[[], object]]

# ---------------------------------------------------------------------------------- measuring


def seconds(work: Callable[[], object], times: int = 1) -> float:
    """Seconds per call."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


class Rounds:
    """Seconds per call of several pieces of work, in turn.

    Args:
        works: the pieces.
        rounds: how often it is each one's turn.
        length: seconds of a turn, of at least one call.
    """

    def __init__(self, works: Works, *, rounds: int, length: float = 0.0) -> None:
        for work in works.values():
            work()
        times = {n: round(length / seconds(w)) or 1 if length else 1 for n, w in works.items()}
        self.rows = [{n: seconds(w, times[n]) for n, w in works.items()} for _ in range(rounds)]

    def time(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(row[name] for row in self.rows)

    def ratio(self, above: str, below: str) -> float:
        """Median of the ratios within a round: what slows both of them down cancels."""
        return statistics.median(row[above] / row[below] for row in self.rows)


def reservoir(neurons: int, latents: int, **knobs: Any) -> tuple[ReservoirSampler, Tensor]:
    """An untrained circuit of a Gaussian model, and an observation of four of its latents.

    Training does not change what a step costs.
    """
    seen = min(latents, 4)

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :seen], 0.5).to_event(1), obs=x)

    x = torch.linspace(-1.0, 2.0, seen)[None]
    circuit = ReservoirSampler(zoo.from_pyro(program, x), neurons=neurons, **knobs)
    return circuit.requires_grad_(False), x


class Moving:
    """Chains of a circuit, a step at a time."""

    def __init__(self, circuit: ReservoirSampler, x: Tensor, chains: int, how: Sampling) -> None:
        self.onset = Onset(circuit, x, how, plan(how, *circuit.noise))
        self.onset.work = torch.empty(chains, circuit.neurons)
        self.xi = torch.randn(chains, 1, circuit.latents.size)
        self.chains = circuit.chains(self.xi.clone(), self.onset)

    def __call__(self) -> None:
        """One more step."""
        self.chains.advance(self.onset.plan.steps[-1], self.xi.normal_())


# ------------------------------------------------------------------- 1. against a dense circuit


class Dense:
    """Chen et al.'s update, with the tonic inputs of one noise level folded into its weights.

    r <- r + dt (-r + a phi(W_rec r + b)) + Sigma (dt rest + sqrt(2 SIZE) xi), W_rec of N x N.
    """

    def __init__(self, circuit: ReservoirSampler, x: Tensor) -> None:
        level = circuit.lowest(x)
        tonic, self.a = level.tonic, float(level.amplitude)
        self.circuit, self.x, self.out = circuit, x, circuit.read_out()
        inward = tonic.gain.T * circuit.inward * tonic.zoom / level.variance.sqrt()
        self.w_rec, self.bias = inward @ self.out, tonic.current - tonic.centre @ inward.T
        self.sigma = torch.linalg.pinv(self.out)
        self.dt = SIZE / float(level.variance)
        self.rest = self.dt * (tonic.centre + self.a * tonic.drive)

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """Latents and rates after FEW steps, with the noise that the circuit's draws have."""
        with seeded(seed):
            y = torch.randn(CHAINS, LATENTS)
            r, xi = y @ self.sigma.T, torch.empty_like(y)
            for _ in range(FEW):
                pull = self.a * torch.relu(r @ self.w_rec.T + self.bias) - r
                push = self.rest + (2 * SIZE) ** 0.5 * xi.normal_()
                r = r + self.dt * pull + push @ self.sigma.T
        return self.circuit.unwhiten(r @ self.out.T, self.x), r


def against_dense() -> None:
    """Table 1."""
    circuit, x = reservoir(NEURONS, LATENTS, noise=NOISE)
    outputs = Sampling(levels=0, step=SIZE, warmup=STEPS)
    rates = replace(outputs, record=("rates",))
    dense, moving = Dense(circuit, x), Moving(circuit, x, CHAINS, rates)

    def draw(how: Sampling) -> Draws:
        circuit.sampling = how
        return circuit.draw(x, draws=1, chains=CHAINS, seed=0)

    def each_step() -> None:
        for _ in range(STEPS):
            moving()
            moving.chains.rates()

    works: dict[str, tuple[int, Callable[[], object]]] = {
        "dense": (FEW, lambda: dense.draw(0)),
        "outputs only": (STEPS, lambda: draw(outputs)),
        f"N rates, told after {STEPS} steps, with the onset": (STEPS, lambda: draw(rates)),
        "N rates, told after each step": (STEPS, each_step),
    }
    found = Rounds({name: work for name, (_, work) in works.items()}, rounds=3)
    print(
        f"\n{NEURONS:,} neurons, {LATENTS} latents, {CHAINS} chains        ms/step   times faster"
    )
    for name, (steps, _) in works.items():
        ratio = found.ratio("dense", name) * steps / FEW
        print(f"{name:46} {found.time(name) / steps * 1e3:9.1f} {ratio:14.1f}", flush=True)
    (z, r), ours = dense.draw(0), draw(replace(rates, warmup=FEW))
    apart = float((ours.values["z"][:, 0, 0] - z).abs().max())
    off = float((ours.circuit["rates"][:, 0, 0] - r).abs().max() / r.abs().max())
    print(f"largest difference after {FEW} steps: z {apart:.0e}; rates {off:.0e} of the largest")


# ------------------------------------------------------------------------- 2. inside of a step


def inside(neurons: int, latents: int, chains: int) -> Rounds:
    """A step, its products, its passes over the activity, and a square product."""
    circuit, x = reservoir(neurons, latents)
    moving = Moving(circuit, x, chains, Sampling(levels=0, step=1e-6, warmup=1))
    onset, y, out = moving.onset, torch.randn(chains, latents), torch.empty(chains, latents)
    h, tonic = onset.work, onset.level(circuit.noise[0]).tonic
    a, b, c = torch.randn(PEAK, PEAK), torch.randn(PEAK, PEAK), torch.empty(PEAK, PEAK)

    def products() -> None:
        torch.mm(y, circuit.inward.T, out=h)
        torch.mm(h, circuit.outward.T, out=out)

    works: Works = {
        "step": moving,
        "products": products,
        "passes": lambda: circuit.phi(torch.addcmul(tonic.current, h, tonic.gain, out=h), h),
        "square": lambda: torch.mm(a, b, out=c),
    }
    return Rounds(works, rounds=11, length=0.05)


def steps() -> None:
    """Table 2."""
    floor = inside(1, 1, 1).time("step")
    print(f"\na step of one neuron and one chain: {floor * 1e6:.0f} us, nearly all of it Python")
    print("      N    D  chains  ms/step  products  gain, phi  Python  GFLOP/s  square  of it")
    for n, d, chains in SHAPES:
        found = inside(n, d, chains)
        step, square = found.time("step"), 2e-9 * PEAK**3 / found.time("square")
        speed = 4 * n * d * chains / (2 * PEAK**3) * found.ratio("square", "step")
        print(
            f"{n:7,} {d:4} {chains:7,} {step * 1e3:8.2f} {found.ratio('products', 'step'):9.0%}"
            f" {found.ratio('passes', 'step'):10.0%} {floor / step:7.1%}"
            f" {4e-9 * n * d * chains / step:8.0f} {square:7.0f} {speed:6.0%}",
            flush=True,
        )


# --------------------------------------------------------------------------- 3. effective draws


class Posterior:
    """Of one observation under factor analysis: Normal(mean, precision^-1)."""

    def __init__(self, model: zoo.FactorAnalysis, x: Tensor) -> None:
        w, noise = model.loadings.detach(), model.noise.detach()
        weighted = (w / noise[:, None] ** 2).T
        self.precision = torch.eye(w.shape[1]) + weighted @ w
        self.mean = torch.linalg.solve(self.precision, weighted @ (x[0] - model.mean.detach()))
        self.sd = torch.linalg.inv(self.precision).diagonal().sqrt()

    def langevin(self, chains: int, draws: int, seed: int) -> Tensor:
        """A Langevin loop by hand with the exact gradient, (chains, draws, D).

        Steps make sds 2 % too large in the stiffest direction, 1 / (p (1 - h p / 2)), and the first
        draw comes when the slackest direction has forgotten the prior.
        """
        stiff = torch.linalg.eigvalsh(self.precision)
        h = 0.08 / float(stiff[-1])
        forget = round(5 / (h * float(stiff[0])))
        with seeded(seed):
            z = torch.randn(chains, len(self.mean))
            kept, xi = z.new_empty(chains, draws, z.shape[1]), torch.empty_like(z)
            for k in range(-forget, draws):
                z.add_((self.mean - z) @ self.precision, alpha=h)
                z.add_(xi.normal_(), alpha=(2 * h) ** 0.5)
                if k >= 0:
                    kept[:, k] = z
        return kept


def effective_draws() -> None:
    """Table 3."""
    model = zoo.FactorAnalysis()
    x = model.observations()[:1]
    circuit, truth, nuts = ReservoirSampler(model), Posterior(model, x), NUTS(model, warmup=300)
    began = time.perf_counter()
    objective = inference.MixedScore()
    inference.fit(model, circuit, objective=objective, steps=1000, seed=0, progress=False)
    taught = time.perf_counter() - began

    def of(guide: inference.Guide, draws: int, chains: int) -> Tensor:
        return guide.draw(x, draws=draws, chains=chains, seed=0).values["z"][:, :, 0]

    works: Mapping[str, Callable[[], Tensor]] = {
        "closed form": lambda: of(model.exact(), 2000, 4),
        f"reservoir, N = {circuit.neurons}": lambda: of(circuit, 2000, 4),
        "Langevin loop, 1,000 chains": lambda: truth.langevin(1000, 500, 0),
        "NUTS, warm-up included": lambda: of(nuts, 500, 1),
    }
    print(
        f"\nfactor analysis, one posterior; the reservoir was taught all of them in {taught:.0f} s"
    )
    print("                              seconds   draws/s     ESS/s  mean error/sd  sd ratios")
    for name, work in works.items():
        began = time.perf_counter()
        z = work()
        took = time.perf_counter() - began
        ess = float(effective(z[None].numpy()).min())
        z = z.flatten(0, 1)
        off, ratio = ((z.mean(0) - truth.mean) / truth.sd).abs().max(), z.std(0) / truth.sd
        print(
            f"{name:28} {took:8.3f} {len(z) / took:9,.0f} {ess / took:9,.0f} {off:14.3f}"
            f"  {ratio.min():.2f} to {ratio.max():.2f}",
            flush=True,
        )


# ------------------------------------------------------------------------------------ 4. memory


def growth(threads: int, draws: int, how: Sampling) -> tuple[int, int]:
    """Peak memory while drawing beyond what there was before, and size of the draws, in bytes."""
    torch.set_num_threads(threads)
    circuit, x = reservoir(NEURONS, LATENTS, noise=NOISE, sampling=how)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what there is now
    found = circuit.draw(x, draws=draws, chains=CHAINS, seed=0)
    kept = sum(t.numel() * t.element_size() for t in (found.values | found.circuit).values())
    return resident("VmHWM") - before, kept


def resident(name: str) -> int:
    """Memory of this process: now (VmRSS), or at most (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def memory(threads: int) -> None:
    """Table 4: each draw in a process of its own."""
    base = Sampling(levels=0, step=SIZE, warmup=10)
    cases = {
        "1 draw, 10 steps": (1, base),
        "1 draw, 100 steps": (1, replace(base, warmup=100)),
        "100 draws": (100, replace(base, per_start=100)),
        "20 draws with rates": (20, replace(base, per_start=20, record=("rates",))),
    }
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory goes back, and is not counted
    print(f"\n{NEURONS:,} neurons, {LATENTS} latents, {CHAINS} chains     kept, MB  growth, MB")
    for name, (draws, how) in cases.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
            top, kept = own.submit(growth, threads, draws, how).result()
        print(f"{name:44} {kept / 1e6:8.1f} {top / 1e6:11.1f}", flush=True)
    print(f"W_rec alone, of N x N: {4e-6 * NEURONS**2:,.0f} MB")


def main() -> None:
    """Print the four tables."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    print(f"{threads} thread(s)")
    against_dense()
    steps()
    effective_draws()
    if sys.platform == "linux":
        memory(threads)


if __name__ == "__main__":
    main()
