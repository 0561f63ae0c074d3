"""Reservoir samplers against exact posteriors, and against the published NPE at 10^4 simulations.

Usage: python benchmarks/reservoir_posteriors.py [--models two_moons,ring] [--samplers denoising]
           [--steps 3000] [--problems 10] [--sbibm 3] [--step 0.02]
           [--out runs/reservoir_posteriors]

Each cell (a model and a way to train and run a guide) is a file in the output folder, so that a
stopped run goes on where it stopped. On the simulation-based tasks guides without access to the
density see 10,000 simulations in all: 2,048 behind the linear guess and 7,952 in training. With
--sbibm the C2ST of Lueckmann et al. (2021) is taken, too: a perceptron of two layers of 10 D,
5 folds, 10,000 draws against 10,000; on the first observations alone, for it takes a minute for
each of them in two dimensions and five in ten. A cell takes one to five minutes on a core else.
Circuits of one noise level run for five relaxation times of their linear guess, by steps of --step
in units of its variance. The default, 5 sigma^2, suits features of ten sigma; on the Gaussian
mixture latents, whose curvature nowhere exceeds two, .02 is small enough, and ten times as fast.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

import diagnostics
import inference
import zoo
from diagnostics.draws import packed
from inference.files import atomic_path
from inference.guides.score_circuit import PILOT
from inference.observation import take

PUBLISHED = {  # C2ST of NPE at 10^4 simulations by observation, sbi-benchmark/results
    "two_moons": (0.54, 0.57, 0.65, 0.67, 0.59, 0.58, 0.62, 0.60, 0.62, 0.63),
    "gaussian_mixture_sbi": (0.66, 0.56, 0.67, 0.61, 0.65, 0.57, 0.59, 0.58, 0.67, 0.60),
    "slcp": (0.94, 0.94, 0.80, 0.92, 0.85, 0.88, 0.95, 0.90, 0.93, 0.90),
    "bernoulli_glm": (0.68, 0.66, 0.76, 0.68, 0.63, 0.64, 0.66, 0.65, 0.74, 0.69),
}
MODELS = ["gaussian_mixture_latents", "ring", *PUBLISHED, "factor_analysis", "factor_analysis_50"]
BUDGET = 10_000
FINE = (0.005, 10.0)  # noise levels of posteriors with features of .02 of their linear guess
# by the denoising loss on simulations held out
DROPOUT = {"slcp": 0.2, "bernoulli_glm": 0.1}
LONGER = 8000  # steps from a fixed set of simulations
METRICS = ("c2st", "mode_occupancy", "sd_ratio", "mean_error")


@dataclass(frozen=True)
class Sampler:
    """A guide, how it is taught and how it is run.

    Attributes:
        guide: builds it.
        objective: teaches it; None is the guide's own.
        simulation_only: it never sees the model's density.
        sampling: how the circuit is run, None as it comes.
        knobs: of the guide.
        circuit: it follows a score.
    """

    guide: Callable[..., inference.Guide]
    objective: Callable[[], inference.Objective] | None = None
    simulation_only: bool = True
    sampling: inference.Sampling | None = None
    knobs: Mapping[str, Any] = field(default_factory=lambda: {"hidden": (128, 128)})
    circuit: bool = True


CORRECTED = inference.Sampling(correction="model", warmup=40)
SMOOTH = {"activation": "squareplus", "hidden": (128, 128)}
SAMPLERS: Mapping[str, Sampler] = {
    "denoising": Sampler(inference.ReservoirSampler),
    "mixed": Sampler(inference.ReservoirSampler, inference.MixedScore, simulation_only=False),
    "exact": Sampler(inference.ReservoirSampler, inference.ExactScore, simulation_only=False),
    "implicit": Sampler(inference.ReservoirSampler, inference.ImplicitScore, knobs=SMOOTH),
    "corrected": Sampler(inference.ReservoirSampler, sampling=CORRECTED, simulation_only=False),
    "random": Sampler(inference.RandomReservoir, knobs={"neurons": 2048}),
    "energy": Sampler(inference.EnergyReservoir),
    "sampler_only": Sampler(inference.SamplerOnlyRate),
    "flow": Sampler(inference.Flow, knobs={}, circuit=False),
    "nuts": Sampler(inference.NUTS, simulation_only=False, knobs={}, circuit=False),
}
DEFAULT = "denoising,mixed,exact,corrected,random,sampler_only,flow"


def build(name: str) -> zoo.Model:
    """A model by the benchmark's name for it."""
    if name == "factor_analysis_50":
        return zoo.FactorAnalysis(100, 50, seed=0)
    return zoo.MODELS[name]()


def cell(
    name: str, how: str, steps: int, problems: int, *, sbibm: int, step: float | None
) -> dict[str, Any]:
    """Fit, draw, compare; the numbers of one cell."""
    sampler, model = SAMPLERS[how], build(name)
    limited = name in PUBLISHED and sampler.simulation_only
    knobs = dict(sampler.knobs)
    if sampler.circuit:
        knobs |= {"noise": FINE} if name in PUBLISHED else {}
        knobs |= {"dropout": DROPOUT.get(name, 0.0)} if limited and "hidden" in knobs else {}
    guide = sampler.guide(model, **knobs)
    run = inference.fit(
        model, guide, objective=sampler.objective() if sampler.objective else None,
        steps=max(steps, LONGER) if limited else steps,
        batch_size=512, lr=3e-3, simulations=BUDGET - PILOT if limited else None, progress=False,
    )  # fmt: skip
    if sampler.sampling is not None:
        guide.sampling = sampler.sampling
    if sampler.circuit and guide.single_level:
        guide.sampling = replace(guide.sampling, step=step)
    x = take(model.observations(), slice(0, problems))
    began = time.perf_counter()
    table = {m: diagnostics.METRICS[m] for m in METRICS}
    found = diagnostics.summary(diagnostics.compare(model, {"it": guide}, x, metrics=table, seed=0))
    mine = found.sel(guide="it")
    numbers = {m: float(mine.value.sel(metric=m)) for m in METRICS}
    numbers |= {f"{m}_floor": float(found.value.sel(guide="exact", metric=m)) for m in METRICS}
    numbers |= {"fit_seconds": run.seconds, "compare_seconds": time.perf_counter() - began}
    if sbibm and name in PUBLISHED:
        numbers["sbibm"] = sbibm_c2st(model, guide, take(x, slice(0, sbibm)))
        numbers["sbibm_problems"] = sbibm
    return numbers


def sbibm_c2st(model: zoo.Model, guide: inference.Guide, x: Any, n: int = 10_000) -> float:
    """Mean C2ST over the problems by the protocol of Lueckmann et al. (2021)."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    trees = [diagnostics.draw(model, g, x, draws=n, chains=1, seed=k)
             for k, g in enumerate((model.exact(), guide))]  # fmt: skip
    scores = []
    for p, q in zip(*(packed(t) for t in trees), strict=True):
        centre, scale, width = p.mean(0), p.std(0), 10 * p.shape[1]
        both = np.concatenate([(p - centre) / scale, (q - centre) / scale])
        labels = np.repeat([0, 1], n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = MLPClassifier((width, width), max_iter=10_000, random_state=1)
            folds = KFold(5, shuffle=True, random_state=1)
            scores.append(float(cross_val_score(net, both, labels, cv=folds).mean()))
    return float(np.mean(scores))


def main(
    models: str = ",".join(MODELS),
    samplers: str = DEFAULT,
    steps: int = 3000,
    problems: int = 10,
    sbibm: int = 0,
    step: float | None = None,
    out: Path = Path("runs/reservoir_posteriors"),
) -> None:
    """Fill in the cells that are missing and print the table."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for name in models.split(","):
        for how in samplers.split(","):
            path = out / f"{name}-{how}.json"
            if not path.exists():
                try:
                    numbers = cell(name, how, steps, problems, sbibm=sbibm, step=step)
                except inference.NeuroguideError as error:
                    numbers = {"refused": str(error)}
                with atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(numbers, indent=1))
            line(name, how, json.loads(path.read_text()))


def line(name: str, how: str, found: dict[str, Any]) -> None:
    """One cell on one line."""
    if "refused" in found:
        print(f"{name:26}{how:14}refused: {found['refused']}", flush=True)
        return
    text = f"{name:26}{how:14}C2ST {found['c2st']:.3f} (floor {found['c2st_floor']:.3f})"
    if not np.isnan(found["mode_occupancy"]):
        text += f"  modes {found['mode_occupancy']:.3f} ({found['mode_occupancy_floor']:.3f})"
    if "sbibm" in found:
        few = found["sbibm_problems"]
        theirs = np.mean(PUBLISHED[name][:few])
        text += f"  sbibm, observations 1 to {few}: {found['sbibm']:.3f} (NPE {theirs:.3f})"
    print(text + f"  fit {found['fit_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
