"""Performance, activity and the cost of being reliable: one objective of two papers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..arguments import Count, Positive
from ..costs import GAUSSIAN, Cost, Entropic
from ..errors import BadInput, lookup
from ..guide import HasNoise, check_counts
from ..noise import check_noise
from ..objective import Objective, Player

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = ["ReliabilityCost"]

MAGNITUDES = {"expected": False, "mean": True}  # whether it is that of the mean


class ReliabilityCost(Objective):
    """Performance + magnitude + reliability: E_q[-log p(x, z)] + sum_i R(s_i), nats per problem.

    Small noise is dear, and large noise spoils performance. With the entropic cost this is minus
    the ELBO, and the noise becomes a posterior. With a power law it is above minus the ELBO by
    `slack`, and the noise becomes a posterior whose spread is compressed; its mean is right where
    the loss is quadratic. Works for any guide with Gaussian noise, on packed latents.

    Args:
        cost: of one unit's noise; by default Entropic().
        magnitude: "expected", E_q[-log p(z)], which makes the whole a bound; or "mean", -log p at
            the mean latents, as published for synapses.
        particles: draws per problem and step.
        budget: energy sum_i E(s_i) that a problem's noise may spend; its price, the multiplier of
            the cost, is then found by a player of its own. By default energy costs what it costs.
        price_rate: learning rate of that player.

    Raises:
        BadInput: an unknown magnitude, or a budget that no noise can meet.

    References:
        Sampling-based probabilistic inference emerges from learning in neural circuits with a cost
        on reliability (Aitchison, Hennequin & Lengyel, 2018) https://arxiv.org/abs/1807.08952
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), equations 2-4, 42-49 https://doi.org/10.7554/eLife.92595

    Differences:
        Constants are included, so that the loss is comparable with the ELBO. The second paper
        penalises |mu|, which falls short of the bound it claims; `magnitude="mean"` is that.
    """

    needs = HasNoise
    learns_model = True
    subsamples = True
    remedy = "It takes a guide with Gaussian noise, such as StochasticSynapses or MeanFieldEncoder."

    def __init__(
        self,
        cost: Cost | None = None,
        *,
        magnitude: str = "expected",
        particles: Count = 1,
        budget: float | None = None,
        price_rate: Positive = 0.05,
    ) -> None:
        chosen = cost or Entropic()
        check_counts(particles=particles)
        super().__init__(
            cost=repr(chosen), magnitude=magnitude, particles=particles, budget=budget,
            price_rate=price_rate,
        )  # fmt: skip
        self.cost, self.particles, self.price_rate = chosen, particles, price_rate
        self.at_mean = lookup(MAGNITUDES, magnitude, "magnitude")
        self.budget = _affordable(chosen, budget)
        self.log_price = nn.Parameter(torch.zeros(()), requires_grad=budget is not None)

    def players(self, guide: Guide) -> dict[str, Player]:
        """The guide, and whoever sets the price where there is a budget."""
        game = super().players(guide)
        return game if self.budget is None else game | {"price": Player(self, lr=self.price_rate)}

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": the cost of the circuit}, and with a budget {"price": its own loss}."""
        terms = self.terms(guide, x)
        used = terms["performance"] + terms["magnitude"]
        if self.budget is None:
            return {"guide": (used + terms["reliability"]).mean()}
        used, over = used.mean(), terms["energy"].mean() / self.budget - 1
        return {
            "guide": used + self.log_price.detach().exp() * self.budget * over,
            "price": -self.log_price * over.detach().clamp(-1, 1),
        }

    def terms(self, guide: Guide, x: Observation) -> dict[str, Tensor]:
        """What the cost is made of, each (B,) in nats but the energy.

        performance E_q[-log p(x given z)], magnitude E_q[-log p(z)], reliability sum_i R(s_i), its
        slack above minus the entropy of the noise, and the energy sum_i E(s_i).

        Raises:
            Diverged: noise has reached zero or infinity; the units are named.
        """
        noisy = cast(HasNoise, guide)  # Objective.check has seen to it
        performance, magnitude, log_sd = noisy.energies(
            x, particles=self.particles, share=self.share, at_mean=self.at_mean
        )
        check_noise(guide.latents, log_sd)
        energy, n = self.cost.energy(log_sd).sum(-1), log_sd.shape[-1]
        reliability = energy + n * self.cost.offset
        return {
            "performance": performance,
            "magnitude": magnitude,
            "reliability": reliability,
            "slack": reliability.detach() + log_sd.detach().sum(-1) + n * GAUSSIAN,
            "energy": energy,
        }

    @property
    def price(self) -> float:
        """Nats per unit of energy; 1 without a budget."""
        return math.exp(self.log_price.item())


def _affordable(cost: Cost, budget: float | None) -> float | None:
    """The budget, if some noise meets it: the energy of a power law is above zero."""
    if budget is None or (math.isfinite(budget) and budget > 0 and cost.positive):
        return budget
    wanted = "a finite number > 0, for a cost whose energy is above zero"
    got = f"{budget!r} for {cost!r}"
    fix = "Take PowerLaw, and the energy of its fit without a budget as a guide."
    raise BadInput("budget", expected=wanted, got=got, fix=fix)
