"""Is it the right posterior, and in which way is it wrong?"""

from __future__ import annotations

from . import plots
from .calibration import sbc, sbc_test
from .compare import Collected, collect, compare, compare_draws, summary
from .draws import draw, packed, reconstruct
from .metrics import METRICS, Estimate, Metric, khat_threshold
from .report import report
from .rundir import RunDirectory

__all__ = [
    "METRICS",
    "Collected",
    "Estimate",
    "Metric",
    "RunDirectory",
    "collect",
    "compare",
    "compare_draws",
    "draw",
    "khat_threshold",
    "packed",
    "plots",
    "reconstruct",
    "report",
    "sbc",
    "sbc_test",
    "summary",
]
