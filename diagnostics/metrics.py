"""The table of metrics: functions of a guide's draws and reference draws, one number per problem.

Each takes two DataTrees, the guide's and the reference's, and returns an :class:`Estimate`. Where a
metric cannot be computed its value is NaN and `reason` says why; it is never a plausible number.
"""

from __future__ import annotations

from inference.table import Table

from .chains import (
    acceptance,
    autocorrelation_time,
    ess,
    ess_per_second,
    ess_per_time,
    ess_tail,
    rhat,
)
from .classifier import c2st
from .discrete import marginal_tv, pattern_kl
from .distances import energy_distance, mmd, sliced_wasserstein, wasserstein
from .estimate import Estimate, Metric
from .modes import mode_occupancy
from .moments import correlation_error, mean_error, sd_ratio
from .stein import fisher_divergence, ksd
from .weights import (
    elbo_gap,
    eubo_gap,
    forward_ess,
    iwae_gap,
    khat,
    khat_threshold,
    reverse_ess,
)

__all__ = ["METRICS", "Estimate", "Metric", "khat_threshold"]

METRICS: Table[Metric] = Table(
    "metric",
    {
        "mean_error": Metric(mean_error, "mean error / sd", 0.0, "bias"),
        "sd_ratio": Metric(sd_ratio, "sd ratio", 1.0, "over- and under-confidence"),
        "correlation_error": Metric(
            correlation_error, "correlation error", 0.0, "lost correlations"
        ),
        "sliced_wasserstein": Metric(
            sliced_wasserstein, "sliced W2 / sd", 0.0, "location, scale, tails"
        ),
        "wasserstein": Metric(
            wasserstein, "W2 / sd", 0.0, "geometry, modes; biased, read the excess"
        ),
        "energy_distance": Metric(energy_distance, "energy distance", 0.0, "location, scale"),
        "mmd": Metric(mmd, "MMD^2", 0.0, "location, scale, some shape"),
        "c2st": Metric(c2st, "C2ST", 0.5, "anything a classifier can learn"),
        "marginal_tv": Metric(marginal_tv, "marginal TV", 0.0, "discrete marginals"),
        "pattern_kl": Metric(pattern_kl, "pattern KL / nats", 0.0, "joint patterns, discrete"),
        "mode_occupancy": Metric(mode_occupancy, "mode TV", 0.0, "dropped modes, wrong weights"),
        "elbo_gap": Metric(elbo_gap, "log p(x) - ELBO / nats", 0.0, "KL(q || p)"),
        "iwae_gap": Metric(iwae_gap, "log p(x) - IWAE / nats", 0.0, "KL left after reweighting"),
        "eubo_gap": Metric(eubo_gap, "EUBO - log p(x) / nats", 0.0, "KL(p || q), dropped modes"),
        "reverse_ess": Metric(
            reverse_ess, "ESS of weights / S", 1.0, "mismatch where the guide goes"
        ),
        "forward_ess": Metric(forward_ess, "1 / E_p[p / q]", 1.0, "mismatch, dropped modes"),
        "khat": Metric(khat, "k-hat", None, "q too narrow or light-tailed"),
        "ksd": Metric(ksd, "KSD^2 (IMQ)", 0.0, "local shape, not weights of modes"),
        "fisher_divergence": Metric(
            fisher_divergence, "Fisher divergence", 0.0, "scores, not weights of modes"
        ),
        "ess": Metric(ess, "ESS", None, "mixing of chains"),
        "ess_tail": Metric(ess_tail, "tail ESS", None, "mixing of chains in the tails"),
        "autocorrelation_time": Metric(
            autocorrelation_time, "draws per effective draw", None, "slow chains"
        ),
        "ess_per_second": Metric(ess_per_second, "ESS / s", None, "speed on this machine"),
        "ess_per_time": Metric(
            ess_per_time, "ESS / time constant", None, "speed of a circuit in its own time"
        ),
        "acceptance": Metric(acceptance, "acceptance", None, "step size of chains"),
        "rhat": Metric(rhat, "R-hat", 1.0, "convergence of chains"),
    },
    say=lambda m: f"{m.title}: {m.why}",
)
