"""A linear Gaussian state space: a value that drifts in time, seen through noise."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .model import Model, Paper

__all__ = ["StateSpace", "autoregression"]


def autoregression(coefficients: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """The law of z_t = sum_k a_k z_t-k + sd_t e_t, values before the start being zero.

    In matrices L z = diag(sd) e, L unit lower-banded; so z ~ Normal(0, P^-1) with the banded
    precision P = L' diag(1/sd^2) L, computed in float64.

    Args:
        coefficients: a, of any number p of lags, (p,).
        sd: standard deviation of each step, (T,).

    Returns:
        the Cholesky factor L^-1 diag(sd) of the covariance, in the dtype of sd, and P in float64,
        both (T, T).
    """
    lags = torch.eye(len(sd)).to(sd).double()
    ones = torch.ones_like(lags)
    for k, a in enumerate(coefficients.double(), 1):
        lags = lags - a * ones.tril(-k).triu(-k)
    tril = torch.linalg.solve_triangular(lags, torch.diag(sd.double()), upper=False)
    scaled = lags / sd.double()[:, None]
    return tril.to(sd.dtype), scaled.T @ scaled


class StateSpace(Model):
    """An autoregressive path, each of its values observed with noise of its own.

    z_1 ~ Normal(0, P0); z_t = sum_k a_k z_t-k + sqrt(q) e_t; x_t = z_t + sqrt(r) n_t.

    Values before the start are zero. So with p > 1 coefficients no other law is needed for the
    first p steps: z_2 = a_1 z_1 + sqrt(q) e_2, z_3 = a_1 z_2 + a_2 z_1 + sqrt(q) e_3 and so on.

    What was is evidence for what is: neighbours in time are correlated in the posterior, and a
    guide that is factorised in time is too sure of each value. With one coefficient:

    ==== ===== === == ==================== ====================== ========= ============
    a    q     r   T  KL of the factorised mean lag-1 correlation variance* factorised*
    ==== ===== === == ==================== ====================== ========= ============
    .9   .19   .5  20 2.44 nats            .533 (.524*)           .152      .087
    .99  .02   1   20 6.20                 .893 (.879*)           .078      .010
    .95  .0975 1   10 2.30                 .759 (.737*)           .166      .049
    ==== ===== === == ==================== ====================== ========= ============

    KL is that of the best factorised guide to the posterior; * is in the middle of the path.

    Args:
        coefficients: a, one for each step back.
        steps: T.
        innovation_variance: q.
        noise_variance: r.
        start_variance: P0.
        seed: of the canonical observations.

    References:
        A new approach to linear filtering and prediction problems (Kalman, 1960)
        https://doi.org/10.1115/1.3662552
        Maximum likelihood estimates of linear dynamic systems (Rauch, Tung & Striebel, 1965), for
        the smoother, whose means and variances are the marginals of this posterior
        https://doi.org/10.2514/3.3166

    Differences:
        The path is inferred at once, by the Cholesky factor of its banded precision, and not by a
        pass forward and one back: draws are whole paths.

    Example:
        >>> round(float(StateSpace().exact().mean_field_gap()), 2)
        2.44
    """

    title = "linear Gaussian state space"
    paper = Paper(
        "Kalman",
        1960,
        "A new approach to linear filtering and prediction problems",
        "https://doi.org/10.1115/1.3662552",
    )
    dims = {"z": ("time",), "x": ("time",)}

    coefficients: Tensor
    sd: Tensor
    scale: Tensor

    def __init__(
        self,
        coefficients: Sequence[float] = (0.9,),
        *,
        steps: Count = 20,
        innovation_variance: Positive = 0.19,
        noise_variance: Positive = 0.5,
        start_variance: Positive = 1.0,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        variance = torch.tensor([start_variance] + [innovation_variance] * (steps - 1))
        self.register_buffer("coefficients", torch.tensor(coefficients))
        self.register_buffer("sd", variance.sqrt())
        self.register_buffer("scale", torch.tensor(float(noise_variance)).sqrt())
        self.keep_draws(torch.zeros(1, steps), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        tril, _ = autoregression(self.coefficients, self.sd)
        with pyro.plate("data", 1 if x is None else size(x)):
            path = dist.MultivariateNormal(torch.zeros_like(self.sd), scale_tril=tril)
            z = pyro.sample("z", path)
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The path itself: latents (..., B, T) to (..., B, T)."""
        return z["z"]

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system: prior precision of the path, weights I, noise sqrt(r)."""
        assert isinstance(x, Tensor)
        _, precision = autoregression(self.coefficients, self.sd)
        origin, eye = torch.zeros_like(self.sd), torch.eye(len(self.sd)).to(self.sd)
        return LinearGaussian(origin, precision, eye, origin, self.scale.reshape(1)), x

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form smoother; draws are whole paths."""
        return LinearGaussianPosterior(self)
