"""Factor analysis at D = 8: exact guide, full-covariance encoder, flow, and mean field's failure.

Run: python benchmarks/factor_analysis.py [PROBLEMS]
"""

from __future__ import annotations

import sys

import diagnostics
import inference
import zoo

STEPS = 2500
NAMES = ("mean_field_encoder", "full_covariance_encoder", "flow")


def main() -> None:
    problems = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    model = zoo.FactorAnalysis()
    exact = model.exact()
    x = model.simulate(problems, seed=1)[1]
    drawn = exact.draw(x, draws=1000, chains=1, seed=0)
    integrand = exact.latents.log_joint(drawn.values, x) - drawn.stats["log_q"]
    evidence = exact.log_evidence(x)
    print("exact guide: largest relative |ELBO - log p(x)|", end=" ")
    print(f"{float(((integrand.mean((0, 1)) - evidence) / evidence).abs().max()):.1e},", end=" ")
    print(f"largest sd of the integrand {float(integrand.std(1).max()):.1e} nats (float32)")

    guides = {
        name: inference.fit(model, inference.GUIDES[name](model), steps=STEPS, title=name).guide
        for name in NAMES
    }
    found = diagnostics.summary(diagnostics.compare(model, guides, x, seed=0, progress=True))
    floor = float(found.value.sel(guide="exact", metric="c2st"))
    print(f"C2ST floor {floor:.3f}")
    for name in NAMES:
        row = found.sel(guide=name)
        c2st, gap = (float(row.value.sel(metric=m)) for m in ("c2st", "elbo_gap"))
        print(f"{name:24} C2ST above floor {c2st - floor:+.3f}  KL(q || p) {gap:.4f} nats")
    print(f"best mean field, closed form: KL(q || p) {float(exact.mean_field_gap()):.4f} nats")
    sd = guides["mean_field_encoder"].distribution(x).base_dist.scale.mean(0)
    best = exact.precision().diagonal().rsqrt()
    ratios = ", ".join(f"{r:.3f}" for r in (sd / best).tolist())
    print(f"mean field's sds over 1 / sqrt(L_ii): {ratios}")


if __name__ == "__main__":
    main()
