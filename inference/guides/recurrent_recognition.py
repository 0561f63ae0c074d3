"""A recognition network with lateral connections, and noise that travels along them."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..activation import ACTIVATIONS
from ..arguments import Count, Index, Range
from ..errors import BadInput, lookup
from ..guide import Draws, check_counts
from ..latents import ModelLike
from ..observation import Observation, flatten
from ..recognition import Recognition, Temperature
from ..seeds import seeded
from ..units import squash

__all__ = ["RecurrentRecognition"]

GAIN = 0.8  # spectral radius, about, of the lateral weights at the start

Rate = Annotated[float, Range("0 < rate <= 1", 1e-9, 1)]


class RecurrentRecognition(Recognition):
    """Neurons that see x and one another, each step with fresh noise; their last state is a draw.

    h_0 = 0; h_k+1 = (1 - a) h_k + a f(W_in x + b + W_lat h_k + W_e e_k), e_k ~ Normal(0, I), k < K;
    c = V x + W_out h_K.

    Noise enters before the lateral weights, which correlate it: what one cause has taken, they
    take from the others. Correlations can come from dense W_e and W_out, too. With `private=True`
    these are gone (each neuron has noise of its own and speaks to one output), so that whatever
    correlation there is comes from `lateral` weights, and without these the outputs are
    independent given x: a factorised guide.

    Args:
        model: latents continuous, or discrete with finitely many states.
        neurons: N.
        noises: numbers in each e_k: at least one for each output, so that no direction is without.
        steps: K.
        rate: a, in (0, 1].
        activation: f: relu, tanh, softplus or squareplus.
        lateral: whether there are lateral weights.
        private: noise and outputs are not shared.
        temperature: of the relaxed gradient of discrete states.
        seed: of the initial weights.

    Raises:
        BadInput: a rate outside (0, 1], fewer neurons than outputs, an unknown activation.

    References:
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2021)
        https://arxiv.org/abs/2006.10811
        A role for cortical interneurons as adversarial discriminators (Benjamin & Kording, 2023)
        https://doi.org/10.1371/journal.pcbi.1011484

    Differences:
        The papers' equations, sizes and numbers of steps were not available; these are ours, as are
        the linear path V x and the standardised units of x and c.
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        neurons: Count = 64,
        noises: Count = 16,
        steps: Count = 5,
        rate: Rate = 0.5,
        activation: str = "tanh",
        lateral: bool = True,
        private: bool = False,
        temperature: Temperature = 0.5,
        seed: Index = 0,
    ) -> None:
        lookup(ACTIVATIONS, activation, "activation")
        super().__init__(
            model, neurons=neurons, noises=noises, steps=steps, rate=rate, activation=activation,
            lateral=lateral, private=private, temperature=temperature, seed=seed,
        )  # fmt: skip

    def build(self, features: int, codes: int, **knobs: Any) -> None:
        """Weights, and who is connected with whom."""
        n, private = knobs["neurons"], knobs["private"]
        if n < codes:
            raise BadInput(
                "neurons", expected=f"one for each of {codes} outputs at least", got=str(n),
                fix=f"neurons={4 * codes}.",
            )  # fmt: skip
        self.steps, self.rate = knobs["steps"], knobs["rate"]
        self.f = ACTIVATIONS[knobs["activation"]]
        self.input = nn.Linear(features, n)
        m = max(codes, knobs["noises"])
        self.noise = nn.Parameter(torch.ones(n) if private else torch.randn(n, m) / m**0.5)
        self.lateral = nn.Parameter(
            GAIN * torch.randn(n, n) / n**0.5, requires_grad=knobs["lateral"]
        )
        if not knobs["lateral"]:
            nn.init.zeros_(self.lateral)
        self.output = nn.Parameter(torch.randn(codes, n) / n**0.5)
        own = torch.arange(n) % codes == torch.arange(codes)[:, None]
        self.register_buffer("wired", own if private else torch.ones_like(own))

    def respond(self, standard: Tensor, shape: torch.Size) -> Tensor:
        """The readout of the last state."""
        return self.readout(self.states(standard, shape)[-1])

    def states(self, standard: Tensor, shape: torch.Size) -> list[Tensor]:
        """All states h_0 ... h_K of the neurons, each (*shape, B, N)."""
        drive = self.input(standard)
        h = drive.new_zeros(*shape, *drive.shape)
        found = [h]
        for _ in range(self.steps):
            e = h.new_empty(*h.shape[:-1], self.noise.shape[-1]).normal_()
            noise = e * self.noise if self.noise.dim() == 1 else e @ self.noise.T
            inward = drive + noise + h @ self.lateral.T
            h = torch.lerp(h, self.f(inward), self.rate)
            found.append(h)
        return found

    def readout(self, h: Tensor) -> Tensor:
        """States (..., N) to outputs (..., C)."""
        outputs: Tensor = h @ (self.output * self.wired).T
        return outputs

    def trajectory(self, x: Observation, *, runs: int, seed: int) -> Draws:
        """What neurons and outputs do from the onset of x on.

        Args:
            x: observation of B problems.
            runs: onsets, each with noise of its own.
            seed: everything depends on it alone.

        Returns:
            Draws that are steps 0 ... K: latents and `rates`, each (runs, K + 1, B, ...), and in
            `stats` the `time`, in time constants of the neurons, and `noise`, which is 1.
        """
        check_counts(runs=runs)
        self.latents.check(x)
        with torch.no_grad(), seeded(seed):
            standard = self.units.standardise(flatten(x, self.latents.problems(x)))
            h = torch.stack(self.states(squash(standard), torch.Size([runs])), 1)
            outputs = self.linear(standard) + self.readout(h)
            code = self.units.u_loc + self.units.u_scale * outputs
            values = self.codes.decode(self.codes.emit(code, self.temperature))
        time = self.rate * torch.arange(self.steps + 1).to(h)[:, None]
        like = h[..., 0]
        stats = {"time": time.expand(like.shape), "noise": torch.ones_like(like)}
        return Draws(values, stats, {"rates": h}, runs * self.steps * self.rate)
