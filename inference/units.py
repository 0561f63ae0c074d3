"""The units of a problem: where observations and latents are under the joint, and how large."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .latents import Latents, Values
from .observation import flatten

__all__ = ["Units", "centre_and_scale", "pilot", "silent", "squash"]

PILOT, PILOT_WHOLE = 512, 32  # joint draws that set units; where a data set is one problem


def pilot(latents: Latents) -> tuple[Tensor, Values]:
    """Draws from the joint: features (n, F), and latents by name, (n, *shape)."""
    z, x = latents.joint(PILOT if latents.plated else PILOT_WHOLE, seed=0)
    return flatten(x, next(iter(z.values())).shape[0]), z


class Units(nn.Module):
    """Centre and scale of features and of numbers to be told from them.

    Both by quantiles of draws from the joint: heavy tails and counts would ruin moments.

    Args:
        features: of draws from the joint, (n, F).
        u: what is to be told from them, (n, D), such as packed latents.
    """

    x_loc: Tensor
    x_scale: Tensor
    u_loc: Tensor
    u_scale: Tensor

    def __init__(self, features: Tensor, u: Tensor) -> None:
        super().__init__()
        for name, t in (("x", features), ("u", u)):
            loc, scale = centre_and_scale(t)
            self.register_buffer(f"{name}_loc", loc)
            self.register_buffer(f"{name}_scale", scale)

    def standardise(self, features: Tensor) -> Tensor:
        """Features with centre 0 and scale 1 under the joint."""
        return (features - self.x_loc) / self.x_scale


def silent(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that is zero at the start."""
    layer = nn.Linear(inputs, outputs)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def squash(scaled: Tensor) -> Tensor:
    """Nearly the identity within a few scales, bounded by ten."""
    return 10 * torch.tanh(scaled / 10)


def centre_and_scale(t: Tensor) -> tuple[Tensor, Tensor]:
    """Median and half the central 68 % range; sd, then 1, where that range is empty."""
    low, mid, high = torch.quantile(t, t.new_tensor([0.16, 0.5, 0.84]), dim=0)
    scale = (high - low) / 2
    scale = torch.where(scale > 0, scale, t.std(0))
    return mid, torch.where(scale > 0, scale, torch.ones_like(scale))
