"""Noisy weights: local reparameterisation in any program, and what it costs to be large; 10 s."""

from __future__ import annotations

import math
from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch
from conftest import within
from scipy.integrate import quad
from torch.nn import functional as nnf

from inference import noisy as noisy_module
from inference.magnitude import Priors
from inference.noisy import Ledger, NoisyDrive, NoisyWeight, Use, UsedTwice
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("same_noise")

ROWS, INS, OUTS = 5, 3, 4


def numbers(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64) + 0.3


M, V, BM, BV = (
    numbers(INS, OUTS),
    numbers(INS, OUTS, seed=1) ** 2,
    numbers(OUTS, seed=2),
    numbers(OUTS, seed=3) ** 2,
)
X = numbers(ROWS, INS, seed=4)


def weights():
    ledger = Ledger()
    return ledger, ledger.weight("w", M, V), ledger.weight("b", BM, BV)


# ------------------------------------------------------------------------------ noisy weights

AS_WRITTEN = {
    "x @ w": lambda w, b: (X @ w, X @ M, X**2 @ V),
    "matmul": lambda w, b: (torch.matmul(X, w), X @ M, X**2 @ V),
    "w' x": lambda w, b: (w.T @ X.T, (X @ M).T, (X**2 @ V).T),
    "x @ w + b": lambda w, b: (X @ w + b, X @ M + BM, X**2 @ V + BV),
    "b + x @ w": lambda w, b: (b[None, :] + X @ w, X @ M + BM, X**2 @ V + BV),
    "x @ w - b": lambda w, b: (X @ w - b, X @ M - BM, X**2 @ V + BV),
    "linear": lambda w, b: (nnf.linear(X, w.mT, b), X @ M + BM, X**2 @ V + BV),
    "linear by name": lambda w, b: (
        nnf.linear(X, bias=b, weight=w.t()), X @ M + BM, X**2 @ V + BV,
    ),
    "bias alone": lambda w, b: (X @ M + b, X @ M + BM, BV.expand(ROWS, OUTS)),
    "plain weights": lambda w, b: (nnf.linear(X, M.T, b), X @ M + BM, BV.expand(ROWS, OUTS)),
    "one output": lambda w, b: (X @ w[:, 1], X @ M[:, 1], X**2 @ V[:, 1]),
    "one row": lambda w, b: (X[0] @ w, X[0] @ M, X[0] ** 2 @ V),
    "some inputs": lambda w, b: (X[:, 1:] @ w[1:], X[:, 1:] @ M[1:], X[:, 1:] ** 2 @ V[1:]),
    "scaled": lambda w, b: (X @ (1 - w / 2), X @ (1 - M / 2), X**2 @ (V / 4)),
    "each its scale": lambda w, b: (X @ (M * w), X @ M**2, X**2 @ (M**2 * V)),
    "negative": lambda w, b: (X @ -w, -X @ M, X**2 @ V),
    "reshaped": lambda w, b: (
        X @ w.reshape(-1).view(INS, OUTS).unsqueeze(0).squeeze(0), X @ M, X**2 @ V,
    ),
    "many sets": lambda w, b: (X.expand(2, ROWS, INS) @ w, (X @ M).expand(2, ROWS, OUTS),
                               (X**2 @ V).expand(2, ROWS, OUTS)),
}  # fmt: skip


@pytest.mark.parametrize("how", AS_WRITTEN)
def test_what_weights_drive_has_the_mean_and_variance_of_its_cells(how):
    ledger, w, b = weights()
    drive, mean, variance = AS_WRITTEN[how](w, b)
    assert type(drive) is NoisyDrive
    assert not ledger.draws
    torch.testing.assert_close(drive.means, mean)
    torch.testing.assert_close(drive.variances.expand(mean.shape), variance)
    assert type(drive + 0.0) is torch.Tensor


def test_draws_of_what_weights_drive():
    """Means, variances, and no correlation between cells: 5 standard errors."""
    n = 20_000
    _, w, b = weights()
    found = (X.repeat(n, 1) @ w + b).relu().reshape(n, ROWS, OUTS)
    drive = (X.repeat(n, 1) @ weights()[1] * 1.0).reshape(n, ROWS, OUTS)
    mean, var = X @ M, X**2 @ V
    within(drive.mean(0), mean, (var / n).sqrt())
    within(drive.var(0), var, var * (2 / n) ** 0.5)
    flat = ((drive - mean) / var.sqrt()).reshape(n, -1)
    off = (flat.T @ flat / n)[torch.triu_indices(ROWS * OUTS, ROWS * OUTS, 1).unbind()]
    within(off, torch.zeros_like(off), torch.full_like(off, n**-0.5))
    loc, sd = mean + BM, (var + BV).sqrt()
    z = loc / sd
    standard = torch.distributions.Normal(0.0, 1.0)
    rectified = loc * standard.cdf(z) + sd * standard.log_prob(z).exp()
    within(found.mean(0), rectified, found.std(0) / n**0.5)


def careless(inputs, weight, product):
    weight.ledger.claim(weight.site, Use(inputs, weight.means, product))
    variances = product(inputs.abs(), weight.variances)
    return weight.ledger.drive(product(inputs, weight.means), variances, (weight.site,))


def test_without_the_square_of_the_inputs_the_variance_is_wrong(monkeypatch):
    """Planted error."""
    monkeypatch.setattr(noisy_module, "_drive", careless)
    with pytest.raises(AssertionError, match="not close"):
        test_what_weights_drive_has_the_mean_and_variance_of_its_cells("x @ w")


OTHERWISE = {
    "exp": lambda w: w.exp(),
    "einsum": lambda w: torch.einsum("ni,io->no", X, w),
    "rows by index": lambda w: w[torch.tensor([0, 0, 2])],
    "copies": lambda w: w.expand(2, INS, OUTS),
    "product that grows": lambda w: X[:, :, None] * w,
    "square": lambda w: w * w,
    "reciprocal": lambda w: 1 / w,
    "joined": lambda w: torch.cat([w, w]),
    "norm": lambda w: w.norm(),
    "pieces": lambda w: w.chunk(2)[0],
    "in place": lambda w: w.add_(1.0),
    "compared": lambda w: w > 0,
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_whatever_else_is_done_is_done_with_one_draw(how):
    ledger, w, _ = weights()
    with seeded(3):
        found = OTHERWISE[how](w)
    with seeded(3):
        draw = M + V.sqrt() * torch.randn_like(M)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, OTHERWISE[how](draw.clone()))
    later = X @ w + w.sum()  # now a plain tensor for everybody
    assert type(later) is torch.Tensor
    torch.testing.assert_close(later, X @ ledger.draws["w"] + ledger.draws["w"].sum())


def test_asking_for_the_shape_is_no_use_of_a_weight():
    ledger, w, _ = weights()
    assert (w.shape, w.dim(), len(w), w.dtype) == ((INS, OUTS), 2, INS, torch.float64)
    assert w.new_zeros(2).shape == (2,)
    assert torch.zeros_like(w).sum() == 0
    assert "NoisyWeight" in repr(w)
    assert isinstance(w.T, NoisyWeight)
    assert not ledger.draws
    assert not ledger.uses


def test_what_gets_past_the_rules_is_not_a_number():
    with torch._C.DisableTorchFunctionSubclass():
        assert weights()[1].isnan().all()


def test_rows_of_zeros_have_neither_noise_nor_gradient():
    mean, sd = M.clone().requires_grad_(), V.sqrt().requires_grad_()
    drive = torch.zeros(2, INS, dtype=torch.float64) @ Ledger().weight("w", mean, sd**2)
    drive.relu().sum().backward()
    assert not mean.grad.any()
    assert not sd.grad.any()


TWICE = {
    "two products": lambda w, b: (X @ w, X @ w),
    "tied weights": lambda w, b: (X @ w).tanh() @ w.T,
    "two parts": lambda w, b: (X[:, :1] @ w[:1], X[:, 1:] @ w[1:]),
    "drawn later": lambda w, b: (X @ w, w.sum()),
    "two sums": lambda w, b: (X @ M + b, X @ M + b),
}


@pytest.mark.parametrize("how", TWICE)
def test_a_weight_used_twice_is_refused(how):
    _, w, b = weights()
    with pytest.raises(UsedTwice, match=r"^[wb]$"):
        TWICE[how](w, b)


def test_what_a_bias_was_put_on_is_not_to_be_used_again():
    _, w, b = weights()
    drive = X @ w
    assert (drive + b).sum().isfinite()
    with pytest.raises(UsedTwice, match=r"^w$"):
        drive.relu()


# ---------------------------------------------------------------------------------- magnitude


def price(priors, mean, log_sd, *, at_mean=False):
    variance = None if at_mean else (2 * log_sd).exp()
    return Priors()(priors, mean, log_sd, variance)


PRIORS = {"normal": dist.Normal, "laplace": dist.Laplace}
MEAN, LOG_SD = numbers(1, 6, seed=5), 0.5 * numbers(1, 6, seed=6) - 0.7
LOC, SCALE = numbers(6, seed=7), numbers(6, seed=8).abs() + 0.2


@pytest.mark.parametrize("family", PRIORS)
def test_mean_sizes_agree_with_quadrature(family):
    prior = PRIORS[family](LOC, SCALE)
    truth = 0.0
    for k in range(6):
        one = PRIORS[family](LOC[k], SCALE[k])
        m, s = MEAN[0, k].item(), LOG_SD[0, k].exp().item()

        def integrand(w, one=one, m=m, s=s):
            density = math.exp(-0.5 * ((w - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
            return -one.log_prob(torch.tensor(w, dtype=torch.float64)).item() * density

        ends = sorted([m - 12 * s, m + 12 * s, min(max(LOC[k].item(), m - 12 * s), m + 12 * s)])
        for a, b in pairwise(ends):
            truth += quad(integrand, a, b, epsabs=1e-12, epsrel=1e-12, limit=200)[0]
    assert price([prior], MEAN, LOG_SD).item() == pytest.approx(truth, abs=1e-10)
    at_mean = price([prior], MEAN, LOG_SD, at_mean=True)
    torch.testing.assert_close(at_mean, -prior.log_prob(MEAN).sum(-1))
    assert at_mean < price([prior], MEAN, LOG_SD)


@pytest.mark.parametrize("at_mean", [False, True])
@pytest.mark.parametrize("family", PRIORS)
def test_gradients_of_mean_sizes(family, at_mean):
    """Of fixed priors, whose gradients are written out, and of priors that are learned."""
    inputs = tuple(t.clone().requires_grad_() for t in (MEAN, LOG_SD, LOC, SCALE))
    fixed = PRIORS[family](LOC, SCALE)
    torch.autograd.gradcheck(
        lambda m, s: price([fixed], m, s, at_mean=at_mean) + 0 * s.sum(), inputs[:2]
    )
    torch.autograd.gradcheck(
        lambda m, s, loc, scale: (
            price([PRIORS[family](loc, scale)], m, s, at_mean=at_mean) + 0 * s.sum()
        ),
        inputs,
    )


def test_prices_follow_the_priors():
    """They are kept between steps; a prior that changes is seen."""
    joined = Priors()
    variance = (2 * LOG_SD).exp()
    for loc, scale in ((0.0, 1.0), (0.0, 1.0), (0.0, 2.0), (1.0, 2.0)):
        shapes = ((2,), (2, 2))
        priors = [dist.Normal(torch.tensor(loc).double(), scale).expand(s) for s in shapes]
        whole = dist.Normal(torch.full((6,), loc).double(), scale)
        found = joined(priors, MEAN, LOG_SD, variance)
        torch.testing.assert_close(found, price([whole], MEAN, LOG_SD))


def test_other_priors_have_no_closed_form():
    assert price([dist.StudentT(5.0, LOC, SCALE)], MEAN, LOG_SD) is None
