"""The training loop: for each step, each player, its updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from .checkpoint import Tensors, optimizer_state, restore_optimizer
from .errors import Diverged
from .guide import Guide
from .latents import Values
from .objective import Objective
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
        steps: updates per step of the fit.
        lr: first learning rate.
    """

    def __init__(self, name: str, parameters: list[nn.Parameter], steps: int, lr: float) -> None:
        self.name, self.parameters, self.steps, self.lr = name, parameters, steps, lr
        self.optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)

    def update(self, loss: Tensor, rate: float) -> None:
        """One step down this player's loss at `rate` times the first learning rate."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        if not torch.isfinite(norm + loss.detach()):
            raise Diverged(
                f"gradient of player {self.name!r}",
                expected="finite numbers",
                got=f"norm {norm.item()} at loss {loss.item():.4g}",
                fix="Lower lr, or look for latents or observations far outside the model's range.",
            )
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.param_groups[0]["lr"] = self.lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and optimiser by name, for a checkpoint."""
        for k, parameter in enumerate(self.parameters):
            yield f"player/{self.name}/{k}", parameter
        yield from optimizer_state(self.name, self.optimizer)

    def restore(self, tensors: Tensors) -> None:
        """Undo :meth:`state`."""
        with torch.no_grad():
            for k, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"player/{self.name}/{k}"])
        restore_optimizer(self.name, self.optimizer, tensors)


class Batches:
    """Batch number k, of the data or fresh from the joint.

    Data are shuffled anew each epoch, from the seed and the epoch's number alone; the last, short
    batch of an epoch is left out.

    Args:
        guide: names the model and whether batches make sense for it.
        x: observations, or None for the joint.
        batch_size: problems per batch.
        seed: of the shuffles; draws from the joint use torch's generator.
        z: the latents that made x, where the data are simulations.
        rows: some rows will do of a data set that is one problem.

    Attributes:
        share: of such a data set that a batch has, else 1.
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
    ) -> None:
        self.latents, self.x, self.z, self.seed = guide.latents, x, z, seed
        self.like = x if x is not None else self.latents.like
        total = size(self.like)
        self.size = min(batch_size, total) if x is not None else batch_size
        parts = rows and self.latents.separable and self.size < total and x is not None
        self.whole = not (parts or (self.latents.plated and guide.amortised))
        self.share = self.size / total if parts else 1.0
        self.per_epoch = max(1, total // self.size)
        self.epoch, self.order = -1, torch.arange(total)

    def __call__(self, k: int) -> tuple[Observation, Values | None]:
        """The observation and, from the joint, the latents that made it."""
        if self.x is None:
            rows = (torch.arange(self.size) + k * self.size) % size(self.like)
            z, x = self.latents.simulate(self.like if self.whole else take(self.like, rows))
            return x, z
        if self.whole:
            return self.x, None
        epoch, slot = divmod(k, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(stream(self.seed, 1, epoch))
            self.epoch, self.order = epoch, torch.randperm(size(self.x), generator=generator)
        rows = self.order[slot * self.size : (slot + 1) * self.size]
        made = None if self.z is None else {n: v[rows] for n, v in self.z.items()}
        return take(self.x, rows), made


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
        self.batches = Batches(fit.guide, x, size, fit.seed, z, rows=rows)
        objective.share = self.batches.share
        self.updates = sum(t.steps for t in trainers)
        self.steps: int = fit.settings["steps"]
        self.losses = {t.name: torch.full((self.steps,), math.nan) for t in trainers}
        for name, old in fit.losses.items():
            self.losses[name][: len(old)] = torch.from_numpy(old)
        self.done, self.midway = fit.steps, False

    def run(self, *, show: bool, title: str) -> None:
        """All remaining steps, with a bar and a checkpoint every ten seconds."""
        before, began = self.fit.seconds, time.perf_counter()
        saved = began

        def keep() -> None:
            self.fit.seconds = before + time.perf_counter() - began
            done = {n: v[: self.done].numpy().astype(np.float32) for n, v in self.losses.items()}
            self.fit.losses = done
            self.save()

        with (
            pyro.settings.context(module_local_params=True),
            seeded(self.fit.seed),
            bar(title, self.steps, start=self.done, show=show) as advance,
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
            except KeyboardInterrupt:
                if not self.midway:  # half a step would be taken twice
                    keep()
                raise
            finally:
                self.fit.guide.eval()
        keep()

    def step(self, step: int) -> None:
        """One step: every player's updates, each on a fresh batch."""
        reseed(self.fit.seed, 0, step)
        warm = min(1.0, (step + 1) / (WARM_UP * self.steps))
        rate = warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        model, guide, k = self.fit.guide.model, self.fit.guide, step * self.updates
        self.objective.progress = step / self.steps
        for trainer in self.trainers:
            for _ in range(trainer.steps):
                loss = self.objective(model, guide, *self.batches(k))[trainer.name]
                self.midway = True
                trainer.update(loss, rate)
                k += 1
            self.losses[trainer.name][step] = loss.detach()
        self.done, self.midway = step + 1, False

    def look(self) -> str:
        """Mean losses of the latest steps, for the bar.

        Raises:
            Diverged: one of them is not finite.
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
        return "  ".join(notes)
