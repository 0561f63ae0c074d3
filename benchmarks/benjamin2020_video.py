"""Recognition of video, judged frame by frame against exact posteriors.

Benjamin & Kording (2021) learn from video; data, network and numbers were not available: these are
ours, on models of ours.

  smoothing  a blob that disappears for three of ten frames, in a Gaussian model: KL(guide || exact)
             of Gaussians with the moments of the draws, nats, over 20 problems; posterior
             correlation of neighbouring positions, in all frames and in hidden ones
  filtering  the same network, which sees the past only, on this model and on an autoregression:
             KL of each step's draws to the exact filter, and to the smoother, which it is not
  ball       a ball that passes behind an occluder, 144 states: probability of its true position,
             where it is visible and where not; total variation between guide's and exact
             probabilities of positions; share of steps that a ball can take.
             docs/recognition_video.gif and .png

Cells are means over seeds and their range. Fits stay in the output folder, so that a stopped run
goes on where it stopped; tables are also written there as CSV.

Run: python benchmarks/benjamin2020_video.py [--experiments smoothing,filtering,ball]
     [--seeds 0,1] [--out runs/benjamin2020_video]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benjamin2020_networks import Row, Rows, show, trained
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from xarray import DataTree

import diagnostics
import inference
import zoo
from diagnostics.film import film, record
from diagnostics.style import INK, PALETTE, new_figure
from inference import ELBO, Adversarial, EnergyScore, ForwardKL, TemporalRecognition

PROBLEMS, DRAWS, BALLS = 20, 4000, 60
MAP = {"cmap": "Blues", "norm": PowerNorm(0.5, 0, 1)}  # faint places can be seen, too
STEPS, BATCH = 600, 64
TEMPERATURE = 2.0  # of relaxed states: at .5, gradients of this many states are too noisy
Recipe = tuple[Callable[..., inference.Guide], Callable[[], inference.Objective], int]


TAUGHT: Mapping[str, Callable[[], inference.Objective]] = {
    "energy score": EnergyScore,
    "adversarial": Adversarial,
}  # Adversarial(anchor=0.0) diverges on the blob
SMOOTHERS: Mapping[str, Recipe] = {
    **{name: (TemporalRecognition, goal, STEPS) for name, goal in TAUGHT.items()},
    "mean field, ELBO": (inference.MeanFieldEncoder, ELBO, 2 * STEPS),
    "full covariance, forward KL": (inference.FullCovarianceEncoder, ForwardKL, 2 * STEPS),
}


# --------------------------------------------------------------------------------------- smoothing


def smoothing(args: argparse.Namespace) -> None:
    """Paths of a blob."""
    model = zoo.GaussianVideo()
    x = model.simulate(PROBLEMS, seed=9)[1]
    rows: Rows = {"exact": [path(model, model.exact(), x)]}
    for arm, (make, goal, steps) in SMOOTHERS.items():
        rows[arm] = []
        for seed in args.seeds:
            guide = make(model, seed=seed)
            knobs = {"steps": steps, "batch_size": BATCH}
            trained(args, f"blob-{arm}", model, guide, goal(), seed, **knobs)
            rows[arm].append(path(model, guide, x))
    show("smoothing: KL in nats, correlations of neighbours", rows, args)


def path(model: zoo.GaussianVideo, guide: inference.Guide, x: Tensor) -> Row:
    """Whole paths against the exact posterior."""
    z = drawn(guide, x)
    exact = model.exact().distribution(x)
    p = MultivariateNormal(exact.loc.double(), scale_tril=exact.scale_tril.double())
    covariance = torch.stack([torch.cov(one.T) for one in z.unbind(1)])
    kl = kl_divergence(MultivariateNormal(z.mean(0), covariance), p)
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    neighbours = covariance.diagonal(1, -2, -1) / (sd[:, 1:] * sd[:, :-1])
    hidden = model.scale[:, 0] > model.scale.min()
    return {
        "KL": float(kl.mean()), "largest KL": float(kl.max()),
        "correlation": float(neighbours.mean()),
        "where hidden": float(neighbours[:, hidden[1:] & hidden[:-1]].mean()),
    }  # fmt: skip


def drawn(guide: inference.Guide, x: Tensor) -> Tensor:
    """Draws of the site z, (S, B, T), in float64."""
    return guide.draw(x, draws=DRAWS, chains=1, seed=1).values["z"][0].double()


# --------------------------------------------------------------------------------------- filtering


def filtering(args: argparse.Namespace) -> None:
    """What can be known at the time."""
    for model in (zoo.GaussianVideo(), zoo.StateSpace()):
        x = model.simulate(PROBLEMS, seed=9)[1]
        now, whole = known(model, x, future=False), known(model, x, future=True)
        rows: Rows = {
            "exact smoother": [{"to the filter": float(kl_divergence(whole, now).mean())}]
        }
        rows["exact filter"] = [steps_apart(now.sample(torch.Size([DRAWS])), now, whole)]
        for arm, goal in TAUGHT.items():
            rows[arm] = []
            for seed in args.seeds:
                guide = TemporalRecognition(model, causal=True, seed=seed)
                knobs = {"steps": STEPS, "batch_size": BATCH}
                trained(args, f"{model.title}-{arm}", model, guide, goal(), seed, **knobs)
                rows[arm].append(steps_apart(drawn(guide, x), now, whole))
        show(f"filtering of {model.title}: KL of a step in nats", rows, args)


def known(model: Any, x: Tensor, *, future: bool) -> Normal:
    """Exact marginals of each step given the observations so far, or given all of them, (B, T)."""
    system, y = model.linear_gaussian(x)
    steps, features = len(system.mean), y.shape[1]
    offset, noise = (t.expand(features) for t in (system.offset, system.noise))
    found = []
    for t in range(steps):
        seen = slice(features if future else (t + 1) * (features // steps))
        part = replace(system, weights=system.weights[seen], offset=offset[seen], noise=noise[seen])
        loc, tril = part.posterior(y[:, seen].double())
        sd = tril[..., t, :].square().sum(-1).sqrt()
        found.append(torch.stack([loc[:, t], sd.expand(len(y))]))
    return Normal(*torch.stack(found, -1))


def steps_apart(z: Tensor, now: Normal, whole: Normal) -> Row:
    """Mean KL of Gaussians with the moments of draws, step by step."""
    q = Normal(z.mean(0), z.std(0))
    pairs = {"to the filter": now, "to the smoother": whole}
    return {name: float(kl_divergence(q, p).mean()) for name, p in pairs.items()}


# -------------------------------------------------------------------------------------------- ball


def ball(args: argparse.Namespace) -> None:
    """Where is the ball?"""
    model = zoo.MovingBall(6, steps=8)
    truth, x = model.simulate(BALLS, seed=9)
    exact, other = (places(model, model.exact(), x, seed) for seed in (2, 3))
    rows: Rows = {"exact": [seen(model, other, exact, truth["z"])]}
    shown = {}
    for arm, goal in TAUGHT.items():
        rows[arm] = []
        for seed in args.seeds:
            guide = TemporalRecognition(model, temperature=TEMPERATURE, seed=seed)
            knobs = {"steps": STEPS, "batch_size": BATCH}
            trained(args, f"ball-{arm}", model, guide, goal(), seed, **knobs)
            rows[arm].append(seen(model, places(model, guide, x, 4), exact, truth["z"]))
            shown.setdefault(arm, guide)
    show("ball: positions, visible and hidden", rows, args)
    picture(model, shown)


def places(model: zoo.MovingBall, guide: inference.Guide, x: Tensor, seed: int) -> Any:
    """Probabilities of positions (B, T, cells), and the share of steps that a ball can take."""
    z = guide.draw(x, draws=500, chains=1, seed=seed).values["z"][0]
    cells = torch.stack([(z // 4 == k).double().mean(0) for k in range(model.side**2)], -1)
    can = (model.successors[z[..., :-1]] == z[..., 1:, None]).any(-1)
    return cells, float(can.double().mean())


def seen(model: zoo.MovingBall, mine: Any, exact: Any, truth: Tensor) -> Row:
    """Against the true positions, and against exact probabilities."""
    (q, can), (p, _) = mine, exact
    right = q.gather(-1, (truth // 4)[..., None])[..., 0]
    apart = (q - p).abs().sum(-1) / 2
    hidden = torch.isin(model.position(truth)[..., 1], torch.tensor(model.occluder))
    return {
        f"{name}, {where}": float(value[chosen].mean())
        for name, value in (("P(true)", right), ("TV", apart))
        for where, chosen in (("visible", ~hidden), ("hidden", hidden))
    } | {"possible steps": can}


def picture(model: zoo.MovingBall, guides: Mapping[str, inference.Guide]) -> None:
    """A film of the ball that is hidden longest, and the same frames side by side."""
    x = model.observations()[:1]
    trees = diagnostics.collect(model, guides, x, draws=500, seed=0)
    record(model, trees)
    Path("docs/recognition_video.gif").write_bytes(film(trees))
    strip(model, trees).savefig("docs/recognition_video.png")


def strip(model: zoo.MovingBall, trees: Mapping[str, DataTree]) -> Figure:
    """Frames from left to right: what is seen, and where each guide takes the ball to be."""
    z, x = model.simulate(100, seed=0)
    at = int((x == model.observations()[0]).flatten(1).all(1).nonzero()[0])
    true = model.position(z["z"][at])
    rows = {"observed": x[at]} | {n: tree["film"]["where"].values[0] for n, tree in trees.items()}
    figure = new_figure(1.1 + 0.95 * model.steps, 0.95 * len(rows) + 0.3)
    axes = figure.subplots(len(rows), model.steps, squeeze=False)
    for line, (name, frames) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        look: dict[str, Any] = {"cmap": "gray_r"} if name == "observed" else MAP
        for t, ax in enumerate(line):
            ax.imshow(np.reshape(frames[t], (model.side, model.side)), **look)
            first, last = min(model.occluder), max(model.occluder)
            ax.axvspan(first - 0.5, last + 0.5, color=PALETTE[4], alpha=0.25, lw=0)
            ax.plot(*true[t].flip(0), "o", ms=8, mfc="none", mec=PALETTE[1])
            ax.set(xticks=[], yticks=[])
    for t, ax in enumerate(axes[0]):
        ax.set_title(f"frame {t + 1}", fontsize=9, color=INK)
    figure.supxlabel("circles: where the ball is; shaded: hidden columns", fontsize=9, color=INK)
    return figure


EXPERIMENTS = {"smoothing": smoothing, "filtering": filtering, "ball": ball}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("runs/benjamin2020_video"))
    args = parser.parse_args()
    args.seeds = [int(s) for s in args.seeds.split(",")]
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.experiments.split(","):
        EXPERIMENTS[name](args)


if __name__ == "__main__":
    main()
