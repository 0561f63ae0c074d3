"""Free energy of beliefs that are refined step by step, with and without backpropagation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from ..arguments import Index, NonNegative, Positive, Share
from ..beliefs import HasBeliefs, Moment
from ..errors import BadInput, Incompatible, lookup
from ..objective import Objective

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = ["DIVERGENCES", "RECONSTRUCTIONS", "FixedPoint", "FreeEnergy"]

FAINT = 1e-4  # weight of the divergence before it is warmed up


def _published(q: Any, p: Any) -> Tensor:
    """exp(u) f(delta) in place of exp(u_prior) f(delta): too large by e^delta."""
    if not (hasattr(q, "log_rate") and hasattr(p, "log_rate")):
        raise Incompatible(
            "divergence='published'", expected="Poisson beliefs", got=type(q).__name__,
            fix="divergence='exact'.",
        )  # fmt: skip
    scaled: Tensor = kl_divergence(q, p) * (q.log_rate - p.log_rate).exp()
    return scaled


DIVERGENCES: Mapping[str, Callable[[Distribution, Distribution], Tensor]] = {
    "exact": kl_divergence,
    "published": _published,
}
RECONSTRUCTIONS: Mapping[str, Callable[[Moment], Tensor]] = {
    "closed_form": Moment.expected_energy,
    "sample": Moment.sampled_energy,
}
COUNTED: Mapping[str, slice] = {"path": slice(1, None), "end": slice(-1, None)}


class FreeEnergy(Objective):
    """Mean over steps t of F_t = E_q[-log p(x given z)] + beta KL(q_t || p_t), nats per problem.

    p_t is the prior where the guide has a fixed one, and the belief before where it rolls.
    Gradients go back through all steps (backpropagation through time), or through the last few.

    Args:
        beta: weight of the divergence. With a rolling prior and T steps, beta = T weighs the whole
            path as one ELBO weighs its divergence.
        divergence: "exact", or "published" for the authors' code, where that of Poisson beliefs is
            exp(u - u_prior) times too large; published betas belong to it.
        reconstruction: "closed_form", for which with a nonlinear decoder a draw stands in, or
            "sample".
        over: "path" for all steps, "end" for the last.
        temperature: of relaxed spikes, at first and once cooled; linear in between.
        cooled: share of the fit after which they are.
        warmup: share of the fit over which beta rises from next to nothing.
        truncate: steps that gradients reach back; 0 means all.

    References:
        Brain-like Variational Inference (Vafaii, Galor & Yates, 2025), the training loss
        https://arxiv.org/abs/2410.19315

    Differences:
        One draw drives the circuit and is scored, where theirs draws two. What relaxed spikes lack
        in variance is put back, in closed form.
    """

    needs = HasBeliefs
    learns_model = True
    remedy = "FreeEnergy trains guides that iterate, such as IterativePoisson; use ELBO()."

    def __init__(
        self,
        *,
        beta: NonNegative = 1.0,
        divergence: str = "exact",
        reconstruction: str = "closed_form",
        over: str = "path",
        temperature: tuple[Positive, Positive] = (1.0, 0.05),
        cooled: Share = 0.5,
        warmup: Share = 0.1,
        truncate: Index = 0,
    ) -> None:
        super().__init__(
            beta=beta, divergence=divergence, reconstruction=reconstruction, over=over,
            temperature=temperature, cooled=cooled, warmup=warmup, truncate=truncate,
        )  # fmt: skip
        self.divergence = lookup(DIVERGENCES, divergence, "divergence")
        self.reconstruction = lookup(RECONSTRUCTIONS, reconstruction, "reconstruction")
        self.counted = lookup(COUNTED, over, "over")
        if not beta >= 0:
            raise BadInput("beta", expected="a number >= 0", got=repr(beta), fix="beta=1.0.")
        self.beta, self.temperature, self.truncate = beta, temperature, truncate
        self.cooled, self.warmup = cooled, warmup

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": mean free energy of the counted steps}."""
        assert isinstance(guide, HasBeliefs)  # Objective.check has seen to it
        steps, tau = guide.training_steps, self._temperature()
        path = list(guide.unroll(x, steps=steps, temperature=tau, truncate=self.truncate))
        weight = self.beta * max(FAINT, min(1.0, self._share(self.warmup)))
        energies = [
            self.reconstruction(now) + weight * self.divergence(now.q, now.p).sum(-1)
            for now in path[self.counted] or path
        ]
        return {"guide": torch.stack(energies).mean()}

    def _share(self, of: float) -> float:
        return self.progress / of if of else 1.0

    def _temperature(self) -> float:
        hot, cold = self.temperature
        return hot + (cold - hot) * min(1.0, self._share(self.cooled))


class FixedPoint(Objective):
    """Learn the model where inference has come to rest, without backpropagation through it.

    Where the potentials u* are at the minimum of F, dF/du is zero, so that the gradient of the
    model at u* held fixed is that of min_u F, exactly (envelope theorem). For a linear decoder it
    is local: dF/dPhi = -N^-2 ((x - Phi r) r' - Phi diag(r)). That is so in the mode "fixed" with
    beta = 1, rates and self-inhibition; in others it is a rule of thumb.

    Args:
        beta: weight of the divergence from the prior.

    References:
        Brain-like Variational Inference (Vafaii, Galor & Yates, 2025)
        https://arxiv.org/abs/2410.19315
    """

    needs = HasBeliefs
    learns_model = True
    learns_guide = False
    remedy = "FixedPoint needs a guide that iterates to a fixed point, such as IterativePoisson."

    def __init__(self, *, beta: NonNegative = 1.0) -> None:
        super().__init__(beta=beta)
        self.beta = beta

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": mean free energy where the guide has come to rest}."""
        assert isinstance(guide, HasBeliefs)
        with torch.no_grad():
            for now in guide.unroll(x, steps=guide.steps):
                rest = now.state
        (now,) = guide.unroll(x, steps=0, state=rest)
        energy = now.expected_energy() + self.beta * kl_divergence(now.q, now.p).sum(-1)
        return {"guide": energy.mean()}
