"""Games of two players: a guide, and a critic that tells its draws from the model's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .arguments import Count, Index, NonNegative, Portion
from .codes import Codes
from .critic import Critic, critic_for
from .energy import energy_score
from .errors import Incompatible
from .gauges import FEW, dispersion, ordered
from .guide import HasRsample
from .objective import Objective, Player
from .observation import Observation, flatten

if TYPE_CHECKING:
    from .guide import Guide
    from .latents import ModelLike, Values

__all__ = ["Game", "energy_loss", "logistic", "slopes"]

LAST_PENALTY = 0.1  # share of the gradient penalty that is left at the end
MOMENTUM = (0.5, 0.99)  # of Adam, both players: a game has no use for long memories
STEEPEST = 10.0  # largest norm of a player's gradient


class Game(Objective):
    """Base of the adversarial objectives: who plays, the warm start, learning the model, health.

    Subclasses say what the critic compares, by `critic_loss` and `guide_loss`.

    Args:
        hidden: widths of the critic's hidden layers; by default what suits the guide.
        critic_steps: its updates for each one of the guide.
        critic_rate: its learning rate, in units of the fit's.
        penalty: weight of the penalty on the critic's gradient.
        warm_up: share of the steps in which the guide follows the energy score, while the critic
            learns already.
        anchor: weight of the energy score in the guide's loss after the warm-up; its minimum is the
            same posterior, and it holds the guide where the critic sees too little. By default what
            suits the guide: 0, or 1 for paths.
        averaging: decay of the running average of the guide's weights, which is what `fit` returns.
        seed: of the critic's initial weights.
        **knobs: of the subclass; kept in checkpoints.

    Attributes:
        judges_steps: can judge draws part by part, as those of a guide that filters must be.
    """

    needs = HasRsample
    learns_model = True
    judges_steps: ClassVar[bool] = False
    remedy = "It takes a guide that can be sampled with gradients, such as RecurrentRecognition."

    def __init__(
        self,
        *,
        hidden: tuple[Count, ...] | None = None,
        critic_steps: Count = 2,
        critic_rate: NonNegative = 2.0,
        penalty: NonNegative = 0.02,
        warm_up: Portion = 0.2,
        anchor: NonNegative | None = None,
        averaging: Portion = 0.999,
        seed: Index = 0,
        **knobs: Any,
    ) -> None:
        super().__init__(
            hidden=hidden, critic_steps=critic_steps, critic_rate=critic_rate, penalty=penalty,
            warm_up=warm_up, anchor=anchor, averaging=averaging, seed=seed, **knobs,
        )  # fmt: skip
        self.hidden, self.seed = hidden, seed
        self.critic_steps, self.critic_rate = critic_steps, critic_rate
        self.penalty, self.warm_up, self.averaging = penalty, warm_up, averaging
        self.anchor = anchor

    def check(self, guide: Guide, *, joint: bool, learn_model: bool) -> None:
        """As for all objectives; and the guide must answer for what the model dreams."""
        super().check(guide, joint=joint, learn_model=learn_model)
        if not guide.amortised:
            raise Incompatible(
                f"{type(self).__name__} with {type(guide).__name__}",
                expected="a guide that answers for simulated observations",
                got="one with parameters for each problem",
                fix="Use an amortised guide such as RecurrentRecognition.",
            )

    # ---------------------------------------------------------------------------- who plays

    def players(self, guide: Guide) -> dict[str, Player]:
        """The critic first, so that the guide follows what it has just learned."""
        self.judge = critic_for(guide, guide.latents, self.hidden, self.seed)
        if not (self.judge.whole or self.judges_steps):
            raise Incompatible(
                f"{type(self).__name__} with {type(guide).__name__}",
                expected="draws of whole paths",
                got="a guide that filters, whose steps are judged one by one",
                fix="Use Adversarial, Wasserstein or EnergyScore.",
            )
        self.critic = self.critics(guide)
        critic = Player(self.critic, steps=self.critic_steps, rate=self.critic_rate)
        players = {"critic": critic, "guide": Player(guide, averaging=self.averaging)}
        return {n: replace(p, betas=MOMENTUM, steepest=STEEPEST) for n, p in players.items()}

    def critics(self, guide: Guide) -> nn.Module:
        """Whoever learns to tell draws; by default one critic of pairs (x, c)."""
        return self.judge

    # --------------------------------------------------------------------------- what it pays

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"critic": its loss, "guide": its loss}."""
        return {n: self.loss(n, model, guide, x, z) for n in ("critic", "guide")}

    def loss(
        self, player: str, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> Tensor:
        """The loss of one player; the other's is not computed."""
        if player == "critic":
            return self.critic_loss(guide, x, z)
        if self.progress < self.warm_up:
            return energy_loss(self.judge, guide, *self.dreams(guide, x, z))
        c = cast(HasRsample, guide).rsample(x)
        loss = self.guide_loss(guide, x, c)
        anchor = self.judge.anchor if self.anchor is None else self.anchor
        if anchor:
            loss = loss + anchor * energy_loss(self.judge, guide, *self.dreams(guide, x, z))
        return loss + self.model_loss(guide, x, c) if self.learn_model else loss

    def critic_loss(self, guide: Guide, x: Observation, z: Values | None) -> Tensor:
        """What the critic minimises."""
        raise NotImplementedError

    def guide_loss(self, guide: Guide, x: Observation, c: Tensor) -> Tensor:
        """What the guide minimises after the warm-up; c are its draws, (B, C), with gradients."""
        raise NotImplementedError

    def model_loss(self, guide: Guide, x: Observation, c: Tensor) -> Tensor:
        """-log p(x, z) at the guide's draws: its gradient is that of KL(q || p) for the model."""
        z = Codes(guide.latents, type(self).__name__).decode(c.detach())
        return -guide.latents.log_joint(z, x).mean()

    def dreams(self, guide: Guide, x: Observation, z: Values | None) -> tuple[Observation, Values]:
        """Draws from the joint: the batch itself, or new ones with the inputs of the data x."""
        if z is None:
            z, x = guide.latents.simulate(x)
        return x, z

    @property
    def gamma(self) -> float:
        """The penalty's weight now."""
        return float(self.penalty * LAST_PENALTY**self.progress)

    # ----------------------------------------------------------------------------- its health

    def scores(self, guide: Guide, x: Observation, z: Values | None) -> tuple[Tensor, Tensor]:
        """The critic's scores of wake and sleep, each (B, parts)."""
        raise NotImplementedError

    def health(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, float]:
        """Accuracy of the critic, and dispersion of the guide's draws."""
        if guide.latents.problems(x) < FEW:
            return {}
        with torch.no_grad():
            found = {"accuracy": ordered(*self.scores(guide, x, z))}
        return found | {"dispersion": dispersion(guide, *self.dreams(guide, x, z))}


def logistic(critic: nn.Module, seen: list[Tensor], gamma: float) -> Tensor:
    """A critic's loss: softplus(-T) of wake, softplus(T) of sleep, and (gamma / 2) |dT|^2 of both.

    The best T is the log ratio of wake over sleep.

    Args:
        critic: gives scores T.
        seen: its inputs, each (2 B, ...), wake above sleep.
        gamma: weight of the penalty on slopes.
    """
    seen = [t.requires_grad_() for t in seen]
    score = critic(*seen)
    wake, sleep = score.chunk(2)
    loss: Tensor = softplus(-wake).mean() + softplus(sleep).mean()
    return loss + gamma * slopes(score, seen).mean()


def slopes(score: Tensor, seen: list[Tensor]) -> Tensor:
    """|dT|^2 of each pair that was scored, (B,), itself differentiable."""
    gradients = torch.autograd.grad(score.sum(), seen, create_graph=True)
    return torch.stack([g.square().sum(-1) for g in gradients]).sum(0)


def energy_loss(
    judge: Critic, guide: Guide, x: Observation, z: Values, *, draws: int = 4
) -> Tensor:
    """Mean energy score of a guide on draws from the joint, in the judge's units."""
    lat = guide.latents
    standard = judge.standardise(flatten(x, lat.problems(x)))
    c = cast(HasRsample, guide).rsample(x, torch.Size([draws]))
    truth = Codes(lat, "energy score").encode(z)
    parts = [judge.apart(judge.relative(t, standard)) for t in (c, truth)]
    return energy_score(*parts).sum(-1).mean()
