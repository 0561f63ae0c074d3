"""Maximum likelihood on draws from the joint: the other direction of KL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..guide import HasDensity
from ..objective import Objective

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = ["ForwardKL"]


class ForwardKL(Objective):
    """Minimise E_x KL(p || q): loss = -log q(z given x) on (z, x) from the joint, nats per problem.

    This is the sleep phase of wake-sleep and neural posterior estimation. It never drops a mode
    and needs no gradient through the model, but it sees only observations the model would make.

    References:
        The Wake-Sleep Algorithm for Unsupervised Neural Networks (Hinton et al., 1995)
        https://doi.org/10.1126/science.7761831
    """

    needs = HasDensity
    joint_only = True
    remedy = "An implicit guide needs an objective made for draws; ForwardKL needs log q."

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": -mean log q}."""
        assert z is not None  # Objective.check has seen to both
        assert isinstance(guide, HasDensity)
        return {"guide": -guide.log_prob(z, x).mean()}
