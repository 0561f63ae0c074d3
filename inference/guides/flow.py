"""A conditional normalising flow: the strongest amortised baseline with a density."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution, constraints

from ..arguments import Count, Index
from ..latents import ModelLike
from ..objectives.forward_kl import ForwardKL
from ..observation import Observation, flatten
from ..packed import PackedGuide
from ..seeds import seeded
from ..units import squash
from .encoder import Encoder, gaussian_head

__all__ = ["Flow"]


class Flow(PackedGuide):
    """A neural spline flow that bends what a Gaussian encoder leaves over.

    e ~ Normal(0, I); v = spline coupling flow (e given x); u = m(x) + L(x) v.

    The affine end makes Gaussian posteriors exact from the first steps on; the splines, whose
    domain is [-5, 5] in units of L, add skew, tails and modes. Coupling layers make sampling and
    density equally cheap.

    Args:
        model: any model with continuous latents.
        transforms: spline coupling layers.
        hidden: widths of the hidden layers, of the encoder and of each spline.
        bins: bins of each spline.
        seed: of the initial weights.

    References:
        Neural Spline Flows (Durkan et al., 2019)
        https://arxiv.org/abs/1906.04032
    """

    objective = ForwardKL

    def __init__(
        self,
        model: ModelLike,
        *,
        transforms: Count = 3,
        hidden: tuple[Count, ...] = (64, 64),
        bins: Count = 8,
        seed: Index = 0,
    ) -> None:
        super().__init__(model, transforms=transforms, hidden=hidden, bins=bins, seed=seed)
        d = self.latents.size
        self.encoder = Encoder(self.latents, 2 * d + d * (d - 1) // 2, hidden, seed)
        features = self.encoder.x_loc.shape[0]
        couple = {"passes": 2} if d > 1 else {}
        sizes = {"transforms": transforms, "bins": bins, "hidden_features": hidden}
        with seeded(seed):
            self.flow = _spline_flow()(d, features, **sizes, **couple)
        self.flow.to(self.encoder.x_loc)

    def distribution(self, x: Observation) -> Distribution:
        """Transformed spline flow: batch (B,), event (D,)."""
        features = flatten(x, self.latents.problems(x))
        loc, tril = gaussian_head(self.encoder, features)
        base = self.flow(squash(self.encoder.standardise(features)))
        return TransformedDistribution(base, [_Affine(loc, tril)], validate_args=False)


def _spline_flow() -> Any:
    """zuko's NSF; importing zuko switches torch's validation off for everybody, so undo that."""
    before = Distribution._validate_args
    try:
        from zuko.flows import NSF
    finally:
        Distribution.set_default_validate_args(before)
    return NSF


class _Affine(Transform):
    """v to loc + tril v for each problem."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, tril: Tensor) -> None:
        super().__init__()
        self.loc, self.tril = loc, tril

    def _call(self, v: Tensor) -> Tensor:
        return self.loc + (self.tril @ v[..., None])[..., 0]

    def _inverse(self, u: Tensor) -> Tensor:
        shifted = (u - self.loc)[..., None]
        v: Tensor = torch.linalg.solve_triangular(self.tril, shifted, upper=False)
        return v[..., 0]

    def log_abs_det_jacobian(self, v: Tensor, u: Tensor) -> Tensor:
        """log |det tril|, (..., B)."""
        log_det: Tensor = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_det.expand(v.shape[:-1])
