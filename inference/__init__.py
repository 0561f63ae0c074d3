"""Guides, the objectives that train them, and the loop that does it.

`GUIDES` and `OBJECTIVES` map the names of the command line to classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .beliefs import HasBeliefs
from .conformance import Conformance, check_guide
from .costs import MECHANISMS, Cost, Entropic, PowerLaw, Sum, calibrated_scale, mixture
from .errors import (
    BadCheckpoint,
    BadInput,
    Diverged,
    ExactWarning,
    FitWarning,
    Incompatible,
    NeuroguideError,
    NoDensity,
    NoExactPosterior,
    OutputError,
    UnknownName,
)
from .fit import Fit, fit
from .guide import (
    Draws,
    Guide,
    HasClosedForm,
    HasDensity,
    HasDivergence,
    HasEvidence,
    HasNoise,
    HasNoiseLevels,
    HasRsample,
    HasScore,
)
from .guides.autoguide import AutoMultivariateNormal, AutoNormal
from .guides.encoder import FullCovarianceEncoder, MeanFieldEncoder
from .guides.flow import Flow
from .guides.iterative_gaussian import IterativeGaussian
from .guides.iterative_poisson import IterativePoisson, OnlinePoisson
from .guides.noise_mlp import NoiseMLP
from .guides.nuts import NUTS
from .guides.poisson_encoder import PoissonEncoder, SemiAmortisedPoisson
from .guides.random_reservoir import RandomReservoir
from .guides.recurrent_recognition import RecurrentRecognition
from .guides.reliability_circuit import MultiLayerCircuit, RecurrentCircuit, SingleLayerCircuit
from .guides.reservoir import EnergyReservoir, ReservoirSampler
from .guides.sampler_only import SamplerOnlyCurrent, SamplerOnlyRate
from .guides.sparse_circuit import ISTA, LCA, SparseLaplace
from .guides.stochastic_synapses import StochasticSynapses
from .guides.temporal_recognition import TemporalRecognition
from .implicit import Implicit
from .latents import Energies, Latents, ModelLike, Site, Values
from .objective import Objective, Player
from .objectives.adversarial import Adversarial, Wasserstein
from .objectives.elbo import ELBO
from .objectives.energy_score import EnergyScore
from .objectives.forward_kl import ForwardKL
from .objectives.free_energy import FixedPoint, FreeEnergy
from .objectives.map_energy import HasPosteriorMode, MAPEnergy
from .objectives.oscillating import Oscillating
from .objectives.prior_contrastive import PriorContrastive
from .objectives.reliability import ReliabilityCost
from .objectives.score_matching import (
    DenoisingScoreMatching,
    ExactScore,
    ImplicitScore,
    MixedScore,
    NoiseStaircase,
)
from .objectives.wake_sleep import ReweightedWakeSleep
from .observation import Observation, flatten
from .packed import PackedGuide
from .recognition import Recognition
from .sampling import Sampling
from .seeds import seeded
from .table import Table

__all__ = [
    "ELBO",
    "GUIDES",
    "ISTA",
    "LCA",
    "MECHANISMS",
    "NUTS",
    "OBJECTIVES",
    "Adversarial",
    "AutoMultivariateNormal",
    "AutoNormal",
    "BadCheckpoint",
    "BadInput",
    "Conformance",
    "Cost",
    "DenoisingScoreMatching",
    "Diverged",
    "Draws",
    "Energies",
    "EnergyReservoir",
    "EnergyScore",
    "Entropic",
    "ExactScore",
    "ExactWarning",
    "Fit",
    "FitWarning",
    "FixedPoint",
    "Flow",
    "ForwardKL",
    "FreeEnergy",
    "FullCovarianceEncoder",
    "Guide",
    "HasBeliefs",
    "HasClosedForm",
    "HasDensity",
    "HasDivergence",
    "HasEvidence",
    "HasNoise",
    "HasNoiseLevels",
    "HasPosteriorMode",
    "HasRsample",
    "HasScore",
    "Implicit",
    "ImplicitScore",
    "Incompatible",
    "IterativeGaussian",
    "IterativePoisson",
    "Latents",
    "MAPEnergy",
    "MeanFieldEncoder",
    "MixedScore",
    "ModelLike",
    "MultiLayerCircuit",
    "NeuroguideError",
    "NoDensity",
    "NoExactPosterior",
    "NoiseMLP",
    "NoiseStaircase",
    "Objective",
    "Observation",
    "OnlinePoisson",
    "Oscillating",
    "OutputError",
    "PackedGuide",
    "Player",
    "PoissonEncoder",
    "PowerLaw",
    "PriorContrastive",
    "RandomReservoir",
    "Recognition",
    "RecurrentCircuit",
    "RecurrentRecognition",
    "ReliabilityCost",
    "ReservoirSampler",
    "ReweightedWakeSleep",
    "SamplerOnlyCurrent",
    "SamplerOnlyRate",
    "Sampling",
    "SemiAmortisedPoisson",
    "SingleLayerCircuit",
    "Site",
    "SparseLaplace",
    "StochasticSynapses",
    "Sum",
    "Table",
    "TemporalRecognition",
    "UnknownName",
    "Values",
    "Wasserstein",
    "calibrated_scale",
    "check_guide",
    "exact",
    "fit",
    "flatten",
    "mixture",
    "seeded",
]


def exact(model: Any) -> Guide:
    """The model's exact posterior, which is a guide too."""
    guide: Guide = model.exact()
    return guide


GUIDES: Table[Callable[..., Guide]] = Table(
    "guide",
    {
        "exact": exact,
        "mean_field_encoder": MeanFieldEncoder,
        "full_covariance_encoder": FullCovarianceEncoder,
        "flow": Flow,
        "auto_normal": AutoNormal,
        "auto_multivariate_normal": AutoMultivariateNormal,
        "nuts": NUTS,
        "reservoir_sampler": ReservoirSampler,
        "random_reservoir": RandomReservoir,
        "energy_reservoir": EnergyReservoir,
        "sampler_only_rate": SamplerOnlyRate,
        "sampler_only_current": SamplerOnlyCurrent,
        "iterative_poisson": IterativePoisson,
        "online_poisson": OnlinePoisson,
        "iterative_gaussian": IterativeGaussian,
        "poisson_encoder": PoissonEncoder,
        "semi_amortised_poisson": SemiAmortisedPoisson,
        "lca": LCA,
        "ista": ISTA,
        "sparse_laplace": SparseLaplace,
        "single_layer_circuit": SingleLayerCircuit,
        "multi_layer_circuit": MultiLayerCircuit,
        "recurrent_circuit": RecurrentCircuit,
        "stochastic_synapses": StochasticSynapses,
        "recurrent_recognition": RecurrentRecognition,
        "noise_mlp": NoiseMLP,
        "temporal_recognition": TemporalRecognition,
    },
)
OBJECTIVES: Table[type[Objective]] = Table(
    "objective",
    {
        "elbo": ELBO,
        "forward_kl": ForwardKL,
        "denoising_score_matching": DenoisingScoreMatching,
        "noise_staircase": NoiseStaircase,
        "exact_score": ExactScore,
        "mixed_score": MixedScore,
        "implicit_score": ImplicitScore,
        "free_energy": FreeEnergy,
        "fixed_point": FixedPoint,
        "map_energy": MAPEnergy,
        "reliability_cost": ReliabilityCost,
        "adversarial": Adversarial,
        "prior_contrastive": PriorContrastive,
        "wasserstein": Wasserstein,
        "oscillating": Oscillating,
        "energy_score": EnergyScore,
        "reweighted_wake_sleep": ReweightedWakeSleep,
    },
)
