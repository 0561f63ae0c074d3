"""The experiments of Chen, Jiang, Rao & Shea-Brown (2023), with what the paper lacks.

Usage: python benchmarks/chen2023.py [--only bimodal,laplace,digits] [--steps 4000] [--mnist]
           [--out runs/chen2023] [--figure docs/chen2023.png]

Unconditional densities: a one-dimensional mixture of two Normals, a two-dimensional mixture of two
crossed Laplace distributions, and handwritten digits in principal components (scikit-learn's in 40;
with --mnist those of MNIST in 300, from NEUROGUIDE_DATA, with N = 4,000). The reservoir is set
beside the paper's sampler-only circuits, once at the paper's size and once with about as many
parameters as they have; each is taught as published, down a noise staircase, and run from the
linear guess without a transient. The last row is ours: all noise levels at once, and a transient.

Of digits, "explained" is 1 - L / L0, L the denoising loss at the smallest noise level on held-out
digits, L0 that of a score of zero.
C2ST and the masses of modes are against exact draws, or held-out digits, with the same numbers of
two exact sets as floor. Draws per second count independent draws, onset and transient included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
import xarray
from pyro.distributions.torch_distribution import TorchDistribution
from scipy.stats import kurtosis, wasserstein_distance
from torch import Tensor
from torch.distributions import constraints

import inference
import zoo
from diagnostics.classifier import c2st as classifier_test
from diagnostics.style import GREY, PALETTE, new_figure
from inference.files import atomic_path
from inference.seeds import seeded
from zoo.target import Target


class Rows(TorchDistribution):  # type: ignore[misc]
    """Rows of a table, each as likely as the next: data without a density.

    Args:
        table: (n, D).
        batch: batch shape.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, table: Tensor, batch: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.table = table
        super().__init__(batch, table.shape[1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Rows:
        """The same rows for more batch dims."""
        return Rows(self.table, torch.Size(batch_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Rows drawn with replacement."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.table[torch.randint(len(self.table), shape)]


class Pictures(Target):
    """Pictures in principal components, (n, K), as an unconditional target.

    Args:
        data: pictures, each scaled to length one.
        components: K.
    """

    title = "digits"

    def __init__(self, data: zoo.data.Data, components: int) -> None:
        super().__init__()
        train, held_out = (t / t.norm(dim=1, keepdim=True) for t in (data.train, data.validation))
        self.centre = train.mean(0)
        self.axes = torch.linalg.svd(train - self.centre, full_matrices=False)[2][:components]
        self.table, self.held_out = ((t - self.centre) @ self.axes.T for t in (train, held_out))
        self.side = round(train.shape[1] ** 0.5)
        self.keep_draws(torch.zeros(1, 1), 2, seed=0)

    def target(self) -> TorchDistribution:
        """The training rows."""
        return Rows(self.table)

    def pixels(self, z: Tensor) -> Tensor:
        """Components (n, K) to pictures (n, side, side)."""
        return (z @ self.axes + self.centre).reshape(-1, self.side, self.side)


@dataclass(frozen=True)
class Circuit:
    """A circuit of the table."""

    title: str
    guide: Callable[..., inference.Guide]
    neurons: Callable[[int], int] | None  # of the number of latents
    published: bool = True


def circuits(size: int) -> list[Circuit]:
    """The rows of an experiment; N = (D + 2) / 2 has the parameters of the baselines."""
    return [
        Circuit(f"reservoir, N = {size:,}", inference.ReservoirSampler, lambda d: size),
        Circuit("reservoir, matched", inference.ReservoirSampler, lambda d: (d + 2) // 2 + 1),
        Circuit("sampler only, rate", inference.SamplerOnlyRate, None),
        Circuit("sampler only, current", inference.SamplerOnlyCurrent, None),
        Circuit(f"ours, N = {size:,}", inference.ReservoirSampler, lambda d: size, published=False),
    ]


@dataclass(frozen=True)
class Experiment:
    """A target, exact draws of it and the noise the paper ends with."""

    model: Target
    exact: Callable[[int, int], Tensor]  # draws and seed to (n, D)
    noise: float
    size: int
    draws: int
    dt: float  # of the published kind of sampling, from the linear guess
    steps: int
    truth: Callable[[Tensor, Tensor], dict[str, float]]  # draws and exact draws to numbers


def bimodal() -> Experiment:
    """Two Normals at -1 and +1 with sd .5; here with weights .2 and .8."""

    def truth(z: Tensor, exact: Tensor) -> dict[str, float]:
        distance = wasserstein_distance(z[:, 0].numpy(), exact[:, 0].numpy())
        return {"W1": distance, "P(z < 0)": float((z < 0).float().mean())}

    return _from_zoo(zoo.Bimodal(), 0.0158, 10_000, truth)


def laplace() -> Experiment:
    """Two crossed arms of kurtosis 6; here with weights .2 and .8."""

    def truth(z: Tensor, _: Tensor) -> dict[str, float]:
        one, two = (float(k) for k in kurtosis(z.numpy(), fisher=False))
        return {
            "kurtosis 1": one,
            "kurtosis 2": two,
            "P(z1 z2 > 0)": float((z.prod(1) > 0).float().mean()),
        }

    return _from_zoo(zoo.LaplaceMixture(), 0.01, 20_000, truth)


def digits(*, mnist: bool = False) -> Experiment:
    """Handwritten digits in principal components, whitened: a noise level of .2 in their sds."""
    data, k, size = (zoo.data.mnist(), 300, 4000) if mnist else (zoo.data.digits(), 40, 2000)
    model = Pictures(data, k)

    def exact(n: int, seed: int) -> Tensor:
        """Seed 0 is the held-out set, others the training set, both shuffled."""
        table = model.held_out if seed == 0 else model.table
        with seeded(seed):
            return table[torch.randperm(len(table))[:n]]

    def truth(z: Tensor, held_out: Tensor) -> dict[str, float]:
        nearest = torch.cdist(z, model.table).min(1).values.mean()
        return {"distance to training set": float(nearest)}

    return Experiment(model, exact, 0.2, size, len(model.held_out), 0.01, 1500, truth)


def _from_zoo(model: Target, noise: float, steps: int, truth: Any) -> Experiment:
    def exact(n: int, seed: int) -> Tensor:
        with seeded(seed):
            return model.target().sample((n,)).reshape(n, -1)

    return Experiment(model, exact, noise, 1000, 2000, 1e-4, steps, truth)


def measure(it: Experiment, row: Circuit, steps: int) -> tuple[dict[str, float], Tensor]:
    """Teach and run one circuit: its numbers and its draws."""
    d = it.exact(2, 0).shape[1]
    knobs: dict[str, Any] = {"noise": (it.noise, 10.0), "gain": not row.published}
    if row.neurons is not None:
        knobs["neurons"] = row.neurons(d)
    guide = row.guide(it.model, **knobs)
    objective = inference.NoiseStaircase() if row.published else inference.DenoisingScoreMatching()
    run = inference.fit(
        it.model, guide, objective=objective, steps=steps, batch_size=256, lr=2e-3, progress=False
    )
    if row.published:
        guide.sampling = inference.Sampling(warmup=it.steps, step=it.dt)
    began = time.perf_counter()
    x = it.model.observations()[:1]
    z = guide.draw(x, draws=it.draws, chains=1, seed=0).values["z"].reshape(it.draws, -1)
    seconds = time.perf_counter() - began
    exact = it.exact(it.draws, 0)
    numbers = {
        "core parameters": core(guide, d),
        "C2ST": c2st(z, exact),
        **it.truth(z, exact),
        **(explained(guide, it, x) if isinstance(it.model, Pictures) else {}),
        "draws per second": it.draws / seconds,
        "fit seconds": run.seconds,
    }
    return numbers, z


def core(guide: inference.Guide, d: int) -> float:
    """Weights and biases of the neurons, without the tonic inputs that all circuits share."""
    own = [p.numel() for n, p in guide.named_parameters() if not n.startswith("input.")]
    return float(sum(own) + guide.neurons)


def explained(guide: Any, it: Experiment, x: Tensor) -> dict[str, float]:
    """1 - L / L0 of the denoising loss at the smallest noise level, on draws not trained on."""
    z = it.exact(it.draws, 0)
    site = guide.latents.sites[0]
    with torch.no_grad(), seeded(1):
        y = guide.whiten({"z": z.reshape(-1, *site.shape)}, x.expand(len(z), -1))
        e, sigma = torch.randn_like(y), torch.full_like(y[:, 0], it.noise)
        s = guide.smoothed_score(y + it.noise * e, x, sigma)
        ratio = (s + e / it.noise).square().mean() / (e / it.noise).square().mean()
    return {"explained": 1 - float(ratio)}


def c2st(z: Tensor, exact: Tensor) -> float:
    """The project's classifier test on two sets of draws (n, D)."""
    trees = [
        xarray.DataTree.from_dict(
            {
                "posterior": xarray.Dataset(
                    {"z": (("chain", "draw", "problem", "latent"), t[None, :, None].numpy())}
                )
            }
        )
        for t in (z, exact)
    ]
    return float(classifier_test(*trees).value[0])


def floor(it: Experiment) -> dict[str, float]:
    """The same numbers of a second set of exact draws."""
    z, exact = it.exact(it.draws, 1), it.exact(it.draws, 0)
    n = min(len(z), len(exact))
    return {"C2ST": c2st(z[:n], exact[:n]), **it.truth(z, exact)}


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "bimodal": bimodal,
    "laplace": laplace,
    "digits": digits,
    "mnist": lambda: digits(mnist=True),
}


def main(
    only: str = "bimodal,laplace,digits",
    steps: int = 4000,
    mnist: bool = False,
    out: Path = Path("runs/chen2023"),
    figure: Path = Path("docs/chen2023.png"),
) -> None:
    """Fill in the rows that are missing, print the tables, draw the figure."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    names = [*only.split(","), *(["mnist"] if mnist else [])]
    draws: dict[str, dict[str, Any]] = {}
    for name in names:
        it = EXPERIMENTS[name]()
        show(name, "exact", floor(it))
        draws[name] = {"exact": it.exact(it.draws, 1)}
        for row in circuits(it.size):
            numbers, draws[name][row.title] = kept(out / f"{name}-{row.title}", it, row, steps)
            show(name, row.title, numbers)
    picture(figure, {n: EXPERIMENTS[n]() for n in names}, draws)


def kept(path: Path, it: Experiment, row: Circuit, steps: int) -> tuple[dict[str, Any], Tensor]:
    """A row from its files, which are written where they are missing."""
    numbers, z = path.with_suffix(".json"), path.with_suffix(".npy")
    if not numbers.exists():
        try:
            found, drawn = measure(it, row, steps)
        except inference.Diverged as error:
            found, drawn = {"diverged": str(error)}, torch.empty(0, 1)
        with atomic_path(z) as temporary, temporary.open("wb") as file:
            np.save(file, drawn.numpy())
        with atomic_path(numbers) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
    return json.loads(numbers.read_text()), torch.from_numpy(np.load(z))


def show(name: str, title: str, numbers: dict[str, Any]) -> None:
    """A row on a line."""
    texts = {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in numbers.items()}
    cells = "  ".join(f"{k} {v}" for k, v in texts.items())
    print(f"{name:9}{title:22}{cells}", flush=True)


def picture(path: Path, its: dict[str, Experiment], draws: dict[str, dict[str, Any]]) -> None:
    """A row of panels for each experiment, a column for each circuit, the truth first."""
    columns = max(len(d) for d in draws.values())
    figure = new_figure(2.1 * columns, 2.2 * len(its))
    axes = figure.subplots(len(its), columns, squeeze=False)
    for row, (name, it) in zip(axes, its.items(), strict=True):
        for ax, (title, z) in zip(row, draws[name].items(), strict=True):
            panel(ax, it, z, draws[name]["exact"])
            ax.set_title("exact" if title == "exact" else title, fontsize=8)
        row[0].set_ylabel(it.model.title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def panel(ax: Any, it: Experiment, z: Tensor, exact: Tensor) -> None:
    """A histogram, a scatter or a few pictures, by the number of latents."""
    ax.set(xticks=[], yticks=[])
    if not len(z):
        ax.text(0.5, 0.5, "diverged", ha="center", transform=ax.transAxes)
    elif isinstance(it.model, Pictures):
        few = it.model.pixels(z[:16])
        framed = torch.nn.functional.pad(few, (1, 1, 1, 1))
        side = framed.shape[1]
        tiles = framed.reshape(4, 4, side, side).permute(0, 2, 1, 3).reshape(4 * side, -1)
        ax.imshow(tiles, cmap="gray_r", vmin=0, vmax=few.quantile(0.995))
    elif z.shape[1] == 1:
        bins = np.linspace(-3, 3, 61)
        ax.hist(exact[:, 0], bins, density=True, color=GREY, alpha=0.5)
        ax.hist(z[:, 0], bins, density=True, histtype="step", color=PALETTE[1])
    else:
        ax.scatter(*z[:3000].T, s=1, color=PALETTE[1], alpha=0.4, lw=0)
        ax.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")


if __name__ == "__main__":
    typer.run(main)
