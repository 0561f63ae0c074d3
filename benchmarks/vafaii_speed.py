"""Time and memory of the iterative Poisson encoder against the published step, plainly written.

At the published size (B = 200 patches of 16 x 16 pixels, K = 512 neurons, T = 16), float32, one
thread, the same parameters for both:
1. a training step. Plain: two relaxed samples and three products per iteration, inter-arrival times
   stored (the .999 quantile of the largest rate), softplus clamps, backpropagation through all;
2. a thousand steps of inference with whole spikes. Plain: two torch.poisson, three products, with
   and without the record of states, samples and pictures that the authors' code keeps;
3. memory of a training step: what autograd keeps, and the peak of a fresh process above its start;
4. memory where rates explode (largest rate 20, 1,000): ours has a bound.

With --quality both are trained from the same start on whitened patches, for as many steps, and free
energy (right divergence, whole spikes, held-out patches) is printed with the time it took.

Times are of this thread's processor, so that other work on the machine disturbs them less.

Run: python benchmarks/vafaii_speed.py [--quality 200]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from poisson_speed import kept
from record import record
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import softplus

import zoo
from inference import FreeEnergy, OnlinePoisson
from inference.counts import poisson_kl
from inference.seeds import seeded
from zoo.data import patches, whiten

SIDE, NEURONS, BATCH, STEPS, LONG, BETA = 16, 512, 200, 16, 1000, 24.0
ROUNDS = 5
MOST = 4000  # MB that a training step may take
CEILING, FLOOR = 10.0, -8.0
LOG_STEP = -2.0  # of the plain form's step; at -1 its rates explode within these T steps


class Plain(nn.Module):
    """The published dynamics and loss."""

    def __init__(self, model: zoo.PoissonCoding) -> None:
        super().__init__()
        self.phi = nn.Parameter(model.dictionary.detach().clone())
        self.log_sigma = nn.Parameter(model.scale.detach().log())
        self.u0 = nn.Parameter(model.log_rate.detach().clone())
        self.log_lr = nn.Parameter(torch.tensor(LOG_STEP))
        self.log_bias = nn.Parameter(torch.full((NEURONS,), -3.0))

    def sample(self, u: Tensor, tau: float, n: int) -> Tensor:
        """Relaxed counts from stored arrivals, or whole ones."""
        rate = u.exp() + torch.finfo(u.dtype).eps
        if tau == 0:
            return torch.poisson(rate)
        gaps = torch.empty(n, *u.shape).exponential_() / rate
        return ((1 - gaps.cumsum(0)) / tau).sigmoid().sum(0)

    def step(self, u: Tensor, x: Tensor, tau: float, n: int) -> Tensor:
        """One update of the potentials."""
        z = self.sample(u, tau, n)
        error = (x - z @ self.phi.T) / (2 * self.log_sigma).exp()
        force = error @ self.phi - self.log_bias.exp()
        return bend(u + bend(self.log_lr.exp() * force))

    def loss(self, x: Tensor, tau: float) -> Tensor:
        """Mean over steps of reconstruction and mis-scaled divergence, per problem."""
        u, total = self.u0.expand(len(x), -1), x.new_zeros(())
        n = arrivals(u)
        for _ in range(STEPS):
            past, u = u, self.step(u, x, tau, n)
            n = arrivals(u)
            shown = self.sample(u, tau, n) @ self.phi.T
            misfit = 0.5 * ((x - shown) / self.log_sigma.exp()).square() + self.log_sigma
            wrong = poisson_kl(u, past) * (u - past).exp()
            total = total + (misfit.sum(-1) + BETA * wrong.sum(-1)).mean()
        return total / STEPS

    @torch.no_grad()
    def infer(self, x: Tensor, steps: int, *, keep: bool) -> None:
        """Whole-spike inference with a reconstruction per step; the authors' code keeps all."""
        u = self.u0.expand(len(x), -1)
        kept: list[list[Tensor]] = [[], [], []]
        for _ in range(steps):
            u = self.step(u, x, 0.0, 0)
            z = self.sample(u, 0.0, 0)
            shown = z @ self.phi.T
            if keep:
                for one, t in zip(kept, (u, z, shown), strict=True):
                    one.append(t)
        for one in kept if keep else []:
            torch.stack(one, 1)


def bend(v: Tensor) -> Tensor:
    return CEILING - softplus(CEILING - v.clamp_min(FLOOR))


def arrivals(u: Tensor) -> int:
    return int(stats.poisson.ppf(0.999, float(u.detach().exp().max()))) + 1


def problem(mean: float = -5.0, *, learned: bool = True) -> tuple[zoo.PoissonCoding, Tensor]:
    """A model of the published size and whitened patches, at first or as if it were learned."""
    data = whiten(patches(side=SIDE, n=4000))
    x = data.train / data.train.std()
    model = zoo.PoissonCoding(NEURONS, side=SIDE, noise=1.0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.log_rate.uniform_(mean - 1, mean + 1, generator=g)
        model.dictionary.normal_(0, 0.05 if learned else 0.01, generator=g)
    model.keep(x[:100].clone())
    return model, x


def ours(model: zoo.PoissonCoding) -> tuple[OnlinePoisson, FreeEnergy, list[nn.Parameter]]:
    guide = OnlinePoisson(model)
    parameters = [p for p in [*guide.parameters(), *model.parameters()] if p.requires_grad]
    return guide, FreeEnergy(beta=BETA, divergence="published", reconstruction="sample"), parameters


def training(tau: float, mean: float = -5.0) -> dict[str, Callable[[], Tensor]]:
    """Loss of each, to be called and differentiated."""
    model, x = problem(mean)
    plain, (guide, objective, _) = Plain(model), ours(model)
    objective.temperature, objective.warmup = (tau, tau), 0.0
    return {
        "plain": lambda: plain.loss(x[:BATCH], tau),
        "ours": lambda: objective(model, guide, x[:BATCH])["guide"],
    }


def medians(
    runs: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, float], list[float]]:
    """Median seconds of each, in turn, and the ratios plain / ours of the rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 1):
        for name, run in runs.items():
            began = time.thread_time()
            run()
            if k:  # the first round warms up
                times[name].append(time.thread_time() - began)
    ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    return {name: statistics.median(t) for name, t in times.items()}, ratios


def _peak(name: str, mean: float, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    with seeded(0):
        run = training(1.0, mean)[name]
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = _status("VmRSS")
        size = int(1e6 * (_status("VmSize") + MOST))
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        try:
            run().backward()
        except RuntimeError:  # not enough memory
            pipe.send(float("inf"))
        else:
            pipe.send(_status("VmHWM") - before)


def _status(field: str) -> float:
    """MB, as Linux tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field))) / 1e3


def peak(name: str, mean: float) -> float:
    """MB by which a fresh process grows in one training step."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_peak, args=(name, mean, there))
    process.start()
    grown: float = here.recv()
    process.join()
    return grown


def speed() -> None:
    print(f"Training step, B = {BATCH}, K = {NEURONS}, F = {SIDE**2}, T = {STEPS}, seconds")
    every = []
    for tau in (1.0, 0.3, 0.05):
        found = {n: lambda f=f: f().backward() for n, f in training(tau).items()}
        s, ratios = medians(found, ROUNDS)
        ratio = statistics.median(ratios)
        every.append(ratio)
        print(f"  tau {tau:4.2f}: plain {s['plain']:.2f}  ours {s['ours']:.3f}  ratio {ratio:.1f}")
    record("training", min(every), every)
    model, x = problem()
    plain, (guide, _, _) = Plain(model), ours(model)

    def infer() -> None:
        with torch.no_grad():
            for _ in guide.unroll(x[:BATCH], steps=LONG):
                pass

    for keep in (False, True):
        runs: dict[str, Callable[[], object]] = {
            "plain": lambda keep=keep: plain.infer(x[:BATCH], LONG, keep=keep),
            "ours": infer,
        }
        s, ratios = medians(runs, 3)
        ratio = statistics.median(ratios)
        if not keep:
            record("inference", ratio, ratios)
        what = "plain, keeping all," if keep else "plain"
        ours_s, plain_s = s["ours"], s["plain"]
        shown = f"{what} {plain_s:.1f}  ours {ours_s:.2f}  ratio {ratio:.1f}"
        print(f"Inference, {LONG} steps, seconds: {shown}")
    share(s["ours"] / LONG)


def share(seconds: float) -> None:
    """Achieved share of the matrix products' peak in inference."""
    a, b = torch.randn(2000, 2000), torch.randn(2000, 2000)
    began = time.thread_time()
    for _ in range(3):
        a @ b
    flops = 3 * 2 * 2000**3 / (time.thread_time() - began)
    used = 2 * 2 * BATCH * NEURONS**2 / seconds  # spikes and load
    print(f"  {used / 1e9:.0f} of {flops / 1e9:.0f} GFLOP/s, {used / flops:.0%} of the peak")


def memory() -> None:
    print("Memory of a training step, MB: kept by autograd; growth of a fresh process")
    for tau in (1.0, 0.05):
        mb = {n: kept(f) for n, f in training(tau).items()}
        print(f"  tau {tau:4.2f}: plain {mb['plain']:.0f}  ours {mb['ours']:.0f}")
    prior = {-5.0: "small rates", 2.0: "prior rates up to 20", 5.9: "prior rates up to 1,000"}
    for mean, what in prior.items():
        mb = {name: peak(name, mean) for name in ("plain", "ours")}
        said = {n: f"{v:.0f}" if v < MOST else f"more than {MOST}" for n, v in mb.items()}
        print(f"  {what}: plain {said['plain']}  ours {said['ours']}", flush=True)


def quality(steps: int) -> None:
    """Both trained from the same start for so many steps."""
    print(
        f"After {steps} training steps from the same start: free energy of held-out patches, nats"
    )
    for name in ("plain", "ours"):
        model, x = problem(learned=False)
        guide, objective, parameters = ours(model)
        plain = Plain(model)
        chosen = list(plain.parameters()) if name == "plain" else parameters
        optimizer = torch.optim.Adam(chosen, lr=5e-3)
        began = time.thread_time()
        for k in range(steps):
            rows = x[torch.randint(len(x) - 500, (BATCH,))]
            objective.progress = k / steps
            tau = objective._temperature()
            loss = (
                plain.loss(rows, tau) if name == "plain" else objective(model, guide, rows)["guide"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds = time.thread_time() - began
        if name == "plain":
            with torch.no_grad():
                model.dictionary.copy_(plain.phi)
                model.log_rate.copy_(plain.u0)
                guide.log_inhibition.copy_(plain.log_bias)
            model.scale = plain.log_sigma.detach().exp()
        with torch.no_grad():
            held = x[-500:]
            *_, now = guide.unroll(held, steps=100)
            spread = (held - held.mean(1, keepdim=True)).square().sum()
            r2 = 1 - (held - now.signal @ model.dictionary.T).square().sum() / spread
            silent = (now.signal == 0).float().mean()
            energy = now.expected_energy().mean()
        print(
            f"  {name:5s}: {seconds:6.1f} s, expected energy {energy:.1f}, pooled R2 {r2:.3f}, "
            f"zeros {silent:.3f} after 100 steps of inference"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quality", type=int, default=0, metavar="STEPS")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with seeded(0):
        speed()
        memory()
        if chosen.quality:
            quality(chosen.quality)


if __name__ == "__main__":
    main()
