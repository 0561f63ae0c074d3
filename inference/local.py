"""A model run with noisy weights: what it scores, and what its weights were used for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints
from torch.distributions.constraints import Constraint

from .errors import Incompatible
from .latents import Latents, Site, isolated, sum_right
from .magnitude import Priors
from .noisy import Ledger, Use, UsedTwice
from .observation import Observation

__all__ = ["Inputs", "Run"]

CELLS = 8  # of an observation, that are asked how many rows of inputs they depend on


class Inputs(NamedTuple):
    """Presynaptic activity x of each weight, averaged over the rows that it met.

    Attributes:
        rate: <|x|>, in the shape of the weights.
        square: <x^2>, in the shape of the weights.
    """

    rate: Tensor
    square: Tensor


class Run(Messenger):  # type: ignore[misc]
    """One call of a model, in which each row of inputs meets weights drawn for it alone.

    Latents that cannot be negative, or are constrained in another way, are drawn for all rows.

    Args:
        latents: of the model.
        x: observation of B problems.
        mean: of packed latents, (B, D).
        log_sd: of packed latents, (B, D).

    Raises:
        Incompatible: a weight is used twice, or the program has other sites than it had.
    """

    def __init__(self, latents: Latents, x: Observation, mean: Tensor, log_sd: Tensor) -> None:
        super().__init__()
        self.latents, self.keep, self.ledger = latents, int(latents.plated), Ledger()
        self.mean, self.log_sd, self.variance = mean, log_sd, (2 * log_sd).exp()
        moments = zip(self._by_site(mean), self._by_site(self.variance), strict=True)
        self.moments = dict(zip(latents.names, moments, strict=True))
        self.values = {s.name: self._value(s) for s in latents.sites}
        self.scored = (latents.observed, *latents.factors)
        self.found: dict[str, Any] = {}
        try:
            with isolated(), self:
                latents.model(x)
        except UsedTwice as error:
            raise Incompatible(
                f"site {error.site!r}",
                expected="a weight that is used once in a call of the model",
                got="a second use, which would see other weights than the first",
                fix="Pass local=False, so that all uses share one draw.",
            ) from None
        if self.found.keys() != {*latents.names, *self.scored}:
            raise Incompatible(
                "model",
                expected=f"sites {sorted({*latents.names, *self.scored})} in every call",
                got=str(sorted(self.found)),
                fix="Reparameterise, so that what is random is the value of a site.",
            )

    def _by_site(self, packed: Tensor) -> Iterator[Tensor]:
        """Packed numbers (B, D) in the shapes of the sites; no problem axis where there is none."""
        lat, lead = self.latents, packed.shape[: self.keep]
        whole = packed if self.keep else packed.flatten()
        for s, t in zip(lat.sites, whole.split(list(lat.splits.values()), -1), strict=True):
            shape = lead + s.unconstrained_shape
            yield t if t.shape == shape else t.reshape(shape)

    def _value(self, site: Site) -> Tensor:
        mean, variance = self.moments[site.name]
        if _is_real(site.support):
            return self.ledger.weight(site.name, mean, variance)
        value: Tensor = site.transform(mean + variance.sqrt() * torch.randn_like(mean))
        return value

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None:
            msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not (site_is_subsample(msg) or msg["infer"].get("_deterministic")):
            self.found[msg["name"]] = msg

    # -------------------------------------------------------------------------------- energies

    def performance(self) -> Tensor:
        """-log p(x given w), (B,), in nats."""
        scores = [self._log_prob(n, self.found[n]["value"]) for n in self.scored]
        return -torch.stack(scores).sum(0)

    def magnitude(self, priors: dict[str, Priors], *, at_mean: bool) -> Tensor:
        """E[-log p(w)] of packed latents, (B,), in nats.

        Args:
            priors: kept from run to run; empty at first.
            at_mean: -log p(E w) instead, where other latents that p depends on are drawn.
        """
        groups = [(key, list(sites)) for key, sites in groupby(self.latents.sites, self._family)]
        sizes = [sum(self.latents.splits[s.name] for s in sites) for _, sites in groups]
        moments = [self.mean, self.log_sd, self.variance]
        columns = zip(
            *(t.split(sizes, -1) if len(sizes) > 1 else [t] for t in moments), strict=True
        )
        terms: list[Tensor] = []
        for (key, sites), (mean, log_sd, variance) in zip(groups, columns, strict=True):
            known = None
            if isinstance(key, type):
                penalty = priors.setdefault(sites[0].name, Priors())
                bases = [_base(self.found[s.name]["fn"]) for s in sites]
                known = penalty(bases, mean, log_sd, None if at_mean else variance)
            terms += [self._energy(s, at_mean=at_mean) for s in sites] if known is None else [known]
        return torch.stack(terms).sum(0)

    def _family(self, site: Site) -> type | str:
        """Sites next to each other that share it are priced together: a kind of prior, or one."""
        msg = self.found[site.name]
        plain = _is_real(site.support) and msg["mask"] is None and msg["scale"] == 1.0
        return type(_base(msg["fn"])) if plain else site.name

    def _energy(self, site: Site, *, at_mean: bool) -> Tensor:
        """-log p of a draw of a packed latent, or of its mean."""
        u, variance = self.moments[site.name]
        if not at_mean:
            u = u + variance.sqrt() * torch.randn_like(u)
        z = site.transform(u)
        log_jacobian = sum_right(site.transform.log_abs_det_jacobian(u, z), self.keep)
        return -self._log_prob(site.name, z) - log_jacobian

    def _log_prob(self, name: str, value: Tensor) -> Tensor:
        """Of a site, summed over all but the problems, (B,)."""
        msg = self.found[name]
        score = msg["fn"].log_prob(value, *msg["args"], **msg["kwargs"])
        score = sum_right(scale_and_mask(score, msg["scale"], msg["mask"]), self.keep)
        return score if self.keep else score[None]

    # ------------------------------------------------------------------------ uses of weights

    def require_separate_rows(self) -> None:
        """Check that local reparameterisation is unbiased for this model.

        A weight that meets many rows of inputs is drawn anew for each. That does no harm as long as
        the rows stay apart: each term of log p(x given w) may depend on one of them alone.

        Raises:
            Incompatible: rows that met the same weight meet again.
        """
        terms = [_base(self.found[n]["fn"]).log_prob(self.found[n]["value"]) for n in self.scored]
        cells = torch.cat([t.flatten() for t in terms])
        drawn = [(d.sites, d.value) for d in self.ledger.drives if d.value is not None]
        for k in torch.linspace(0, len(cells) - 1, CELLS).long().unique() if drawn else ():
            slopes = torch.autograd.grad(
                cells[k], [value for _, value in drawn], retain_graph=True, allow_unused=True
            )
            for (sites, _), slope in zip(drawn, slopes, strict=True):
                for site in sites if slope is not None else ():
                    use = self.ledger.uses[site]
                    rows = _back(use, torch.ones_like(use.inputs), use.weights, slope != 0)
                    if rows.max() > 1:
                        raise _rows_meet(site)

    def inputs(self) -> dict[str, Inputs]:
        """Presynaptic activity, by site; weights that met none, or more than that, are left out."""
        found = {}
        for site, use in self.ledger.uses.items():
            ones, size = torch.ones_like(use.inputs), use.inputs.detach().abs()
            n, rate, square = (
                _back(use, x, self.moments[site][0]) for x in (ones, size, size.square())
            )
            found[site] = Inputs(*(torch.where(n == 0, 0, t / n) for t in (rate, square)))
        return found


def _back(use: Use, inputs: Tensor, weights: Tensor, chosen: Tensor | None = None) -> Tensor:
    """The sum over rows of the inputs of each weight, or over those rows that are chosen."""
    product = use.product(inputs, use.weights)
    rows = torch.ones_like(product) if chosen is None else chosen.to(product)
    (sums,) = torch.autograd.grad(product, weights, rows, retain_graph=True)
    return sums


def _rows_meet(site: str) -> Incompatible:
    return Incompatible(
        f"site {site!r}",
        expected="rows of inputs that stay apart until they are scored",
        got="a term of the likelihood that depends on several rows, each with weights of its own",
        fix="Pass local=False, so that all rows share one draw.",
    )


def _base(fn: Distribution) -> Distribution:
    """What stands inside `to_event`."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def _is_real(support: Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
