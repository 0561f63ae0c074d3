"""The energy score as an objective: learning to draw without an adversary."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

from ..arguments import Portion, Several
from ..critic import critic_for
from ..game import energy_loss
from ..gauges import FEW, dispersion
from ..guide import HasRsample
from ..objective import Objective, Player

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = ["EnergyScore"]


class EnergyScore(Objective):
    """Draws should be near the latents that made x, and far from one another, in equal measure.

    loss = E |Z - z| - E |Z - Z'| / 2 with (x, z) from the joint and Z, Z' from the guide given x.
    Its only minimum is the posterior. It is the control for every game with a critic: it trains the
    same guides on the same draws, and nobody plays against them.

    Distances are taken in the units that a critic would see (:class:`inference.critic.Critic`).

    Args:
        draws: M, for each problem and step.
        averaging: decay of the running average of the guide's weights, which is what `fit` returns.

    References:
        Likelihood-free inference with generative neural networks via scoring rule minimization
        (Pacchiardi & Dutta, 2022) https://arxiv.org/abs/2205.15784
    """

    needs = HasRsample
    joint_only = True
    remedy = "It takes a guide that can be sampled with gradients, such as RecurrentRecognition."

    def __init__(self, *, draws: Several = 4, averaging: Portion = 0.99) -> None:
        super().__init__(draws=draws, averaging=averaging)
        self.draws, self.averaging = draws, averaging

    def players(self, guide: Guide) -> dict[str, Player]:
        """The guide alone."""
        self.judge = critic_for(guide, guide.latents, None, 0)
        return {"guide": Player(guide, averaging=self.averaging)}

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": mean energy score}."""
        known = cast("Values", z)  # Objective.check has seen to it
        return {"guide": energy_loss(self.judge, guide, x, known, draws=self.draws)}

    def health(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, float]:
        """Dispersion of the guide's draws."""
        if guide.latents.problems(x) < FEW:
            return {}
        return {"dispersion": dispersion(guide, x, cast("Values", z))}
