"""Steps of training and draws per second, on the CPU and, where there is one, on a GPU.

Sizes are such that the small ones wait for Python and the large ones for products of matrices. The
share is the products' operations in a step (`torch.utils.flop_counter`), forth and back, over the
step's time and the device's peak, which is measured here: the best of several products of square
matrices of float32, at torch's own precision of them.

Run: python benchmarks/gpu.py [--quick]
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from record import record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import inference
import zoo
from inference import Guide

PROBLEMS = 8  # observations that are drawn for at once


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: of the guide, and its size.
        build: the guide, on the CPU.
        batch_size: problems per step.
        steps: that are timed.
        draws: per problem.
        from_data: the model learns, too, from as many observations as a batch has.
    """

    name: str
    build: Callable[[], Guide]
    batch_size: int
    steps: int
    draws: int
    from_data: bool = False


def sampler(features: int, latents: int, neurons: int) -> Guide:
    model = zoo.FactorAnalysis(features, latents)
    sampling = inference.Sampling(levels=20)
    return inference.ReservoirSampler(model, neurons=neurons, sampling=sampling)


def iterative(latents: int, side: int) -> Guide:
    return inference.IterativePoisson(
        zoo.PoissonCoding(latents, side=side), steps=100, training_steps=10
    )


def encoder(features: int, latents: int, width: int) -> Guide:
    return inference.MeanFieldEncoder(zoo.FactorAnalysis(features, latents), hidden=(width, width))


def opponent(features: int, latents: int, width: int) -> Guide:
    return inference.NoiseMLP(zoo.FactorAnalysis(features, latents), hidden=(width, width))


SMALL = [
    Case("mean-field encoder, 8 latents", lambda: encoder(20, 8, 64), 256, 100, 1000),
    Case("reservoir sampler, 300 neurons", lambda: sampler(20, 8, 300), 256, 100, 1000),
    Case("iterative Poisson, 16 neurons", lambda: iterative(16, 8), 256, 50, 200, from_data=True),
    Case("adversarial, 8 latents", lambda: opponent(20, 8, 64), 256, 50, 1000),
]
LARGE = [
    Case("mean-field encoder, 128 latents", lambda: encoder(1024, 128, 2048), 4096, 10, 1000),
    Case("reservoir sampler, 5000 neurons", lambda: sampler(200, 100, 5000), 1024, 5, 100),
    Case(
        "iterative Poisson, 512 neurons", lambda: iterative(512, 16), 1024, 5, 100, from_data=True
    ),
    Case("adversarial, 128 latents", lambda: opponent(1024, 128, 2048), 4096, 5, 1000),
]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds, with all that the device has been given to do."""
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def peak(device: str, n: int) -> float:
    """Operations per second of an n by n product of float32."""
    a, b = torch.randn(2, n, n, device=device)
    timed(lambda: a @ b, device)
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(5))


class Counter(TorchDispatchMode):
    """Counts operations; torch's own counter cannot be had with penalties on gradients."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        found = func(*args, **(kwargs or {}))
        rule = flop_registry.get(func.overloadpacket)
        self.total += rule(*args, **(kwargs or {}), out_val=found) if rule else 0
        return found


def operations(train: Callable[[int], object]) -> float:
    """Of the products of a step; what comes before the first step is in both counts."""
    counts = []
    for steps in (1, 3):
        with Counter() as counter:
            train(steps)
        counts.append(counter.total)
    return (counts[1] - counts[0]) / 2


def measure(case: Case, device: str) -> tuple[float, float, float]:
    """Seconds per step, operations per step, draws per second."""
    guide = case.build()
    model = guide.model
    seen = model.simulate(case.batch_size, seed=0)[1] if case.from_data else None

    def train(steps: int) -> inference.Fit:
        knobs = {"batch_size": case.batch_size, "learn_model": case.from_data, "device": device}
        knobs["lr"] = 1e-6  # a circuit after a few large steps may be unstable, and fit draws once
        return inference.fit(model, guide, seen, steps=steps, seed=0, progress=False, **knobs)

    x = model.to(device).simulate(PROBLEMS, seed=1)[1]
    guide.to(device)
    draw = {"chains": 1, "seed": 0}
    guide.draw(x, draws=2, **draw)
    took = timed(lambda: guide.draw(x, draws=case.draws, **draw), device)
    flops = operations(train)  # warms up, too
    seconds = train(case.steps).seconds / case.steps
    return seconds, flops, PROBLEMS * case.draws / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few steps")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore", inference.FitWarning)  # nothing is trained to its end here
    names = {"cpu": f"{platform.machine()} CPU, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        names["cuda"] = torch.cuda.get_device_name()
    sizes = {"cpu": 512 if quick else 2048, "cuda": 2048 if quick else 8192}
    peaks = {device: peak(device, sizes[device]) for device in names}
    for device, name in names.items():
        print(f"{device}: {name}, {peaks[device] / 1e9:,.0f} GFLOP/s in products of float32")
    print("\n| guide | device | batch | ms per step | share of peak | draws per second |")
    print("|---|---|---|---|---|---|")
    for case in SMALL if quick else SMALL + LARGE:
        for device in names:
            seconds, flops, draws = measure(case, device)
            share = flops / seconds / peaks[device]
            record(f"ms per step, {case.name}, {device}", 1e3 * seconds)
            record(f"draws per second, {case.name}, {device}", draws)
            print(
                f"| {case.name} | {device} | {case.batch_size} | {1e3 * seconds:.2f} "
                f"| {100 * share:.2g} % | {draws:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
