"""The linear guess that a circuit starts from: packed latents as residuals of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .units import centre_and_scale, squash

__all__ = ["Whitening"]

HELD_OUT = 0.25  # share of the pilot draws that measures what the guess leaves over
CLIP = 5.0  # robust sds beyond which a residual counts no more: heavy tails


class Whitening(nn.Module):
    """u = m(x) + L y: a ridge regression of the latents on x, and the scale of its residuals.

    Under a linear-Gaussian model y given x is a standard Normal, whatever x; elsewhere it is
    centred and of scale one on average over the joint.

    Args:
        features: of pilot draws from the joint, (n, F).
        u: their packed latents, (n, D).
    """

    x_loc: Tensor
    x_scale: Tensor
    offset: Tensor
    slope: Tensor
    root: Tensor

    def __init__(self, features: Tensor, u: Tensor) -> None:
        super().__init__()
        for name, t in zip(("x_loc", "x_scale"), centre_and_scale(features), strict=True):
            self.register_buffer(name, t)
        found = _guess(self.standardise(features), u)
        for name, t in zip(("offset", "slope", "root"), found, strict=True):
            self.register_buffer(name, t.to(u))

    def standardise(self, features: Tensor) -> Tensor:
        """(B, F) with centre zero and scale one under the joint, and bounded."""
        return squash((features - self.x_loc) / self.x_scale)

    def mean(self, standard: Tensor) -> Tensor:
        """Standardised features (B, F) to the guess m(x), (B, D)."""
        return self.offset + standard @ self.slope

    def whiten(self, u: Tensor, standard: Tensor) -> Tensor:
        """Packed latents (..., B, D) to y."""
        residual = (u - self.mean(standard))[..., None]
        y: Tensor = torch.linalg.solve_triangular(self.root, residual, upper=False)
        return y[..., 0]

    def unwhiten(self, y: Tensor, standard: Tensor) -> Tensor:
        """y (..., B, D) to packed latents."""
        return self.mean(standard) + y @ self.root.T


def _guess(standard: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offset (D,), slope (F, D) and Cholesky factor (D, D) of the residuals' covariance."""
    from sklearn.covariance import ledoit_wolf
    from sklearn.linear_model import RidgeCV

    loc, scale = centre_and_scale(u)
    standard, target = (
        standard.double().cpu(),
        ((u - loc) / scale).clamp(-CLIP, CLIP).double().cpu(),
    )
    cut = round(len(u) * HELD_OUT)
    ridge = RidgeCV(alphas=[10.0**k for k in range(-3, 5)])
    ridge.fit(standard[cut:].numpy(), target[cut:].numpy())
    slope = torch.from_numpy(ridge.coef_.reshape(target.shape[1], -1)).T
    residual = target - standard @ slope
    offset = residual[cut:].median(0).values
    left = (residual[:cut] - offset).numpy()
    covariance = torch.from_numpy(ledoit_wolf(left)[0])
    root = torch.linalg.cholesky(covariance)
    scale, loc = scale.double().cpu(), loc.double().cpu()
    return loc + scale * offset, slope * scale, scale[:, None] * root
