"""The game against the prior: a critic of z given x, and the model's own likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ..game import Game, logistic
from ..guide import HasRsample
from ..guides.encoder import FullCovarianceEncoder
from ..objective import Player
from ..observation import flatten

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = ["PriorContrastive"]


class PriorContrastive(Game):
    """A critic tells the guide's u from draws of a reference r; the likelihood does the rest.

    critic:    min E_q softplus(-T) + E_r softplus(T) + (gamma / 2) (E_q + E_r) |dT|^2
    reference: min E_q [-log r(u given x)]
    guide:     min E_q [T - log p(x, u) + log r(u given x)]

    The best T is log q(u given x) - log r(u given x), which makes the guide's loss minus the ELBO.
    The reference is a Gaussian, mean and covariance read off x, that follows the guide (adaptive
    contrast), so that the critic has to see only what is not Gaussian in it. With `adaptive=False`
    it is the prior, far from any narrow posterior; T is then a ratio of many nats.

    It needs continuous latents, and a likelihood with gradients. Works on data as they are: only
    the warm-up simulates the model.

    Args:
        adaptive: a reference that follows the guide.
        **knobs: of :class:`inference.game.Game`.

    Raises:
        Incompatible: a latent is discrete.

    References:
        Adversarial variational Bayes (Mescheder, Nowozin & Geiger, 2017), equations 3.3, 3.8 and
        section 4 https://arxiv.org/abs/1701.04722

    Differences:
        The paper takes the reference's moments from a few draws for each x, without correlations.
        These moments are noisy, which the critic cannot know: with 16 draws of two latents the pull
        of the entropy is a quarter too weak. Here a third player, an encoder, learns them. Packed
        latents take the place of z.
    """

    def __init__(self, *, adaptive: bool = True, **knobs: object) -> None:
        super().__init__(adaptive=adaptive, **knobs)  # type: ignore[arg-type]
        self.adaptive = adaptive

    def players(self, guide: Guide) -> dict[str, Player]:
        """Reference, critic and guide."""
        guide.latents.require_continuous(type(self).__name__)
        self.reference = FullCovarianceEncoder(guide.model)
        third = {"reference": Player(self.reference, steps=2, rate=2.0)} if self.adaptive else {}
        return third | super().players(guide)

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"reference": its loss, "critic": its loss, "guide": its loss}."""
        third = {"reference": self.loss("reference", model, guide, x, z)} if self.adaptive else {}
        return third | super().forward(model, guide, x, z)

    def loss(
        self, player: str, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> Tensor:
        """The loss of one player."""
        if player != "reference":
            return super().loss(player, model, guide, x, z)
        with torch.no_grad():
            u = cast(HasRsample, guide).rsample(x)
        return -self.reference.distribution(x).log_prob(u).mean()

    def critic_loss(self, guide: Guide, x: Observation, z: Values | None) -> Tensor:
        """Logistic loss and gradient penalty."""
        return logistic(self.critic, self.both(guide, x), self.gamma)

    def guide_loss(self, guide: Guide, x: Observation, c: Tensor) -> Tensor:
        """Minus the ELBO, with T in place of log q - log r."""
        lat = guide.latents
        standard = self.judge.standardise(flatten(x, lat.problems(x)))
        if not self.adaptive:
            rest = -lat.log_terms(c, x)[1]
            y = self.judge.prior(c)
        else:
            mean, tril = (t.detach() for t in self.reference.affine(x))
            y = whiten(c, mean, tril)
            reference = MultivariateNormal(mean, scale_tril=tril, validate_args=False)
            rest = reference.log_prob(c) - lat.log_density(c, x)
        return cast(Tensor, (self.critic(standard, y).sum(-1) + rest).mean())

    def model_loss(self, guide: Guide, x: Observation, c: Tensor) -> Tensor:
        """Nothing: log p(x, u) is in the guide's loss."""
        return c.new_zeros(())

    def both(self, guide: Guide, x: Observation) -> list[Tensor]:
        """What the critic sees, the guide's above the reference's: (2 B, F) and (2 B, D)."""
        lat = guide.latents
        with torch.no_grad():
            standard = self.judge.standardise(flatten(x, lat.problems(x))).repeat(2, 1)
            u = cast(HasRsample, guide).rsample(x)
            if self.adaptive:
                y = whiten(u, *self.reference.affine(x))
                return [standard, torch.cat([y, torch.randn_like(y)])]
            prior = lat.pack(lat.simulate(x)[0])[0]
            return [standard, self.judge.prior(torch.cat([u, prior]))]

    def scores(self, guide: Guide, x: Observation, z: Values | None) -> tuple[Tensor, Tensor]:
        """The critic's scores of draws and of the reference, each (B,)."""
        drawn, referred = self.critic(*self.both(guide, x)).chunk(2)
        return drawn, referred


def whiten(u: Tensor, mean: Tensor, tril: Tensor) -> Tensor:
    """u (B, D) to L^-1 (u - mean)."""
    y: Tensor = torch.linalg.solve_triangular(tril, (u - mean)[..., None], upper=False)
    return y[..., 0]
