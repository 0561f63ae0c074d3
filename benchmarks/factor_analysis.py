"""Factor analysis at D = 8 and Gaussian-mixture latents: guides beside the exact posterior.

For factor analysis also what is known in closed form: the evidence, which the exact guide's ELBO
must be, and the gap and the sds of the best mean field. The reservoir samplers learn by the mixed
score.

Run: python benchmarks/factor_analysis.py [PROBLEMS]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from record import record

import diagnostics
import inference
import zoo
from inference.observation import take

STEPS = 2500
RESERVOIR = {"steps": 2000, "batch_size": 512, "lr": 3e-3}
MEAN_FIELD = "mean field"
ENCODERS = {
    MEAN_FIELD: inference.MeanFieldEncoder,
    "full covariance": inference.FullCovarianceEncoder,
    "flow": inference.Flow,
}


def learned(model: zoo.Model, names: list[str]) -> dict[str, inference.Guide]:
    """Trained guides, the reservoir sampler last."""
    guides: dict[str, inference.Guide] = {
        name: inference.fit(model, ENCODERS[name](model), steps=STEPS, progress=False).guide
        for name in names
    }
    circuit = inference.ReservoirSampler(model, hidden=(128, 128))
    objective = inference.MixedScore()
    run = inference.fit(model, circuit, objective=objective, progress=False, **RESERVOIR)
    return {**guides, "reservoir sampler": run.guide}


def judged(title: str, model: zoo.Model, guides: Mapping[str, inference.Guide], x: object) -> None:
    """C2ST of all guides, and the gap to the evidence of those with a density."""
    metrics = {m: diagnostics.METRICS[m] for m in ("c2st", "elbo_gap")}
    compared = diagnostics.compare(model, guides, x, metrics=metrics, seed=0, progress=False)
    found = diagnostics.summary(compared)
    floor = float(found.value.sel(guide="exact", metric="c2st"))
    print(f"\n{title}: C2ST floor {floor:.3f}")
    for name in guides:
        c2st, gap = (float(found.value.sel(guide=name, metric=m)) for m in metrics)
        shown = "" if gap != gap else f"  KL(q || p) {gap:.4f} nats"
        print(f"{name:24} C2ST above floor {c2st - floor:+.3f}{shown}", flush=True)
        each = compared.value - compared.floor
        excess = each.sel(guide=name, metric="c2st").values
        record(f"{title}: {name}", float(excess.mean()), excess.tolist())


def closed_forms(model: zoo.FactorAnalysis, x: torch.Tensor) -> None:
    """The integrand of the exact guide's ELBO."""
    exact = model.exact()
    drawn = exact.draw(x, draws=1000, chains=1, seed=0)
    integrand = (exact.latents.log_joint(drawn.values, x) - drawn.stats["log_q"]).detach()
    evidence = exact.log_evidence(x).detach()
    print("exact guide: largest relative |ELBO - log p(x)|", end=" ")
    print(f"{float(((integrand.mean((0, 1)) - evidence) / evidence).abs().max()):.1e},", end=" ")
    print(f"largest sd of the integrand {float(integrand.std(1).max()):.1e} nats (float32)")


def mean_field(model: zoo.FactorAnalysis, guide: inference.Guide, x: torch.Tensor) -> None:
    """The best one, and the sds of the one that was learned."""
    exact = model.exact()
    print(f"best mean field, closed form: KL(q || p) {float(exact.mean_field_gap()):.4f} nats")
    sd = guide.distribution(x).base_dist.scale.mean(0)
    best = exact.precision().diagonal().rsqrt()
    ratios = ", ".join(f"{r:.3f}" for r in (sd / best).tolist())
    print(f"mean field's sds over 1 / sqrt(L_ii): {ratios}")


def main() -> None:
    """Both models."""
    problems = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.set_num_threads(1)
    model = zoo.FactorAnalysis()
    x = model.simulate(problems, seed=1)[1]
    closed_forms(model, x)
    guides = learned(model, list(ENCODERS))
    judged("factor analysis", model, guides, x)
    mean_field(model, guides[MEAN_FIELD], x)
    mixture = zoo.GaussianMixtureLatents()
    seen = take(mixture.observations(), slice(0, problems))
    judged("Gaussian mixture", mixture, learned(mixture, ["flow"]), seen)


if __name__ == "__main__":
    main()
