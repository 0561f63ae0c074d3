"""Generative models, each with its exact posterior beside it.

`MODELS` maps the names of the command line to classes; every one builds without arguments.
"""

from __future__ import annotations

from collections.abc import Mapping

from inference.errors import NoExactPosterior

from . import data
from .exact import ClosedForm, Enumerated
from .factor_analysis import FactorAnalysis
from .model import Model, Paper, from_pyro
from .quadrature import Quadrature
from .stored import StoredDraws

__all__ = [
    "MODELS",
    "ClosedForm",
    "Enumerated",
    "FactorAnalysis",
    "Model",
    "NoExactPosterior",
    "Paper",
    "Quadrature",
    "StoredDraws",
    "data",
    "from_pyro",
]

MODELS: Mapping[str, type[Model]] = {"factor_analysis": FactorAnalysis}
