"""Is it the right posterior, and in which way is it wrong?"""

from __future__ import annotations

from . import (
    plot_calibration,
    plot_recognition,
    plot_refinement,
    plot_reliability,
    plot_signatures,
    plots,
)
from .calibration import sbc, sbc_by, sbc_test
from .circuits import score_field, trajectories, watch
from .compare import Collected, collect, compare, compare_draws, summary
from .coverage import coverage, tarp
from .draws import draw, dream, packed, reconstruct
from .film import film, record
from .fisher import synapse_statistics
from .interop import from_pyro_guide, from_pyro_mcmc
from .matrix import overview
from .metrics import METRICS, Estimate, Metric, khat_threshold
from .oscillations import ALTERNATION, oscillations
from .patterns import wake_sleep_patterns
from .refinement import refinement
from .reliability import reliability, variability_against_uncertainty
from .report import report
from .results import Results
from .rundir import RunDirectory
from .signature_fits import fit_slope
from .signatures import (
    convergence_time,
    fano_factor,
    noise_correlations,
    oscillation_against_surprise,
    oscillation_amplitude,
    signal_correlations,
    sparsity,
    variance_against_contrast,
)
from .synapses import MECHANISMS, predicted_slope, synaptic_variance
from .verdict import verdicts

__all__ = [
    "ALTERNATION",
    "MECHANISMS",
    "METRICS",
    "Collected",
    "Estimate",
    "Metric",
    "Results",
    "RunDirectory",
    "collect",
    "compare",
    "compare_draws",
    "convergence_time",
    "coverage",
    "draw",
    "dream",
    "fano_factor",
    "film",
    "fit_slope",
    "from_pyro_guide",
    "from_pyro_mcmc",
    "khat_threshold",
    "noise_correlations",
    "oscillation_against_surprise",
    "oscillation_amplitude",
    "oscillations",
    "overview",
    "packed",
    "plot_calibration",
    "plot_recognition",
    "plot_refinement",
    "plot_reliability",
    "plot_signatures",
    "plots",
    "predicted_slope",
    "reconstruct",
    "record",
    "refinement",
    "reliability",
    "report",
    "sbc",
    "sbc_by",
    "sbc_test",
    "score_field",
    "signal_correlations",
    "sparsity",
    "summary",
    "synapse_statistics",
    "synaptic_variance",
    "tarp",
    "trajectories",
    "variability_against_uncertainty",
    "variance_against_contrast",
    "verdicts",
    "wake_sleep_patterns",
    "watch",
]
