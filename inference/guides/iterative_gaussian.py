"""The iterative Gaussian encoder: predictive coding with a variance for each neuron."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions import Distribution

from ..beliefs import Moment, State
from ..errors import BadInput
from ..latents import ModelLike
from .iterative import Iterative

__all__ = ["IterativeGaussian"]

FAR, WIDE, NARROW = 1e6, 20.0, (-2.0, 2.0)  # bounds of means and of log sds
PUBLISHED = 7.0  # bound of a mean in the mode "online"


class IterativeGaussian(Iterative):
    """Neurons that hold a mean m and a log sd s, and descend the free energy by natural gradient.

    q(z given x) = Normal(m, exp(s)); in units of the noise, with Phi the decoder, d the diagonal of
    Phi' Phi and the prior Normal(m0, v0),

        m <- m + h v (Phi' x - Phi' Phi m - beta (m - m0) / v0),   v = exp(2 s),
        s <- s + (h / 2) (beta (1 - v / v0) - v d).

    In the mode "fixed" with beta = 1 and a linear decoder m goes to the exact posterior mean, and v
    to 1 / L_kk of the posterior precision L: too confident wherever L is not diagonal. In the mode
    "online" the precision grows with every step, up to a bound.

    On a model whose decoder rectifies its latents, such as zoo.RectifiedCoding, this is the
    published rectified variant.

    Args:
        model: Normal latents, Gaussian noise behind a decoder, such as zoo.FactorAnalysis.
        mode: "fixed" or "online".
        signal: "rates" (the mean) or "spikes" (a draw).
        self_inhibition: d, exactly; else what a draw says about it, which takes signal="spikes".
        steps: T, of inference.
        training_steps: T of one training step.
        beta: gain of the leak.
        step: h of neuron k at first, in units of 1 / (1 + sum_j |Phi' Phi|_kj v_j).
        learn_step: the two h are learned.
        cautious: v_j of the moment, so that no problem becomes unstable; else of the prior.

    Raises:
        BadInput: neither `self_inhibition` nor draws: the variance could not be told.

    References:
        Brain-like Variational Inference (Vafaii, Galor & Yates, 2025), iG-VAE
        https://arxiv.org/abs/2410.19315

    Differences:
        No learned constant is added to the force on m. The nonlinearity of the rectified variant
        belongs to the model.
    """

    family = Normal
    components = 2

    def __init__(
        self,
        model: ModelLike,
        **knobs: Any,
    ) -> None:
        super().__init__(model, **knobs)
        if self.independent and not self.exact_self:
            raise BadInput(
                "self_inhibition", expected="True where neurons send their means", got="False",
                fix="Pass signal='spikes', or leave it True.",
            )  # fmt: skip

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """Of m and s."""
        if self.mode.wide:
            return (-FAR, FAR), (-WIDE, WIDE)
        return (-PUBLISHED, PUBLISHED), NARROW

    def law(self, *state: Tensor, temperature: float = 0.0) -> Distribution:
        """Independent Normals; they need no relaxation."""
        law: Distribution = Normal(state[0], state[1].exp(), validate_args=False)
        return law

    def origin(self, prior: Distribution) -> State:
        """m0 and log sqrt(v0)."""
        assert isinstance(prior, Normal)
        return prior.loc, prior.scale.log()

    def force(self, now: Moment, origin: State) -> State:
        """-dF/dm times v, and half -dF/ds."""
        (m, s), (m0, s0) = now.state, origin
        v, leak = (2 * s).exp(), self.mode.leak * self.beta
        if self.exact_self:
            seen = -v * now.synapses.curvature(now.signal, s.exp())
        else:
            seen = now.currents * (now.signal - m)
        mean = v * (now.currents - leak * (m - m0) * (-2 * s0).exp())
        return mean, 0.5 * (seen + leak * -torch.expm1(2 * (s - s0)))
