"""Reweighted wake-sleep: draws of the guide, weighted by how well they explain x, teach it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arguments import Several, Share
from ..errors import BadInput, Incompatible
from ..guide import HasDensity
from ..objective import Objective

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = ["ReweightedWakeSleep"]


class ReweightedWakeSleep(Objective):
    """Minimise KL(p || q) where x was observed, with importance weights for the posterior.

    z_k ~ q(z given x), k = 1 ... K, without gradients;
    w_k = p(x, z_k) / q(z_k given x), divided by their sum;
    wake = -sum_k w_k log q(z_k given x), and sleep = -log q(z given x) on (z, x) from the joint;
    the guide's loss is insomnia * wake + (1 - insomnia) * sleep, nats per problem.

    Nothing is differentiated through a draw, so latents may be discrete. With `learn_model` the
    model's gradient is -sum_k w_k d log p(x, z_k), that of the bound -log((1/K) sum_k w_k) on minus
    the log evidence. Each loss moves its own parameters only. Gradients of weighted draws have a
    bias of order 1 / K; sleep has none, but sees only observations the model would make.

    Args:
        particles: K, at least 2.
        insomnia: share of wake in the guide's loss, from 0 (sleep alone) to 1 (wake alone).

    Raises:
        BadInput: fewer than two particles, or an insomnia outside [0, 1].
        Incompatible: a guide with parameters for each problem of the data cannot sleep.

    Differences:
        Sleep has one draw for each problem of the batch, where Pyro has K; where batches come from
        the joint, they are these draws.

    References:
        Reweighted Wake-Sleep (Bornschein & Bengio, 2015), algorithm 1
        https://arxiv.org/abs/1406.2751
        Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow (Le et al., 2019)
        https://arxiv.org/abs/1805.10469
        pyro.infer.ReweightedWakeSleep, for `insomnia`
    """

    needs = HasDensity
    learns_model = True
    remedy = "An implicit guide needs an objective made for draws; weights need log q."

    def __init__(self, *, particles: Several = 10, insomnia: Share = 1.0) -> None:
        super().__init__(particles=particles, insomnia=insomnia)
        if not 0 <= insomnia <= 1:
            wanted = "a number from 0 to 1"
            raise BadInput("insomnia", expected=wanted, got=repr(insomnia), fix="insomnia=1.0.")
        self.particles, self.insomnia = particles, insomnia

    def check(self, guide: Guide, *, joint: bool, learn_model: bool) -> None:
        """As for all objectives; and to sleep, a guide must answer for any x."""
        super().check(guide, joint=joint, learn_model=learn_model)
        if self.insomnia < 1 and not (joint or guide.amortised):
            raise Incompatible(
                f"{type(self).__name__} with {type(guide).__name__}",
                expected="a guide that answers for simulated observations",
                got=f"parameters for each problem and insomnia={self.insomnia:g}",
                fix="insomnia=1.0.",
            )

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": the guide's loss, plus the bound on minus the log evidence}."""
        assert isinstance(guide, HasDensity)  # Objective.check has seen to it
        values = self._particles(guide, x)
        log_p = guide.latents.log_joint(values, x)
        with _held(model):
            log_q = guide.log_prob(values, x)
            asleep = self._asleep(guide, x, z) if self.insomnia < 1 else log_q.new_zeros(())
        log_w = log_p - log_q.detach()
        awake = -(log_w.detach().softmax(0) * log_q).sum(0).mean()
        bound = (math.log(self.particles) - log_w.logsumexp(0)).mean()
        return {"guide": self.insomnia * awake + (1 - self.insomnia) * asleep + bound}

    def _particles(self, guide: Guide, x: Observation) -> Values:
        """Latents (K, B, *shape): one of each chain, as those of one chain may be correlated."""
        seed = int(torch.randint(1 << 31, ()))
        draws = guide.draw(x, draws=1, chains=self.particles, seed=seed)
        return {n: v.squeeze(1) for n, v in draws.values.items()}

    @staticmethod
    def _asleep(guide: Guide, x: Observation, z: Values | None) -> Tensor:
        """-log q on the batch, if it came from the joint, else on as many simulated problems."""
        assert isinstance(guide, HasDensity)
        made, seen = guide.latents.simulate(x) if z is None else (z, x)
        log_q: Tensor = guide.log_prob(made, seen)
        return -log_q.mean()


@contextmanager
def _held(model: ModelLike) -> Iterator[None]:
    """Inside, gradients do not reach the model's parameters, which a guide's density may use."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    learned = [p for p in parameters if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)
