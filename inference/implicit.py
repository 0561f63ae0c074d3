"""A distribution that can be sampled but not scored."""

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from .errors import NoDensity

__all__ = ["Implicit"]


class Implicit(TorchDistribution):  # type: ignore[misc]
    """The law of a value somebody else has drawn: samples, and no density.

    A guide without a density samples from this, never from `Delta`, whose log-density of zero
    turns an ELBO into maximum a posteriori without a word.

    Args:
        value: the draw, of shape batch_shape + event_shape; gradients flow through it.
        event_dim: how many of its right-most dims are the event.

    Example:
        >>> import torch
        >>> Implicit(torch.zeros(3, 2), event_dim=1).batch_shape
        torch.Size([3])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, value: Tensor, *, event_dim: int = 0) -> None:
        cut = value.dim() - event_dim
        self.value = value
        super().__init__(value.shape[:cut], value.shape[cut:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Unconstrained: the value is taken as it is."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Implicit:
        """The same value for more batch dims."""
        shape = torch.Size(batch_shape) + self.event_shape
        return Implicit(self.value.expand(shape), event_dim=len(self.event_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """The value."""
        return self.value.expand(torch.Size(sample_shape) + self.value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Always refused.

        Raises:
            NoDensity: always.
        """
        raise NoDensity(
            "guide",
            expected="a density log q(z given x)",
            got="a guide that can only be sampled",
            fix="Train it with an objective made for implicit guides, and judge it by its draws "
            "(C2ST, sliced Wasserstein) instead of ELBO or k-hat.",
        )
