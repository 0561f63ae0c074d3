"""Effective draws per second: the reservoir sampler and the exact posterior beside three NUTS.

One observation of factor analysis (D = 8, Gaussian) and one of the ring (D = 2, a hole in the
middle). Pyro's NUTS (our guide `nuts`), NumPyro's and BlackJAX's, whose log densities are written
here in JAX from the numbers of the model. All make 2 chains of 400 draws, after 200 steps of
warm-up, which counts; Pyro's once, for it is slow, the others in each round. JAX's chains move
together, and have compiled before the clock starts: `compiling` says how much longer the first call
took. ESS is ArviZ's, of the worst latent; C2ST is that of the same draws against exact ones, which
finds correlated draws more easily. The reservoir was taught all observations of the model, as
`training` says; NUTS has to start anew for each.

Usage: python benchmarks/opponents_nuts.py [--rounds 3]
Needs the extra `bench`. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from record import record
from torch import Tensor

import diagnostics
import inference
import zoo
from inference.seeds import stream

DRAWS, CHAINS, WARM_UP, TEACHING = 400, 2, 200, 1500
SLOW = "Pyro NUTS"
LogDensity = Callable[[Any], Any]
JUDGED = {m: diagnostics.METRICS[m] for m in ("ess_per_second", "ess", "rhat", "c2st")}

# --------------------------------------------------------------------------- log densities in JAX


def factor_analysis(model: zoo.FactorAnalysis, x: Tensor) -> LogDensity:
    """log p(x, z) of one observation, but for a constant."""
    import jax.numpy as jnp

    kept = (model.loadings, model.mean, model.noise, x[0])
    w, mean, noise, seen = (jnp.asarray(t.detach().numpy()) for t in kept)
    return lambda z: -0.5 * (z @ z + jnp.sum(((seen - mean - w @ z) / noise) ** 2))


def ring(model: zoo.Ring, x: Tensor) -> LogDensity:
    """log p(x, z) of one observation, but for a constant."""
    seen, noise = float(x[0, 0]), float(model.scale)
    return lambda z: -0.5 * (z @ z + ((seen - z @ z) / noise) ** 2)


POSTERIORS: Mapping[str, Callable[[Any, Tensor], LogDensity]] = {
    "factor_analysis": factor_analysis,
    "ring": ring,
}

# ------------------------------------------------------------------------------- the two of JAX


class InJax(inference.Guide):
    """A sampler of JAX as a guide, so that it is judged like the others.

    Args:
        model: a model with one latent site of one axis.
        run: takes a seed, gives draws (chains, draws, D).
    """

    independent = False

    def __init__(self, model: zoo.Model, run: Callable[[int], Any]) -> None:
        super().__init__(model)
        self.run = run

    def draw(
        self, x: Tensor, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> inference.Draws:
        """As many draws and chains as the sampler was built for."""
        z = torch.as_tensor(np.asarray(self.run(seed)).copy())
        return inference.Draws({self.latents.names[0]: z[:, :, None]})


def numpyro_nuts(density: LogDensity, latents: int) -> Callable[[int], Any]:
    """NumPyro's kernel and warm-up, without its class MCMC, which compiles at every run."""
    import jax
    from numpyro.infer import NUTS

    kernel = NUTS(potential_fn=lambda z: -density(z))

    def chain(key: Any) -> Any:
        begin, go = jax.random.split(key)
        state = kernel.init(go, WARM_UP, jax.random.normal(begin, (latents,)), (), {})

        def move(state: Any, _: Any) -> Any:
            state = kernel.sample(state, (), {})
            return state, state.z

        state, _ = jax.lax.scan(move, state, length=WARM_UP)
        return jax.lax.scan(move, state, length=DRAWS)[1]

    return vectorised(chain)


def blackjax_nuts(density: LogDensity, latents: int) -> Callable[[int], Any]:
    """BlackJAX's, with Stan's window adaptation."""
    import blackjax
    import jax

    adaptation = blackjax.window_adaptation(blackjax.nuts, density)

    def chain(key: Any) -> Any:
        begin, adapt, go = jax.random.split(key, 3)
        found, _ = adaptation.run(adapt, jax.random.normal(begin, (latents,)), WARM_UP)
        step = blackjax.nuts(density, **found.parameters).step

        def move(state: Any, k: Any) -> Any:
            state, _ = step(k, state)
            return state, state.position

        return jax.lax.scan(move, found.state, jax.random.split(go, DRAWS))[1]

    return vectorised(chain)


def vectorised(chain: Callable[[Any], Any]) -> Callable[[int], Any]:
    """All chains together, compiled at the first call."""
    import jax

    chains = jax.jit(jax.vmap(chain))
    return lambda seed: chains(jax.random.split(jax.random.PRNGKey(seed % 2**31), CHAINS))


JAX: Mapping[str, Callable[[LogDensity, int], Callable[[int], Any]]] = {
    "NumPyro NUTS": numpyro_nuts,
    "BlackJAX NUTS": blackjax_nuts,
}

# ------------------------------------------------------------------------------------ the table


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def contestants(name: str, model: zoo.Model, x: Tensor) -> dict[str, tuple[inference.Guide, str]]:
    """Guides, and what they cost before the first draw."""
    circuit = inference.ReservoirSampler(model)
    fit = inference.fit(
        model, circuit, objective=inference.MixedScore(), steps=TEACHING, seed=0, progress=False
    )
    found: dict[str, tuple[inference.Guide, str]] = {
        "exact posterior": (model.exact(), ""),
        "reservoir": (circuit, f"training {fit.seconds:.0f} s"),
        SLOW: (inference.NUTS(model, warmup=WARM_UP), ""),
    }
    density, latents = POSTERIORS[name](model, x), circuit.latents.size
    for title, make in JAX.items():
        run = make(density, latents)
        sampler = InJax(model, run)
        first, second = (
            seconds(lambda s=sampler, k=k: s.draw(x, draws=DRAWS, chains=CHAINS, seed=k))
            for k in (0, 1)
        )
        found[title] = sampler, f"compiling {first - second:.1f} s"
    return found


def contest(name: str, rounds: int) -> None:
    """All samplers of one posterior, in turn."""
    model = zoo.MODELS[name]()
    x = model.observations()[:1]
    entered = contestants(name, model, x)
    guides = {title: guide for title, (guide, _) in entered.items()}
    rows: dict[str, dict[str, list[float]]] = {t: {m: [] for m in JUDGED} for t in guides}
    floors = []
    for k in range(rounds):
        now = {title: guide for title, guide in guides.items() if k == 0 or title != SLOW}
        trees = diagnostics.collect(
            model, now, x, draws=DRAWS, chains=CHAINS, seed=stream(0, k), progress=False
        )
        found = diagnostics.compare_draws(trees, JUDGED)
        floors.append(float(found.floor.sel(metric="c2st").mean()))
        for title in now:
            for metric, values in rows[title].items():
                values.append(float(found.value.sel(guide=title, metric=metric).mean()))
    print(f"\n{model.title}, one posterior: C2ST floor {statistics.median(floors):.3f}")
    print(f"{'':18}{'ESS/s':>9}{'(range)':>20}{'ESS':>8}{'R-hat':>8}{'C2ST':>8}")
    for title, row in rows.items():
        speed = row["ess_per_second"]
        middle = {m: statistics.median(v) for m, v in row.items()}
        spread = f"({min(speed):,.0f} to {max(speed):,.0f})"
        print(
            f"{title:18}{middle['ess_per_second']:9,.0f}{spread:>20}{middle['ess']:8,.0f}"
            f"{middle['rhat']:8.3f}{middle['c2st']:8.3f}  {entered[title][1]}",
            flush=True,
        )
        record(f"{name}: ESS per second, {title}", middle["ess_per_second"], speed)


def main() -> None:
    """Both posteriors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # one thread for JAX too, as for the others
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    print(f"{CHAINS} chains, {DRAWS} draws, warm-up {WARM_UP}; medians of {args.rounds} rounds")
    for name in POSTERIORS:
        contest(name, args.rounds)


if __name__ == "__main__":
    main()
