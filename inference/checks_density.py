"""The checks of a guide's density; see :mod:`inference.checks` for the table."""

from __future__ import annotations

import pyro
import torch
from pyro.infer import Trace_ELBO

from .case import Case, close, does_not_apply, expect, log_qs, steady
from .errors import NoDensity
from .guide import HasDensity
from .integral import mass
from .packed import PackedGuide
from .seeds import seeded

__all__ = ["density", "elbo", "log_q", "normalised"]

SURE, ENOUGH = 5.0, 50.0  # standard errors; draws that an estimate should rest on


def density(case: Case) -> None:
    """`log_prob` is the log-density of the Pyro program, one number for each problem."""
    if isinstance(case.guide, PackedGuide):
        _one_distribution(case)
    with seeded(case.seed), torch.no_grad():  # the same run, where runs are random
        log_q = case.scored.log_prob(case.traced, case.x)
    shape, wanted = tuple(log_q.shape), (case.latents.problems(case.x),)
    expect(shape == wanted, f"log_prob of shape {wanted}", f"{shape}", "Sum over latents only.")
    mine, theirs = log_q.sum(), case.trace.log_prob_sum()
    fix = "log_prob(z, x) must be the log-density that forward samples from, Jacobian included."
    right = close(mine, theirs, case.tolerance)
    expect(right, f"the trace's {theirs:.4f} nats", f"{mine:.4f} from log_prob", fix)


def log_q(case: Case) -> None:
    """The "log_q" that comes with draws is `log_prob` of them."""
    n = 4 if case.guide.independent else 1
    found = case.guide.draw(case.x, draws=n, chains=1, seed=case.seed)
    if not isinstance(case.scored, HasDensity) or "log_q" not in found.stats:
        does_not_apply("draws come without log_q")
    with seeded(case.seed), torch.no_grad():
        again = case.scored.log_prob(found.values, case.x)
    off = float((again - found.stats["log_q"]).abs().max())
    right = close(again, found.stats["log_q"], case.tolerance)
    expect(right, "log_prob of the draws", f"up to {off:.3g} nats apart", "Look at draw.")


def normalised(case: Case) -> None:
    """The density that draws come from integrates to one."""
    steady(case)
    found = mass(case.guide, case.x, seed=case.seed)
    if found is None:
        does_not_apply("too many latents, or latents of both kinds")
    if float(found.effective.min()) < ENOUGH:
        does_not_apply("the density is too uneven to be integrated with draws")
    off = (found.value - 1).abs() / found.se
    k = int(off.argmax())
    expect(
        float(off[k]) < SURE, "an integral of 1", f"{found.value[k]:.3f} ± {found.se[k]:.3f}",
        "Either log_prob lacks a term, such as a normaliser or the log-Jacobian, or draw samples "
        "from something else.",
    )  # fmt: skip


def elbo(case: Case) -> None:
    """Pyro's Trace_ELBO is log q - log p; without a density it is refused."""
    has = isinstance(case.guide, HasDensity)
    try:
        with seeded(case.seed), pyro.settings.context(module_local_params=True):
            loss = Trace_ELBO().loss(case.guide.model, case.guide, case.x)
    except NoDensity:
        fix = "Give forward a density that can be scored, or leave out log_prob."
        expect(not has, "an ELBO, for there is a log_prob", "NoDensity", fix)
        return
    expect(
        has, "NoDensity from Trace_ELBO", f"a loss of {loss:.3f}",
        "A guide that can only be sampled samples from inference.Implicit, never from Delta; one "
        "with a density has log_prob(z, x), too.",
    )  # fmt: skip
    with torch.no_grad():
        log_p = case.latents.log_joint(case.traced, case.x).sum()
        wanted = case.trace.log_prob_sum() - log_p
    right = close(torch.as_tensor(loss).to(wanted), wanted, case.tolerance)
    expect(right, f"{wanted:.4f}", f"{loss:.4f}", "Let forward sample each latent once.")


def _one_distribution(case: Case) -> None:
    """`distribution(x)` is one distribution, and not another in each call."""
    one, other = log_qs(case)
    expect(
        torch.equal(one, other),
        "the same distribution(x) in each call", "another one each time",
        "Keep noise, and dropout, out of `distribution`: it returns q(u given x), which draws add "
        "noise to. Noise inside a network, without a density, is for `Recognition`, or `Implicit`.",
    )  # fmt: skip
