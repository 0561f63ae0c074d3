"""A recognition network for sequences: what was and what will be, then one step after another."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu

from ..arguments import Count, Index
from ..codes import Codes
from ..critic import Critic, pairs, perceptron
from ..errors import Incompatible
from ..latents import Latents, ModelLike
from ..observation import Observation, flatten, parts
from ..recognition import Recognition, Temperature
from ..units import silent, squash
from ..whitening import Whitening

__all__ = ["TemporalCritic", "TemporalRecognition"]

WINDOW = 3  # steps that a layer of a critic sees at once
SIGHT = 7  # steps of x that say where a code should be


class TemporalRecognition(Recognition):
    """Draws a path step by step, each step with fresh noise, from summaries of the observations.

    f_t, b_t = summaries of x_1..t and of x_t..T, by recurrent networks (GRU);
    s_t = tanh(W [f_t, b_t, r_t-1, g_t e_t] + k_t), e_t ~ Normal(0, I);
    c_t = (V x)_t + out([s_t, f_t, b_t, r_t-1, g_t e_t]), r_t = c_t - (V x)_t, for t = 1 ... T,
    r_0 = 0.

    The bias k_t and the gain g_t of the noise are each step's own, for how much is known of the
    latents differs from step to step, whatever x: in a film with hidden frames, for instance.

    Every step sees the one before it, so paths can have any correlation in time: it smooths. With
    `causal=True` it filters: there are no b_t and no r_t-1, and c_t is a draw of what can be known
    at time t of the present, p(z_t given x_1..t). Steps are then judged one by one, for together
    such draws are no path. Of discrete latents r_t is the state that was drawn. V, which looks back
    only if the circuit filters, begins as a linear guess from draws of the joint.

    Args:
        model: the first axis of the observation and of every site, after the problem axis, is time.
        neurons: in each summary, and in s_t.
        noises: numbers in each e_t.
        causal: whether to filter.
        temperature: of the relaxed gradient of discrete states.
        seed: of the initial weights.

    Raises:
        Incompatible: a site or the observation has no time axis, or another one.

    References:
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2021), who learn
        from video https://arxiv.org/abs/2006.10811
        Sequential neural models with stochastic layers (Fraccaro et al., 2016), for the two
        summaries https://arxiv.org/abs/1605.07571

    Differences:
        The paper's network for video was not available; this one is ours.
    """

    order: Tensor
    known: Tensor

    def __init__(
        self,
        model: ModelLike,
        *,
        neurons: Count = 48,
        noises: Count = 8,
        causal: bool = False,
        temperature: Temperature = 0.5,
        seed: Index = 0,
    ) -> None:
        super().__init__(
            model, neurons=neurons, noises=noises, causal=causal, temperature=temperature, seed=seed
        )
        if self.latents.continuous:
            self.guess()

    def build(self, features: int, codes: int, **knobs: Any) -> None:
        """The layers, and where in a code each step is."""
        self.duration = _duration(self.latents)
        self.register_buffer("order", _order(self.codes, self.duration))
        self.causal = knobs["causal"]
        n, inputs, each = knobs["neurons"], features // self.duration, codes // self.duration
        self.noises = max(each, knobs["noises"])
        self.past = nn.GRU(inputs, n, batch_first=True)
        self.future = None if self.causal else nn.GRU(inputs, n, batch_first=True)
        known = self.noises + (n if self.causal else 2 * n + each)
        self.inward = nn.Linear(known, n)
        self.clock = nn.Parameter(torch.zeros(self.duration, n))
        self.gain = nn.Parameter(torch.ones(self.duration, self.noises))
        self.outward = nn.Linear(known + n, each)
        step_of = torch.empty_like(self.order).index_copy_(0, self.order, _steps(codes, each))
        ahead = _steps(features, inputs) > step_of[:, None]
        self.register_buffer("known", ~ahead if self.causal else torch.ones_like(ahead))

    def guess(self) -> None:
        """Let V begin as the best linear guess from what each step may know."""
        features, codes = pairs(self.latents)
        each = codes.shape[1] // self.duration
        with torch.no_grad():
            for rows in self.order.split(each) if self.causal else [self.order]:
                seen = self.known[rows[0]].nonzero()[:, 0]
                found = Whitening(features[:, seen], codes[:, rows])
                loc, scale = self.units.u_loc[rows], self.units.u_scale[rows]
                shift, ratio = found.x_loc - self.units.x_loc[seen], self.units.x_scale[seen]
                slope = found.slope / found.x_scale[:, None]
                self.linear.weight[rows[:, None], seen] = (slope * ratio[:, None]).T / scale[
                    :, None
                ]
                self.linear.bias[rows] = (found.offset - shift @ slope - loc) / scale

    def rsample(self, x: Observation, shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Differentiable codes (*shape, B, C), drawn step by step."""
        standard = self.units.standardise(flatten(x, self.latents.problems(x)))
        summary = self.summarise(squash(standard))
        weight = self.linear.weight * self.known
        direct = self.in_steps(linear(squash(standard), weight, self.linear.bias))
        summary = summary.expand(*shape, *summary.shape)
        e = self.gain * summary.new_empty(*summary.shape[:-1], self.noises).normal_()
        loc, scale = self.in_steps(self.units.u_loc), self.in_steps(self.units.u_scale)
        known = torch.cat([summary, e], -1)
        if self.causal:
            found = self._step(known, direct, loc, scale, self.clock)
        else:
            told = direct * ~self.in_steps(self.codes.discrete.to(e.device))
            steps, r = [], torch.zeros_like(known[..., 0, : direct.shape[-1]])
            for t in range(self.duration):
                sees = torch.cat([known[..., t, :], r], -1)
                steps.append(self._step(sees, direct[:, t], loc[t], scale[t], self.clock[t]))
                r = (steps[-1] - loc[t]) / scale[t] - told[:, t]
            found = torch.stack(steps, -2)
        code: Tensor = found.flatten(-2)[..., self.order.argsort()]
        return code

    def summarise(self, standard: Tensor) -> Tensor:
        """Features (B, F) to summaries of past and future at each step, (B, T, N or 2 N)."""
        x = standard.reshape(len(standard), self.duration, -1)
        past: Tensor = self.past(x)[0]
        if self.future is None:
            return past
        return torch.cat([past, self.future(x.flip(1))[0].flip(1)], -1)

    def in_steps(self, c: Tensor) -> Tensor:
        """Codes (..., C), site by site, as (..., T, C / T)."""
        steps: Tensor = c[..., self.order].unflatten(-1, (self.duration, -1))
        return steps

    def _step(
        self, known: Tensor, direct: Tensor, loc: Tensor, scale: Tensor, clock: Tensor
    ) -> Tensor:
        state = torch.tanh(self.inward(known) + clock)
        raw = loc + scale * (direct + self.outward(torch.cat([known, state], -1)))
        return self.codes.emit(raw, self.temperature, steps=self.duration)

    def critic(
        self,
        features: Tensor,
        codes: Tensor,
        hidden: tuple[int, ...] | None,
        seed: int,
        *,
        guess: bool,
    ) -> TemporalCritic:
        """A critic that looks at neighbouring steps, or at each step with its past."""
        return TemporalCritic(
            features, codes, hidden, seed, guess=guess and not self.causal, guide=self
        )


class TemporalCritic(Critic):
    """Scores sequences by convolutions over time, the sum of the steps' scores.

    Energy scores are those of steps and their neighbours: as each step of the guide sees no more of
    the path than the step before it, these determine the law of the path, and a sum over many of
    them is easier to learn from than one distance between long paths.

    For a guide that filters it scores each step apart, from x up to then and the code of that step.

    Args:
        features: of pilot draws from the joint, (n, F).
        codes: their codes, (n, C).
        hidden: channels of the layers.
        seed: of the initial weights.
        guess: whether codes are seen as residuals of a linear guess.
        guide: what it judges.
    """

    widths = (32, 32)
    anchor = 1.0  # else means drift where a narrow critic is blind
    guide: TemporalRecognition

    def __init__(
        self, features: Tensor, codes: Tensor, hidden: tuple[int, ...] | None, seed: int, *,
        guess: bool, guide: TemporalRecognition,
    ) -> None:  # fmt: skip
        self.__dict__["guide"] = guide
        super().__init__(features, codes, hidden, seed, guess=guess)
        self.whole = not guide.causal

    def build(self, features: int, codes: int, hidden: tuple[int, ...]) -> None:
        """The layers."""
        t, causal = self.guide.duration, self.guide.causal
        inputs, each = features // t, codes // t
        sizes = [inputs if causal else inputs + each, *hidden, hidden[-1]]
        self.layers = nn.ModuleList(nn.Linear(WINDOW * a, b) for a, b in pairwise(sizes))
        self.net = perceptron(sizes[-1] + each * causal, hidden[-1], 1)
        self.project = silent(SIGHT * inputs, each)

    def relative(self, c: Tensor, standard: Tensor) -> Tensor:
        """Residuals of a linear guess, step by step; of a guide that filters, prior units."""
        if self.guess is None:
            return self.prior(c)
        residual: Tensor = (c - self.guess.mean(standard)) / self.guess.root.norm(dim=-1)
        return residual

    def apart(self, y: Tensor) -> Tensor:
        """Steps beside the next, (..., T - 1, 2 C / T); of a guide that filters, steps alone."""
        steps = self.guide.in_steps(y)
        wide = 1 if self.guide.causal or self.guide.duration == 1 else 2
        return steps.unfold(-2, wide, 1).flatten(-2)

    def forward(self, standard: Tensor, y: Tensor) -> Tensor:
        """Scores (B, 1), or (B, T) of a guide that filters."""
        x = standard.reshape(len(standard), self.guide.duration, -1)
        y, causal = self.guide.in_steps(y), self.guide.causal
        h = x if causal else torch.cat([x, y], -1)
        for layer in self.layers:  # a matrix product is faster than torch's convolution, if narrow
            h = silu(layer(windows(h, WINDOW, causal=causal)))
        scores: Tensor = self.net(torch.cat([h, y], -1) if causal else h)[..., 0]
        scores = scores + (y * self.project(windows(x, SIGHT, causal=causal))).sum(-1)
        return scores if causal else scores.sum(-1, keepdim=True)


def windows(h: Tensor, width: int, *, causal: bool) -> Tensor:
    """Each step of (B, T, F) with its neighbours, or with those before it: (B, T, width F)."""
    reach = width - 1
    before = reach if causal else reach // 2
    return pad(h, (0, 0, before, reach - before)).unfold(1, width, 1).flatten(-2)


def _steps(total: int, each: int) -> Tensor:
    """The step that each of `total` numbers in the order of time belongs to."""
    return torch.arange(total) // each


def _duration(latents: Latents) -> int:
    """The length of the time axis that observation and sites have in common."""
    seen = parts(latents.like)
    shapes = {s.name: s.shape for s in latents.sites} | {"x": seen[0].shape[1:]}
    lengths = {n: s[0] if len(s) else None for n, s in shapes.items()}
    together = len(set(lengths.values())) == 1 and None not in lengths.values() and len(seen) == 1
    if not (together and latents.plated):
        raise Incompatible(
            "TemporalRecognition",
            expected="time as the first axis of the observation, one tensor, and of every site",
            got=", ".join(f"{n!r} of shape {tuple(s)}" for n, s in shapes.items()),
            fix="Use RecurrentRecognition.",
        )
    return int(next(iter(shapes.values()))[0])


def _order(codes: Codes, steps: int) -> Tensor:
    """Where in a code, which goes site by site, the entries of step 1, of step 2, ... are."""
    places = torch.arange(codes.size).split(list(codes.sizes.values()))
    return torch.cat([p.reshape(steps, -1) for p in places], -1).flatten()
