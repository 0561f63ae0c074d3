"""Generative models, each with its exact posterior beside it.

`MODELS` maps the names of the command line to classes; every one builds without arguments.
"""

from __future__ import annotations

from collections.abc import Mapping

from inference.errors import NoExactPosterior

from . import data
from .banana import Banana
from .exact import ClosedForm, Enumerated
from .explaining_away import ExplainingAway
from .factor_analysis import FactorAnalysis
from .gaussian_mixture_latents import GaussianMixtureLatents
from .gibbs import Gibbs
from .hidden_markov import HiddenMarkov
from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .log_concave import LogConcave
from .markov import ForwardBackward, MarkovChain
from .mixture import GaussianMixture, MixturePosterior
from .model import Model, Paper, from_pyro
from .quadrature import Quadrature
from .stored import StoredDraws
from .switching import SwitchingPosterior
from .truncated import TruncatedNormal
from .two_stage import TwoStage

__all__ = [
    "MODELS",
    "Banana",
    "ClosedForm",
    "Enumerated",
    "ExplainingAway",
    "FactorAnalysis",
    "ForwardBackward",
    "GaussianMixture",
    "GaussianMixtureLatents",
    "Gibbs",
    "HiddenMarkov",
    "LinearGaussian",
    "LinearGaussianPosterior",
    "LogConcave",
    "MarkovChain",
    "MixturePosterior",
    "Model",
    "NoExactPosterior",
    "Paper",
    "Quadrature",
    "StoredDraws",
    "SwitchingPosterior",
    "TruncatedNormal",
    "TwoStage",
    "data",
    "from_pyro",
]

MODELS: Mapping[str, type[Model]] = {
    "factor_analysis": FactorAnalysis,
    "explaining_away": ExplainingAway,
    "gaussian_mixture_latents": GaussianMixtureLatents,
    "banana": Banana,
    "hidden_markov": HiddenMarkov,
}
