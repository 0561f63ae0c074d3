"""Noisy-OR: diseases that each might have caused the symptom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index
from inference.errors import BadInput
from inference.latents import Values
from inference.observation import Observation, size

from .exact import Enumerated
from .model import Model, Paper

__all__ = ["NoisyOr"]


class NoisyOr(Model):
    """Any cause can bring about a finding by itself, and each may fail to.

    z_i ~ Bernoulli(p_i), i = 1 ... K;
    x_j given z ~ Bernoulli(1 - (1 - l_j) prod_i (1 - w_ij)^z_i), j = 1 ... J.

    Once a finding is explained by one cause there is no need of another, so causes that were
    independent exclude each other: with two causes, p = .1, w = .9, l = .01 and the finding
    present, P(z_1 = 1) is .505, and .109 once z_2 = 1 is known; the correlation is -.800. No
    independent units can do that: the best factorised guide misses by .499 nats in KL(q || p) and
    by .369 in KL(p || q).

    Args:
        causes: K.
        findings: J.
        prior: p, one for each cause; random by default.
        weights: w, one row for each cause and one column for each finding; random by default.
        leak: l, probability of each finding without a cause; random by default.
        seed: of the random parameters and the canonical observations. In the first of these all
            findings are present; the others are draws from the joint with one at least.

    Raises:
        BadInput: parameters of the wrong shape, or not probabilities; only a weight may be 0, and
            none may be 1, for a certain cause would make other observations impossible.

    References:
        Probabilistic Reasoning in Intelligent Systems (Pearl, 1988), section 4.3.2
        https://doi.org/10.1016/C2009-0-27609-4
        Probabilistic diagnosis using a reformulation of the INTERNIST-1/QMR knowledge base (Shwe et
        al., 1991), for the two-level network of diseases and findings
        https://doi.org/10.1055/s-0038-1634846

    Example:
        >>> model = NoisyOr(2, 1, prior=(0.1, 0.1), weights=((0.9,), (0.9,)), leak=(0.01,))
        >>> model.exact().logits(torch.ones(1, 1)).softmax(0).T.round(decimals=3)
        tensor([[0.0450, 0.4500, 0.4500, 0.0550]])
    """

    title = "noisy-OR"
    paper = Paper(
        "Pearl",
        1988,
        "Probabilistic Reasoning in Intelligent Systems",
        "https://doi.org/10.1016/C2009-0-27609-4",
        "section 4.3.2",
    )
    dims = {"z": ("cause",), "x": ("finding",)}

    prior: Tensor
    weights: Tensor
    leak: Tensor

    def __init__(
        self,
        causes: Count = 6,
        findings: Count = 5,
        *,
        prior: Sequence[float] | None = None,
        weights: Sequence[Sequence[float]] | None = None,
        leak: Sequence[float] | None = None,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        random = {
            "prior": 0.05 + 0.25 * torch.rand(causes, generator=g),
            "weights": 0.95 * torch.rand(causes, findings, generator=g),
            "leak": 0.01 + 0.04 * torch.rand(findings, generator=g),
        }
        given = {"prior": prior, "weights": weights, "leak": leak}
        for name, values in random.items():
            chosen = values if given[name] is None else _probabilities(name, given[name], values)
            self.register_buffer(name, chosen)
        self.keep_draws(torch.zeros(1, findings), 1000, seed=seed)
        found = self.x_0[self.x_0.sum(-1) > 0][:99]
        self.keep(torch.cat([torch.ones(1, findings), found]))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Bernoulli(self.prior).to_event(1))
            absent = self.log_absent({"z": z})
            logits = (-torch.expm1(absent)).log() - absent
            x_given_z = dist.Bernoulli(logits=logits).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def log_absent(self, z: Values) -> Tensor:
        """log P(x_j = 0 given z), a sum over causes: latents (..., B, K) to (..., B, J)."""
        return torch.log1p(-self.leak) + z["z"] @ torch.log1p(-self.weights)

    def predict(self, z: Values) -> Tensor:
        """P(x_j = 1 given z): latents (..., B, K) to (..., B, J)."""
        return -torch.expm1(self.log_absent(z))

    def exact(self) -> Enumerated:
        """All 2^K states."""
        return Enumerated(self)


def _probabilities(name: str, given: Any, like: Tensor) -> Tensor:
    """Parameters as a tensor shaped as `like`."""
    values = torch.as_tensor(given, dtype=like.dtype)
    low = 0.0 if name == "weights" else torch.finfo(like.dtype).tiny
    if values.shape != like.shape or not bool(((values >= low) & (values < 1)).all()):
        raise BadInput(
            name,
            expected=f"probabilities of shape {tuple(like.shape)}, below 1 and, but for weights, "
            "above 0",
            got=f"shape {tuple(values.shape)}, {given}",
            fix="Set causes and findings to fit; write .999 for certainty.",
        )
    return values
