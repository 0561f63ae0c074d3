"""What a step of an adversarial game costs over the same networks trained by hand in PyTorch.

Explaining away (D = 2, s = .3), the recurrent circuit and the critic of `fit`, the same losses, two
updates of the critic and one of the guide, Adam, clipped gradients, averaged weights. By hand there
is no Pyro, no check, no gauge and no bar; the model is three lines of tensor operations.

Then the time to the number of the design, KL below .05 nats (best factorised guide: .922).

Times are of this thread's processor, medians of interleaved rounds.

Run: python benchmarks/adversarial_speed.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from record import record
from torch import Tensor, nn
from torch.nn.functional import softplus

import inference
import zoo
from inference import Adversarial, RecurrentRecognition
from inference.critic import Critic, critic_for
from inference.game import MOMENTUM, STEEPEST
from inference.units import squash

FEW, MORE = 10, 50  # steps: the difference of two runs is free of what comes before the first step
NOISE, PENALTY = 0.3, 0.02
ENOUGH = 0.05  # nats
LENGTHS = (250, 500, 1000)  # steps of a fit; the first that is good enough is the last


def model() -> zoo.ExplainingAway:
    """The motivating case of the paper."""
    return zoo.ExplainingAway(2, noise=NOISE)


def by_fit(batch: int, steps: int) -> None:
    """The game as users play it."""
    m = model()
    game = Adversarial(warm_up=0.0, penalty=PENALTY)
    inference.fit(
        m, RecurrentRecognition(m), objective=game, steps=steps, batch_size=batch, progress=False
    )


def by_hand(batch: int, steps: int) -> None:
    """The same networks and losses, written for this model alone."""
    m = model()
    guide = RecurrentRecognition(m)
    critic = critic_for(guide, guide.latents, None, 0)
    players = [critic, guide]
    adams = [torch.optim.Adam(p.parameters(), lr=3e-3, betas=MOMENTUM, fused=True) for p in players]
    mean = [p.detach().clone() for p in guide.parameters()]
    for _ in range(steps):
        for player, adam in ((critic, adams[0]), (critic, adams[0]), (guide, adams[1])):
            z = torch.randn(batch, 2)
            x = z.sum(-1, keepdim=True) + NOISE * torch.randn(batch, 1)
            standard = critic.standardise(x)
            if player is critic:
                with torch.no_grad():
                    c = emit(guide, x)
                loss = tell(critic, standard, c, z)
            else:
                loss = critic(standard, critic.relative(emit(guide, x), standard)).mean()
            update(player, adam, loss)
        with torch.no_grad():
            torch._foreach_lerp_(mean, list(guide.parameters()), 0.001)


def emit(guide: RecurrentRecognition, x: Tensor) -> Tensor:
    """The circuit's draws."""
    u = guide.units
    scaled = (x - u.x_loc) / u.x_scale
    states = guide.states(squash(scaled), torch.Size())
    return u.u_loc + u.u_scale * (guide.linear(scaled) + guide.readout(states[-1]))


def tell(critic: Critic, standard: Tensor, c: Tensor, z: Tensor) -> Tensor:
    """The critic's loss with its penalty."""
    s = standard.repeat(2, 1).requires_grad_()
    y = critic.relative(torch.cat([c, z]), standard.repeat(2, 1)).requires_grad_()
    score = critic(s, y)
    wake, sleep = score.chunk(2)
    slopes = torch.autograd.grad(score.sum(), [s, y], create_graph=True)
    penalty = sum(g.square().sum(-1) for g in slopes).mean()
    return softplus(-wake).mean() + softplus(sleep).mean() + PENALTY * penalty


def update(player: nn.Module, adam: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down, cut to a norm."""
    parameters = list(player.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = g
    nn.utils.clip_grad_norm_(parameters, STEEPEST)
    adam.step()
    adam.zero_grad()


def timed(run: Callable[[int, int], None], batch: int) -> float:
    """Milliseconds per step."""
    took = []
    for steps in (FEW, MORE):
        began = time.process_time()
        run(batch, steps)
        took.append(time.process_time() - began)
    return (took[1] - took[0]) / (MORE - FEW) * 1e3


def gap(m: zoo.ExplainingAway, guide: inference.Guide) -> float:
    """KL(q || p) by moments, averaged over five observations."""
    x = torch.linspace(-2, 2, 5)[:, None]
    z = guide.draw(x, draws=20_000, chains=1, seed=5).values["z"][0]
    p = m.exact().distribution(x)
    found = []
    for b in range(len(x)):
        q = torch.distributions.MultivariateNormal(z[:, b].mean(0), torch.cov(z[:, b].T))
        truth = torch.distributions.MultivariateNormal(p.loc[b], p.covariance_matrix[b])
        found.append(torch.distributions.kl_divergence(q, truth))
    return float(torch.stack(found).mean())


def main() -> None:
    """Rounds in turn, then the time to the number."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("batch   fit  by hand  ratio   (ms of a processor per step, medians)")
    for batch in (128, 256):
        rows = [[timed(run, batch) for run in (by_fit, by_hand)] for _ in range(args.rounds)]
        fit, hand = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio = statistics.median([a / b for a, b in rows])
        print(f"{batch:5d} {fit:5.1f} {hand:8.1f} {ratio:6.2f}")
    found = []
    for seed in range(3):
        for steps in LENGTHS:
            m = model()
            guide = RecurrentRecognition(m, seed=seed)
            knobs = {"steps": steps, "batch_size": 128, "lr": 3e-3, "seed": seed}
            began = time.process_time()
            inference.fit(m, guide, objective=Adversarial(), progress=False, **knobs)
            seconds, kl = time.process_time() - began, gap(m, guide)
            print(f"seed {seed}, {steps} steps: {seconds:.0f} s of a processor, KL {kl:.4f}")
            if kl < ENOUGH:
                break
        found.append(kl)
    record("KL", statistics.median(found), found)


if __name__ == "__main__":
    main()
