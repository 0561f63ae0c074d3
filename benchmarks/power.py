"""How often does each diagnostic reject a guide with a planted error? Writes docs/power.md.

Usage: python benchmarks/power.py [--repeats 20] [--draws 1000] [--chains 4] [--problems 500]
           [--seed 0] [--out docs/power.md]

One problem, D = 5: a Gaussian posterior with all correlations .5, and two unit modes at +-3 on one
axis. A metric rejects where `summary` finds an excess of three standard errors over the floor; SBC
rejects where `sbc_test` does, at 5 % and over the problems of the model's joint. A repeat takes
about 25 s on one core, most of it C2ST and sliced W2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import typer
from pyro.distributions.torch_distribution import TorchDistribution
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.distributions import Distribution

import diagnostics
import inference
import zoo
from inference.latents import Values
from inference.observation import Observation, size
from inference.progress import Advance, bar
from inference.seeds import stream
from zoo.linear_gaussian import LinearGaussian, LinearGaussianPosterior
from zoo.target import Target

D, RHO, SBC_DRAWS = 5, 0.5, 99
T_DOF = 5.0
NO_IDEAL = "no ideal value to be compared with"
Counts = dict[str, tuple[int, int]]  # rejections and verdicts by metric
Wrong = Callable[[Any], Distribution]  # from the exact posterior, batch (B,), event (5,)


class Equicorrelated(zoo.Model):
    """z ~ Normal(m, 4 C); x given z ~ Normal(A z, I), with A'A = 3/4 C^-1: the posterior has cov C.

    C has ones on the diagonal and .5 elsewhere; the prior is twice as wide as the posterior.
    """

    title = "equicorrelated Gaussian"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.linspace(-1.0, 2.0, D))
        self.register_buffer("covariance", RHO + (1 - RHO) * torch.eye(D))
        precision = torch.linalg.inv(self.covariance)
        self.register_buffer("weights", torch.linalg.cholesky(0.75 * precision).T)
        self.keep_draws(torch.zeros(1, D), 1, seed=0)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.MultivariateNormal(self.centre, 4 * self.covariance))
            observed: Tensor = pyro.sample(
                "x", dist.Normal(z @ self.weights.T, 1.0).to_event(1), obs=x
            )
            return observed

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system: weights A, noise 1."""
        assert isinstance(x, Tensor)
        precision, zero = torch.linalg.inv(4 * self.covariance), x.new_zeros(D)
        return LinearGaussian(self.centre, precision, self.weights, zero, zero + 1), x

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form posterior."""
        return LinearGaussianPosterior(self)


class TwoModes(Target):
    """Half of the mass in each of two unit Gaussians at +-3 on the first axis, whatever x is."""

    title = "two modes"

    def __init__(self) -> None:
        super().__init__()
        self.keep_draws(torch.zeros(1, 1), 1, seed=0)

    def target(self) -> TorchDistribution:
        """The mixture."""
        return two_modes(0.5)

    def modes(self, z: Values) -> Tensor:
        """Which of the two: latents (..., B, D) to (..., B)."""
        return (z["z"][..., 0] > 0).long()


class Planted(inference.PackedGuide):
    """A guide with a known error, made from the exact posterior."""

    def __init__(self, model: zoo.Model, wrong: Wrong) -> None:
        super().__init__(model)
        self.__dict__["wrong"] = wrong

    def distribution(self, x: Observation) -> Distribution:
        """What the error makes of the posterior: batch (B,), event (5,)."""
        return self.wrong(self.model.exact().distribution(x))


def two_modes(weight: float) -> TorchDistribution:
    """Mass `weight` at +3 and the rest at -3."""
    centres = torch.zeros(2, D)
    centres[:, 0] = torch.tensor([-3.0, 3.0])
    modes = dist.MultivariateNormal(centres, torch.eye(D))
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([1 - weight, weight])), modes)


def gaussian(*, shift: float = 0.0, scale: float = 1.0) -> Wrong:
    """The first mean is off by `shift` sds, all sds are wrong by the factor `scale`."""
    offset = torch.zeros(D)
    offset[0] = shift
    return lambda p: dist.MultivariateNormal(p.mean + offset, scale_tril=scale * p.scale_tril)


def independent(p: Any) -> Distribution:
    """The right marginals without correlations; all sds are 1."""
    return dist.MultivariateNormal(p.mean, torch.eye(D))


def heavy(p: Any) -> Distribution:
    """The right mean, sds and correlations, with five degrees of freedom."""
    unit = (1 - 2 / T_DOF) ** 0.5
    return dist.MultivariateStudentT(torch.tensor(T_DOF), p.mean, unit * p.scale_tril)


def mixture(weight: float) -> Wrong:
    """Two modes for each problem."""
    return lambda p: two_modes(weight).expand(p.batch_shape)


def matched(p: Any) -> Distribution:
    """The Gaussian with the moments of the two modes: a variance of 10 on the first axis."""
    variance = torch.ones(*p.batch_shape, D)
    variance[..., 0] = 10.0
    return dist.MultivariateNormal(torch.zeros_like(variance), torch.diag_embed(variance))


ERRORS: Mapping[type[zoo.Model], Mapping[str, Wrong]] = {
    Equicorrelated: {
        "none (Gaussian)": gaussian(),
        "mean + .1 sd": gaussian(shift=0.1),
        "mean + .2 sd": gaussian(shift=0.2),
        "mean + .3 sd": gaussian(shift=0.3),
        "sd x .9": gaussian(scale=0.9),
        "sd x .8": gaussian(scale=0.8),
        "sd x .7": gaussian(scale=0.7),
        "sd x 1.25": gaussian(scale=1.25),
        "correlations dropped": independent,
        "multivariate t5": heavy,
    },
    TwoModes: {
        "none (two modes)": mixture(0.5),
        "mode dropped": mixture(1.0),
        "mode weights .6/.4": mixture(0.6),
        "moment-matched Gaussian": matched,
    },
}


def judge(
    model: zoo.Model, guides: Mapping[str, Planted], *, draws: int, chains: int, seed: int
) -> tuple[dict[str, dict[str, bool]], dict[str, str]]:
    """Verdicts of all metrics, True for a rejection, by guide; and why metrics have none."""
    x = model.observations()
    found = diagnostics.compare(model, guides, x, draws=draws, chains=chains, seed=seed)
    table = diagnostics.summary(found)
    given = table.excess.notnull()
    verdicts = {
        guide: {
            str(m): not bool(table.at_floor.sel(guide=guide, metric=m))
            for m in table.metric.values
            if bool(given.sel(guide=guide, metric=m))
        }
        for guide in guides
    }
    silent = given.sel(guide=list(guides)).any("guide")
    reasons = {
        str(m): str(table.reason.sel(metric=m).values[-1]) or NO_IDEAL
        for m in table.metric.values[~silent.values]
    }
    return verdicts, reasons


def repeat(
    rows: dict[str, Counts], *, draws: int, chains: int, problems: int, seed: int, advance: Advance
) -> dict[str, str]:
    """Add the verdicts of one repeat to the rows; returns why metrics say nothing."""
    silent: list[dict[str, str]] = []
    for k, (make, errors) in enumerate(ERRORS.items()):
        model = make()
        guides = {name: Planted(model, wrong) for name, wrong in errors.items()}
        verdicts, reasons = judge(model, guides, draws=draws, chains=chains, seed=stream(seed, k))
        silent.append(reasons)
        advance(model.title)
        for j, (name, guide) in enumerate(guides.items()):
            knobs = {"problems": problems, "draws": SBC_DRAWS, "seed": stream(seed, k, j)}
            ranks = diagnostics.sbc(model, guide, progress=False, **knobs)
            verdicts[name]["sbc"] = not diagnostics.sbc_test(ranks).attrs["calibrated"]
            advance(f"SBC, {name}")
            for metric, rejected in verdicts[name].items():
                sums = rows[name].get(metric, (0, 0))
                rows[name][metric] = (sums[0] + rejected, sums[1] + 1)
    return {m: why for m, why in silent[0].items() if all(m in found for found in silent)}


def share(counts: tuple[int, int]) -> str:
    """Rejections over verdicts, with two digits; n/a where there was no verdict."""
    rejected, verdicts = counts
    if not verdicts:
        return "n/a"
    text = f"{rejected / verdicts:.2f}"
    return {"0.00": "0", "1.00": "1"}.get(text, text.lstrip("0"))


def page(rows: Mapping[str, Counts], silent: Mapping[str, str], header: str) -> str:
    """The page: provenance, how to read it, the table, what is not in it."""
    metrics = [m for m in (*diagnostics.METRICS, "sbc") if m not in silent]
    lines = [header, f"| error | {' | '.join(metrics)} |", "|---|" + "--:|" * len(metrics)]
    for name, counts in rows.items():
        cells = [share(counts.get(m, (0, 0))) for m in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Without a verdict here:", ""]
    lines += [f"- `{m}`: {why}" for m, why in silent.items()]
    return "\n".join(lines) + "\n"


HEADER = """# Power of the diagnostics

The share of {repeats} repeats in which a diagnostic rejects a guide with a planted error. Each
repeat has one problem with D = 5 latents, {draws} draws in each of {chains} chains from the guide
and as many from the exact posterior, and new seeds; SBC has {problems} problems with {sbc} draws.
Means are off on one axis, sds on all; "none" is the exact posterior as a guide. The rows from
"none (two modes)" on have two unit modes at +-3 on one axis, the others a Gaussian posterior with
all correlations .5.

Made by `python benchmarks/power.py --repeats {repeats} --draws {draws} --chains {chains}
--problems {problems} --seed {seed}`.

The rows "none" are false alarms: a number that is clearly above .05, which is what SBC is set to,
is a defect of the diagnostic. In the other rows 1 means that the diagnostic always sees the error
at these sizes and 0 that it never does: none sees them all, so read several. A share of {repeats}
repeats has a standard error of up to {error:.2f}.
"""


def main(
    repeats: int = 20,
    draws: int = 1000,
    chains: int = 4,
    problems: int = 500,
    seed: int = 0,
    out: Path = Path("docs/power.md"),
) -> None:
    """Run all repeats and write the page."""
    torch.set_num_threads(1)  # threads that wait for a busy core can cost a hundred times more
    rows: dict[str, Counts] = {name: {} for errors in ERRORS.values() for name in errors}
    silent: dict[str, str] = {}
    steps = repeats * (len(rows) + len(ERRORS))
    knobs = {"draws": draws, "chains": chains, "problems": problems}
    with threadpool_limits(1), bar("power", steps) as advance:
        for r in range(repeats):
            silent = repeat(rows, **knobs, seed=stream(seed, r), advance=advance)
    error = 0.5 / np.sqrt(repeats)
    header = HEADER.format(repeats=repeats, **knobs, seed=seed, sbc=SBC_DRAWS, error=error)
    out.write_text(page(rows, silent, header))
    print(out.read_text())


if __name__ == "__main__":
    typer.run(main)
