"""Eight schools: a hierarchy whose variance the data hardly determine."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from inference.arguments import Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .model import Model, Paper, from_pyro
from .two_stage import TwoStage

__all__ = ["EightSchools"]

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)  # points; Rubin (1981), BDA3 table 5.2
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
FARTHEST = 200.0  # points; what lies beyond comes from the tail of the half-Cauchy


class EightSchools(Model):
    """Do eight schools differ in the effect of coaching, or is it all sampling error?

    tau ~ HalfCauchy(c); mu ~ Normal(0, m^2); theta_j given mu, tau ~ Normal(mu, tau^2);
    y_j given theta ~ Normal(theta_j, s_j^2), with known standard errors s_j, j = 1 ... 8.

    The effects theta lie within tau of mu, and tau may be anything from nothing to 20 points: in
    the packed latents (log tau, mu, theta) the posterior is a funnel, eight latents narrowing
    together as the first falls. Guides of one scale and samplers of one step size miss its neck,
    and all the marginals show of that is a tau somewhat too large.

    Given tau all is Gaussian, so tau is on a grid and (mu, theta) in closed form: mu sees each
    school with the variance s_j^2 + tau^2, and theta_j is y_j pulled towards mu by the share
    s_j^2 / (s_j^2 + tau^2).

    Args:
        tau_scale: c, points.
        mu_scale: m, points.
        seed: of the canonical observations after the first, which is the real one: draws from the
            joint, but for those with an effect beyond 200 points.

    Differences:
        Rubin and Gelman et al. have flat priors on mu and tau. The proper ones here are those of
        common benchmarks.

    References:
        Estimation in parallel randomized experiments (Rubin, 1981)
        https://doi.org/10.3102/10769986006004377
        Bayesian Data Analysis, third edition (Gelman et al., 2013), equations 5.17, 5.20 and 5.21
        Prior distributions for variance parameters in hierarchical models (Gelman, 2006), for the
        half-Cauchy https://doi.org/10.1214/06-BA117A

    Example:
        >>> EightSchools().observations()[0].tolist()
        [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    """

    title = "eight schools"
    paper = Paper(
        "Rubin",
        1981,
        "Estimation in parallel randomized experiments",
        "https://doi.org/10.3102/10769986006004377",
    )
    dims = {"tau": (), "mu": (), "theta": ("school",), "y": ("school",)}

    tau_scale: Tensor
    mu_scale: Tensor
    errors: Tensor

    def __init__(
        self, *, tau_scale: Positive = 5.0, mu_scale: Positive = 5.0, seed: Index = 0
    ) -> None:
        super().__init__()
        self.register_buffer("tau_scale", torch.tensor(float(tau_scale)))
        self.register_buffer("mu_scale", torch.tensor(float(mu_scale)))
        self.register_buffer("errors", torch.tensor(ERRORS))
        self.keep_draws(torch.zeros(1, len(ERRORS)), seed=seed)
        near = (self.x_0.abs() <= FARTHEST).all(-1)
        self.keep(torch.cat([torch.tensor([EFFECTS]), self.x_0[near][:19]]))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            tau = pyro.sample("tau", dist.HalfCauchy(self.tau_scale))
            mu = pyro.sample("mu", dist.Normal(0.0, self.mu_scale))
            around = mu[..., None].expand(*mu.shape, len(self.errors))
            theta = pyro.sample("theta", dist.Normal(around, tau[..., None]).to_event(1))
            y_given_theta = dist.Normal(theta, self.errors).to_event(1)
            observed: Tensor = pyro.sample("y", y_given_theta, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The effects: latents (..., B, 8) to (..., B, 8)."""
        return z["theta"]

    def exact(self) -> TwoStage:
        """Tau by quadrature, (mu, theta) given tau in closed form."""
        return TwoStage(self, from_pyro(self._marginal, self.observations()), self._rest)

    def _marginal(self, y: Tensor) -> None:
        """Mu and theta integrated out: y given tau ~ Normal(0, diag(s^2 + tau^2) + m^2 11')."""
        with pyro.plate("data", len(y)):
            tau = pyro.sample("tau", dist.HalfCauchy(self.tau_scale))
            own = self.errors.square() + tau[..., None].square()
            shared = self.mu_scale.expand(len(self.errors), 1)
            law = dist.LowRankMultivariateNormal(torch.zeros_like(self.errors), shared, own)
            pyro.sample("y", law, obs=y)

    def _rest(self, log_tau: Tensor, y: Observation) -> MultivariateNormal:
        """(mu, theta) given tau, as a triangular system: equations 5.20, then 5.17 of BDA3."""
        assert isinstance(y, Tensor)
        own = self.errors.square() + (2 * log_tau).exp()  # (..., B, 8)
        precision = 1 / own
        variance = 1 / (1 / self.mu_scale.square() + precision.sum(-1, keepdim=True))
        mu = variance * (precision * y).sum(-1, keepdim=True)
        pull = self.errors.square() / own
        loc = torch.cat([mu, y + pull * (mu - y)], -1)
        spread = torch.cat([variance.sqrt(), self.errors * log_tau.exp() / own.sqrt()], -1)
        tril = torch.diag_embed(spread)
        tril[..., 1:, 0] = pull * variance.sqrt()
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)
