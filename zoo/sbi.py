"""What the six models of the benchmark of simulation-based inference share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution
from torch.special import log_ndtr

from inference.errors import BadInput
from inference.latents import Site

from .model import Paper

__all__ = ["LUECKMANN", "keep_trying", "log_interval", "published", "unconstrained"]

FILE = Path(__file__).with_name("sbi_observations.json")
ROUNDS = 10_000

LUECKMANN = Paper(
    "Lueckmann et al.",
    2021,
    "Benchmarking Simulation-Based Inference",
    "https://arxiv.org/abs/2101.04653",
)


def published(task: str) -> Tensor:
    """The ten published observations of a task, (10, F), in their order.

    They come with the benchmark's code, under the MIT licence; the entry "source" of the file says
    from where. Some were chosen by their authors, who left out posteriors they found too spiked,
    so the ten are no sample of the joint: use `simulate` for calibration.

    Args:
        task: the benchmark's own name, "two_moons" for instance.

    Example:
        >>> published("slcp").shape
        torch.Size([10, 8])
    """
    return torch.tensor(json.loads(FILE.read_text(encoding="utf-8"))[task])


def unconstrained(law: Distribution, site: Site) -> Distribution:
    """A law of the values of a site, batch (B,), as one of its packed vector."""
    return TransformedDistribution(law, [site.transform.inv], validate_args=False)


def log_interval(low: Tensor, high: Tensor) -> Tensor:
    """log [Phi(high) - Phi(low)] in float64, from the nearer tail; -inf where low >= high."""
    low, high = low.double(), high.double()
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top, bottom = log_ndtr(high), log_ndtr(low)
    part = torch.log1p(-(bottom - top).clamp_max(0.0).exp())
    mass: Tensor = (top + part).masked_fill(low >= high, -torch.inf)
    return mass


def keep_trying(propose: Callable[[Tensor], tuple[Tensor, Tensor]], values: Tensor) -> Tensor:
    """Rejection sampling of all rows of `values`, (N, D), which are overwritten.

    Args:
        propose: takes the numbers of the rows still open, (M,); gives a proposal for each, (M, D),
            and whether it is kept, (M,).
        values: where to put what is kept.

    Raises:
        BadInput: a row that 10,000 proposals have not filled.
    """
    left = torch.arange(len(values), device=values.device)
    for _ in range(ROUNDS):
        found, kept = propose(left)
        values[left[kept]] = found[kept]
        left = left[~kept]
        if len(left) == 0:
            return values
    raise BadInput(
        "x",
        expected="observations that the model can make",
        got=f"one that is all but impossible: no draw in {ROUNDS:,} rounds",
        fix="Leave it out.",
    )
