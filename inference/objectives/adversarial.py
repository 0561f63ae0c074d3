"""The game of wake and sleep: a critic of pairs (x, z)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..arguments import NonNegative
from ..codes import Codes
from ..game import Game, logistic, slopes
from ..observation import flatten

if TYPE_CHECKING:
    from ..guide import Guide, HasRsample
    from ..latents import Values
    from ..observation import Observation

__all__ = ["Adversarial", "Wasserstein"]


class Adversarial(Game):
    """A critic tells (x, z) of wake, z from the guide, from (x, z) of sleep, both from the model.

    critic: min E_wake softplus(-T) + E_sleep softplus(T) + (gamma / 2) (E_wake + E_sleep) |dT|^2
    guide:  min E_wake T

    The best T is log q(x, z) - log p(x, z), so that the guide minimises KL(q || p), and neither of
    the two needs a density. With x=None the observations are the model's own, in wake as in sleep:
    then all that the critic can tell is whether z is right. With data, and `learn_model=True`, the
    model learns by its likelihood at what the guide draws in wake.

    T is regularised towards 0: as an estimate of KL(q || p) it is too small.

    Args:
        **knobs: of :class:`inference.game.Game`: hidden, critic_steps, critic_rate, penalty (gamma,
            which falls to a tenth), warm_up, averaging, seed.

    References:
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2021)
        https://arxiv.org/abs/2006.10811
        Adversarially learned inference (Dumoulin et al., 2017) https://arxiv.org/abs/1606.00704
        Which training methods for GANs do actually converge? (Mescheder, Geiger & Nowozin, 2018),
        for the penalty https://arxiv.org/abs/1801.04406

    Differences:
        The paper has the Wasserstein form (:class:`Wasserstein`); with a logistic critic T is a log
        ratio. Warm start, penalty, two updates of the critic and averaged weights are ours.
    """

    judges_steps = True

    def critic_loss(self, guide: Guide, x: Observation, z: Values | None) -> Tensor:
        """Logistic loss and gradient penalty."""
        return logistic(self.critic, self.both(guide, x, z), self.gamma)

    def guide_loss(self, guide: Guide, x: Observation, c: Tensor) -> Tensor:
        """The critic's score of the guide's draws."""
        standard = self.judge.standardise(flatten(x, guide.latents.problems(x)))
        score: Tensor = self.critic(standard, self.judge.relative(c, standard))
        return score.mean()

    def both(self, guide: Guide, x: Observation, z: Values | None) -> list[Tensor]:
        """What the critic sees, wake above sleep: features (2 B, F) and codes (2 B, C)."""
        lat = guide.latents
        with torch.no_grad():
            dreamt, z = self.dreams(guide, x, z)
            awake = cast("HasRsample", guide).rsample(x)
            asleep = Codes(lat, type(self).__name__).encode(z)
            features = torch.cat([flatten(t, lat.problems(t)) for t in (x, dreamt)])
            standard = self.judge.standardise(features)
            return [standard, self.judge.relative(torch.cat([awake, asleep]), standard)]

    def scores(self, guide: Guide, x: Observation, z: Values | None) -> tuple[Tensor, Tensor]:
        """The critic's scores of wake and sleep, each (B, parts)."""
        wake, sleep = self.critic(*self.both(guide, x, z)).chunk(2)
        return wake, sleep


class Wasserstein(Adversarial):
    """The game in the form of the paper: a critic with slope one, and the difference of its means.

    critic: max E_wake T - E_sleep T - lambda E (|dT| - 1)^2, between wake and sleep
    guide:  min E_wake T

    Args:
        penalty: lambda.
        **knobs: of :class:`inference.game.Game`.

    References:
        A role for cortical interneurons as adversarial discriminators (Benjamin & Kording, 2023)
        https://doi.org/10.1371/journal.pcbi.1011484
        Improved training of Wasserstein GANs (Gulrajani et al., 2017), equation 3
        https://arxiv.org/abs/1704.00028

    Differences:
        The authors' code penalises a signed 1-norm of the gradient at the data, which bounds no
        slope; here it is that of the cited paper. The model learns by its likelihood in wake, not
        by the critic's slope on dreams.
    """

    def __init__(self, *, penalty: NonNegative = 1.0, **knobs: object) -> None:
        super().__init__(penalty=penalty, **knobs)  # type: ignore[arg-type]

    def critic_loss(self, guide: Guide, x: Observation, z: Values | None) -> Tensor:
        """Minus the difference of means, and the penalty on slopes other than one."""
        seen = self.both(guide, x, z)
        wake, sleep = self.critic(*seen).chunk(2)
        between = []
        share = torch.rand_like(wake[:, :1])
        for t in seen:
            a, b = t.chunk(2)
            between.append(torch.lerp(a, b, share).requires_grad_())
        slope = slopes(self.critic(*between), between).add(1e-12).sqrt()
        gap: Tensor = sleep.mean() - wake.mean()
        return gap + self.penalty * (slope - 1).square().mean()
