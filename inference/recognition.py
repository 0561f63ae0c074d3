"""Recognition networks that can be sampled and not scored."""

from __future__ import annotations

from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .arguments import LARGEST, Index, Range
from .codes import Codes
from .guide import Draws, Guide, check_counts
from .latents import MAX_ROWS, ModelLike, Values
from .objectives.adversarial import Adversarial
from .observation import Observation, flatten
from .progress import bar
from .seeds import seeded
from .units import Units, pilot, silent, squash

__all__ = ["Recognition", "Temperature"]

Temperature = Annotated[float, Range("a number >= 0.001", 1e-3, LARGEST)]


class Recognition(Guide):
    """A guide that makes draws of x and noise, without a density.

    c = centre + scale (V x + response(x, noise)), where c is a code of all latents: their
    unconstrained values, and of discrete ones the log odds that a state is drawn from. Subclasses
    make layers in `build` and write `respond`.

    Args:
        model: latents continuous, or discrete with finitely many states.
        temperature: of the relaxed gradient of discrete states.
        seed: of the initial weights.
        **knobs: of the subclass, handed to `build`.

    Raises:
        Incompatible: a discrete site without bounds, such as a count.
    """

    objective = Adversarial

    def __init__(
        self, model: ModelLike, *, temperature: Temperature = 0.5, seed: Index = 0, **knobs: Any
    ) -> None:
        super().__init__(model, temperature=temperature, seed=seed, **knobs)
        self.temperature = temperature
        features, z = pilot(self.latents)
        codes = self.codes.encode(z)
        self.units = Units(features, codes)
        drawn = self.codes.discrete.to(codes.device)
        self.units.u_loc[drawn], self.units.u_scale[drawn] = 0.0, 1.0
        with seeded(seed):
            self.linear = silent(features.shape[1], codes.shape[1])
            self.build(features.shape[1], codes.shape[1], **knobs)
        self.to(features)

    def build(self, features: int, codes: int, **knobs: Any) -> None:
        """Make the layers, for F features and C entries of a code."""
        raise NotImplementedError

    def respond(self, standard: Tensor, shape: torch.Size) -> Tensor:
        """Draws for standardised features (B, F): (*shape, B, C), each with noise of its own."""
        raise NotImplementedError

    @property
    def codes(self) -> Codes:
        """Between latents and what the network emits."""
        known: Codes | None = self.__dict__.get("_codes")
        if known is None or known.latents is not self.latents:
            known = self.__dict__["_codes"] = Codes(self.latents, type(self).__name__)
        return known

    def rsample(self, x: Observation, shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Differentiable codes (*shape, B, C)."""
        standard = self.units.standardise(flatten(x, self.latents.problems(x)))
        outputs = self.linear(standard) + self.respond(squash(standard), shape)
        return self.codes.emit(self.units.u_loc + self.units.u_scale * outputs, self.temperature)

    def forward(self, x: Observation) -> Values:
        """Sample the latent sites, from `Implicit`: an ELBO fails loudly."""
        return self.emit(self.codes.decode(self.rsample(x, self.outer())), x)

    def outer(self) -> torch.Size:
        """Axes of the plates around this call: vectorised particles have noise of their own."""
        lat = self.latents
        one = dist.Normal(torch.zeros(()), 1.0)
        mark = pyro.sample("_outer", one, infer={"is_auxiliary": True})  # the plates expand it
        shape: torch.Size = mark.shape[: max(0, mark.dim() - lat.inner - lat.plated)]
        return shape

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Independent draws, with x encoded once per piece."""
        check_counts(draws=draws, chains=chains)
        self.latents.check(x)
        total, most = chains * draws, max(1, MAX_ROWS // self.latents.problems(x))
        sizes = [min(most, total - done) for done in range(0, total, most)]
        with (
            torch.no_grad(),
            seeded(seed),
            bar(type(self).__name__, len(sizes), show=progress) as step,
        ):
            pieces = []
            for n in sizes:
                pieces.append(self.codes.decode(self.rsample(x, torch.Size([n]))))
                step()
        flat = {n: torch.cat([p[n] for p in pieces]) for n in self.latents.names}
        return Draws({n: v.reshape(chains, draws, *v.shape[1:]) for n, v in flat.items()})
