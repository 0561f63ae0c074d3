"""What each step of the derivation of the iterative Poisson encoder buys: posteriors and floors.

Usage: python benchmarks/poisson_posteriors.py [--models 3,5,16] [--steps 300] [--quick]
           [--out runs/poisson_posteriors]

Trained guides, Gibbs draws and the rows of the table (with standard errors) stay in the output
folder, so that a stopped run goes on where it stopped. All takes a quarter of an hour on a core
and, at its largest, 14 GB.

zoo.PoissonCoding with so many latents. Three and five are enumerated; of sixteen the posterior is
known by Gibbs sampling and log p(x) by annealed importance sampling, which is tried out on the
enumerated models first. Beside the guides stands the best factorised Poisson belief, by L-BFGS,
which none of those with one belief per x can beat. For each model:
1. the fixed point of the circuit (float64) against L-BFGS: this must agree to 1e-6;
2. how often the online circuit, by rates, has counted the evidence of x after T steps;
3. the table of guides; with three latents also simulation-based calibration.

Columns: largest and mean total variation of the marginals; largest error of a posterior mean, in
sds; spikes, sum of means over that of the exact ones; sd ratio of the latent where it is furthest
from 1, and of all latents together; variance over mean, of all latents together; KL(q || p), in
nats; KL(p || q); C2ST; free energy above the best factorised belief's, without sampling error.
Circuits that spike have a belief at each step: their KL(q || p) is the mean over steps, which is
above that of the mixture, and their KL(p || q) that of the mixture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import gammaln, logsumexp
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import diagnostics
import inference
import zoo
from diagnostics.compare import EXACT, Collected
from diagnostics.draws import packed
from diagnostics.estimate import Estimate, Metric, by_blocks
from diagnostics.extras import extend
from inference.beliefs import State
from inference.coding import Coding
from inference.files import atomic_path
from inference.seeds import seeded, stream
from inference.synapses import Linear
from zoo.stored import StoredDraws

Array = NDArray[np.float64]
AGREE = 1e-6  # of log rates and nats
LARGEST = 40  # count that annealing considers
CLASSIFIED = 3  # problems with a C2ST
CHAINS, DRAWS = 8, 500
SIZES = {"3": (4, 20), "5": (4, 20), "16": (6, 10)}  # latents: pixels along a side, observations
CALIBRATED = "3"
ABOVE = "F above best"


def wired(coding: Coding, x: Tensor) -> tuple[Tensor, ...]:
    """In float64 and units of the noise: W = Phi' Phi, b = Phi' x, u0, and -log p(x given 0)."""
    wiring = Linear(coding, x)
    found = wiring.phi.T @ wiring.phi, wiring.drive, coding.prior.rate.log(), wiring.silent
    return tuple(t.detach().double() for t in found)


def factorised(coding: Coding, x: Tensor, counted: Array | float = 1.0) -> Array:
    """Log rates (B, K) of the best factorised Poisson belief, by L-BFGS in square roots of rates.

    In these coordinates the curvature of KL(Poisson(r) || Poisson(r0)) is 4, whatever r. `counted`
    says how often each neuron counts the evidence of x, one number or (B, K).
    """
    w, drive, u0 = (t.numpy() for t in wired(coding, x)[:3])
    half = np.diag(w) / 2

    def free_energy(root: Array, b: Array, n: Array) -> tuple[float, Array]:
        r, gain = root**2, (2 * np.log(root) - u0) / n
        energy = 0.5 * r @ w @ r + (half - b) @ r + (r * gain - r / n).sum()
        return energy, 2 * root * (w @ r - b + half + gain)

    found = []
    for b, n in zip(drive, np.broadcast_to(counted, drive.shape), strict=True):
        rest = minimize(
            free_energy, np.exp(u0 / 2), (b, n), "L-BFGS-B", jac=True,
            bounds=[(1e-12, None)] * len(u0), options={"ftol": 1e-16, "gtol": 1e-12, "maxcor": 30},
        )  # fmt: skip
        found.append(2 * np.log(rest.x))
    return np.stack(found)


class Factorised(inference.IterativePoisson):
    """The best factorised Poisson belief, by an optimiser in place of a circuit."""

    def settle(self, x: Tensor) -> State:
        """Its log rates, (B, K)."""
        return (torch.as_tensor(factorised(self.reader(), x)).to(x),)


def sweep(z: Tensor, gain: Tensor, w: Tensor) -> Tensor:
    """Each count of z (chains, B, K) anew from p(z) ~ exp(gain'z - z'Wz / 2) / prod_k z_k!."""
    z, counts = z.clone(), torch.arange(LARGEST + 1.0, dtype=w.dtype)
    table = -torch.lgamma(counts + 1) - 0.5 * w.diag()[:, None] * counts**2
    for k in range(len(w)):
        slope = gain[..., k] - z @ w[k] + z[..., k] * w[k, k]
        logits = table[k] + slope[..., None] * counts
        z[..., k] = Categorical(logits=logits, validate_args=False).sample().to(z)
    return z


def annealed(
    coding: Coding, x: Tensor, *, chains: int = 200, levels: int = 400, seed: int = 0
) -> tuple[Array, Array]:
    """log p(x) and its standard error, (B,), in nats, by annealed importance sampling (Neal, 2001).

    From q, the best factorised belief, to p(x, z) by way of q^(1-t) p^t, whose conditionals are
    tables too: one Gibbs sweep at each of so many levels t, from draws of q.
    """
    u = torch.as_tensor(factorised(coding, x))
    w, b, u0, silent = wired(coding, x)
    constant = u.exp().sum(-1) - u0.exp().sum() - silent  # of log p(x, z) - log q(z)
    log_weight = torch.zeros(chains, len(x), dtype=torch.float64)
    with seeded(seed):
        z = torch.poisson(u.exp().expand(chains, -1, -1))
        for t in torch.linspace(0, 1, levels + 1, dtype=torch.float64)[1:]:
            log_weight += ((z * (b - 0.5 * z @ w + u0 - u)).sum(-1) + constant) / levels
            z = sweep(z, torch.lerp(u, u0 + b, t), t * w)
    top = log_weight.max(0).values
    ratio = (log_weight - top).exp()
    mean = ratio.mean(0)
    return (top + mean.log()).numpy(), (ratio.std(0) / mean / math.sqrt(chains)).numpy()


class Annealed(StoredDraws):
    """Gibbs draws and log p(x), up to a standard error."""

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), (B,), in nats."""
        return torch.as_tensor(annealed(inference.IterativePoisson(self.model).reader(), x)[0])


def posterior(model: zoo.PoissonCoding, x: Tensor, out: Path) -> inference.Guide:
    """By enumeration, or by Gibbs sampling, which must have converged."""
    exact, path = model.exact(), out / f"{len(model.log_rate)}-gibbs.nc"
    if exact.independent:
        return exact
    if not path.exists():
        StoredDraws.write(path, exact, x, draws=500, chains=16, seed=0, command=__file__)
    stored = Annealed(model, path)
    print("  Gibbs: " + ", ".join(f"{k} {stored.attrs[k]:.3f}" for k in ("rhat_max", "ess_min")))
    return stored


@dataclass(frozen=True)
class Row:
    """A guide, its knobs, and how it is trained, if it is."""

    guide: type[inference.IterativePoisson] = inference.IterativePoisson
    knobs: Mapping[str, Any] = field(default_factory=dict)
    training: int = 0  # steps, as a multiple of those asked for
    lr: float = 0.03
    like: str = ""  # row whose parameters it takes over
    silent: bool = False  # the learned constant inhibition is left out


ONLINE, BARE = inference.OnlinePoisson, {"self_inhibition": False}
ROWS: Mapping[str, Row] = {
    "best factorised Poisson, L-BFGS": Row(Factorised),
    "fixed + self": Row(),
    "fixed + self, T = 16": Row(knobs={"steps": 16}),
    "fixed, learned inhibition": Row(knobs=BARE, training=1),
    "fixed, no inhibition": Row(knobs=BARE, silent=True),
    "fixed, no inhibition, spikes": Row(knobs={**BARE, "signal": "spikes"}, silent=True),
    "fixed + self, spikes, step 1": Row(knobs={"signal": "spikes"}),
    "fixed + self, spikes, step .3": Row(knobs={"signal": "spikes", "step": 0.3}),
    "fixed + self, spikes, step .1": Row(knobs={"signal": "spikes", "step": 0.1}),
    "online as published": Row(ONLINE, training=1),
    "online as published, T = 16": Row(ONLINE, {"steps": 16}, like="online as published"),
    "online as published, incautious": Row(ONLINE, {"cautious": False}, training=1),
    "online + self": Row(ONLINE, {"self_inhibition": True}, training=1),
    "online + self, rates": Row(knobs={"mode": "online"}),
    "amortised": Row(inference.PoissonEncoder, training=5, lr=5e-3),
    "amortised, then T = 16": Row(inference.SemiAmortisedPoisson, like="amortised"),
    "semi-amortised, T = 16": Row(inference.SemiAmortisedPoisson, training=1, lr=5e-3),
}


def build(model: zoo.PoissonCoding, steps: int, out: Path) -> dict[str, inference.Guide]:
    """All guides, trained on fresh draws from the joint."""
    guides: dict[str, inference.Guide] = {}
    for name, row in ROWS.items():
        guide = row.guide(model, **row.knobs)
        if row.silent:
            guide.log_inhibition.data.fill_(-math.inf)
        if row.training:
            fit = inference.fit(
                model, guide, steps=row.training * steps, lr=row.lr, progress=False,
                checkpoint=out / f"{len(model.log_rate)}-{name}.safetensors",
            )  # fmt: skip
            loss = fit.losses["guide"][-row.training * steps // 10 :].mean()
            silence = guide.log_inhibition.detach().exp().numpy().round(1)
            print(f"  {name}, trained: free energy {loss:.2f} nats, step "
                  f"{guide.log_step.exp().item():.2f}, inhibition {silence}")  # fmt: skip
        if row.like:
            guide.load_state_dict(guides[row.like].state_dict())
        guides[name] = guide
    return guides


def tv(q: Array, p: Array) -> float:
    """Total variation of the marginals of counts (S, D), mean over the latents."""
    n = 1 + int(max(q.max(), p.max()))
    f, g = ([np.bincount(c, minlength=n) / len(c) for c in z.T.astype(int)] for z in (q, p))
    return float(np.abs(np.subtract(f, g)).sum(1).mean() / 2)


def metric(distance: Callable[[Array, Array], float], title: str, ideal: float | None) -> Metric:
    return Metric(lambda q, p: by_blocks(distance, packed(q), packed(p)), title, ideal, "")


def forward_kl(tree: Any, reference: Any) -> Estimate:
    """KL(p || q), in nats; q of a circuit that spikes is the mixture of its beliefs."""
    if "circuit" not in tree.children:
        return diagnostics.METRICS["eubo_gap"].compute(tree, reference)
    evidence = reference["evidence"].dataset["log_evidence"].values[:, None]
    joint = tree["at_reference"].dataset["log_p_joint"].transpose("problem", ...).values
    rates = tree["circuit"].dataset["rates"].transpose("problem", ..., "neuron").values
    log_p = joint.reshape(len(joint), -1) - evidence
    rates = rates.reshape(len(rates), -1, rates.shape[-1])[:, ::4].astype(float)
    found = []
    for z, r, log_density in zip(packed(reference), rates, log_p, strict=True):
        log_q = logsumexp(z @ np.log(r).T - r.sum(1), axis=1) - np.log(len(r))
        found.append(log_density - log_q + gammaln(z + 1).sum(1))
    gap = np.stack(found)
    return Estimate(gap.mean(1), gap.std(1) / np.sqrt(gap.shape[1]))


TABLE: Mapping[str, Metric] = {
    "marginal_tv": diagnostics.METRICS["marginal_tv"],
    "tv": metric(tv, "mean TV", 0.0),
    "mean_error": diagnostics.METRICS["mean_error"],
    "spikes": metric(lambda q, p: q.mean(0).sum() / p.mean(0).sum(), "spikes", 1.0),
    "sd_ratio": diagnostics.METRICS["sd_ratio"],
    "spread": metric(lambda q, p: np.sqrt(q.var(0).sum() / p.var(0).sum()), "sd, all", 1.0),
    "fano": metric(lambda q, _: q.var(0).sum() / (q.mean(0).sum() + 1e-12), "var / mean", None),
    "elbo_gap": diagnostics.METRICS["elbo_gap"],
    "forward_kl": Metric(forward_kl, "KL(p, q) / nats", 0.0, ""),
}
C2ST = {"c2st": diagnostics.METRICS["c2st"]}


def cell(trees: Collected, name: str) -> dict[str, float]:
    """Means over problems of all metrics of one guide, and the standard errors of these."""
    row = diagnostics.summary(diagnostics.compare_draws(trees, TABLE)).sel(guide=name)
    few = Collected({n: t.isel(problem=slice(0, CLASSIFIED)) for n, t in trees.items()})
    few.floor = trees.floor.isel(problem=slice(0, CLASSIFIED))
    judged = diagnostics.compare_draws(few, C2ST).value.sel(guide=name)
    errors = {f"se {m}": float(row.se.sel(metric=m)) for m in TABLE}
    values = {m: float(row.value.sel(metric=m)) for m in TABLE}
    return {**values, "c2st": float(judged.mean()), **errors}


def verdict(model: zoo.PoissonCoding, guide: inference.Guide, problems: int) -> str:
    """Is it calibrated, and if not, mean shift and spread of the latents' ranks."""
    ranks = diagnostics.sbc(model, guide, problems=problems, seed=0, progress=False)
    test = diagnostics.sbc_test(ranks)
    latents = test.sel(quantity=[q for q in test.quantity.values if q.startswith("z")])
    shift, spread = (float(latents[name].mean()) for name in ("shift", "spread"))
    return "yes" if test.attrs["calibrated"] else f"no, {shift:+.2f}, {spread:.2f}"


@torch.no_grad()
def free_energy(guide: inference.IterativePoisson, x: Tensor, u: Tensor) -> Tensor:
    """F of beliefs with log rates u (B, K), in closed form, (B,), in nats."""
    (now,) = inference.IterativePoisson(guide.model).unroll(x, steps=0, state=(u,))
    return now.expected_energy() + kl_divergence(now.q, now.p).sum(-1)


def above_best(guide: inference.Guide, x: Tensor) -> float:
    """Mean free energy above that of the best factorised belief, of guides with one belief."""
    if not isinstance(guide, inference.IterativePoisson) or not guide.independent:
        return math.nan
    best = torch.as_tensor(factorised(guide.reader(), x)).to(x)
    return float((free_energy(guide, x, *guide.settle(x)) - free_energy(guide, x, best)).mean())


def check_fixed_point(model: zoo.PoissonCoding, x: Tensor) -> None:
    """The circuit's rest against L-BFGS, both of a model in float64; an error if they differ."""
    guide = inference.IterativePoisson(model)
    best = torch.as_tensor(factorised(guide.reader(), x))
    for steps in (16, 100, 1000):
        guide.steps = steps
        (u,) = guide.settle(x)
        off = float((u - best).abs().max())
        above = float((free_energy(guide, x, u) - free_energy(guide, x, best)).max())
        print(f"  fixed + self, T = {steps}: log rates {off:.1e} off L-BFGS, F {above:.1e} up")
    if not (off < AGREE and abs(above) < AGREE):
        raise SystemExit(f"the fixed point is not the best factorised belief to {AGREE:g}")


def check_counting(model: zoo.PoissonCoding, x: Tensor) -> None:
    """Online, by rates, neuron k counts the evidence about sum_t h_k times, h_k its step size."""
    guide = inference.IterativePoisson(model, mode="online")
    u0 = guide.origin(guide.reader().prior)
    once = np.exp(factorised(guide.reader(), x))
    with torch.no_grad():
        path = list(guide.unroll(x, steps=1000))
    often, size, before = torch.zeros_like(path[0].signal), torch.zeros(()), path[0]
    for t, now in enumerate(path[1:], 1):
        (force,) = guide.force(before, u0)
        step = (now.state[0] - before.state[0]) / force
        size = torch.where(force.abs() > 1e-9, step, size).detach()  # else it is at rest
        often, before = often + size, now
        if t in (16, 1000):
            rest = np.exp(factorised(guide.reader(), x, often.numpy()))
            far = [np.abs(now.signal.numpy() - r).max(1).mean() for r in (once, rest)]
            print(f"  online + self, rates, T = {t}: steps add up to {often.mean():.1f}; rates are "
                  f"{far[0]:.3f} from the best belief, {far[1]:.3f} from the best with evidence "
                  f"counted as often as that")  # fmt: skip


def check_annealing(model: zoo.PoissonCoding, x: Tensor) -> None:
    """Annealing against enumeration, or its own error."""
    log_p, se = annealed(inference.IterativePoisson(model).reader(), x)
    text = f"  log p(x) by annealing: standard error {se.mean():.3f} nats"
    if isinstance(exact := model.exact(), zoo.Enumerated):
        error = log_p - exact.log_evidence(x).detach().numpy()
        text += f"; largest error {np.abs(error / se).max():.1f} of them, mean {error.mean():+.4f}"
    print(text)


def short(value: float, se: float) -> str:
    """Two decimals, and the standard error where it shows in them."""
    if not value < 1000:
        return "" if math.isnan(value) else f"{value:.0e}"
    return f"{value:.2f}" + (f" ± {se:.2f}" if se >= 0.02 else "")


def table(name: str, steps: int, out: Path, *, quick: bool) -> None:
    """One model."""
    (side, problems), latents = SIZES[name], int(name)
    problems, draws, simulated = (3, DRAWS // 5, 40) if quick else (problems, DRAWS, 300)
    print(f"\nK = {latents}, {side**2} pixels, {problems} observations, {CHAINS * draws} draws")
    precise = zoo.PoissonCoding(latents, side=side).double()
    for check in (check_fixed_point, check_counting, check_annealing):
        check(precise, precise.observations()[:problems])
    model = zoo.PoissonCoding(latents, side=side)
    x = model.observations()[:problems]
    exact = posterior(model, x, out)
    guides = {EXACT: exact, **build(model, steps, out)}
    sizes = {"draws": draws, "chains": CHAINS}
    base = diagnostics.collect(model, {}, x, **sizes, seed=0, reference=exact)
    titles = [*(m.title for m in (TABLE | C2ST).values()), ABOVE]
    titles += ["calibrated"] * (name == CALIBRATED)
    print("| " + " | ".join(["guide", *titles]) + " |\n" + "|---" * (1 + len(titles)) + "|")
    for k, (title, guide) in enumerate(guides.items()):
        path = out / f"{name}-{title}.json"
        if not path.exists():
            trees = Collected(base)
            trees.floor = base.floor
            if title != EXACT:
                trees[title] = diagnostics.draw(model, guide, x, **sizes, seed=stream(0, k))
                extend(trees[title], model, guide, x, reference=base[EXACT], judge=exact)
            found: dict[str, Any] = {**cell(trees, title), ABOVE: above_best(guide, x)}
            if name == CALIBRATED:
                found["calibrated"] = verdict(model, guide, simulated)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(found, indent=1))
        found = json.loads(path.read_text())
        cells = [short(found[m], found.get(f"se {m}", 0)) for m in (*TABLE, *C2ST, ABOVE)]
        cells += [found["calibrated"]] if name == CALIBRATED else []
        print("| " + " | ".join([title, *cells]) + " |", flush=True)


def main(
    models: str = ",".join(SIZES),
    steps: int = 300,
    quick: bool = False,
    out: Path = Path("runs/poisson_posteriors"),
) -> None:
    """Print all tables."""
    torch.set_num_threads(1)
    folder = out / "quick" if quick else out
    folder.mkdir(parents=True, exist_ok=True)
    for name in models.split(","):
        table(name, min(steps, 20) if quick else steps, folder, quick=quick)


if __name__ == "__main__":
    typer.run(main)
