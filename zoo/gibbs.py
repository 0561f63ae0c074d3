"""Exact conditionals, one latent at a time: the reference where enumeration is out of reach."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Categorical

from inference.errors import Incompatible
from inference.guide import Draws, Guide, check_counts
from inference.implicit import Implicit
from inference.latents import ModelLike, Values
from inference.observation import Observation
from inference.progress import bar
from inference.seeds import seeded

from .exact import values_of

__all__ = ["Gibbs"]


class Gibbs(Guide):
    """Gibbs sampling of discrete latents, each from its table of exact conditionals.

    Works for any model whose latents are booleans, bounded integers or counts. The draws are
    correlated: read R-hat and ESS. There is no density.

    Args:
        model: discrete latents.
        bound: largest value of counts, which are cut there; needed where there are any.
        warmup: sweeps before the first draw.
        thin: sweeps between draws.

    Raises:
        Incompatible: a continuous latent, counts without a bound, or no plate "data".
    """

    kind: ClassVar[str] = "reference"
    independent = False

    def __init__(
        self, model: ModelLike, *, bound: int | None = None, warmup: int = 200, thin: int = 2
    ) -> None:
        super().__init__(model, bound=bound, warmup=warmup, thin=thin)
        self.warmup, self.thin = warmup, thin
        self.choices = {s.name: values_of(s, bound) for s in self.latents.sites}
        if not self.latents.plated:
            raise Incompatible(
                "model",
                expected='latents inside the plate "data"',
                got="a data set that is one problem",
                fix="Add the plate, or enumerate the model.",
            )

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Run all chains of all problems side by side; starts are draws from the prior."""
        check_counts(draws=draws, chains=chains)
        lat = self.latents
        lat.check(x)
        b = lat.problems(x)
        kept: dict[str, list[Tensor]] = {n: [] for n in lat.names}
        total = self.warmup + draws * self.thin
        with torch.no_grad(), seeded(seed), bar("Gibbs", total, show=progress) as advance:
            start = lat.joint(chains * b, seed=seed)[0]
            z = {s.name: start[s.name].reshape(chains, b, *s.shape) for s in lat.sites}
            for sweep in range(total):
                z = self._sweep(z, x)
                advance()
                if sweep >= self.warmup and (sweep - self.warmup) % self.thin == 0:
                    for n in lat.names:
                        kept[n].append(z[n])
        return Draws({n: torch.stack(v, 1) for n, v in kept.items()})

    def forward(self, x: Observation) -> Values:
        """One draw per problem, the end of a fresh chain."""
        seed = int(torch.randint(2**31, ()))
        found = self.draw(x, draws=1, chains=1, seed=seed).values
        with self.latents.plate(x):
            return self.sample_sites(lambda s: Implicit(found[s.name][0, 0], event_dim=s.event_dim))

    def _sweep(self, z: Values, x: Observation) -> Values:
        for s in self.latents.sites:
            for k in range(s.shape.numel()):
                z = {**z, s.name: self._resample(z, s.name, k, x)}
        return z

    def _resample(self, z: Values, name: str, k: int, x: Observation) -> Tensor:
        """Site `name` with its element k drawn anew given all else, (chains, B, *shape)."""
        options, value = self.choices[name].to(z[name]), z[name]
        lead = value.shape[:2]
        tries = value.reshape(*lead, -1).repeat(len(options), 1, 1, 1)  # (V, chains, B, n)
        tries[..., k] = options[:, None, None]
        shaped = tries.reshape(len(options), *value.shape)
        rest = {n: v.expand(len(options), *v.shape) for n, v in z.items()}
        logits = self.latents.log_joint({**rest, name: shaped}, x)
        pick = Categorical(logits=logits.movedim(0, -1), validate_args=False).sample()
        new = value.reshape(*lead, -1).clone()
        new[..., k] = options[pick]
        return new.reshape(value.shape)
