"""Is it the right posterior, and in which way is it wrong?"""

from __future__ import annotations

from .compare import collect, compare, compare_draws
from .draws import draw, packed
from .metrics import METRICS, Estimate, Metric, khat_threshold

__all__ = [
    "METRICS",
    "Estimate",
    "Metric",
    "collect",
    "compare",
    "compare_draws",
    "draw",
    "khat_threshold",
    "packed",
]
