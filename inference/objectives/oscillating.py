"""The oscillating game: one small critic for each pair of layers, within one stimulus."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..codes import Codes
from ..critic import Critic, pairs
from ..game import Game, logistic
from ..guide import Draws, HasRsample, check_counts
from ..latents import Latents, Values, isolated
from ..observation import Observation, flatten, parts
from ..seeds import seeded
from ..units import squash

if TYPE_CHECKING:
    from ..guide import Guide

__all__ = ["Oscillating"]


Layers = list[Tensor]


class Oscillating(Game):
    """Layers alternate between what the stimulus evokes and what the layer above would make of it.

    Layers are z_0 = x and the latent sites from the last of the model's program, z_1, to the first,
    z_L. The guide draws all of them given x; from each, one bounces back a layer by the model,
    z_i' ~ p(z_i given z_i+1, ...), and z_L' comes from its prior.

    critic i: tells (z_i, z_i+1) from (z_i', z_i+1) by a logistic loss with a gradient penalty
    guide:    min E_q sum_i T_i

    For a chain, KL(q || p) is the sum of the divergences that the critics see, so they suffice, and
    each is small. They see pairs: with z_i alone, a wrong joint with right marginals passes.

    Args:
        **knobs: of :class:`inference.game.Game`; hidden are the widths of each critic.

    References:
        A role for cortical interneurons as adversarial discriminators (Benjamin & Kording, 2023),
        algorithm 2 https://doi.org/10.1371/journal.pcbi.1011484

    Differences:
        The secondary account of the algorithm lets each critic see one layer alone; see above. All
        layers are drawn by one guide, not each from the one below.
    """

    def critics(self, guide: Guide) -> nn.Module:
        """One critic for each pair."""
        lat = guide.latents
        layers = split(lat, *pairs(lat))
        return nn.ModuleList(
            Critic(low, high, self.hidden, self.seed + k, guess=lat.continuous)
            for k, (low, high) in enumerate(views(layers, layers))
        )

    def critic_loss(self, guide: Guide, x: Observation, z: Values | None) -> Tensor:
        """The sum of all critics' losses and penalties."""
        evoked, back = self.states(guide, x)
        both = zip(self.members, views(evoked, evoked), views(back, evoked), strict=True)
        losses = [
            logistic(
                critic,
                [torch.cat(t) for t in zip(*[see(critic, *t) for t in two], strict=True)],
                self.gamma,
            )
            for critic, *two in both
        ]
        return torch.stack(losses).sum()

    def guide_loss(self, guide: Guide, x: Observation, c: Tensor) -> Tensor:
        """The sum of all critics' scores of what the guide evokes."""
        layers = split(guide.latents, flatten(x, guide.latents.problems(x)), c)
        return self.score(layers, layers).sum(-1).mean()

    @property
    def members(self) -> list[Critic]:
        """The critics, from the pair (x, z_1) up to z_L alone."""
        return cast("list[Critic]", list(cast("nn.ModuleList", self.critic)))

    def states(self, guide: Guide, x: Observation) -> tuple[Layers, Layers]:
        """What the stimulus evokes in each layer, and what bounces back from the layer above."""
        lat = guide.latents
        with torch.no_grad():
            c = cast(HasRsample, guide).rsample(x)
            dreamt, codes = bounce(lat, c, x)
            evoked = split(lat, flatten(x, lat.problems(x)), c)
            return evoked, split(lat, flatten(dreamt, lat.problems(x)), codes)

    def score(self, lower: Layers, upper: Layers) -> Tensor:
        """All critics' scores T_i(lower_i, upper_i+1), (B, L + 1)."""
        pairs_seen = zip(self.members, views(lower, upper), strict=True)
        return torch.cat([critic(*see(critic, *pair)) for critic, pair in pairs_seen], -1)

    def scores(self, guide: Guide, x: Observation, z: Values | None) -> tuple[Tensor, Tensor]:
        """Sums over critics of their scores of what was evoked and of what bounced back, (B,)."""
        evoked, back = self.states(guide, x)
        return self.score(evoked, evoked).sum(-1), self.score(back, evoked).sum(-1)

    def oscillate(
        self, guide: Guide, x: Observation, *, cycles: int = 16, trials: int = 8, seed: int
    ) -> Draws:
        """The activity of all layers and critics while evoked and dreamt states alternate.

        Args:
            guide: the one that was trained.
            x: observation of B problems.
            cycles: of two steps each, evoked first.
            trials: repetitions.
            seed: everything depends on it alone.

        Returns:
            latents (trials, 2 cycles, B, *shape), and as circuit the layers' activity in units of
            the joint, `potentials`, and the critics' firing rates softplus(T), `rates`, each
            (trials, 2 cycles, B, neurons).
        """
        check_counts(cycles=cycles, trials=trials)
        lat = guide.latents
        lat.check(x)
        code, potentials, rates = [], [], []
        with torch.no_grad(), seeded(seed):
            for _ in range(trials * cycles):
                evoked, back = self.states(guide, x)
                for now in (evoked, back):
                    code.append(torch.cat(now[:0:-1], -1))
                    potentials.append(self.activity(now))
                    rates.append(softplus(self.score(now, evoked)))

        def in_trials(steps: list[Tensor]) -> Tensor:
            return torch.stack(steps).reshape(trials, 2 * cycles, *steps[0].shape)

        values = Codes(lat, type(self).__name__).decode(in_trials(code))
        seen = {"potentials": in_trials(potentials), "rates": in_trials(rates)}
        return Draws(values, {}, seen)

    def activity(self, layers: Layers) -> Tensor:
        """All layers beside one another in units of the joint, (B, F + C)."""
        *critics, above = self.members
        units = [c.standardise(layer) for c, layer in zip(critics, layers[:-1], strict=True)]
        return torch.cat([*units, squash(above.prior(layers[-1]))], -1)


def split(latents: Latents, features: Tensor, codes: Tensor) -> Layers:
    """Layers from x up to the first site of the model's program: (B, F), (B, C_1) ... (B, C_L)."""
    sizes = Codes(latents, "Oscillating").sizes.values()
    return [features, *reversed(codes.split(list(sizes), -1))]


def views(lower: Layers, upper: Layers) -> list[tuple[Tensor, Tensor]]:
    """What each critic sees: (lower_i, upper_i+1), and of the top lower_L alone, beside zeros."""
    alone = (torch.zeros_like(lower[-1][..., :1]), lower[-1])
    return [*zip(lower[:-1], upper[1:], strict=True), alone]


def see(critic: Critic, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A pair in the critic's units."""
    standard = critic.standardise(low)
    return standard, critic.relative(high, standard)


def bounce(latents: Latents, c: Tensor, x: Observation) -> tuple[Observation, Tensor]:
    """Each layer drawn anew by the model, given the layers above it as they are.

    Args:
        latents: of the model.
        c: codes (B, C).
        x: observation of B problems; its inputs are kept.

    Returns:
        an observation shaped as x, and codes (B, C).
    """
    codes = Codes(latents, "Oscillating")
    z = codes.decode(c)
    given = z if latents.plated else {n: v[0] for n, v in z.items()}
    program = poutine.uncondition(latents.model)
    found: Values = {}
    for k, name in enumerate((*latents.names, latents.observed)):
        above = {n: given[n] for n in latents.names[:k]}
        with isolated():
            trace = poutine.trace(poutine.condition(program, data=above)).get_trace(x)
        found[name] = trace.nodes[name]["value"]
    tensors = list(parts(x))
    tensors[latents.slot] = found.pop(latents.observed).to(tensors[latents.slot].dtype)
    back = found if latents.plated else {n: v[None] for n, v in found.items()}
    return tuple(tensors) if isinstance(x, tuple) else tensors[0], codes.encode(back)
