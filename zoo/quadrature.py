"""Exact posteriors on a grid, for one to three continuous latents."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from inference.errors import BadInput, ExactWarning, Incompatible
from inference.guide import Draws
from inference.latents import Latents, ModelLike
from inference.objectives.elbo import ELBO
from inference.observation import Observation, take
from inference.packed import PackedGuide
from inference.show import title_of

from .exact import refuse_mixed

__all__ = ["LARGE_ERROR", "GridPosterior", "Quadrature"]

FINE = {1: 1025, 2: 129, 3: 49}  # points per axis; odd, so that every second one is a grid too
COARSE = {1: 257, 2: 65, 3: 25}
DROP = 20.0  # nats below the peak that still count: what is left out weighs about e^-20
START = 12.0  # half-width of the first box, in prior scales
ROUNDS = 30
_Shape = torch.Size | list[int] | tuple[int, ...]
LARGE_ERROR = 0.05  # posterior sds: three standard errors of a mean of the usual 4,000 draws
SWEEPS = 4  # Metropolis steps from the interpolated grid to the posterior itself


class Quadrature(PackedGuide):
    """The posterior on a regular grid over the unconstrained latents.

    Each problem has a box of its own, found by zooming from the prior: a box keeps every cell that
    could reach within 20 nats of the peak, and grows where such a cell is at its edge. Draws come
    from the multilinear interpolation of the grid and then take four independence Metropolis steps
    on the posterior itself, which removes the interpolation error.

    A grid is for smooth densities. A kink or a step of the likelihood in a latent, such as the time
    of a change of rate, costs an error that falls with the step of the grid only, and that `error`
    states. Draws warn where a mean or an sd is uncertain by more than 0.05 posterior sds: once,
    and again only for an x whose error is twice as large.

    Args:
        model: one to three continuous latents in all.
        points: grid points per axis, odd; by default 1025, 129 or 49 for one to three latents.
        bounds: a fixed box, (low, high) for each packed latent, instead of the search.

    Raises:
        Incompatible: more than three latents, or discrete ones.
        BadInput: an even number of points, or bounds of the wrong length.
    """

    kind: ClassVar[str] = "quadrature"
    objective = ELBO

    def __init__(
        self,
        model: ModelLike,
        *,
        points: int | None = None,
        bounds: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        try:
            super().__init__(model, points=points, bounds=bounds)
        except Incompatible:
            refuse_mixed(self.latents)
            raise
        d = self.latents.size
        if d not in FINE:
            raise Incompatible(
                "model",
                expected="one to three packed latents",
                got=str(d),
                fix="Use a closed form, or stored draws as reference.",
            )
        self.points = points or FINE[d]
        if self.points < 5 or self.points % 2 == 0:
            raise BadInput("points", expected="odd, at least 5", got=str(points), fix="points=129.")
        if bounds is not None and len(bounds) != d:
            raise BadInput(
                "bounds", expected=f"{d} pairs (low, high)", got=str(len(bounds)), fix="One each."
            )
        self.bounds = bounds
        self.warned_of = 0.0  # the largest error that was told

    def distribution(self, x: Observation) -> GridPosterior:
        """The gridded posterior: batch (B,), event (D,)."""
        with torch.no_grad():
            low, high = self._fixed_box(x) if self.bounds else self._search(x)
            return GridPosterior(self.latents, x, low, high, self.points)

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        return self.distribution(x).log_evidence

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Coarse against fine grid, each (B,).

        `mean` and `sd` are the largest moves of a packed mean or sd, in posterior sds,
        `log_evidence` is in nats, `edge_mass` is the posterior mass in the outermost cells.
        """
        with torch.no_grad():
            return self.distribution(x).error()

    def told(self, u: Tensor, q: Distribution) -> Draws:
        """Packed draws (chains, draws, B, D) as latents; warns where the grid is too coarse."""
        if isinstance(q, GridPosterior):
            self._warn(q)
        return super().told(u, q)

    def _warn(self, grid: GridPosterior) -> None:
        """Costs a few percent of the grid, whose densities are known."""
        error = grid.error()
        moves = torch.maximum(error["mean"], error["sd"]).nan_to_num(nan=torch.inf)
        worst = float(moves.max())  # NaN: all mass is on one node
        if worst <= max(LARGE_ERROR, 2 * self.warned_of):
            return
        self.warned_of = worst
        bad = int((moves > LARGE_ERROR).sum())
        warnings.warn(
            f"{title_of(self.model)}: the posterior on a grid is not exact here. Without every "
            f"second point a mean or sd moves by up to {worst:.2g} posterior sds, and by more than "
            f"{LARGE_ERROR} in {bad} of {len(moves)} problems. The likelihood is likely to have a "
            "kink or a step in a latent; else the posterior is too narrow for the grid. Try "
            f"zoo.Quadrature(model, points={2 * self.points - 1}), or a closer box with bounds=. "
            "Where error(x) does not fall enough: zoo.TwoStage, if the other latents have a closed "
            "form; for a kink, reference=inference.NUTS(model), which is blind to steps; or draws "
            "of a sampler of your own, zoo.StoredDraws.",
            ExactWarning,
            stacklevel=4,
        )

    def _fixed_box(self, x: Observation) -> tuple[Tensor, Tensor]:
        b = self.latents.problems(x)
        like = self.latents.pack(self.latents.joint(1, seed=0)[0])[0]
        edges = torch.as_tensor(self.bounds, dtype=like.dtype, device=like.device)
        return edges[:, 0].expand(b, -1), edges[:, 1].expand(b, -1)

    def _search(self, x: Observation) -> tuple[Tensor, Tensor]:
        """A box (B, D) for each problem."""
        lat = self.latents
        prior = lat.pack(lat.joint(512 if lat.plated else 64, seed=0)[0])[0]
        p = torch.quantile(prior, prior.new_tensor([0.16, 0.5, 0.84]), dim=0)
        centre, scale = p[1], (p[2] - p[0]).clamp_min(1e-6) / 2
        b, n = lat.problems(x), COARSE[lat.size]
        low = (centre - START * scale).expand(b, -1)
        high = (centre + START * scale).expand(b, -1)
        low, high = low.clone(), high.clone()
        rows = torch.arange(b, device=low.device)
        for _ in range(ROUNDS):
            some = take(x, rows) if lat.plated else x
            before = low[rows], high[rows]
            low[rows], high[rows] = _zoom(GridPosterior(lat, some, *before, n))
            settled = (high - low)[rows] > 0.8 * (before[1] - before[0])
            grown = (low[rows] < before[0]) | (high[rows] > before[1])
            rows = rows[~(settled & ~grown).all(-1)]
            if len(rows) == 0:
                break
        return low, high


class GridPosterior(Distribution):
    """A density known on a regular grid in a box for each problem."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, lat: Latents, x: Observation, low: Tensor, high: Tensor, n: int) -> None:
        b, d = low.shape
        super().__init__(torch.Size([b]), torch.Size([d]), validate_args=False)
        self.lat, self.x, self.n = lat, x, n
        self.low, self.high = low, high
        self.step = (high - low) / (n - 1)
        axes = [torch.arange(n, device=low.device)] * d
        self.index = torch.cartesian_prod(*axes).reshape(-1, d)  # (G, D)
        self.nodes = low + self.index[:, None].to(low) * self.step  # (G, B, D)
        self.log_density = lat.log_density(self.nodes, x)  # (G, B)
        self.log_evidence = self._log_sum(self.log_density, 1.0)

    def _log_sum(self, log_density: Tensor, stride: float) -> Tensor:
        return log_density.logsumexp(0) + (stride * self.step).log().sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact joint over gridded evidence: (..., B).

        No gradient of the model's parameters, which the evidence has none of either: half of one
        would mislead a fit that learns the model.
        """
        with torch.set_grad_enabled(value.requires_grad):
            return self.lat.log_density(value, self.x) - self.log_evidence

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, D)."""
        rows = torch.Size(sample_shape).numel()
        u, log_weight = self._propose(rows)
        for _ in range(SWEEPS):
            other, log_other = self._propose(rows)
            accept = torch.rand_like(log_weight).log() < log_other - log_weight
            u = torch.where(accept[..., None], other, u)
            log_weight = torch.where(accept, log_other, log_weight)
        return u.reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def _propose(self, rows: int) -> tuple[Tensor, Tensor]:
        """Draws (S, B, D) from the interpolated grid, and log posterior over its density."""
        cells = torch.distributions.Categorical(logits=self.log_density.T, validate_args=False)
        node = self.index[cells.sample(torch.Size([rows]))].to(self.low)  # (S, B, D)
        hat = torch.rand_like(node) - torch.rand_like(node)  # a triangle of width two cells
        grid = (node + hat).clamp(0, self.n - 1)
        u = self.low + grid * self.step
        return u, self.lat.log_density(u, self.x) - self._interpolate(grid)

    def _interpolate(self, grid: Tensor) -> Tensor:
        """Log of the multilinear interpolation at grid coordinates (S, B, D)."""
        d = grid.shape[-1]
        base = grid.floor().clamp(0, self.n - 2)
        part = grid - base
        strides = torch.tensor([self.n ** (d - 1 - k) for k in range(d)], device=grid.device)
        peak = self.log_density.max(0).values
        density = (self.log_density - peak).exp()  # (G, B)
        total = torch.zeros_like(grid[..., 0])
        for corner in torch.cartesian_prod(*[torch.tensor([0, 1])] * d).reshape(-1, d):
            at = ((base.long() + corner.to(grid.device)) * strides).sum(-1)
            weight = torch.where(corner.to(grid.device).bool(), part, 1 - part).prod(-1)
            total = total + weight * density.gather(0, at)
        return total.log() + peak

    def moments(self, log_density: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of the packed latents on a grid, (B, D)."""
        weight = log_density.softmax(0)[..., None]
        mean = (weight * nodes).sum(0)
        return mean, (weight * (nodes - mean).square()).sum(0).sqrt()

    def error(self) -> dict[str, Tensor]:
        """Every second point against every point, and the mass at the edge."""
        half = (self.index % 2 == 0).all(-1)
        mean, sd = self.moments(self.log_density, self.nodes)
        mean_2, sd_2 = self.moments(self.log_density[half], self.nodes[half])
        rounding = 10 * torch.finfo(mean.dtype).eps * (1 + (mean / sd).abs())
        edge = ((self.index == 0) | (self.index == self.n - 1)).any(-1)
        evidence = (self._log_sum(self.log_density[half], 2.0) - self.log_evidence).abs()
        return {
            "mean": ((mean_2 - mean).abs() / sd + rounding).max(-1).values,
            "sd": ((sd_2 - sd).abs() / sd + rounding).max(-1).values,
            "log_evidence": evidence + rounding.max(-1).values * (1 + self.log_evidence.abs()),
            "edge_mass": self.log_density.softmax(0)[edge].sum(0),
        }


def _reach(f: Tensor, axis: int) -> Tensor:
    """For each grid point, how high f may go in the two cells beside it along an axis."""
    n = f.shape[axis]
    rise = f.diff(dim=axis).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    ends = torch.maximum(f.narrow(axis, 0, n - 1), f.narrow(axis, 1, n - 1))
    inner = f.narrow(axis, 1, n - 2)
    endless = torch.full_like(f.narrow(axis, 0, 1), torch.inf)
    from_left = torch.cat([endless, inner + rise.narrow(axis, 0, n - 2)], axis)
    from_right = torch.cat([inner - rise.narrow(axis, 1, n - 2), endless], axis)
    cell = torch.maximum(ends, torch.minimum(from_left, from_right))
    beside = torch.cat([-endless, cell], axis), torch.cat([cell, -endless], axis)
    return torch.maximum(*beside)


def _zoom(grid: GridPosterior) -> tuple[Tensor, Tensor]:
    """The next box: around every cell that could reach within DROP nats of the peak.

    How far the density can rise between two grid points is judged from the lines through the two
    points on their left and the two on their right: a log density that is concave there stays below
    both. On a thin ridge that says too much, so a side grows only if the density itself counts at
    the edge.
    """
    b, d = grid.low.shape
    f = grid.log_density.T.reshape(b, *[grid.n] * d).nan_to_num(nan=-torch.inf)
    bound = f
    for axis in range(1, d + 1):
        bound = torch.maximum(bound, _reach(f, axis))
    least = f.amax(list(range(1, d + 1)), keepdim=True) - DROP
    low, high = [], []
    for axis in range(d):
        others = [a for a in range(1, d + 1) if a != axis + 1]
        near, there = ((t > least).amax(others) if others else t > least for t in (bound, f))
        first = near.float().argmax(1)
        last = grid.n - 1 - near.flip(1).float().argmax(1)
        width = grid.n - 1.0
        # one cell of margin, or half a box more on a side where mass touches the edge
        low.append(torch.where(there[:, 0], -width / 2, (first - 1.0).clamp_min(0.0)))
        high.append(torch.where(there[:, -1], 1.5 * width, (last + 1.0).clamp_max(width)))
    at = grid.low, grid.step
    return at[0] + torch.stack(low, -1) * at[1], at[0] + torch.stack(high, -1) * at[1]
