"""Learn a model at the mode of its posterior, as sparse coding does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from ..objective import Objective

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = ["HasPosteriorMode", "MAPEnergy"]


@runtime_checkable
class HasPosteriorMode(Protocol):
    """Latents where the posterior is largest: for the MAP energy."""

    def posterior_mode(self, x: Observation) -> Values:
        """Latents by site, (B, *shape), without gradients."""


class MAPEnergy(Objective):
    """Learn the model where latents are most probable: loss = -log p(x, z_map), nats per problem.

    At the minimum over z of -log p(x, z) the gradient of the model with z held fixed is that of the
    minimum (envelope theorem). For a linear decoder it is local: error times activity.

    The loss is no bound on -log p(x), for it takes no account of the width of the posterior: the
    model must hold the scale of its features, as zoo.SparseCoding does, and noise and rates of the
    prior should stay as they are, for noise would vanish. ELBO() with SparseLaplace learns them.

    References:
        Emergence of simple-cell receptive field properties by learning a sparse code for natural
        images (Olshausen & Field, 1996), its learning rule https://doi.org/10.1038/381607a0
    """

    needs = HasPosteriorMode
    learns_model = True
    learns_guide = False
    remedy = "MAPEnergy needs a guide that finds the posterior's mode, such as LCA or ISTA."

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": mean of -log p(x, z_map)}."""
        assert isinstance(guide, HasPosteriorMode)  # Objective.check has seen to it
        return {"guide": -guide.latents.log_joint(guide.posterior_mode(x), x).mean()}
