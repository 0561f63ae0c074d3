"""Amortised Poisson beliefs: a network reads them off x, and may hand them on to be refined."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import Count, Index
from ..beliefs import State
from ..latents import ModelLike
from .encoder import Encoder
from .iterative import limit
from .iterative_poisson import IterativePoisson

__all__ = ["PoissonEncoder", "SemiAmortisedPoisson"]


class SemiAmortisedPoisson(IterativePoisson):
    """A network's guess, then iterations of the circuit.

    u at the start is u0 + f(x), f a perceptron; the rest is :class:`IterativePoisson`.

    Args:
        model: Poisson latents, Gaussian noise behind a decoder, such as zoo.PoissonCoding.
        hidden: widths of the perceptron's hidden layers.
        seed: of its initial weights.
        steps: T, of inference.
        **knobs: those of IterativePoisson.

    References:
        Brain-like Variational Inference (Vafaii, Galor & Yates, 2025), the semi-amortised baseline
        https://arxiv.org/abs/2410.19315
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        hidden: tuple[Count, ...] = (64, 64),
        seed: Index = 0,
        steps: Count = 16,
        **knobs: Any,
    ) -> None:
        super().__init__(model, steps=steps, **knobs)
        self.knobs |= {"hidden": hidden, "seed": seed}
        self.encoder = Encoder(self.latents, self.reader.neurons, hidden, seed)
        self.eval()

    def start(self, x: Tensor, origin: State) -> State:
        """u0 + f(x), within the bounds of u."""
        (edge,) = self.bounds
        return (limit(origin[0] + self.encoder(x.reshape(len(x), -1)), *edge),)


class PoissonEncoder(SemiAmortisedPoisson):
    """The Poisson variational autoencoder's recognition network: independent rates, read off x.

    q(z given x) = Poisson(exp(u0 + f(x))), f a perceptron.

    Args:
        model: Poisson latents, Gaussian noise behind a decoder, such as zoo.PoissonCoding.
        hidden: widths of the perceptron's hidden layers.
        seed: of its initial weights.

    References:
        Poisson Variational Autoencoder (Vafaii, Galor & Yates, 2024)
        https://arxiv.org/abs/2405.14473

    Differences:
        A perceptron in place of convolutions; no clamp of u but the common one.
    """

    def __init__(
        self, model: ModelLike, *, hidden: tuple[Count, ...] = (64, 64), seed: Index = 0
    ) -> None:
        super().__init__(model, hidden=hidden, seed=seed, steps=0, training_steps=0)
        self.knobs = {"hidden": hidden, "seed": seed}
