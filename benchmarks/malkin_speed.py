"""What a training step of stochastic synapses costs: 784-100-100-10, MNIST, batches of 20.

Time of one step, medians over runs of ten steps taken in turn, and relative to the deterministic
network:

1. deterministic: plain PyTorch, cross-entropy;
2. local: StochasticSynapses on a Pyro program, each row of inputs with weights of its own; the
   magnitude is that of the mean weights or the mean one, and the prior a Laplace;
3. drawn: the same with local=False, one draw of the weights for all rows;
4. local, by hand: the loss of 2 in plain PyTorch, which tells the price of the method from ours;
5. published: double precision, one draw, sd = softplus(phi), after Malkin et al. (2024).

All have the same Adam: fused, as `fit` has it, and then as PyTorch has it by default. Then the
variance of the gradients of 2 and 3 over their noise, summed over the parameters of a kind, on one
batch, at the start and after some training.

Times are of this thread's processor, so that other work on the machine disturbs them less.

Run: python benchmarks/malkin_speed.py [--rounds 100] [--batch 20]; with NEUROGUIDE_DATA where the
files of MNIST are, if they cannot be downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import zoo
from inference import PowerLaw, ReliabilityCost, StochasticSynapses
from inference.seeds import seeded
from zoo.data import mnist

SHAPES = {
    "w1": (784, 100), "b1": (100,), "w2": (100, 100), "b2": (100,), "w3": (100, 10), "b3": (10,),
}  # fmt: skip
ROWS, BATCH = 60_000, 20
RHO, SCALE = 0.5, 0.1  # of the cost
RATE, LR = 1e-4, 5e-4  # of the Laplace prior; of learning
RUN, WARM_UP = (
    10,
    2,
)  # steps in turn, as in training; those at first, with other things in the cache
TRAINING, DRAWS = 1000, 200

Loss = Callable[[], Tensor]
Parameters = list[nn.Parameter]


def program(images: Tensor, labels: Tensor) -> None:
    """The network as anybody would write it."""
    z = {}
    for name, shape in SHAPES.items():
        prior = dist.Laplace(torch.zeros(shape), 1 / RATE).to_event(len(shape))
        z[name] = pyro.sample(name, prior)
    with pyro.plate("rows", len(images)):
        h = (images @ z["w1"] + z["b1"]).relu()
        h = (h @ z["w2"] + z["b2"]).relu()
        pyro.sample("y", dist.Categorical(logits=h @ z["w3"] + z["b3"]), obs=labels)


class Batches:
    """The next rows, so many at each call."""

    def __init__(self, size: int) -> None:
        self.size, data = size, mnist()
        assert data.train_labels is not None
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
        self.images, self.labels, self.next = data.train[order], data.train_labels[order], 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        rows = slice(self.next, self.next + self.size)
        self.next = (self.next + self.size) % ROWS
        return self.images[rows], self.labels[rows]


def deterministic(batch: Batches) -> tuple[Loss, Parameters]:
    """Nothing but a network."""
    net = nn.Sequential(
        nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )

    def loss() -> Tensor:
        images, labels = batch()
        return nnf.cross_entropy(net(images), labels)

    return loss, list(net.parameters())


def ours(batch: Batches, *, magnitude: str, local: bool = True) -> tuple[Loss, Parameters]:
    """A Pyro program, our guide and our objective."""
    images, labels = batch()
    model = zoo.from_pyro(program, (images, labels.float()))
    guide = StochasticSynapses(model, scale=SCALE, local=local)
    objective = ReliabilityCost(PowerLaw(RHO, scale=SCALE), magnitude=magnitude)
    objective.share = batch.size / ROWS

    def loss() -> Tensor:
        images, labels = batch()
        return objective(model, guide, (images, labels.float()))["guide"]

    return loss, list(guide.parameters())


def by_hand(batch: Batches) -> tuple[Loss, Parameters]:
    """The same loss for this network alone."""
    sizes = [torch.Size(s).numel() for s in SHAPES.values()]
    mean = nn.Parameter(torch.empty(sum(sizes)).uniform_(-0.1, 0.1))
    log_sd = nn.Parameter(torch.full((sum(sizes),), SCALE).log())

    def split(packed: Tensor) -> list[Tensor]:
        return [t.view(s) for t, s in zip(packed.split(sizes), SHAPES.values(), strict=True)]

    def loss() -> Tensor:
        h, labels = batch()
        m, v = split(mean), split((2 * log_sd).exp())
        for k in (0, 2, 4):
            loc = torch.addmm(m[k + 1], h, m[k])
            sd = torch.addmm(v[k + 1], h * h, v[k]).sqrt()
            h = loc + sd * torch.randn_like(loc)
            h = h.relu() if k < 4 else h
        reliability = SCALE**RHO / RHO * (-RHO * log_sd).exp().sum()
        return nnf.cross_entropy(h, labels) * ROWS + RATE * mean.abs().sum() + reliability

    return loss, [mean, log_sd]


def published(batch: Batches) -> tuple[Loss, Parameters]:
    """As the released code has it: for a batch, not for the whole of the data."""
    shapes = SHAPES.values()
    mean = [nn.Parameter(torch.empty(s).double().uniform_(-0.1, 0.1)) for s in shapes]
    phi = [nn.Parameter(torch.full(s, SCALE).double().expm1().log()) for s in shapes]

    def loss() -> Tensor:
        images, labels = batch()
        sd = [nnf.softplus(p) for p in phi]
        w = [m + s * torch.randn_like(m) for m, s in zip(mean, sd, strict=True)]
        h = images.double()
        for k in (0, 2, 4):
            h = h @ w[k] + w[k + 1]
            h = h.relu() if k < 4 else h
        cost = sum((SCALE / s).pow(RHO).sum() / RHO for s in sd)
        size = sum(m.abs().sum() for m in mean)
        return nnf.cross_entropy(h, labels) * batch.size + batch.size / ROWS * (cost + RATE * size)

    return loss, mean + phi


def descent(loss: Loss, parameters: Parameters, *, fused: bool | None) -> Callable[[], None]:
    """One step."""
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def speed(rounds: int, size: int) -> None:
    """The table of times."""
    batch = Batches(size)
    kinds = {"fused": True, "default": None}
    losses = {
        "deterministic": lambda: deterministic(batch),
        "local, mean weights": lambda: ours(batch, magnitude="mean"),
        "local": lambda: ours(batch, magnitude="expected"),
        "drawn": lambda: ours(batch, magnitude="expected", local=False),
        "local, mean weights, by hand": lambda: by_hand(batch),
        "published": lambda: published(batch),
    }
    steps = {
        (name, kind): descent(*make(), fused=fused)
        for name, make in losses.items()
        for kind, fused in kinds.items()
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            for k in range(RUN):
                began = time.thread_time()
                step()
                if k >= WARM_UP:
                    times[key].append(1e3 * (time.thread_time() - began))
    found = {key: statistics.median(t) for key, t in times.items()}
    print(f"A training step, ms, medians of {rounds} runs, and relative to the deterministic one")
    print(f"{'':30s}{'fused Adam':>16s}{'default Adam':>16s}")
    for name in losses:
        cells = [(found[name, k], found[name, k] / found["deterministic", k]) for k in kinds]
        print(f"{name:30s}" + "".join(f"{ms:10.2f}{ratio:6.2f}" for ms, ratio in cells))


def variance(size: int) -> None:
    """The table of variances."""
    batch = Batches(size)
    both = {local: ours(batch, magnitude="expected", local=local) for local in (True, False)}
    step = descent(*both[True], fused=True)
    print("Variance of the gradient on one batch, drawn over local:      means   log sds")
    for steps, when in ((0, "at the start"), (TRAINING, f"after {TRAINING} steps")):
        for _ in range(steps):
            step()
        with torch.no_grad():
            for mine, theirs in zip(both[False][1], both[True][1], strict=True):
                mine.copy_(theirs)
        traces = {}
        for local, (loss, parameters) in both.items():
            draws: list[list[Tensor]] = [[], []]
            for _ in range(DRAWS):
                batch.next = 0
                for kept, slope in zip(draws, torch.autograd.grad(loss(), parameters), strict=True):
                    kept.append(slope)
            traces[local] = [float(torch.stack(d).var(0).sum()) for d in draws]
        ratios = [drawn / own for drawn, own in zip(traces[False], traces[True], strict=True)]
        print(f"{when:57s}{ratios[0]:10.2f}{ratios[1]:10.2f}")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--batch", type=int, default=BATCH)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with pyro.settings.context(module_local_params=True), seeded(0):  # as in a fit
        speed(chosen.rounds, chosen.batch)
        variance(chosen.batch)


if __name__ == "__main__":
    main()
