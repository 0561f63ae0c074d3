"""In words: in which way is a guide wrong?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .chains import effective
from .compare import EXACT, summary
from .draws import packed
from .estimate import Array, sds
from .metrics import METRICS
from .style import labels_of

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["AT_FLOOR", "RULES", "Finding", "Rule", "labels", "verdicts"]

MOST = 2  # findings in a sentence
NEVER = 1e-12  # stands for a probability of zero
AT_FLOOR = "at the floor: nothing tells it from the exact posterior"


@dataclass(frozen=True)
class Finding:
    """One way in which a guide is wrong.

    Attributes:
        nats: its size on a scale that all findings share, the KL(p || q) that this error alone
            would cost: of two Gaussians, or of two tables.
        words: what to say.
    """

    nats: float
    words: str


@dataclass(frozen=True)
class Rule:
    """How an error is told.

    Attributes:
        metric: which has to be above its floor by three standard errors.
        find: from the guide's and the reference's draws to a finding, or None where the draws have
            no such latents. It names the component that is worst on average over problems.
    """

    metric: str
    find: Callable[[DataTree, DataTree], Finding | None]


def verdicts(trees: Mapping[str, DataTree], comparison: Dataset) -> dict[str, str]:
    """One sentence for each guide: in which way it is wrong, the worst first.

    Only what exceeds its floor by more than three standard errors is told, at most two findings.
    An over-confidence of 38 % is an sd 38 % smaller than the exact one. Where the draws are of
    several problems, numbers are means over them, and correlations and modes those of a typical
    problem, whose error is the nearest to the mean.

    Args:
        trees: draws by guide, the exact posterior's among them, from :func:`collect`.
        comparison: of the same guides, from :func:`compare_draws`.
    """
    means = summary(comparison)
    # without an error, as of R-hat, nothing can be said to exceed a floor
    judged = means.excess.notnull() & (means.excess_se > 0)
    above = judged & ~means.at_floor
    found = {}
    for name in [str(g) for g in comparison.guide.values if g != EXACT]:
        wrong = {str(m) for m in means.metric.values[above.sel(guide=name).values]}
        if not judged.sel(guide=name).any():
            found[name] = "cannot be judged: no metric could be computed"
        else:
            found[name] = _sentence(trees[name], trees[EXACT], wrong, means.sel(guide=name))
    return found


def _sentence(tree: DataTree, reference: DataTree, wrong: set[str], means: Dataset) -> str:
    findings = [rule.find(tree, reference) for rule in RULES if rule.metric in wrong]
    told = sorted((f for f in findings if f), key=lambda f: -f.nats)[:MOST]
    if told:
        return "; ".join(f.words for f in told)
    if not wrong:
        return AT_FLOOR
    if "c2st" in wrong:
        accuracy = _digits(float(means.value.sel(metric="c2st")))
        moments = f"cannot be told from exact in its {_common(tree)}"
        return f"{moments}, but a classifier can (C2ST {accuracy})"
    # what no rule names: the metric furthest above its floor in standard errors
    some = means.sel(metric=sorted(wrong))
    worst = str(some.metric.values[np.argmax((some.excess / some.excess_se).values)])
    off, floor = (float(means[k].sel(metric=worst)) for k in ("excess", "floor"))
    title = METRICS[worst].title if worst in METRICS else worst
    where = "one metric," if len(wrong) == 1 else f"{len(wrong)} metrics, most surely in"
    return f"off by {off:.2g} from a floor of {floor:.2g} in {where} {title}"


def _common(tree: DataTree) -> str:
    return "moments" if packed(tree, discrete=False).shape[2] else "marginals"


def labels(tree: DataTree, *, discrete: bool | None = None) -> list[str]:
    """Names of the columns of :func:`packed`, with the same choice of sites.

    Args:
        tree: draws.
        discrete: only the discrete sites, only the others, or by default all of them.
    """
    data = tree["posterior"].dataset
    counted = str(tree.attrs.get("discrete", "")).split(",")
    rows = int(np.prod([data.sizes[d] for d in ("chain", "draw", "problem")]))
    sizes = {str(n): v.size // rows for n, v in data.data_vars.items()}
    return labels_of(
        {n: k for n, k in sizes.items() if discrete is None or (n in counted) is discrete}
    )


def _size(tree: DataTree, *, discrete: bool | None = None) -> Array:
    """Effective draws of each column, (B, D): all of them where they are independent."""
    z = packed(tree, discrete=discrete)
    if tree.attrs["independent_draws"]:
        return np.full((z.shape[0], z.shape[2]), float(z.shape[1]))
    chains = tree["posterior"].sizes["chain"]
    size = effective(z.reshape(z.shape[0], chains, -1, z.shape[2]))
    return np.where(size > 0, size, 1.0)  # NaN where a latent never moved


def _clear(error: Array, se: Array) -> bool:
    """The mean of errors (B,) exceeds what noise alone makes by three of its standard errors."""
    noise = np.sqrt(2 / np.pi) * se.mean()  # mean of |Normal(0, se)|
    return bool(error.mean() - noise > 3 * np.sqrt((se**2).sum()) / len(error))


def _bias(tree: DataTree, reference: DataTree) -> Finding | None:
    q, p = (packed(t, discrete=False) for t in (tree, reference))
    if not q.shape[2]:
        return None
    error = np.abs(q.mean(1) - p.mean(1)) / sds(p)
    k = int(error.mean(0).argmax())
    n_q, n_p = (_size(t, discrete=False)[:, k] for t in (tree, reference))
    if not _clear(error[:, k], np.sqrt((q.std(1) / sds(p))[:, k] ** 2 / n_q + 1 / n_p)):
        return None
    size, name = float(error[:, k].mean()), labels(tree, discrete=False)[k]
    return Finding(size**2 / 2, f"biased by {_sd(size)} sd in {name}")


def _confidence(tree: DataTree, reference: DataTree) -> Finding | None:
    q, p = (packed(t, discrete=False) for t in (tree, reference))
    if not q.shape[2]:
        return None
    logs = np.log(np.maximum(q.std(1), 1e-12) / sds(p))
    k = int(np.abs(logs).mean(0).argmax())
    n_q, n_p = (_size(t, discrete=False)[:, k] for t in (tree, reference))
    logs, name = logs[:, k], labels(tree, discrete=False)[k]
    if not _clear(np.abs(logs), np.sqrt(0.5 / n_q + 0.5 / n_p)):
        return None
    mean, size = float(logs.mean()), float(np.abs(logs).mean())
    # KL(p || q) where log(sd of q / sd of p) = t
    nats = float(np.mean([t + np.exp(-2 * t) / 2 - 0.5 for t in logs.clip(-5)]))
    if abs(mean) < size / 2:
        return Finding(
            nats, f"sd of {name} wrong by {_percent(np.expm1(size))}, in either direction"
        )
    if mean < 0:
        return Finding(nats, f"over-confident by {_percent(-np.expm1(mean))} along {name}")
    return Finding(nats, f"under-confident by {_percent(np.expm1(mean))} along {name}")


def _correlation(tree: DataTree, reference: DataTree) -> Finding | None:
    q, p = packed(tree), packed(reference)
    if q.shape[2] < 2:
        return None
    r_q, r_p = (np.stack([_matrix(z) for z in draws]) for draws in (q, p))
    mean = np.abs(r_q - r_p).mean(0)
    i, j = np.unravel_index(int(np.triu(mean, 1).argmax()), mean.shape)
    r_q, r_p = r_q[:, i, j], r_p[:, i, j]
    n_q, n_p = (_size(t)[:, [i, j]].min(1) for t in (tree, reference))
    if not _clear(np.abs(r_q - r_p), np.hypot((1 - r_q**2) / n_q**0.5, (1 - r_p**2) / n_p**0.5)):
        return None
    typical = _typical(np.abs(r_q - r_p))
    here, exact = (float(np.clip(r[typical], -0.999, 0.999)) for r in (r_q, r_p))
    # KL(p || q) of two pairs of unit variances
    nats = np.log((1 - here**2) / (1 - exact**2)) / 2 + (1 - exact * here) / (1 - here**2) - 1
    names, how = labels(tree), "misses" if abs(here) < abs(exact) / 2 else "has wrong"
    pair = f"the correlation of {names[i]} and {names[j]}"
    return Finding(float(nats), f"{how} {pair} ({_digits(exact)} exact, {_digits(here)} here)")


def _matrix(z: Array) -> Array:
    centred = (z - z.mean(0)) / sds(z[None])[0]
    matrix: Array = centred.T @ centred / len(z)
    return matrix


def _modes(tree: DataTree, reference: DataTree) -> Finding | None:
    if not all("modes" in t.children for t in (tree, reference)):
        return None
    q, p = (t["modes"].dataset["label"].transpose("problem", ...).values for t in (tree, reference))
    q, p = q.reshape(len(q), -1), p.reshape(len(p), -1)
    names = np.unique(np.concatenate([q.ravel(), p.ravel()]))
    w_q, w_p = (np.stack([(label == n).mean(1) for n in names], 1) for label in (q, p))
    error = np.abs(w_q - w_p)
    k = int(error.mean(0).argmax())
    typical = _typical(error[:, k])
    here, exact = w_q[typical], w_p[typical]
    words = f"puts {_digits(here[k])} on a mode that weighs {_digits(exact[k])}"
    return Finding(_kl(exact, here), words)


def _marginal(tree: DataTree, reference: DataTree) -> Finding | None:
    q, p = (packed(t, discrete=True) for t in (tree, reference))
    if not q.shape[2]:
        return None
    values = np.unique(np.concatenate([q.ravel(), p.ravel()]))
    f, g = (np.stack([(z == v).mean(1) for v in values], -1) for z in (q, p))  # (B, D, values)
    distance = np.abs(f - g).sum(-1) / 2
    k = int(distance.mean(0).argmax())
    typical = _typical(distance[:, k])
    nats = _kl(g[typical, k], f[typical, k])
    name = labels(tree, discrete=True)[k]
    return Finding(nats, f"wrong marginal of {name} (TV {_digits(distance[:, k].mean())})")


def _typical(error: Array) -> int:
    """The problem whose error is the nearest to the mean."""
    return int(np.abs(error - error.mean()).argmin())


def _kl(p: Array, q: Array) -> float:
    """KL(p || q) of two tables; what q never drew costs without bound, and here a great deal."""
    return float((p * np.log(np.maximum(p, NEVER) / np.maximum(q, NEVER))).sum())


def _digits(value: float) -> str:
    """Two digits after the point and none before it: .05, -.92, 1."""
    text = f"{value:.2f}".replace("-0.", "-.")
    text = text[1:] if text.startswith("0.") else text
    return {"1.00": "1", "-1.00": "-1", ".00": "0", "-.00": "0"}.get(text, text)


def _sd(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else _digits(value)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share < 2 else f"a factor of {1 + share:.2g}"


RULES = (
    Rule("mean_error", _bias),
    Rule("sd_ratio", _confidence),
    Rule("correlation_error", _correlation),
    Rule("mode_occupancy", _modes),
    Rule("marginal_tv", _marginal),
)
