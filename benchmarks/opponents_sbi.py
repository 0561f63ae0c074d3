"""sbi's NPE and NPSE beside the reservoir sampler and our flow, from as many simulations.

Everybody learns from 10,000 draws of the joint; nobody sees the density. The C2ST is ours, its
floor that of two exact sets; one value for each observation, mean and standard deviation over them.
sbi runs as it comes, with its own early stopping, but in batches of 1,000; NPE with neural splines,
as in the published benchmark; NPSE draws by its ODE. The published NPE is that of Lueckmann et al.
(2021), by another classifier. Times are of the wall clock, and drawing is for all observations.

Usage: python benchmarks/opponents_sbi.py [--tasks two_moons,gaussian_mixture_sbi] [--seeds 0,1]
           [--who reservoir,flow,NPE,NPSE] [--simulations 10000] [--problems 10]
Needs the extra `bench`. A task takes about five minutes a seed on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from record import record
from reservoir_posteriors import DROPOUT, FINE, LONGER, PUBLISHED
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

import diagnostics
import inference
import zoo
from inference.guides.score_circuit import PILOT
from inference.observation import take
from inference.seeds import seeded

EACH = 250  # draws of each of four chains, for the C2ST
FLOW_STEPS = 3000
BATCH = 1000  # of sbi, whose default of 200 takes five times as long
C2ST = {"c2st": diagnostics.METRICS["c2st"]}


class Opponent(inference.Guide):
    """Another library's draws as a guide, so that they are judged like those of ours.

    Args:
        model: a model with one latent site.
        sample: takes x (B, F) and a number S, gives draws (S, B, D).
    """

    def __init__(self, model: zoo.Model, sample: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__(model)
        self.sample = sample

    def draw(
        self, x: Tensor, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> inference.Draws:
        """Independent draws."""
        with seeded(seed), quiet():
            z = self.sample(x, draws * chains).detach()
        return inference.Draws({self.latents.names[0]: z.reshape(chains, draws, *z.shape[1:])})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither bars nor warnings of other libraries."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(sink):
            yield


# ------------------------------------------------------------------------------- the contestants


def box(bound: float, latents: int) -> Callable[[zoo.Model], Distribution]:
    """A uniform prior, as sbi wants it."""

    def prior(model: zoo.Model) -> Distribution:
        from sbi.utils import BoxUniform

        edge = torch.full((latents,), bound)
        return BoxUniform(-edge, edge)

    return prior


def smooth(model: zoo.Model) -> Distribution:
    """The prior of Bernoulli GLM."""
    return MultivariateNormal(torch.zeros(10), precision_matrix=model.precision)


PRIORS: Mapping[str, Callable[[Any], Distribution]] = {
    "two_moons": box(1.0, 2),
    "gaussian_mixture_sbi": box(10.0, 2),
    "slcp": box(3.0, 5),
    "bernoulli_glm": smooth,
}


def reservoir(task: str, model: zoo.Model, seed: int, simulations: int) -> inference.Guide:
    """The circuit by denoising."""
    knobs = {"hidden": (128, 128), "noise": FINE, "dropout": DROPOUT.get(task, 0.0)}
    return taught(inference.ReservoirSampler(model, seed=seed, **knobs), LONGER, simulations, seed)


def flow(task: str, model: zoo.Model, seed: int, simulations: int) -> inference.Guide:
    """Splines on a linear guess."""
    return taught(inference.Flow(model, seed=seed), FLOW_STEPS, simulations, seed)


def taught(guide: inference.Guide, steps: int, simulations: int, seed: int) -> inference.Guide:
    """A guide of ours; the linear guess of a circuit counts among its simulations."""
    left = simulations - PILOT * isinstance(guide, inference.ReservoirSampler)
    inference.fit(
        guide.model, guide, steps=steps, simulations=left, batch_size=512, lr=3e-3, seed=seed,
        progress=False,
    )  # fmt: skip
    return guide


def npe(task: str, model: zoo.Model, seed: int, simulations: int) -> inference.Guide:
    """Neural posterior estimation."""
    from sbi.inference import NPE

    with seeded(seed), quiet():
        knobs = {"prior": PRIORS[task](model), "density_estimator": "nsf"}
        posterior = learned(NPE, model, seed, simulations, **knobs).build_posterior()

    return Opponent(
        model, lambda x, n: posterior.sample_batched((n,), x=x, show_progress_bars=False)
    )


def npse(task: str, model: zoo.Model, seed: int, simulations: int) -> inference.Guide:
    """Neural posterior score estimation, one observation after the other."""
    from sbi.inference import NPSE

    with seeded(seed), quiet():
        trained = learned(NPSE, model, seed, simulations, prior=PRIORS[task](model))
        posterior = trained.build_posterior(sample_with="ode")

    def sample(x: Tensor, n: int) -> Tensor:
        each = [posterior.sample((n,), x=row[None], show_progress_bars=False) for row in x]
        return torch.stack(each, 1)

    return Opponent(model, sample)


def learned(kind: Any, model: zoo.Model, seed: int, simulations: int, **knobs: Any) -> Any:
    """A trainer of sbi that has seen the joint."""
    from sbi.utils.tracking import TensorBoardTracker
    from torch.utils.tensorboard import SummaryWriter

    z, x = model.simulate(simulations, seed=1000 + seed)
    with tempfile.TemporaryDirectory() as logs:  # sbi's own place is the current folder
        trainer = kind(tracker=TensorBoardTracker(SummaryWriter(logs)), **knobs)
        trainer.append_simulations(z["z"], x).train(training_batch_size=BATCH)
    return trainer


CONTESTANTS: Mapping[str, Callable[[str, zoo.Model, int, int], inference.Guide]] = {
    "reservoir": reservoir,
    "flow": flow,
    "NPE": npe,
    "NPSE": npse,
}

# ------------------------------------------------------------------------------------- the table


def contest(task: str, who: list[str], seeds: list[int], simulations: int, problems: int) -> None:
    """All contestants on one task."""
    model = zoo.MODELS[task]()
    x = take(model.observations(), slice(0, problems))
    published = statistics.mean(PUBLISHED[task][:problems])
    print(f"\n{model.title}: published NPE {published:.3f}", flush=True)
    found: dict[str, list[float]] = {name: [] for name in who}
    for seed in seeds:
        for name in who:
            began = time.perf_counter()
            guide = CONTESTANTS[name](task, model, seed, simulations)
            trained = time.perf_counter() - began
            trees = diagnostics.collect(model, {name: guide}, x, draws=EACH, seed=0, progress=False)
            table = diagnostics.compare_draws(trees, C2ST)
            value = table.value.sel(guide=name, metric="c2st").values
            floor = float(table.floor.sel(metric="c2st").mean())
            found[name].extend(value.tolist())
            print(
                f"  seed {seed}  {name:10} C2ST {value.mean():.3f} ± {value.std(ddof=1):.3f}"
                f"  floor {floor:.3f}  training {trained:5.0f} s"
                f"  drawing {trees[name].attrs['seconds']:6.1f} s",
                flush=True,
            )
    record(f"{task}: published", published)
    for name, values in found.items():
        record(f"{task}: {name}", statistics.mean(values), values)


def main() -> None:
    """Every task that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", default="two_moons,gaussian_mixture_sbi")
    parser.add_argument("--who", default=",".join(CONTESTANTS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--problems", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.simulations:,} simulations, {args.problems} observations, {4 * EACH} draws each")
    who, seeds = args.who.split(","), [int(s) for s in args.seeds.split(",")]
    for task in args.tasks.split(","):
        contest(task, who, seeds, args.simulations, args.problems)


if __name__ == "__main__":
    main()
