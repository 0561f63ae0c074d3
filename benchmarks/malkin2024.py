"""Stochastic synapses of one neuron against exact posteriors (Malkin et al., 2024).

A neuron with 20 inputs of scales 10^-.7 to 10^.7 and 1,000 trials, linear (exact posterior in
closed form) or logistic (near-exact draws; all inputs drive it alike, for one that is saturated by
its strong inputs learns of the others from few trials). Its synapses are trained by performance +
magnitude + reliability, with each of the four mechanisms, and with the entropic cost for Bayes.

  slopes       of log variance on log posterior variance (2 / (rho + 2)), on the log of the adaptive
               learning rate (4 / (rho + 2)) and of the mean square input (-2 / (rho + 2)), and how
               far means are from the posterior's (tests T4-T6 and T8-T10 of the design)
  posterior    sds of synapses against those of the posterior's marginals: rank correlation, sd
               ratio, C2ST, for correlated inputs (Bm1)
  calibration  how often the true weights are in central 90 % intervals, over many data sets, with
               the scale s0 of each cost calibrated, three times too small and too large
  picture      variances of synapses and the laws, docs/reliability.png

Run: python benchmarks/malkin2024.py [--experiments slopes,posterior] [--steps 3000]
All take about ten minutes on a core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import numpy as np
import torch
from record import record
from scipy.stats import norm, spearmanr
from torch import Tensor

import diagnostics
import inference
import zoo
from diagnostics.style import PALETTE, new_figure
from inference import MECHANISMS, Cost, Entropic, PowerLaw, ReliabilityCost, StochasticSynapses
from inference.seeds import seeded

TRIALS, INPUTS, SCALE = 1000, 20, 0.1
DRIVE = 0.5  # sd of what an input sends to a logistic neuron
START = 0.02  # sd of a synapse, near those of the strongest inputs
Neuron = zoo.BayesianRegression | zoo.LogisticRegression


def linear(correlation: float) -> zoo.BayesianRegression:
    """A data set of a linear neuron."""
    return zoo.BayesianRegression(TRIALS, INPUTS, problems=1, correlation=correlation)


def logistic(correlation: float) -> zoo.LogisticRegression:
    """A data set of a neuron that decides, driven alike by all of its inputs."""
    model = zoo.LogisticRegression(TRIALS, INPUTS, problems=1, alpha=0.1, correlation=correlation)
    inputs, _ = model.observations()
    with seeded(0):
        weights = DRIVE * torch.randn(INPUTS) / inputs[0].std(0)
        model.keep((inputs, torch.bernoulli((inputs @ weights).sigmoid())))
    return model


NEURONS: Mapping[str, Callable[[float], Neuron]] = {"linear": linear, "logistic": logistic}
COSTS: Mapping[str, Cost] = {"entropic": Entropic()} | {
    name: PowerLaw(name, scale=SCALE) for name in MECHANISMS
}


def trained(model: Neuron, x: tuple[Tensor, Tensor], cost: Cost, steps: int) -> StochasticSynapses:
    """Synapses of a neuron that knows a data set."""
    guide, objective = StochasticSynapses(model, scale=START), ReliabilityCost(cost)
    settings = {"objective": objective, "steps": steps, "lr": 0.02, "seed": 0, "progress": False}
    inference.fit(model, guide, x, **settings)
    return guide


def slope(x: Tensor, y: Tensor) -> float:
    """Least-squares slope of log y on log x."""
    return float(np.polyfit(*(v.detach().log().flatten().numpy() for v in (x, y)), 1)[0])


def moments(guide: inference.Guide, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of the synapses of all data sets, (B, p)."""
    with torch.no_grad():
        q = guide.distribution(x)
    return q.mean, q.variance


def fisher(kind: str, x: tuple[Tensor, Tensor], mean: Tensor) -> Tensor:
    """Sum over trials of squared gradients of the log-likelihood at the mean weights, (B, p)."""
    inputs, targets = x
    drive = (inputs @ mean[..., None])[..., 0]
    error = targets - (drive if kind == "linear" else drive.sigmoid())
    return (error[..., None] * inputs).square().sum(-2)


def slopes(steps: int) -> None:
    """The three laws, linear and logistic."""
    off_law = []
    for kind, make in NEURONS.items():
        model = make(0.0)
        x = model.observations()
        exact = model.exact().draw(x, draws=2000, chains=1, seed=0).values["w"][0]
        centre, spread = exact.mean(0), exact.std(0)
        mean, bayes = moments(trained(model, x, Entropic(), steps), x)
        print(f"\n{kind} neuron; entropic: largest z of a mean {worst(mean - centre, spread):.2f}")
        if isinstance(model, zoo.BayesianRegression):
            h = model.exact().precision().diagonal(dim1=-2, dim2=-1)
            off = (bayes.log() + h.log()).abs().max()
            print(f"largest difference of log variance and log 1 / L_ii: {off:.3f}")
            bayes = 1 / h
        print(
            "slopes of log variance, measured (law), r of log sds with those of Bayes, z of means"
        )
        predictors = {"posterior variance": (bayes, 1), "mean square input": (power(x), -1)}
        for name in MECHANISMS:
            mean, variance = moments(trained(model, x, COSTS[name], steps), x)
            predictors["learning rate"] = fisher(kind, x, mean).rsqrt(), 2
            law, r = 2 / (MECHANISMS[name] + 2), np.corrcoef(variance.log(), bayes.log())[0, 1]
            cells = [
                f"{n} {slope(v, variance):+.3f} ({k * law:+.3f})"
                for n, (v, k) in predictors.items()
            ]
            off_law.append(abs(slope(bayes, variance) - law))
            z = worst(mean - centre, spread)
            print(f"{name:<18} {'; '.join(cells)}; r {r:.4f}; z {z:.2f}", flush=True)
    record("slope", max(off_law), off_law)


def picture(steps: int) -> None:
    """Variance of synapses against posterior variance, a line for each law."""
    model = linear(0.0)
    x = model.observations()
    exact = 1 / model.exact().precision().diagonal(dim1=-2, dim2=-1)[0]
    ends = torch.stack([exact.min(), exact.max()])
    figure = new_figure(5.2, 4.2)
    ax = figure.subplots()
    for ink, (name, cost) in zip(PALETTE, COSTS.items(), strict=False):
        variance = moments(trained(model, x, cost, steps), x)[1][0].detach()
        law = cost.optimal_sd(1 / ends).square()
        ax.plot(ends, law, color=ink, lw=1.5, label=f"{name}, {slope(ends, law):.2g}")
        ax.plot(exact, variance, "o", color=ink, ms=4)
    ax.set(xscale="log", yscale="log", xlabel="posterior variance", ylabel="synaptic variance")
    ax.legend(frameon=False, title="cost, predicted slope")
    figure.savefig("docs/reliability.png")


def posterior(steps: int) -> None:
    """Synapses against the marginals of the exact posterior, weakly correlated inputs."""
    model = logistic(0.3)
    x = model.observations()
    bayes = moments(trained(model, x, Entropic(), steps), x)[1].sqrt()
    guides: dict[str, inference.Guide] = {
        name: trained(model, x, calibrated(cost, bayes), steps) for name, cost in COSTS.items()
    }
    guides["nuts"] = inference.NUTS(model, warmup=300)
    compared = diagnostics.compare(model, guides, x, draws=1000, seed=0)
    table = diagnostics.summary(compared).value.sel(metric=["mean_error", "sd_ratio", "c2st"])
    print("\nlogistic neuron, correlation .3, s0 calibrated: synapses against the exact posterior")
    print(table.to_pandas().round(3))
    exact = model.exact().draw(x, draws=4000, chains=1, seed=1).values["w"][0, :, 0].std(0)
    print("rank correlation of sds with those of the exact marginals")
    for name in COSTS:
        sd = moments(guides[name], x)[1][0].sqrt()
        print(f"{name:<18} {spearmanr(sd, exact).statistic:.3f}")


def calibration(steps: int) -> None:
    """Coverage of the true weights of 200 data sets, and what each mechanism does to the spread."""
    model = zoo.BayesianRegression()
    z, x = model.simulate(200, seed=1)
    precision = model.exact().precision(x)
    best = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    marginal = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt()
    print("\nlinear neuron, 4 correlated inputs, 200 data sets: coverage of 90 % intervals,")
    print("sd over the best factorised one (geometric mean, lowest, highest), gap to its ELBO")
    exact = covered(z["w"], model.exact().distribution(x).mean, marginal)
    print(f"{'exact posterior':<28} coverage {exact}")
    for name, cost in COSTS.items():
        for factor in (1.0,) if name == "entropic" else (1 / 3, 1.0, 3.0):
            mean, variance = moments(trained(model, x, calibrated(cost, best, factor), steps), x)
            ratio = (variance.sqrt() / best).double()
            gap = 0.5 * (ratio.square() - 1 - 2 * ratio.log()).sum(1).mean()
            inside = covered(z["w"], mean, variance.sqrt())
            low, middle, high = ratio.min(), ratio.log().mean().exp(), ratio.max()
            print(f"{name:<18} s0 x {factor:<4.2f} coverage {inside}   sds {middle:.2f}"
                  f" ({low:.2f}, {high:.2f})   gap {gap:.3f} nats", flush=True)  # fmt: skip


def calibrated(cost: Cost, sd: Tensor, factor: float = 1.0) -> Cost:
    """The cost with the scale that leaves the least gap to the ELBO, times a factor."""
    if not isinstance(cost, PowerLaw):
        return cost
    return PowerLaw(cost.rho, scale=factor * inference.calibrated_scale(sd, cost.rho))


def covered(truth: Tensor, mean: Tensor, sd: Tensor) -> str:
    """Share of true weights in central 90 % intervals, with its error over data sets."""
    inside = ((truth - mean).abs() < norm.ppf(0.95) * sd).double().mean(1)
    return f"{inside.mean():.3f} ± {inside.std() / len(inside) ** 0.5:.3f}"


def worst(difference: Tensor, spread: Tensor) -> float:
    """The largest of them, in units of the spread."""
    return (difference / spread).abs().max().item()


def power(x: tuple[Tensor, Tensor]) -> Tensor:
    """Mean square of each input, (B, p)."""
    return x[0].square().mean(1)


EXPERIMENTS = {
    "slopes": slopes,
    "posterior": posterior,
    "calibration": calibration,
    "picture": picture,
}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS))
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.experiments.split(","):
        EXPERIMENTS[name](args.steps)


if __name__ == "__main__":
    main()
