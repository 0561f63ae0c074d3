"""Circuits with a cost on reliability against exact posteriors, after Aitchison et al. (2018).

Only the abstract of the paper was at hand, which gives no numbers: these are ours.

  ladder       one layer, several layers, recurrent, trained with the entropic cost: KL(q || p) in
               nats (the ELBO gap) and C2ST above its floor, three seeds (Bm5)
  uncertainty  log variance of neurons against that of the exact posterior's marginals, and the
               slope on contrast, of images whose contrast is known and inferred; to infer it, one
               layer will not do: a log contrast that is linear in x grows without end, and diverges
  mechanisms   what each cost makes of a posterior: factor analysis, the recurrent circuit, with s0
               calibrated, three times too small and too large; coverage of 90 % intervals and the
               p-value of simulation-based calibration

Run: python benchmarks/aitchison2018.py [--experiments ladder,uncertainty,mechanisms]
     [--steps 2000] [--seeds 0,1,2]
All take about fifteen minutes on a core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from itertools import product

import numpy as np
import torch
from torch import nn

import diagnostics
import inference
import zoo
from inference import MECHANISMS, Cost, Entropic, PowerLaw, ReliabilityCost
from inference.observation import take
from inference.seeds import seeded

OVERLAP = 0.7  # of two sparse features, so that they explain each other away
PROBLEMS, DRAWS = 10, 1000
PRICED = "calcium efflux", "trafficking"  # the flattest and the steepest
MEAN = ["chain", "draw"]


def overlapping() -> zoo.SparseCoding:
    """Sparse coding with two features that overlap."""
    model = zoo.SparseCoding(2)
    a, b = model.features.detach().T
    apart = nn.functional.normalize(b - (a @ b) * a, dim=0)
    model.dictionary = nn.Parameter(
        torch.stack([a, OVERLAP * a + (1 - OVERLAP**2) ** 0.5 * apart], 1)
    )
    with seeded(0):
        model.keep(model.simulate(100, seed=0)[1])
    return model


MODELS: Mapping[str, Callable[[], zoo.Model]] = {
    "factor analysis": zoo.FactorAnalysis,
    "sparse coding, overlapping": overlapping,
    "scale mixture, contrast known": zoo.ObservedContrast,
}
CIRCUITS: Mapping[str, type[inference.Guide]] = {
    "single layer": inference.SingleLayerCircuit,
    "multi layer": inference.MultiLayerCircuit,
    "recurrent": inference.RecurrentCircuit,
}


def trained(
    model: zoo.Model, circuit: type[inference.Guide], cost: Cost, steps: int, seed: int = 0
) -> inference.Guide:
    """A circuit that has learned from draws of the model's joint."""
    objective = ReliabilityCost(cost)
    guide = circuit(model)
    inference.fit(model, guide, objective=objective, steps=steps, seed=seed, progress=False)
    return guide


def ladder(steps: int, seeds: list[int]) -> None:
    """Does each rung bring the posterior nearer?"""
    for title, make in MODELS.items():
        model = make()
        x = take(model.observations(), slice(PROBLEMS))
        print(f"\n{title}: ELBO gap, C2ST above its floor, largest correlation error; by seed")
        for name, circuit in CIRCUITS.items():
            guides = {
                f"seed {seed}": trained(model, circuit, Entropic(), steps, seed) for seed in seeds
            }
            means = diagnostics.summary(
                diagnostics.compare(model, guides, x, draws=DRAWS, seed=0)
            ).sel(guide=list(guides))
            cells = [
                ", ".join(f"{v:{width}}" for v in found.values)
                for found, width in (
                    (means.value.sel(metric="elbo_gap"), ".3f"),
                    (means.excess.sel(metric="c2st"), "+.3f"),
                    (means.value.sel(metric="correlation_error"), ".2f"),
                )
            ]
            print(f"{name:<14} {'   '.join(cells)}", flush=True)


def uncertainty(steps: int, seeds: list[int]) -> None:
    """Does variability follow posterior uncertainty, and does contrast quench it?"""
    costs = {"entropic": Entropic(), **{n: PowerLaw(n, scale=0.3) for n in PRICED}}
    for title, model, circuits in (
        ("contrast known", zoo.ObservedContrast(), list(CIRCUITS)),
        ("contrast inferred", zoo.ScaleMixture(), list(CIRCUITS)[1:]),
    ):
        x = model.observations()
        exact = diagnostics.draw(model, model.exact(), x, draws=DRAWS, chains=1, seed=1).posterior
        contrast = x[0].flatten().numpy() if isinstance(x, tuple) else exact.contrast.mean(MEAN)
        wanted = steepness(exact.u.values, contrast)
        print(f"\n{title}: slope of log variance on log exact variance; on log contrast (exact)")
        for name, (label, cost) in product(circuits, costs.items()):
            guide = trained(model, CIRCUITS[name], cost, steps)
            draws = diagnostics.draw(model, guide, x, draws=DRAWS, chains=1, seed=0).posterior.u
            own, true = (np.log(v.var(MEAN).values).ravel() for v in (draws, exact.u))
            slope = np.polyfit(true, own, 1)[0]
            law = 2 / (MECHANISMS.get(label, 0.0) + 2)
            quenched = steepness(draws.values, contrast)
            print(f"{name:<14} {label:<18} {slope:+.3f} (law {law:.2f});   "
                  f"{quenched:+.3f} ({wanted:+.3f})", flush=True)  # fmt: skip


def steepness(draws: np.ndarray, contrast: np.ndarray) -> float:
    """Slope of the mean log variance of neurons on log contrast."""
    variance = np.log(draws.var((0, 1))).mean(-1)
    return float(np.polyfit(np.log(contrast), variance, 1)[0])


def mechanisms(steps: int, seeds: list[int]) -> None:
    """What each cost makes of a posterior."""
    model = zoo.FactorAnalysis()
    x = model.observations()[:PROBLEMS]
    lengths = torch.linalg.eigvalsh(model.exact().precision()).detach().rsqrt()
    costs: dict[str, Cost] = {"entropic": Entropic()}
    for name, rho in MECHANISMS.items():
        best = inference.calibrated_scale(lengths, rho)
        costs |= {f"{name}, s0 x {k:.2g}": PowerLaw(rho, scale=k * best) for k in (1 / 3, 1, 3)}
    guides = {
        n: trained(model, inference.RecurrentCircuit, cost, steps) for n, cost in costs.items()
    }
    means = diagnostics.summary(diagnostics.compare(model, guides, x, draws=DRAWS, seed=0))
    print("\nfactor analysis, recurrent: sd ratio, correlation error, C2ST above floor, ELBO gap,")
    print("coverage of 90 % intervals, smallest p of simulation-based calibration")
    for name, guide in guides.items():
        row = means.sel(guide=name)
        values = [float(row.value.sel(metric=m)) for m in ("sd_ratio", "correlation_error")]
        excess, gap = (
            float(row.excess.sel(metric="c2st")),
            float(row.value.sel(metric="elbo_gap")),
        )
        ranks = diagnostics.sbc(model, guide, problems=300, seed=0, progress=False)
        test = diagnostics.sbc_test(ranks)
        shown = (
            f"{values[0]:.3f}  {values[1]:.3f}  {excess:+.3f}  {gap:.3f}   {covered(model, guide)}"
        )
        print(f"{name:<26} {shown}   p {float(test.p_value.min()):.2g}", flush=True)


def covered(model: zoo.Model, guide: inference.Guide) -> str:
    """Share of true latents in central 90 % intervals of 400 problems, with its error."""
    z, x = model.simulate(400, seed=5)
    draws = guide.draw(x, draws=400, chains=1, seed=0).values["z"][0]
    low, high = draws.quantile(draws.new_tensor([0.05, 0.95]), dim=0)
    inside = ((z["z"] > low) & (z["z"] < high)).double().mean(1)
    return f"{inside.mean():.3f} ± {inside.std() / len(inside) ** 0.5:.3f}"


EXPERIMENTS = {"ladder": ladder, "uncertainty": uncertainty, "mechanisms": mechanisms}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.experiments.split(","):
        EXPERIMENTS[name](args.steps, [int(s) for s in args.seeds.split(",")])


if __name__ == "__main__":
    main()
