"""The headline numbers of a trained circuit, each with its standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import diagnostics
import zoo
from diagnostics.compare import EXACT
from diagnostics.estimate import Estimate, Metric, by_blocks, scaled
from inference import Guide, HasDensity
from inference.observation import take
from zoo.data import digits

if TYPE_CHECKING:
    from xarray import DataTree

    from .recipes import Recipe

__all__ = ["HEADLINES", "Numbers", "against_exact", "of_a_code", "of_a_reader"]

Numbers = dict[str, dict[str, Any]]
CHAINS = 2


def _spread(tree: DataTree, reference: DataTree) -> Estimate:
    """Unlike `sd_ratio`, which is of the worst latent, it does not jump from one to another."""
    return by_blocks(
        lambda q, p: float(np.sqrt(q.var(0).sum() / p.var(0).sum())), *scaled(tree, reference)
    )


HEADLINES: Mapping[str, Metric] = {
    **diagnostics.METRICS,
    "spread": Metric(_spread, "sd ratio, all latents", 1.0, "over- and under-confidence"),
}


def against_exact(
    guide: Guide, recipe: Recipe, seed: int, names: Sequence[str] | None = None
) -> Numbers:
    """Metrics against the exact posterior of the model's first observations, with their floors."""
    x = take(guide.model.observations(), slice(0, recipe.problems))
    found = diagnostics.summary(
        diagnostics.compare(
            guide.model, {"it": guide}, x, draws=recipe.draws // CHAINS, chains=CHAINS, seed=seed,
            metrics={n: HEADLINES[n] for n in names or recipe.metrics}, progress=False,
        )
    )  # fmt: skip
    return {
        str(name): {
            "title": HEADLINES[str(name)].title,
            "value": _at(found.value, "it", name),
            "se": _at(found.se, "it", name),
            "floor": _at(found.value, EXACT, name),
            "floor_se": _at(found.se, EXACT, name),
        }
        for name in found.metric.values
    }


def _at(table: Any, guide: str, metric: str) -> float:
    return float(table.sel(guide=guide, metric=metric))


@torch.no_grad()
def of_a_code(
    guide: Guide, recipe: Recipe, seed: int, names: Sequence[str] | None = None
) -> Numbers:
    """What a code of held-out observations is worth, which a seed chooses: means over these.

    R^2 of what the model shows for the mean of the draws, share of latents that are zero, and nats.
    """
    assert recipe.data is not None
    assert isinstance(guide.model, zoo.Model)
    held_out = recipe.data().validation
    g = torch.Generator().manual_seed(seed)
    x = held_out[torch.randperm(len(held_out), generator=g)[: recipe.problems]]
    drawn = guide.draw(x, draws=recipe.draws, chains=1, seed=seed).values
    z = drawn["z"][0]  # (draws, B, K)
    left = (x - guide.model.predict({"z": z.mean(0)})).square().sum(1)
    whole = (x - x.mean(1, keepdim=True)).square().sum(1)
    log_p = guide.latents.log_joint({"z": z}, x)
    numbers = {
        "r2": _over_problems("R2", 1 - left / whole),
        "zeros": _over_problems("share of zeros", (z == 0).float().mean((0, 2))),
        "energy": _over_problems("-log p(x, z) / nats", -log_p.mean(0)),
    }
    if isinstance(guide, HasDensity):
        free = (guide.log_prob({"z": z}, x) - log_p).mean(0)
        numbers["free_energy"] = _over_problems("free energy / nats", free)
    return {n: numbers[n] for n in names or recipe.metrics}


@torch.no_grad()
def of_a_reader(
    guide: Guide, recipe: Recipe, seed: int, names: Sequence[str] | None = None
) -> Numbers:
    """How well a network with the drawn weights reads held-out digits, which a seed chooses."""
    data, model = digits(), guide.model
    assert data.validation_labels is not None
    assert isinstance(model, zoo.BayesianMLP)
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.validation), generator=g)[: recipe.problems]
    labels = data.validation_labels[rows]
    drawn = guide.draw(model.observations(), draws=recipe.draws, chains=1, seed=seed).values
    z = {n: v[0, :, 0] for n, v in drawn.items()}
    p = model.logits(z, data.validation[rows]).softmax(-1).mean(0)  # of all networks together
    numbers = {
        "accuracy": _over_problems("held-out accuracy", (p.argmax(-1) == labels).float()),
        "log_likelihood": _over_problems(
            "held-out log p(label) / nats", p[torch.arange(len(labels)), labels].log()
        ),
    }
    return {n: numbers[n] for n in names or recipe.metrics}


def _over_problems(title: str, each: Tensor) -> dict[str, Any]:
    se = float(each.std() / len(each) ** 0.5)
    return {"title": title, "value": float(each.mean()), "se": se, "floor": None, "floor_se": None}
