"""Networks of stochastic synapses that read digits (Malkin et al., 2024, figures 2, 3 and 5).

  energy      accuracy with noise against the true cost of reliability, sum_i sigma_i^-rho / rho
              (s = 1), for a sweep of the coefficient c: noise of each synapse its own against one
              level for the whole network, and the ratio of their costs at equal accuracy (Bm2)
  signatures  slopes and correlations of log variance with log curvature, learning rate and input
              rate, layer by layer, for each mechanism (Bm3)
  toy         y = x^3 + 2 x^2, one hidden layer of 20: spread of predictions inside and outside the
              data, entropic and for each mechanism (Bm4)

Rows stay in the output folder, so that a stopped run goes on where it stopped. With --data mnist,
NEUROGUIDE_DATA may name a folder with the files.

Run: python benchmarks/malkin2024_networks.py [--experiments energy,signatures,toy] [--data digits]
     [--hidden 50,50] [--steps 3000] [--seeds 0,1,2] [--mechanisms actin,trafficking] [--out DIR]
Digits: about 40 minutes on a core. Published: 784-100-100-10 on MNIST, 50 epochs, batch 20, one
seed; cost ratios of 1.2 to 2.7 in favour of synapses with noise of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from xarray import Dataset

import diagnostics
import inference
import zoo
from inference import MECHANISMS, Cost, Entropic, PowerLaw, ReliabilityCost, StochasticSynapses
from inference.files import atomic_path
from inference.seeds import seeded
from zoo.data import DATA, Data

BATCH, LR = 20, 5e-3
CURVATURE = 100.0  # of a typical synapse, in nats
START = 0.05  # largest sd at the start: with more, a network learns nothing
WANTED = (0.02, 0.04, 0.08, 0.16, 0.32)  # sds that such a synapse has at the c of a sweep
LEVELS = (0.95, 0.9, 0.8)  # accuracies at which costs are compared
SAMPLES = 20  # networks drawn for an accuracy
NOISES = "synapse", "network"  # of each its own, or one level for all
Row = dict[str, Any]


def synapses(
    model: zoo.BayesianMLP, cost: Cost, *, noise: str, steps: int, seed: int, start: float
) -> StochasticSynapses:
    """A network, trained on mini-batches of its own rows."""
    guide = StochasticSynapses(model, noise=noise, scale=start, seed=seed)
    inference.fit(
        model, guide, model.observations(), objective=ReliabilityCost(cost), steps=steps,
        batch_size=BATCH, lr=LR, seed=seed, progress=False,
    )  # fmt: skip
    return guide


def accuracy(
    model: zoo.BayesianMLP, guide: inference.Guide, images: Tensor, labels: Tensor
) -> float:
    """Mean accuracy of networks drawn at random: each decides with what its synapses release."""
    draws = guide.draw(model.observations(), draws=SAMPLES, chains=1, seed=0).values
    right = []
    for k in range(SAMPLES):
        z = {name: v[0, k, 0] for name, v in draws.items()}
        right.append((model.logits(z, images).argmax(-1) == labels).float().mean())
    return float(torch.stack(right).mean())


def kept(path: Path, make: Callable[[], Row]) -> Row:
    """A row from file, or made and filed."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        row = make()
        with atomic_path(path) as new:
            new.write_text(json.dumps(row))
    found: Row = json.loads(path.read_text())
    return found


def energy(args: argparse.Namespace) -> None:
    """Accuracy against the true cost of reliability."""
    data = DATA[args.data]()
    model = zoo.BayesianMLP(hidden=args.hidden, data=data)
    for name in args.mechanisms:
        ratios: dict[float, list[float]] = {level: [] for level in LEVELS}
        print(f"\n{name}: accuracy, cost per synapse (s = 1), rms sigma; own noise | common noise")
        for seed in args.seeds:
            own, one = (sweep(model, data, name, noise, seed, args) for noise in NOISES)
            for sd, a, b in zip(WANTED, own, one, strict=True):
                cells = [f"{r['accuracy']:.3f} {r['cost']:9.3g} {r['rms']:.3f}" for r in (a, b)]
                c = coefficient(MECHANISMS[name], sd)
                print(f"  seed {seed}  c = {c:8.1e}   {' | '.join(cells)}", flush=True)
            for level in LEVELS:
                ratios[level].append(at(level, one) / at(level, own))
        for level, found in ratios.items():
            shown = ", ".join(f"{r:.2f}" for r in found)
            print(f"  cost of common over own noise at accuracy {level:.0%}: {shown}")


def sweep(
    model: zoo.BayesianMLP, data: Data, name: str, noise: str, seed: int, args: argparse.Namespace
) -> list[Row]:
    """One curve: a row for each coefficient."""
    assert data.validation_labels is not None
    held, rho = (data.validation, data.validation_labels), MECHANISMS[name]

    def measure(sd: float) -> Row:
        cost = PowerLaw(rho, coefficient=coefficient(rho, sd))
        guide = synapses(
            model, cost, noise=noise, steps=args.steps, seed=seed, start=min(sd, START)
        )
        sd = guide.noise(model.observations()).detach()
        return {
            "accuracy": accuracy(model, guide, *held),
            "cost": float(PowerLaw(rho, scale=1.0).energy(sd.log()).mean()),
            "rms": float(sd.square().mean().sqrt()),
        }

    size = "-".join(map(str, args.hidden))
    stem = f"{data.name}-{size}-{args.steps}-{name}-{noise}-{seed}".replace(" ", "_")
    return [kept(args.out / f"{stem}-{sd}.json", functools.partial(measure, sd)) for sd in WANTED]


def coefficient(rho: float, sd: float) -> float:
    """The c for which a synapse of typical curvature has this sd."""
    return CURVATURE * sd ** (rho + 2) / rho


def at(level: float, curve: list[Row]) -> float:
    """The lowest cost at which an accuracy is reached, between points of a curve; NaN if none."""
    points = sorted((r["cost"], r["accuracy"]) for r in curve)
    for (low, before), (high, after) in pairwise(points):
        if before < level <= after:
            share = (level - before) / (after - before)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return math.nan


def signatures(args: argparse.Namespace) -> None:
    """What synapses of a deep network look like, layer by layer."""
    data = DATA[args.data]()
    assert data.validation_labels is not None
    model = zoo.BayesianMLP(hidden=args.hidden, data=data)
    for name in args.mechanisms:
        cost = PowerLaw(name, scale=args.scale)
        law = {p: diagnostics.predicted_slope(p, cost.rho) for p in ("curvature", "learning_rate")}
        print(f"\n{name}, s = {args.scale}: slopes of log variance, correlations; laws {law}")
        for seed in args.seeds:
            guide = synapses(
                model, cost, noise="synapse", steps=args.steps, seed=seed, start=args.scale
            )
            held = accuracy(model, guide, data.validation, data.validation_labels)
            print(f"  seed {seed}, accuracy {held:.3f}")
            found = diagnostics.synapse_statistics(guide, model.observations(), seed=0)
            for site in [n for n in model.shapes if n.startswith("w")]:
                layer = found.isel(synapse=found.site.values == site)
                print(f"    {site}, {layer.sizes['synapse']} synapses: {lines(layer)}", flush=True)


def lines(layer: Dataset) -> str:
    """Slope, correlation for each predictor."""
    found = diagnostics.synaptic_variance(layer, seed=0)
    cells = [
        f"{p} {float(found.value.sel(predictor=p)):+.2f} r {float(found.r.sel(predictor=p)):+.2f}"
        for p in found.predictor.values
    ]
    return "; ".join(cells)


def curve(inputs: Tensor, targets: Tensor) -> Tensor:
    """A network with one hidden layer of 20 for a curve with noise of sd .05."""

    def weights(name: str, *shape: int) -> Tensor:
        spread = 3.0 * shape[0] ** -0.5 if len(shape) == 2 else 1.0
        prior = dist.Normal(torch.zeros(shape), spread).to_event(len(shape))
        found: Tensor = pyro.sample(name, prior)
        return found

    hidden = (inputs @ weights("w1", 1, 20) + weights("b1", 20)).tanh()
    mean = (hidden @ weights("w2", 20, 1) + weights("b2", 1))[:, 0]
    with pyro.plate("rows", len(inputs)):
        found: Tensor = pyro.sample("y", dist.Normal(mean, 0.05), obs=targets)
    return found


def toy(args: argparse.Namespace) -> None:
    """Spread of predictions inside the data and outside them."""
    with seeded(0):
        x = torch.linspace(-1, 1, 60)[:, None]
        y = (x**3 + 2 * x**2)[:, 0] + 0.05 * torch.randn(60)
    model = zoo.from_pyro(curve, (x, y))
    costs: dict[str, Cost] = {"entropic": Entropic()}
    costs |= {f"{n}, s = {s}": PowerLaw(n, scale=s) for n in args.mechanisms for s in (0.01, 0.1)}
    print("\ny = x^3 + 2 x^2 on [-1, 1]")
    print("sd of predictions inside; at |x| = 1.5; their ratio; rms error of the mean inside")
    wide = torch.tensor([[-1.5], [1.5]])
    for name, cost in costs.items():
        guide = StochasticSynapses(model, scale=0.03, seed=1)
        objective = ReliabilityCost(cost, particles=4)
        inference.fit(
            model, guide, (x, y), objective=objective, steps=2 * args.steps, lr=LR, progress=False
        )
        draws = guide.draw((x, y), draws=400, chains=1, seed=0).values

        def predicted(at: Tensor, draws: dict[str, Tensor] = draws) -> Tensor:
            w1, b1, w2, b2 = (draws[n][0, :, 0] for n in ("w1", "b1", "w2", "b2"))
            return (((at @ w1 + b1[:, None]).tanh()) @ w2 + b2[:, None])[..., 0]

        inside, outside = predicted(x), predicted(wide)
        a, b = (float(v.std(0).mean()) for v in (inside, outside))
        error = float((inside.mean(0) - (x**3 + 2 * x**2)[:, 0]).square().mean().sqrt())
        print(f"{name:<28} {a:.4f}   {b:.4f}   {b / a:6.1f}   {error:.3f}", flush=True)


EXPERIMENTS = {"energy": energy, "signatures": signatures, "toy": toy}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS))
    parser.add_argument("--data", default="digits", choices=list(DATA))
    parser.add_argument("--hidden", default="50,50")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scale", type=float, default=0.01)
    parser.add_argument("--mechanisms", default=",".join(MECHANISMS))
    parser.add_argument("--out", type=Path, default=Path("runs/malkin2024"))
    args = parser.parse_args()
    args.hidden = tuple(int(h) for h in args.hidden.split(","))
    args.seeds = [int(s) for s in args.seeds.split(",")]
    args.mechanisms = args.mechanisms.split(",")
    torch.set_num_threads(1)
    for name in args.experiments.split(","):
        EXPERIMENTS[name](args)


if __name__ == "__main__":
    main()
