"""How the circuits that come trained are trained and measured: a recipe for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import inference
from inference import Guide, Objective
from inference.checkpoint import plain
from zoo.data import Data, digits, patches, whiten

from .headlines import Numbers, against_exact, of_a_code, of_a_reader

__all__ = ["RECIPES", "Recipe"]

FLAT = 0.05  # sd of a patch, of pixels in [0, 1], below which it is sky or blur
SETTINGS = "steps", "lr", "batch_size", "metrics", "problems", "draws", "knows"

CHEN = "Chen, Jiang, Rao & Shea-Brown 2023, https://arxiv.org/abs/2308.11809"
VAFAII = "Vafaii, Galor & Yates 2025, https://arxiv.org/abs/2410.19315"
OLSHAUSEN = "Rozell et al. 2008, https://doi.org/10.1162/neco.2008.03-07-486"
AITCHISON = "after Aitchison, Hennequin & Lengyel 2018, https://arxiv.org/abs/1807.08952"
MALKIN = "Malkin et al. 2024, https://doi.org/10.7554/eLife.92595"
BENJAMIN = "Benjamin & Kording 2020, https://arxiv.org/abs/2006.10811"

OURS = "Apache-2.0"
DIGITS = f"{OURS}; 100 digits in it: Alpaydin & Kaynak, UCI, CC BY 4.0"
LABELLED = f"{OURS}; 200 digits in it: Alpaydin & Kaynak, UCI, CC BY 4.0"
PATCHES = f"{OURS}; 100 patches in it of photographs by danielbuechele and vultilion, CC BY 2.0"

Measure = Callable[[Guide, "Recipe", int, Sequence[str] | None], Numbers]


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made and measured.

    Attributes:
        paper: of the circuit.
        steps: training steps.
        metrics: headline numbers.
        objective: builds it; by default the guide's own.
        lr: first learning rate.
        batch_size: problems per step.
        model_knobs: of the model.
        guide_knobs: of the guide.
        data: what the model is learned from, if it is learned.
        knows: the guide learns so many of the model's own observations, and knows no others.
        measure: takes guide, recipe, seed and, if not all of them, the numbers' names.
        problems: observations that are measured.
        draws: of each.
        licence: of checkpoint and data.
    """

    paper: str
    steps: int
    metrics: tuple[str, ...]
    objective: Callable[[], Objective] | None = None
    lr: float = 5e-3
    batch_size: int = 256
    model_knobs: Mapping[str, Any] = field(default_factory=dict)
    guide_knobs: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[], Data] | None = None
    knows: int | None = None
    measure: Measure = against_exact
    problems: int = 4
    draws: int = 1000
    licence: str = OURS

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the numbers, as JSON has it."""
        chosen = self.objective() if self.objective else None
        found = {n: getattr(self, n) for n in SETTINGS} | {
            "model_knobs": dict(self.model_knobs),
            "guide_knobs": dict(self.guide_knobs),
            "objective": type(chosen).__name__,
            "objective_knobs": chosen.knobs if chosen else {},
            "measure": self.measure.__name__,
        }
        return plain(found)


def white_patches() -> Data:
    """Whitened patches of 8 x 8 pixels, in units of their sd, without sky and blur."""
    raw = patches(side=8)
    busy = [t[t.std(1) > FLAT] for t in (raw.train, raw.validation)]
    white = whiten(replace(raw, train=busy[0], validation=busy[1]))
    scale = white.train.std()
    return replace(white, train=white.train / scale, validation=white.validation / scale)


SHAPE = "c2st", "mean_error", "spread"
COUNTS = "mean_error", "spread", "marginal_tv", "elbo_gap"
NORMAL = *SHAPE, "elbo_gap"
CODE = "r2", "zeros"

RECIPES: Mapping[str, Recipe] = {
    "reservoir_sampler": Recipe(
        CHEN, 1000, (*SHAPE, "mode_occupancy"), inference.MixedScore, lr=3e-3,
        guide_knobs={"neurons": 256},
    ),
    "random_reservoir": Recipe(
        CHEN, 1000, (*SHAPE, "mode_occupancy"), guide_knobs={"neurons": 1024},
    ),
    "energy_reservoir": Recipe(
        CHEN, 1000, (*SHAPE, "mode_occupancy"), lr=3e-3, guide_knobs={"neurons": 256},
    ),
    "sampler_only_rate": Recipe(CHEN, 1000, (*SHAPE, "mode_occupancy"), lr=3e-3),
    "sampler_only_current": Recipe(CHEN, 1000, (*SHAPE, "mode_occupancy"), lr=3e-3),
    "reservoir_sampler_on_laplace_mixture": Recipe(
        CHEN, 1000, SHAPE, lr=2e-3, guide_knobs={"neurons": 512, "noise": (0.01, 10.0)},
    ),
    "online_poisson": Recipe(VAFAII, 300, COUNTS, lr=0.03),
    "poisson_encoder": Recipe(VAFAII, 1500, COUNTS),
    "semi_amortised_poisson": Recipe(VAFAII, 300, COUNTS),
    "iterative_poisson": Recipe(
        VAFAII, 400, (*CODE, "free_energy"), lr=0.02, batch_size=200, data=digits,
        measure=of_a_code, model_knobs={"latents": 64, "side": 8, "noise_floor": 0.02},
        guide_knobs={"steps": 100},
        problems=100, draws=20, licence=DIGITS,
    ),
    "iterative_gaussian": Recipe(
        VAFAII, 400, NORMAL, lr=0.02, batch_size=200, data=digits,
        model_knobs={"features": 64, "latents": 10}, guide_knobs={"steps": 100}, licence=DIGITS,
    ),
    "lca": Recipe(
        OLSHAUSEN, 500, (*CODE, "energy"), inference.MAPEnergy, batch_size=200, data=white_patches,
        measure=of_a_code, model_knobs={"latents": 64},
        guide_knobs={"steps": 100, "tolerance": 1e-3},
        problems=100, draws=1, licence=PATCHES,
    ),
    "single_layer_circuit": Recipe(AITCHISON, 2000, NORMAL),
    "multi_layer_circuit": Recipe(AITCHISON, 2000, NORMAL),
    "recurrent_circuit": Recipe(AITCHISON, 1000, NORMAL),
    "recurrent_circuit_on_factor_analysis": Recipe(AITCHISON, 1000, NORMAL),
    "stochastic_synapses": Recipe(
        MALKIN, 1500, ("mean_error", "spread", "elbo_gap"), lr=0.02, knows=10, problems=10,
    ),
    "stochastic_synapses_on_bayesian_mlp": Recipe(
        MALKIN, 1500, ("accuracy", "log_likelihood"), lr=0.01, batch_size=50, knows=200,
        measure=of_a_reader, problems=200, draws=20, licence=LABELLED,
    ),
    "recurrent_recognition": Recipe(
        BENJAMIN, 800, (*SHAPE, "correlation_error"), inference.Adversarial, lr=3e-3,
        batch_size=128,
    ),
    "noise_mlp": Recipe(
        BENJAMIN, 800, (*SHAPE, "correlation_error"), inference.Adversarial, lr=3e-3,
        batch_size=128,
    ),
    "temporal_recognition": Recipe(
        BENJAMIN, 300, (*SHAPE, "correlation_error"), inference.Adversarial, lr=3e-3,
        batch_size=64,
    ),
}  # fmt: skip
