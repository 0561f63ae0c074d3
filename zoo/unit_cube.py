"""Densities on the unit cube by Gauss-Legendre rules, for the few latents that resist algebra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints
from torch.nn.functional import pad

__all__ = ["UnitCube", "legendre"]

_Shape = torch.Size | list[int] | tuple[int, ...]
DROP = 16.0  # nats below the peak that still count: what is left out weighs about e^-16
ZOOMS = 12  # rounds that look for the mass
SWEEPS = 10  # Metropolis steps from the cells of the rule to the density itself
ROWS = 1 << 17  # nodes of one chunk of problems; bounds memory


def legendre(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1], each (n,)."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.as_tensor((nodes + 1) / 2).to(like), torch.as_tensor(weights / 2).to(like)


class UnitCube(Distribution):
    """A density on [0, 1]^D for each of B problems; batch (B,), event (D,).

    For densities that are smooth but may end at an edge, where a regular grid loses its accuracy.
    A product of Gauss-Legendre rules is zoomed to the box that holds the mass. Draws come from the
    cells of the rule and take ten independence Metropolis steps on the density itself.

    Args:
        log_density: takes points (..., b, D) and which b of the problems they belong to, and gives
            (..., b), in nats.
        problems: B.
        nodes: of the rule along each axis, (D,).
        like: of the dtype and device to work in.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self,
        log_density: Callable[[Tensor, slice], Tensor],
        problems: int,
        nodes: Sequence[int],
        *,
        like: Tensor,
    ) -> None:
        super().__init__(torch.Size([problems]), torch.Size([len(nodes)]), validate_args=False)
        self.log_density, self.nodes = log_density, nodes
        step = max(1, ROWS // math.prod(nodes))
        self.chunks = [slice(i, min(i + step, problems)) for i in range(0, problems, step)]
        scouts = _Rule([(n + 1) // 2 for n in nodes], like)
        self.box = torch.cat([self._zoom(scouts, rows) for rows in self.chunks], 1)
        self.rule = _Rule(nodes, like)
        self.known = self._on(self.rule)  # (G, B)
        self.log_weight = self.known + self.rule.log_widths(self.box)
        self.log_normaliser = self.log_weight.logsumexp(0)

    def error(self) -> Tensor:
        """Three quarters of the nodes against all of them, in nats of `log_normaliser`, (B,)."""
        fewer = _Rule([3 * n // 4 for n in self.nodes], self.box)
        weight = self._on(fewer) + fewer.log_widths(self.box)
        return (weight.logsumexp(0) - self.log_normaliser).abs()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (..., B), in nats."""
        return self.log_density(value, slice(None)) - self.log_normaliser

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, D)."""
        rows = torch.Size([torch.Size(sample_shape).numel()])
        at, log_weight = self._propose(rows)
        for _ in range(SWEEPS):
            other, log_other = self._propose(rows)
            accept = torch.rand_like(log_weight).log() < log_other - log_weight
            at = torch.where(accept[..., None], other, at)
            log_weight = torch.where(accept, log_other, log_weight)
        return at.reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def _propose(self, rows: torch.Size) -> tuple[Tensor, Tensor]:
        """Draws (S, B, D) from the cells, and the log-density over theirs."""
        pick = Categorical(logits=self.log_weight.T, validate_args=False).sample(rows)
        at = self.rule.jitter(pick, self.box)
        return at, self.log_density(at, slice(None)) - self.known.gather(0, pick)

    def _on(self, rule: _Rule) -> Tensor:
        each = [self.log_density(rule.at(self.box[:, rows]), rows) for rows in self.chunks]
        return torch.cat(each, 1)

    def _zoom(self, rule: _Rule, rows: slice) -> Tensor:
        """Two corners of the box that holds the mass, (2, b, D)."""
        origin = rule.nodes.new_zeros(rows.stop - rows.start, rule.nodes.shape[1])
        box = torch.stack([origin, origin + 1])
        for _ in range(ZOOMS):
            f = self.log_density(rule.at(box), rows)
            ends = rule.around(f > f.max(0).values - DROP)
            # an axis waits until the others, too, are resolved well enough to judge it
            part = ends[1] - ends[0]
            wait = part > 4 * part.min(-1, keepdim=True).values
            ends = torch.stack([ends[0].masked_fill(wait, 0.0), ends[1].masked_fill(wait, 1.0)])
            box = box[0] + ends * (box[1] - box[0])
            if float(part.min()) > 0.8:
                break
        return box


class _Rule:
    """A product of rules on [0, 1] with G nodes, to be stretched to a box (2, B, D).

    The weights of a rule divide the interval into cells, with one node in each.
    """

    def __init__(self, counts: Sequence[int], like: Tensor) -> None:
        self.counts, self.axes = counts, [legendre(n, like) for n in counts]
        self.nodes = torch.cartesian_prod(*(at for at, _ in self.axes))  # (G, D)
        self.widths = torch.cartesian_prod(*(w for _, w in self.axes))
        self.starts = torch.cartesian_prod(*(w.cumsum(0) - w for _, w in self.axes))

    def at(self, box: Tensor) -> Tensor:
        """Nodes, (G, B, D)."""
        return box[0] + self.nodes[:, None] * (box[1] - box[0])

    def log_widths(self, box: Tensor) -> Tensor:
        """Log-volumes of the cells, (G, B)."""
        return self.widths.log().sum(-1)[:, None] + (box[1] - box[0]).log().sum(-1)

    def jitter(self, pick: Tensor, box: Tensor) -> Tensor:
        """Points anywhere in the cells picked, (S, B) to (S, B, D)."""
        widths = self.widths[pick]
        return box[0] + (self.starts[pick] + widths * torch.rand_like(widths)) * (box[1] - box[0])

    def around(self, keep: Tensor) -> Tensor:
        """From the node before the first one kept (G, B) to that after the last, (2, B, D)."""
        grid = keep.reshape(*self.counts, -1)
        ends = []
        for k, (nodes, _) in enumerate(self.axes):
            line = grid.movedim(k, 0).flatten(1, -2).any(1).float()  # (n, B)
            stops = pad(pad(nodes, (1, 0)), (0, 1), value=1.0)
            last = len(nodes) - 1 - line.flip(0).argmax(0)
            ends.append(torch.stack([stops[line.argmax(0)], stops[last + 2]]))
        return torch.stack(ends, -1)
