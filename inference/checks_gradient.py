"""The checks of what a guide learns from: `rsample`, and the gradient of its objective."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, does_not_apply, expect
from .codes import Codes
from .guide import Guide, HasRsample
from .seeds import seeded
from .two_samples import gap

__all__ = ["SHAKES", "gradient", "learning"]

SHAKES = (1e-3, 0.1)  # moves of parameters
BATCHES = 5  # a rectifier may rest for a few observations


def gradient(case: Case) -> None:
    """`rsample` draws what `forward` draws, with a gradient for the guide's parameters."""
    if not isinstance(case.guide, HasRsample):
        does_not_apply("the guide has no rsample")
    _same_law(case)
    named = _trainable(case.guide)
    with seeded(case.seed):
        draws = case.guide.rsample(case.x)
    fix = "Let draws be a differentiable function of noise and parameters."
    expect(draws.requires_grad, "draws with a gradient", "draws without", fix)
    slopes = torch.autograd.grad(draws.sum(), list(named.values()), allow_unused=True)
    flows = [g for g in slopes if g is not None]
    finite = all(bool(g.isfinite().all()) for g in flows)
    expect(flows and finite, "a finite gradient", "none" if finite else "infinite numbers", fix)


def learning(case: Case) -> None:
    """The gradient of its default objective reaches every parameter."""
    guide, x = case.guide, case.x
    if guide.objective is None:
        does_not_apply("the guide names no objective")
    objective, named = guide.objective(), _trainable(guide)
    objective.check(guide, joint=objective.joint_only, learn_model=not objective.learns_guide)
    objective.players(guide)
    for objective.progress in (0.0, 0.9):  # games begin with something else
        idle = set(named)
        for seed in range(case.seed, case.seed + BATCHES):
            with case.shaken(SHAKES[0]), seeded(seed):
                z, seen = guide.latents.simulate(x) if objective.joint_only else (None, x)
                loss = objective(guide.model, guide, seen, z)["guide"]
                slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            flows = {n: g for n, g in zip(named, slopes, strict=True) if g is not None}
            bad = [n for n, g in flows.items() if not g.isfinite().all()]
            expect(not bad, "finite gradients", f"NaN or infinite ones for {bad}", "Bound scales.")
            idle -= {n for n, g in flows.items() if g.any()}
            if not idle:
                break
        fix = "Use them in forward; what is not to be learned is a buffer."
        expect(not idle, "a gradient for each parameter", f"none for {sorted(idle)}", fix)


def _same_law(case: Case) -> None:
    """What `rsample` draws has the law of what `forward` samples."""
    assert isinstance(case.guide, HasRsample)
    try:
        with seeded(case.seed), torch.no_grad():
            shape = tuple(case.guide.rsample(case.x).shape)
    except NotImplementedError:
        does_not_apply("its draws have no gradient")
    codes = Codes(case.latents, type(case.guide).__name__)
    wanted = (case.latents.problems(case.x), codes.size)
    fix = "rsample gives packed latents, one draw for each problem; see `inference.HasRsample`."
    expect(shape == wanted, f"rsample of shape {wanted}", f"{shape}", fix)
    found = gap(case.guide, codes, case.x, seed=case.seed)
    expect(
        found.size < found.chance, "draws of rsample with the law of forward's",
        f"distribution functions of {found.site!r} that are {found.size:.2f} apart, where chance "
        f"makes up to {found.chance:.2f}",
        "Let both draw from one place, with the same mean and noise: an objective trains what "
        "rsample draws.",
    )  # fmt: skip


def _trainable(guide: Guide) -> dict[str, Tensor]:
    named = {n: p for n, p in guide.named_parameters() if p.requires_grad}
    return named or does_not_apply("the guide has no parameters")
