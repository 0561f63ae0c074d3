"""Exact posteriors as guides: closed form and enumeration."""

from __future__ import annotations

from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Categorical

from inference.errors import Incompatible
from inference.guide import Draws, Guide, check_counts
from inference.latents import MAX_ROWS, Latents, ModelLike, Site, Values
from inference.objectives.elbo import ELBO
from inference.observation import Observation, parts
from inference.packed import PackedGuide
from inference.seeds import seeded

__all__ = ["ClosedForm", "Enumerated", "refuse_mixed", "values_of"]

MAX_STATES = 1 << 20


class ClosedForm(PackedGuide):
    """A posterior written with exact conditionals. Subclasses give `distribution` and evidence.

    log p(x, z) - log q(z given x) is constant in z and equals log p(x), so the ELBO integrand has
    zero variance, and `fit(model, model.exact(), x, learn_model=True)` is maximum likelihood.
    """

    kind: ClassVar[str] = "closed_form"
    objective = ELBO

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        raise NotImplementedError

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Error of the posterior by quantity, (B,): zero."""
        return {"log_evidence": torch.zeros(self.latents.problems(x))}


class Enumerated(Guide):
    """The posterior over all joint states of finite discrete latents.

    Where other latents are continuous, sum the discrete ones out of the program, and use
    :class:`Quadrature` for the rest.

    Args:
        model: latents are booleans, bounded integers or counts.
        bound: largest value of counts, which are cut there; needed where there are any.

    Raises:
        Incompatible: a continuous latent, counts without a bound, or over a million states.
    """

    kind: ClassVar[str] = "enumeration"
    objective = ELBO

    def __init__(self, model: ModelLike, *, bound: int | None = None) -> None:
        super().__init__(model, bound=bound)
        refuse_mixed(self.latents)
        sites = self.latents.sites
        choices = [v for s in sites for v in [values_of(s, bound)] * s.shape.numel()]
        count = 1
        for v in choices:
            count *= len(v)
        if count > MAX_STATES:
            raise Incompatible(
                "model",
                expected=f"at most {MAX_STATES:,} joint states",
                got=f"{count:,}",
                fix="Enumerate a smaller model, or use stored draws as reference.",
            )
        where = parts(self.latents.like)[0].device
        table = torch.cartesian_prod(*choices).reshape(count, -1).to(where)
        sizes = [s.shape.numel() for s in sites]
        for s, piece in zip(sites, table.split(sizes, -1), strict=True):
            self.register_buffer(
                f"states_{s.name}", piece.reshape(count, *s.shape).to(s.dtype), False
            )
        cut = [s for s in sites if not _bounded(s)]
        at_edge = [self._states(s.name).reshape(count, -1).eq(float(bound or 0)) for s in cut]
        edge = (
            torch.cat(at_edge, -1).any(-1)
            if cut
            else torch.zeros(count, dtype=torch.bool, device=where)
        )
        self.register_buffer("edge", edge, persistent=False)

    def _states(self, name: str) -> Tensor:
        states: Tensor = getattr(self, f"states_{name}")
        return states

    def logits(self, x: Observation) -> Tensor:
        """log p(x, z) for every state, (K, B)."""
        b = self.latents.problems(x)
        pieces = []
        step = max(1, MAX_ROWS // b)
        for i in range(0, len(self.edge), step):
            z = {n: self._states(n)[i : i + step] for n in self.latents.names}
            z = {n: v[:, None].expand(-1, b, *v.shape[1:]) for n, v in z.items()}
            pieces.append(self.latents.log_joint(z, x))
        return torch.cat(pieces)

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        return self.logits(x).logsumexp(0)

    def log_prob(self, z: Values, x: Observation) -> Tensor:
        """log p(z given x) of latents (..., B, *shape): shape (..., B), in nats."""
        return self.latents.log_joint(z, x) - self.log_evidence(x)

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Posterior mass where a count stands at its bound, (B,): what the cut may have lost."""
        return {"edge_mass": self.logits(x).softmax(0)[self.edge].sum(0)}

    def forward(self, x: Observation) -> Values:
        """Sample a joint state, then give each site its part."""
        lat = self.latents
        logits = self.logits(x).T
        logits = logits.reshape(-1, *[1] * lat.inner, logits.shape[-1]) if lat.plated else logits[0]
        with lat.plate(x):
            state = dist.Categorical(logits=logits)
            pick = pyro.sample("_state", state, infer={"is_auxiliary": True})
            pick = pick.reshape(pick.shape[: pick.dim() - lat.inner]) if lat.plated else pick
            return self.sample_sites(
                lambda s: dist.Delta(self._states(s.name)[pick], event_dim=s.event_dim)
            )

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Independent draws from the table; `stats` has log q."""
        check_counts(draws=draws, chains=chains)
        self.latents.check(x)
        with torch.no_grad(), seeded(seed):
            table = Categorical(logits=self.logits(x).T, validate_args=False)
            pick = table.sample(torch.Size([chains, draws]))
            values = {n: self._states(n)[pick] for n in self.latents.names}
            return Draws(values, {"log_q": table.log_prob(pick)})


def refuse_mixed(latents: Latents) -> None:
    """Raise :class:`Incompatible` if some latents are discrete and some continuous."""
    counted = [s.name for s in latents.sites if s.discrete]
    others = [s.name for s in latents.sites if not s.discrete]
    if counted and others:
        raise Incompatible(
            "model",
            expected="latents that are all discrete (zoo.Enumerated) or all continuous "
            "(zoo.Quadrature, inference.NUTS)",
            got=f"discrete {counted} and continuous {others}",
            fix=f"Sum {counted} out of the program, with dist.MixtureSameFamily or a logsumexp, "
            f"and use Quadrature or NUTS for {others}; or zoo.SwitchingPosterior, where a state "
            "chooses among linear Gaussians.",
        )


def _base(site: Site) -> object:
    return getattr(site.support, "base_constraint", site.support)


def _bounded(site: Site) -> bool:
    """Booleans and integer intervals know their largest value; counts do not."""
    base = _base(site)
    return base is torch.distributions.constraints.boolean or hasattr(base, "upper_bound")


def values_of(site: Site, bound: int | None) -> Tensor:
    """The values one element of a discrete site can take, as floats."""
    base = _base(site)
    low = getattr(base, "lower_bound", 0)
    high = getattr(base, "upper_bound", bound)
    if base is torch.distributions.constraints.boolean:
        low, high = 0, 1
    if not site.discrete or high is None or not float(torch.as_tensor(high).max()) < 1e6:
        raise Incompatible(
            f"site {site.name!r}",
            expected="booleans, bounded integers, or counts with a bound",
            got=f"support {site.support}",
            fix="Pass bound=20 for counts; use Quadrature for continuous latents.",
        )
    return torch.arange(int(torch.as_tensor(low).min()), int(torch.as_tensor(high).max()) + 1.0)
