"""What the iterative Poisson encoder's paper shows, with our guides, on data at hand.

Guides, each with a model of its own that is learned together with it, K = 512 latents:
  ip        OnlinePoisson: rolling prior, spikes, learned inhibition; beta = 24
  ip_published  the same with the authors' scaling of the KL
  ig        IterativeGaussian, online, on factor analysis
  ig_relu   the same on RectifiedCoding
  p_vae     PoissonEncoder, a perceptron with 512 hidden units
  g_vae     MeanFieldEncoder on factor analysis, the same perceptron
  lca       LCA on SparseCoding, learned at the mode

Data: patches (two photographs, 16 x 16, whitened, flat ones left out), van_hateren and mnist where
NEUROGUIDE_DATA has the files, digits. Experiments:
  convergence  R2 and zeros over 1,000 steps with whole spikes; the silent network is R2 = 0
  sweep        the trade-off between them as beta grows (ip, patches of 8 x 8, K = 128)
  labels       logistic regression on the final rates (digits, mnist)
  shifted      R2 on rotated digits and on patches after learning digits (digits, mnist)
  contrast     steps until half of the response, and its size, at three contrasts (ip)
  dictionary   a picture of features, runs/vafaii2024/DATA-dictionary.png

R2 is per patch, against its own mean, averaged, as published; in brackets pooled over all pixels.
Published numbers are printed beside ours; their patches (van Hateren, all components) and length of
training (160,000 steps) differ. Stopped runs go on where they stopped.

Run: python benchmarks/vafaii2024.py --data patches --guides ip,lca --steps 3000 --seeds 0,1,2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record
from scipy.ndimage import rotate
from torch import Tensor

import inference
import zoo
from diagnostics import plot_refinement, refinement
from inference.beliefs import HasBeliefs
from inference.seeds import seeded
from zoo.data import DATA, Data, patches, whiten

LATENTS, SIDE, BATCH, LR = 512, 16, 200, 5e-3
SHORT = 300  # steps that need no checkpoint
MARKS = (1, 8, 16, 32, 64, 128, 256, 512, 1000)
HELD, LABELLED = 300, 6000  # observations for curves, and for the regression
FLAT = 0.05  # sd of a patch in pixel units [0, 1], below which it is sky or blur
KEPT = 100  # principal components of patches
RUNS = Path("runs/vafaii2024")
PUBLISHED = {
    ("patches", "ip"): "R2 .830, zeros .773 (1,000 steps); .708, .369 (16)",
    ("patches", "ig"): "R2 .874, zeros 0; .850 (16)",
    ("patches", "ig_relu"): "R2 .820, zeros .576; .771, .256 (16)",
    ("patches", "lca"): "R2 .826, zeros .778",
    ("patches", "p_vae"): "R2 .696, zeros .774 (convolutional)",
    ("patches", "g_vae"): "R2 .795, zeros 0 (convolutional)",
    ("mnist", "ip"): "R2 .951, zeros .844, accuracy .965",
    ("mnist", "ig"): "R2 .914, zeros 0, accuracy .927",
    ("mnist", "ig_relu"): "R2 .906, zeros .785, accuracy .957",
    ("mnist", "p_vae"): "R2 .713, zeros .838, accuracy .979 (convolutional)",
    ("mnist", "g_vae"): "R2 .841, zeros 0, accuracy .958 (convolutional)",
}
SWEPT = (2.0, 6.0, 12.0, 24.0)  # a quarter of the pixels, and of the published betas
FEWER = 128
SWEEP_PUBLISHED = "8: .916/.675  16: .872/.729  24: .827/.775  48: .682/.873 (160,000 steps)"
CONTRASTS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Recipe:
    """How a guide and its model are made and learned."""

    model: type[zoo.Model]
    guide: Callable[[zoo.Model], inference.Guide]
    objective: Callable[[float], inference.Objective]
    beta: float


def _closed(beta: float) -> inference.Objective:
    return inference.FreeEnergy(beta=beta)


def _online(divergence: str) -> Callable[[float], inference.Objective]:
    return lambda beta: inference.FreeEnergy(
        beta=beta, divergence=divergence, reconstruction="sample"
    )


def _poisson(model: zoo.Model) -> inference.Guide:
    return inference.OnlinePoisson(model, step=0.2)


def _gaussian(model: zoo.Model) -> inference.Guide:
    return inference.IterativeGaussian(model, mode="online", learn_step=True, step=0.2)


def _rectified(model: zoo.Model) -> inference.Guide:
    """Draws tell the curvature, which would take 512 decodings per problem and step."""
    knobs = {"signal": "spikes", "self_inhibition": False, "cautious": False}
    return inference.IterativeGaussian(model, mode="online", learn_step=True, step=0.2, **knobs)


RECIPES = {
    "ip": Recipe(zoo.PoissonCoding, _poisson, _online("exact"), 24.0),
    "ip_published": Recipe(zoo.PoissonCoding, _poisson, _online("published"), 24.0),
    "ig": Recipe(zoo.FactorAnalysis, _gaussian, _closed, 8.0),
    "ig_relu": Recipe(zoo.RectifiedCoding, _rectified, _closed, 8.0),
    "p_vae": Recipe(
        zoo.PoissonCoding,
        lambda m: inference.PoissonEncoder(m, hidden=(512,)),
        _closed,
        1.0,
    ),
    "g_vae": Recipe(
        zoo.FactorAnalysis,
        lambda m: inference.MeanFieldEncoder(m, hidden=(512,)),
        lambda beta: inference.ELBO(),
        1.0,
    ),
    "lca": Recipe(
        zoo.SparseCoding,
        lambda m: inference.LCA(m, steps=100, tolerance=1e-3),
        lambda beta: inference.MAPEnergy(),
        1.0,
    ),
}


def load(name: str, side: int) -> Data:
    """A data set in units of its own sd; patches whitened, without flat ones."""
    if name in ("digits", "mnist"):
        return DATA[name]()
    raw = patches(side=side, n=40_000) if name == "patches" else DATA[name]()
    busy = [t[t.std(1) > FLAT] for t in (raw.train, raw.validation)]
    white = whiten(replace(raw, train=busy[0], validation=busy[1]), components=min(KEPT, side**2))
    scale = white.train.std()
    order = torch.randperm(len(white.validation), generator=torch.Generator().manual_seed(0))
    return replace(white, train=white.train / scale, validation=white.validation[order] / scale)


def learned(
    data: Data, name: str, steps: int, seed: int, beta: float = 0.0, latents: int = LATENTS
) -> tuple[zoo.Model, inference.Guide]:
    """A guide and its model, from the checkpoint where there is one."""
    recipe = RECIPES[name]
    knobs: dict[str, Any] = {"latents": latents}
    if recipe.model is not zoo.FactorAnalysis:
        knobs["seed"] = seed
    model = recipe.model.for_data(data.train, **knobs)
    with seeded(seed):
        guide = recipe.guide(model)
    beta = beta or recipe.beta
    file = f"{data.name}{latents}-{name}-{steps}-{beta:g}-{seed}.safetensors"
    inference.fit(
        model, guide, data.train, objective=recipe.objective(beta), steps=steps, batch_size=BATCH,
        lr=LR, seed=seed, learn_model=True, title=f"{name}, {data.name}, beta {beta:g}",
        checkpoint=RUNS / file if steps > SHORT else None,
    )  # fmt: skip
    return model, guide


@torch.no_grad()
def codes(guide: inference.Guide, x: Tensor, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Steps done, a draw of the latents and their mean, (B, K), at every step."""
    if isinstance(guide, HasBeliefs):
        last = min(steps, guide.steps)
        for t, now in enumerate(guide.unroll(x, steps=last)):
            yield t, now.signal if now.drawn else now.q.sample(), now.q.mean
        return
    z = guide.draw(x, draws=20, chains=1, seed=0).values["z"][0]
    yield 0, z[0], z.mean(0)


def r2(model: zoo.Model, z: Tensor, x: Tensor) -> tuple[float, float]:
    """Per patch and pooled."""
    with torch.no_grad():
        left = (x - model.predict({"z": z})).square().sum(1)
    whole = (x - x.mean(1, keepdim=True)).square().sum(1)
    return float((1 - left / whole).mean()), float(1 - left.sum() / whole.sum())


def silent(z: Tensor, model: zoo.Model) -> float:
    """Share of latents that the decoder does not see."""
    seen = z.clamp_min(0) if isinstance(model, zoo.RectifiedCoding) else z
    return float((seen == 0).float().mean())


def convergence(data: Data, names: list[str], steps: int, seeds: list[int]) -> None:
    x = data.validation[:HELD]
    print(f"\n{data.name}: R2 per patch (pooled) / zeros, {len(x)} held out; silent: 0 / 1")
    for name in names:
        for seed in seeds:
            model, guide = learned(data, name, steps, seed)
            found = {}
            with seeded(1):
                for t, z, mean in codes(guide, x, MARKS[-1]):
                    if t in MARKS or t == 0:
                        found[t] = (*r2(model, z, x), silent(z, model), r2(model, mean, x)[0])
            last = found[max(found)]
            record(f"{name}: R2", last[0])
            record(f"{name}: zeros", last[2])
            shown = {t: v for t, v in found.items() if t or len(found) == 1}
            print(f"  {name}, seed {seed}: " + "  ".join(
                f"{t}: {a:.3f} ({b:.3f}) / {c:.3f}" for t, (a, b, c, _) in shown.items()
            ))  # fmt: skip
            print(
                f"    with means in place of draws, at the end: {list(found.values())[-1][3]:.3f}"
            )
        if (data.name, name) in PUBLISHED:
            print(f"    published: {PUBLISHED[data.name, name]}")


def sweep(steps: int) -> None:
    """On patches of 8 x 8, whose smaller network learns enough in a few minutes."""
    data = load("patches", 8)
    x = data.validation[:HELD]
    print(f"\npatches of 8 x 8, ip, K = {FEWER}: beta, R2 per patch / zeros after 1,000 steps")
    points = []
    for beta in SWEPT:
        model, guide = learned(data, "ip", steps, 0, beta, FEWER)
        with seeded(1):
            *_, (_, z, _) = codes(guide, x, MARKS[-1])
        points.append((r2(model, z, x)[0], silent(z, model)))
        print(f"  {beta:g}: {points[-1][0]:.3f} / {points[-1][1]:.3f}", flush=True)
    falls = all(a[0] > b[0] and a[1] < b[1] for a, b in pairwise(points))
    print(f"  monotone: {'yes' if falls else 'no'};  published, 16 x 16, {SWEEP_PUBLISHED}")


def labels(data: Data, names: list[str], steps: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    assert data.train_labels is not None
    assert data.validation_labels is not None
    print(f"\n{data.name}: accuracy of logistic regression on means, {LABELLED} labels at most")
    for name in names:
        _, guide = learned(data, name, steps, 0)
        sets = []
        for x in (data.train[:LABELLED], data.validation[:LABELLED]):
            with seeded(2):
                *_, (_, _, mean) = codes(guide, x, 128)
            sets.append(mean.numpy())
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        regression.fit(sets[0], data.train_labels[:LABELLED].numpy())
        score = regression.score(sets[1], data.validation_labels[:LABELLED].numpy())
        print(f"  {name}: {score:.4f}", flush=True)


def shifted(data: Data, names: list[str], steps: int) -> None:
    side = data.image_shape[0]
    x = data.validation[:HELD]
    sets = {"upright": x}
    for angle in (45, 90, 180):
        turned = rotate(
            x.reshape(-1, side, side).numpy(), angle, axes=(1, 2), reshape=False, order=1
        )
        sets[f"{angle} degrees"] = torch.from_numpy(turned).reshape(len(x), -1).float()
    natural = patches(side=side, n=4000).validation
    natural = natural[natural.std(1) > FLAT][:HELD]
    sets["patches"] = (natural / natural.std() * x.std() + x.mean()).clamp(0, 1)
    print(f"\nLearned on {data.name}: pooled R2 of means on {', '.join(sets)}")
    for name in names:
        model, guide = learned(data, name, steps, 0)
        for t in (16, 1000) if isinstance(guide, HasBeliefs) and guide.steps else (0,):
            row = []
            for shown in sets.values():
                with seeded(3):
                    *_, (_, _, mean) = codes(guide, shown, t)
                row.append(r2(model, mean, shown)[1])
            print(f"  {name}, {t} steps: " + "  ".join(f"{v:.3f}" for v in row), flush=True)


def contrast(data: Data, steps: int) -> None:
    _, guide = learned(data, "ip", steps, 0)
    print(f"\n{data.name}, ip: contrast, steps until half of the final rise of rates, final spikes")
    for c in CONTRASTS:
        shown = c * data.validation[:HELD]
        with seeded(4):
            total = np.array([float(m.sum(1).mean()) for _, _, m in codes(guide, shown, 256)])
        half = int(np.argmax(total > (total[0] + total[-20:].mean()) / 2))
        print(f"  {c:4.2f}: {half} steps, {total[-20:].mean():.1f} spikes")


def dictionary(data: Data, names: list[str], steps: int) -> None:
    for name in names:
        model, guide = learned(data, name, steps, 0)
        model.image_shape = data.image_shape
        found = refinement(guide, data.validation[:50], steps=64)
        path = RUNS / f"{data.name}-{name}-dictionary.png"
        plot_refinement.dictionary(found).savefig(path)
        print(f"  {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="patches")
    parser.add_argument("--guides", default="ip,ip_published,ig,p_vae,g_vae,lca")
    parser.add_argument("--experiments", default="convergence")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", default="0")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    names, seeds = chosen.guides.split(","), [int(s) for s in chosen.seeds.split(",")]
    data = load(chosen.data, SIDE)
    RUNS.mkdir(parents=True, exist_ok=True)
    rows, pixels = data.train.shape
    print(f"{data.name}: {rows} to learn from, {pixels} pixels, {chosen.steps} steps")
    runs: dict[str, Callable[[], None]] = {
        "convergence": lambda: convergence(data, names, chosen.steps, seeds),
        "sweep": lambda: sweep(chosen.steps),
        "labels": lambda: labels(data, names, chosen.steps),
        "shifted": lambda: shifted(data, names, chosen.steps),
        "contrast": lambda: contrast(data, chosen.steps),
        "dictionary": lambda: dictionary(data, names, chosen.steps),
    }
    for experiment in chosen.experiments.split(","):
        inference.Table("experiment", runs)[experiment]()


if __name__ == "__main__":
    main()
