"""The training loop: for each step, each player, its updates."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from . import parallel
from .checkpoint import Tensors, optimizer_state, restore_optimizer
from .errors import BadInput, Diverged, FitWarning
from .guide import Guide
from .latents import Values
from .objective import Objective, Player
from .observation import Observation, size, take
from .progress import bar
from .seeds import reseed, seeded, stream

if TYPE_CHECKING:
    from .fit import Fit

__all__ = ["Batches", "Loop", "Trainer"]

LOOK_EVERY = 50  # steps between looks at the losses: each look waits for the device
WARM_UP = 0.05  # share of the steps over which the learning rate rises
SAVE_EVERY = 10.0  # seconds between checkpoints


class Trainer:
    """A player with its optimiser.

    Args:
        name: of the player.
        parameters: those that move; no others do.
        player: how.
        lr: the fit's first learning rate.
    """

    def __init__(
        self, name: str, parameters: list[nn.Parameter], player: Player, lr: float
    ) -> None:
        self.name, self.parameters, self.player = name, parameters, player
        self.lr = player.lr or player.rate * lr
        self.optimizer = torch.optim.Adam(parameters, lr=self.lr, betas=player.betas, fused=True)
        self.average = [p.detach().clone() for p in parameters] if player.averaging else []
        self.updates = torch.zeros(())
        self.norm = torch.zeros(())

    def slope(self, loss: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Loss and gradients, means over all ranks; None where no rank has a gradient."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        loss = loss.detach()
        if parallel.world() == 1:
            return loss, gradients
        known = loss.new_tensor([g is not None for g in gradients])
        pairs = zip(gradients, self.parameters, strict=True)
        whole = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        loss, known, *means = parallel.average([loss, known, *whole])
        return loss, [m if k else None for m, k in zip(means, known.tolist(), strict=True)]

    def update(self, loss: Tensor, rate: float) -> Tensor:
        """One step down this player's loss at `rate` times the first learning rate.

        Returns:
            the loss, a mean over all ranks.

        Raises:
            Diverged: loss or gradient is not finite, on any rank.
        """
        loss, gradients = self.slope(loss)
        known = [g for g in gradients if g is not None]
        self.norm = norm = nn.utils.get_total_norm(known)
        if not torch.isfinite(norm + loss):
            raise Diverged(
                f"gradient of player {self.name!r}",
                expected="finite numbers",
                got=f"norm {norm.item()} at loss {loss.item():.4g}",
                fix="Lower lr, or look for latents or observations far outside the model's range.",
            )
        cut = min(1.0, float(self.player.steepest / norm))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None or cut == 1 else cut * gradient
        self.optimizer.param_groups[0]["lr"] = self.lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.updates += 1  # early on the average is young: it forgets the start at once
            decay = min(self.player.averaging, float(self.updates / (self.updates + 9)))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return loss

    def settle(self) -> None:
        """Put the averages in the parameters' place, where there are any."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=False):
                parameter.copy_(mean)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages in the parameters' place, for a while."""
        raw = [p.detach().clone() for p in self.parameters]
        self.settle()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, raw, strict=True):
                    parameter.copy_(value)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, averages and optimiser by name, for a checkpoint."""
        for k, parameter in enumerate(self.parameters):
            yield f"player/{self.name}/{k}", parameter
        for k, mean in enumerate(self.average):
            yield f"average/{self.name}/{k}", mean
        if self.average:
            yield f"updates/{self.name}", self.updates
        yield from optimizer_state(self.name, self.optimizer)

    def restore(self, tensors: Tensors) -> None:
        """Undo :meth:`state`."""
        self.updates = tensors.get(f"updates/{self.name}", self.updates)
        with torch.no_grad():
            for kind, values in (("player", self.parameters), ("average", self.average)):
                for k, value in enumerate(values):
                    value.copy_(tensors[f"{kind}/{self.name}/{k}"])
        restore_optimizer(self.name, self.optimizer, tensors)


class Batches:
    """Batch number k, of the data or fresh from the joint.

    Data are shuffled anew each epoch, from the seed and the epoch's number alone; the last, short
    batch of an epoch is left out. Several ranks take adjacent batches: together what one rank would
    have with a batch so many times as large.

    Args:
        guide: names the model and whether batches make sense for it.
        x: observations, or None for the joint.
        batch_size: problems per batch.
        seed: of the shuffles; draws from the joint use torch's generator.
        z: the latents that made x, where the data are simulations.
        rows: some rows will do of a data set that is one problem.
        rank: whose part of each step to give.
        world: ranks that share a step.

    Attributes:
        share: of such a data set that a batch has, else 1.

    Raises:
        BadInput: fewer problems than ranks.
    """

    def __init__(
        self,
        guide: Guide,
        x: Observation | None,
        batch_size: int,
        seed: int,
        z: Values | None = None,
        *,
        rows: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.latents, self.x, self.z, self.seed = guide.latents, x, z, seed
        self.like = x if x is not None else self.latents.like
        total = size(self.like)
        self.size = min(batch_size, total // world) if x is not None else batch_size
        parts = rows and self.latents.separable and self.size < total and x is not None
        self.whole = not (parts or (self.latents.plated and guide.amortised))
        if not (self.whole or self.size):
            raise BadInput(
                "x", expected=f"a problem for each of {world} ranks", got=f"{total}",
                fix=f"torchrun --nproc-per-node {total}.",
            )  # fmt: skip
        self.share = self.size / total if parts else 1.0
        self.per_epoch = max(1, total // (world * max(1, self.size)))
        self.rank, self.world = rank, world
        self.epoch, self.order = -1, torch.arange(total)

    def __call__(self, k: int) -> tuple[Observation, Values | None]:
        """The observation and, from the joint, the latents that made it."""
        if self.x is None:
            rows = self.places(k) % size(self.like)
            z, x = self.latents.simulate(self.like if self.whole else take(self.like, rows))
            return x, z
        if self.whole:
            return self.x, None
        epoch, slot = divmod(k, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(stream(self.seed, 1, epoch))
            self.epoch, self.order = epoch, torch.randperm(size(self.x), generator=generator)
        rows = self.order[self.places(slot)]
        made = None if self.z is None else {n: v[rows] for n, v in self.z.items()}
        return take(self.x, rows), made

    def places(self, k: int) -> Tensor:
        """Where batch k stands in a row of all ranks' batches, (size,)."""
        return torch.arange(self.size) + (k * self.world + self.rank) * self.size

    def several(self, k: int, n: int) -> list[tuple[Observation, Values | None]]:
        """Batches k to k + n - 1; those from the joint in one call of the model."""
        if self.x is not None or self.whole:
            return [self(k + i) for i in range(n)]
        rows = torch.cat([self.places(k + i) for i in range(n)]) % size(self.like)
        z, x = self.latents.simulate(take(self.like, rows))
        cuts = [slice(i * self.size, (i + 1) * self.size) for i in range(n)]
        return [(take(x, cut), {name: v[cut] for name, v in z.items()}) for cut in cuts]


class Loop:
    """Runs a fit from where it stands to its last step.

    Args:
        fit: where losses and time are kept.
        objective: gives a loss per player.
        trainers: the players.
        x: observations, or None for the joint.
        z: the latents that made x, where they are simulations.
        save: writes a checkpoint.
    """

    def __init__(
        self,
        fit: Fit,
        objective: Objective,
        trainers: list[Trainer],
        x: Observation | None,
        z: Values | None,
        save: Callable[[], None],
    ) -> None:
        self.fit, self.save, self.trainers = fit, save, trainers
        self.objective = objective.to(next(iter(trainers)).parameters[0].device)
        size, rows = fit.settings["batch_size"], objective.subsamples and fit.guide.takes_rows
        self.rank, ranks = parallel.rank(), parallel.world()
        self.batches = Batches(
            fit.guide, x, size, fit.seed, z, rows=rows, rank=self.rank, world=ranks
        )
        objective.share, objective.learn_model = self.batches.share, fit.settings["learn_model"]
        self.updates = sum(t.player.steps for t in trainers)
        self.steps: int = fit.settings["steps"]
        self.losses = {t.name: torch.full((self.steps,), math.nan) for t in trainers}
        for name, old in fit.losses.items():
            self.losses[name][: len(old)] = torch.from_numpy(old)
        self.health = {name: list(values) for name, values in fit.health.items()}
        self.done, self.midway = fit.steps, False
        self.batch: tuple[Observation, Values | None] | None = None

    def run(self, *, show: bool, title: str) -> None:
        """All remaining steps, with a bar and a checkpoint every ten seconds."""
        before, began = self.fit.seconds, time.perf_counter()
        saved = began

        def keep() -> None:
            self.fit.seconds = before + time.perf_counter() - began
            done = {n: v[: self.done].numpy().astype(np.float32) for n, v in self.losses.items()}
            self.fit.losses = done
            self.fit.health = {n: np.array(v, np.float32) for n, v in self.health.items()}
            self.save()

        with (
            pyro.settings.context(module_local_params=True),
            seeded(self.fit.seed),
            bar(title, self.steps, start=self.done, show=show and not self.rank) as advance,
        ):
            self.fit.guide.train()
            try:
                for step in range(self.done, self.steps):
                    self.step(step)
                    advance(self.look() if self.done % LOOK_EVERY == 0 else "")
                    if time.perf_counter() - saved > SAVE_EVERY:
                        keep()
                        saved = time.perf_counter()
                self.look()
                keep()
            except KeyboardInterrupt:
                if not self.midway:  # half a step would be taken twice
                    keep()
                raise
            finally:
                self.fit.guide.eval()
        for trainer in self.trainers:
            trainer.settle()
        for sentence in () if self.rank else self.fit.warnings:
            warnings.warn(f"{title}: {sentence}", FitWarning, stacklevel=3)

    def step(self, step: int) -> None:
        """One step: every player's updates, each on a fresh batch."""
        reseed(self.fit.seed, 0, step, *([self.rank] if self.rank else []))
        warm = min(1.0, (step + 1) / (WARM_UP * self.steps))
        rate = warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        model, guide = self.fit.guide.model, self.fit.guide
        self.objective.progress = step / self.steps
        batches = iter(self.batches.several(step * self.updates, self.updates))
        for trainer in self.trainers:
            for _ in range(trainer.player.steps):
                self.batch = next(batches)
                loss = self.objective.loss(trainer.name, model, guide, *self.batch)
                self.midway = True
                loss = trainer.update(loss, rate)
            self.losses[trainer.name][step] = loss
        self.done, self.midway = step + 1, False

    def look(self) -> str:
        """Mean losses of the latest steps and gauges, for the bar.

        Raises:
            Diverged: a loss is not finite.
        """
        notes = []
        for name, values in self.losses.items():
            recent = values[max(0, self.done - LOOK_EVERY) : self.done]
            if not torch.isfinite(recent).all():
                raise Diverged(
                    f"loss of {name!r}",
                    expected="finite numbers",
                    got=f"NaN or infinity within the {LOOK_EVERY} steps before step {self.done}",
                    fix="Lower lr, or look for latents or observations outside the support.",
                )
            notes.append(f"{name} {recent.mean():.4g}")
        if self.rank:
            return ""  # gauges are the first rank's
        if self.batch is not None and self.done not in self.health.get("step", []):
            notes += [f"{name} {value:.2g}" for name, value in self.examine().items()]
        return "  ".join(notes)

    def examine(self) -> dict[str, float]:
        """Gauges on the latest batch, beside norms of gradients; nothing of a plain fit."""
        assert self.batch is not None
        found = self.objective.health(self.fit.guide.model, self.fit.guide, *self.batch)
        norms = {f"gradient {t.name}": float(t.norm) for t in self.trainers}
        for name, value in ({"step": float(self.done)} | norms | found).items():
            self.health.setdefault(name, []).append(value)
        return found | norms if found else {}
