"""Generative models, each with its exact posterior beside it.

`MODELS` maps the names of the command line to classes; every one builds without arguments.
"""

from __future__ import annotations

from inference.errors import NoExactPosterior
from inference.table import Table

from . import data
from .banana import Banana
from .bayesian_mlp import BayesianMLP
from .bayesian_regression import BayesianRegression
from .bernoulli_glm import BernoulliGLM
from .bimodal import Bimodal
from .causal_inference import CausalInference
from .continuous_sprinkler import ContinuousSprinkler
from .eight_schools import EightSchools
from .exact import ClosedForm, Enumerated
from .explaining_away import ExplainingAway
from .factor_analysis import FactorAnalysis
from .four_neurons import FourNeurons
from .gaussian_linear import GaussianLinear
from .gaussian_linear_uniform import GaussianLinearUniform
from .gaussian_mixture_latents import GaussianMixtureLatents
from .gaussian_mixture_sbi import GaussianMixtureSBI
from .gaussian_video import GaussianVideo
from .gibbs import Gibbs
from .hidden_markov import HiddenMarkov
from .laplace_mixture import LaplaceMixture
from .layered_gaussian import LayeredGaussian
from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .log_concave import LogConcave
from .logistic_regression import LogisticRegression
from .markov import ForwardBackward, MarkovChain
from .mixture import GaussianMixture, MixturePosterior
from .model import Model, Paper, from_pyro
from .moving_ball import MovingBall
from .necker import Necker
from .noisy_or import NoisyOr
from .plaid_motion import PlaidMotion
from .poisson_coding import PoissonCoding
from .pretrained import PRETRAINED, Pretrained, pretrained
from .product import Product
from .quadrature import Quadrature
from .rectified_coding import RectifiedCoding
from .recurrent_generator import RecurrentGenerator
from .ring import Ring
from .scale_mixture import ObservedContrast, ScaleMixture
from .slcp import SLCP
from .sparse_coding import SparseCoding
from .spike_and_slab import SpikeAndSlab
from .sprinkler import Sprinkler
from .square_root import SquareRoot
from .state_space import StateSpace
from .stored import StoredDraws
from .switching import SwitchingPosterior
from .target import Target
from .truncated import TruncatedNormal
from .two_moons import TwoMoons
from .two_stage import TwoStage

__all__ = [
    "MODELS",
    "PRETRAINED",
    "SLCP",
    "Banana",
    "BayesianMLP",
    "BayesianRegression",
    "BernoulliGLM",
    "Bimodal",
    "CausalInference",
    "ClosedForm",
    "ContinuousSprinkler",
    "EightSchools",
    "Enumerated",
    "ExplainingAway",
    "FactorAnalysis",
    "ForwardBackward",
    "FourNeurons",
    "GaussianLinear",
    "GaussianLinearUniform",
    "GaussianMixture",
    "GaussianMixtureLatents",
    "GaussianMixtureSBI",
    "GaussianVideo",
    "Gibbs",
    "HiddenMarkov",
    "LaplaceMixture",
    "LayeredGaussian",
    "LinearGaussian",
    "LinearGaussianPosterior",
    "LogConcave",
    "LogisticRegression",
    "MarkovChain",
    "MixturePosterior",
    "Model",
    "MovingBall",
    "Necker",
    "NoExactPosterior",
    "NoisyOr",
    "ObservedContrast",
    "Paper",
    "PlaidMotion",
    "PoissonCoding",
    "Pretrained",
    "Product",
    "Quadrature",
    "RectifiedCoding",
    "RecurrentGenerator",
    "Ring",
    "ScaleMixture",
    "SparseCoding",
    "SpikeAndSlab",
    "Sprinkler",
    "SquareRoot",
    "StateSpace",
    "StoredDraws",
    "SwitchingPosterior",
    "Target",
    "TruncatedNormal",
    "TwoMoons",
    "TwoStage",
    "data",
    "from_pyro",
    "pretrained",
]

MODELS: Table[type[Model]] = Table(
    "model",
    {
        "factor_analysis": FactorAnalysis,
        "explaining_away": ExplainingAway,
        "gaussian_mixture_latents": GaussianMixtureLatents,
        "bimodal": Bimodal,
        "laplace_mixture": LaplaceMixture,
        "square_root": SquareRoot,
        "ring": Ring,
        "banana": Banana,
        "product": Product,
        "continuous_sprinkler": ContinuousSprinkler,
        "four_neurons": FourNeurons,
        "layered_gaussian": LayeredGaussian,
        "recurrent_generator": RecurrentGenerator,
        "sparse_coding": SparseCoding,
        "spike_and_slab": SpikeAndSlab,
        "scale_mixture": ScaleMixture,
        "observed_contrast": ObservedContrast,
        "poisson_coding": PoissonCoding,
        "rectified_coding": RectifiedCoding,
        "bayesian_regression": BayesianRegression,
        "logistic_regression": LogisticRegression,
        "bayesian_mlp": BayesianMLP,
        "noisy_or": NoisyOr,
        "sprinkler": Sprinkler,
        "state_space": StateSpace,
        "hidden_markov": HiddenMarkov,
        "moving_ball": MovingBall,
        "gaussian_video": GaussianVideo,
        "causal_inference": CausalInference,
        "necker": Necker,
        "plaid_motion": PlaidMotion,
        "two_moons": TwoMoons,
        "gaussian_mixture_sbi": GaussianMixtureSBI,
        "gaussian_linear": GaussianLinear,
        "gaussian_linear_uniform": GaussianLinearUniform,
        "slcp": SLCP,
        "bernoulli_glm": BernoulliGLM,
        "eight_schools": EightSchools,
    },
)
