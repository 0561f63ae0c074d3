"""Hamiltonian Monte Carlo as a guide: slow, unamortised, and asymptotically exact."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, mcmc
from torch import Tensor

from ..arguments import Index, Probability
from ..guide import Draws, Guide, check_counts
from ..latents import ModelLike, Values
from ..observation import Observation, parts
from ..progress import bar
from ..seeds import seeded, stream

__all__ = ["NUTS"]


class NUTS(Guide):
    """Pyro's No-U-Turn sampler over all problems of x together.

    Its draws are correlated: read R-hat and ESS. It has no density, so `forward` samples from
    `Implicit`, out of one chain that is run at the first call for an observation and kept.

    Args:
        model: any model with continuous latents.
        warmup: adaptation steps, dropped from the draws.
        target_accept: acceptance probability the step size is adapted to.

    References:
        The No-U-Turn Sampler (Hoffman & Gelman, 2014)
        https://jmlr.org/papers/v15/hoffman14a.html
    """

    independent = False

    def __init__(
        self, model: ModelLike, *, warmup: Index = 500, target_accept: Probability = 0.8
    ) -> None:
        super().__init__(model, warmup=warmup, target_accept=target_accept)
        self.latents.require_continuous("NUTS")
        self.warmup, self.target_accept = warmup, target_accept
        self.__dict__["_kept"] = None

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Run the chains one after the other; each (chains, draws, B, *shape)."""
        check_counts(draws=draws, chains=chains)
        lat = self.latents
        lat.check(x)
        runs = [self._chain(x, draws, stream(seed, c), progress=progress) for c in range(chains)]
        b = lat.problems(x)
        values = {
            s.name: torch.stack([r[s.name].reshape(draws, b, *s.shape) for r in runs])
            for s in lat.sites
        }
        return Draws(values)

    def forward(self, x: Observation) -> Values:
        """One draw per problem, at random out of a kept chain."""
        kept: Any = self.__dict__["_kept"]
        if kept is None or not all(map(torch.equal, parts(x), parts(kept[0]))):
            seed = int(torch.randint(2**31, ()))
            kept = self.__dict__["_kept"] = (x, self.draw(x, draws=500, chains=1, seed=seed))
        values = kept[1].values
        pick = int(torch.randint(500, ()))
        return self.emit({n: v[0, pick] for n, v in values.items()}, x)

    def _begin(self, node: dict[str, Any]) -> Tensor:
        """Pyro's own start, evenly within 2 of zero, unconstrained; its own knows no mixtures."""
        value: Tensor = node["fn"].sample().detach()
        to = next(s.transform for s in self.latents.sites if s.name == node["name"])
        begin: Tensor = to(4 * torch.rand_like(to.inv(value)) - 2)
        return begin

    def _chain(self, x: Observation, draws: int, seed: int, *, progress: bool) -> Values:
        total = self.warmup + draws
        with seeded(seed), bar("NUTS", total, show=progress) as advance:
            kernel = mcmc.NUTS(
                self.model, target_accept_prob=self.target_accept, init_strategy=self._begin,
                transforms={s.name: s.transform.inv for s in self.latents.sites},
            )  # fmt: skip
            run = MCMC(
                kernel,
                num_samples=draws,
                warmup_steps=self.warmup,
                disable_progbar=True,
                hook_fn=lambda *_: advance(),
            )
            local = pyro.settings.context(module_local_params=True)
            with local, torch.enable_grad(), poutine.block():
                run.run(x)
        samples: Values = run.get_samples()
        return samples
