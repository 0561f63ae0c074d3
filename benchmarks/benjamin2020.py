"""What recurrence buys, what the adversary buys, and where neither does (Benjamin & Kording 2020).

Every objective and every ablation of the recurrent circuit on models with exact posteriors, beside
mean-field, full-covariance and flow encoders. Each fit is a row of a CSV file, so that a stopped
run goes on, and several processes can share the work (`--models`).

  objectives   the recurrent circuit: adversarial, prior-contrastive (reference that follows the
               guide, or the prior), Wasserstein, oscillating, energy score
  ablations    by energy score, and by the adversary: no lateral weights; noise and outputs private,
               with and without lateral weights; noise in a perceptron; no penalty; no warm-up
  paths        state space only: the temporal network, by the adversary with the energy score
               as an anchor, which is its default, and by each of the two alone
  baselines    mean-field (ELBO, and wake-sleep, which is factorised), full covariance, flow

Columns: KL(q || p) in nats, of Gaussian posteriors by moments of 20,000 draws, of discrete ones by
counts; C2ST above its floor; error of correlations; patterns and modes; lag-one correlation of
paths; dispersion; CPU seconds of the fit.

Run: python benchmarks/benjamin2020.py [--models ...] [--guides ...] [--seeds 0,1,2] [--steps 1000]
     [--out runs/benjamin2020.csv] [--show]
One fit takes about half a minute of a core, the whole table two hours.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diagnostics
import inference
import zoo
from inference import (
    ELBO,
    Adversarial,
    EnergyScore,
    ForwardKL,
    Oscillating,
    PriorContrastive,
    RecurrentRecognition,
    Wasserstein,
)
from inference.observation import size, take

PROBLEMS, DRAWS, MANY = 4, 1000, 20_000
RATE, BATCH = 3e-3, 128
METRICS = ("c2st", "correlation_error", "pattern_kl", "mode_occupancy")
COLUMNS = ("model", "guide", "seed", "kl", *METRICS, "lag", "dispersion", "seconds")
Recipe = tuple[Callable[..., inference.Guide], Callable[[], inference.Objective | None]]


def recurrent(**knobs: Any) -> Callable[..., inference.Guide]:
    """The circuit with some of its parts taken away."""
    return lambda model, seed: RecurrentRecognition(model, seed=seed, **knobs)


def plain(guide: Callable[..., inference.Guide]) -> Callable[..., inference.Guide]:
    """A guide as it is."""
    return lambda model, seed: guide(model, seed=seed)


PARTS: Mapping[str, Callable[..., inference.Guide]] = {
    "no lateral": recurrent(lateral=False),
    "private": recurrent(private=True),
    "private, no lateral": recurrent(private=True, lateral=False),
    "noise MLP": plain(inference.NoiseMLP),
}
GUIDES: dict[str, Recipe] = {
    "mean field": (plain(inference.MeanFieldEncoder), ELBO),
    "mean field, wake-sleep": (plain(inference.MeanFieldEncoder), ForwardKL),
    "full covariance": (plain(inference.FullCovarianceEncoder), ELBO),
    "flow": (plain(inference.Flow), ForwardKL),
    "adversarial": (recurrent(), Adversarial),
    "prior-contrastive": (recurrent(), PriorContrastive),
    "wasserstein": (recurrent(), Wasserstein),
    "oscillating": (recurrent(), Oscillating),
    "energy score": (recurrent(), EnergyScore),
    **{f"energy score, {name}": (make, EnergyScore) for name, make in PARTS.items()},
    **{f"adversarial, {name}": (make, Adversarial) for name, make in PARTS.items()},
    "prior-contrastive, prior": (recurrent(), lambda: PriorContrastive(adaptive=False)),
    "adversarial, no penalty": (recurrent(), lambda: Adversarial(penalty=0.0)),
    "adversarial, cold": (recurrent(), lambda: Adversarial(warm_up=0.0)),
}
PATHS: dict[str, Recipe] = {
    "temporal, adversarial": (plain(inference.TemporalRecognition), Adversarial),
    "temporal, adversarial alone": (
        plain(inference.TemporalRecognition),
        lambda: Adversarial(anchor=0.0),
    ),
    "temporal, energy score": (plain(inference.TemporalRecognition), EnergyScore),
}
MODELS: Mapping[str, Callable[[], zoo.Model]] = {
    "explaining away 2": lambda: zoo.ExplainingAway(2, noise=0.3),
    "explaining away 5": lambda: zoo.ExplainingAway(5, noise=0.3),
    "explaining away 10": lambda: zoo.ExplainingAway(10, noise=0.3),
    "banana": zoo.Banana,
    "product": zoo.Product,
    "continuous sprinkler": zoo.ContinuousSprinkler,
    "sprinkler": zoo.Sprinkler,
    "noisy-OR": zoo.NoisyOr,
    "layered Gaussian": zoo.LayeredGaussian,
    "state space": zoo.StateSpace,
}


def cell(title: str, name: str, seed: int, steps: int) -> dict[str, Any]:
    """One fit, measured."""
    model = MODELS[title]()
    make, goal = (GUIDES | PATHS)[name]
    began = time.process_time()
    guide = make(model, seed=seed)
    done = inference.fit(
        model, guide, objective=goal(), steps=steps, lr=RATE, batch_size=BATCH, seed=seed,
        progress=False,
    )  # fmt: skip
    seconds = time.process_time() - began
    x = take(model.observations(), slice(PROBLEMS))
    metrics = {m: diagnostics.METRICS[m] for m in METRICS}
    found = diagnostics.compare(model, {name: guide}, x, draws=DRAWS, seed=0, metrics=metrics)
    means = diagnostics.summary(found).sel(guide=name)
    row = {m: float(means.value.sel(metric=m)) for m in METRICS}
    row["c2st"] = float(means.excess.sel(metric="c2st"))
    spread = done.health.get("dispersion", np.full(1, math.nan))[-1]
    return row | {
        "model": title, "guide": name, "seed": seed, "kl": divergence(model, guide, x),
        "lag": lag(guide, x) if name in PATHS or title == "state space" else math.nan,
        "dispersion": float(spread), "seconds": seconds,
    }  # fmt: skip


def divergence(model: zoo.Model, guide: inference.Guide, x: Any) -> float:
    """Mean KL(q || p) over problems, of Gaussian and of discrete posteriors; else NaN."""
    exact = model.exact()
    z = guide.draw(x, draws=MANY, chains=1, seed=5).values
    if isinstance(exact, zoo.Enumerated):
        return discrete(exact, z, x)
    if not isinstance(exact, zoo.LinearGaussianPosterior):
        return math.nan
    u = guide.latents.pack(z)[0][0].double()  # (S, B, D)
    p = exact.distribution(x)
    found = []
    for b in range(size(x)):
        q = torch.distributions.MultivariateNormal(u[:, b].mean(0), torch.cov(u[:, b].T))
        cholesky = p.scale_tril.double().expand(size(x), -1, -1)[b]
        truth = torch.distributions.MultivariateNormal(p.loc[b].double(), scale_tril=cholesky)
        found.append(torch.distributions.kl_divergence(q, truth))
    return float(torch.stack(found).mean())


def lag(guide: inference.Guide, x: Any) -> float:
    """Mean posterior correlation of neighbouring latents; .533 for the exact smoother."""
    u = guide.latents.pack(guide.draw(x, draws=MANY, chains=1, seed=5).values)[0][0]
    each = [torch.corrcoef(u[:, b].T).diagonal(1).mean() for b in range(size(x))]
    return float(torch.stack(each).mean())


def discrete(exact: zoo.Enumerated, z: inference.Values, x: Any) -> float:
    """By counts of the states that were drawn; (states - 1) / 2 S too large on average."""
    found = []
    for b in range(size(x)):
        rows = torch.cat([v[0, :, b].reshape(MANY, -1) for v in z.values()], -1)
        _, first, counts = np.unique(rows.numpy(), axis=0, return_index=True, return_counts=True)
        kept = {n: v[0, torch.as_tensor(first), b : b + 1] for n, v in z.items()}
        one = take(x, slice(b, b + 1))
        log_p = exact.log_prob(kept, one)[:, 0].double().numpy()
        share = counts / MANY
        found.append(float((share * (np.log(share) - log_p)).sum()))
    return float(np.mean(found))


def done_already(path: Path) -> set[tuple[str, str, int]]:
    """Cells that are in the file."""
    if not path.exists():
        return set()
    with path.open() as file:
        return {(r["model"], r["guide"], int(r["seed"])) for r in csv.DictReader(file)}


def show(path: Path) -> None:
    """Means over seeds, and their range, model by model."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for title in dict.fromkeys(r["model"] for r in rows):
        print(f"\n{title}\n{'':<28}" + "".join(f"{c:>26}" for c in COLUMNS[3:]))
        for name in GUIDES | PATHS:
            mine = [r for r in rows if r["model"] == title and r["guide"] == name]
            if mine:
                cells = [spanned([float(r[c]) for r in mine]) for c in COLUMNS[3:]]
                print(f"{name:<28}" + "".join(f"{c:>26}" for c in cells))


def spanned(values: list[float]) -> str:
    """Mean, and range where there are several."""
    if any(math.isnan(v) for v in values):
        return ""
    text = f"{np.mean(values):.3g}"
    return text if len(values) == 1 else f"{text} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--guides", default=";".join(GUIDES), help="separated by semicolons")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/benjamin2020.csv"))
    parser.add_argument("--show", action="store_true", help="only print what is in the file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        (title, name, int(seed))
        for seed in args.seeds.split(",")
        for title in args.models.split(",")
        for name in args.guides.split(";")
    ]
    for title, name, seed in [] if args.show else wanted:
        if (title, name, seed) in done_already(args.out):
            continue
        try:
            row = cell(title, name, seed, args.steps)
        except inference.Incompatible as error:
            print(f"{title}, {name}: {error}", flush=True)
            continue
        new = not args.out.exists()
        with args.out.open("a") as file:
            table = csv.DictWriter(file, COLUMNS)
            if new:
                table.writeheader()
            table.writerow({n: f"{v:.5g}" if isinstance(v, float) else v for n, v in row.items()})
        print({n: row[n] for n in ("model", "guide", "seed", "kl", "c2st", "seconds")}, flush=True)
    show(args.out)


if __name__ == "__main__":
    main()
