"""Guides, the objectives that train them, and the loop that does it.

`GUIDES` and `OBJECTIVES` map the names of the command line to classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import (
    BadCheckpoint,
    BadInput,
    Diverged,
    Incompatible,
    NeuroguideError,
    NoDensity,
    NoExactPosterior,
    OutputError,
    lookup,
)
from .fit import Fit, fit
from .guide import Draws, Guide, HasDensity, HasEvidence, HasNoise, HasRsample, HasScore
from .guides.autoguide import AutoMultivariateNormal, AutoNormal
from .guides.encoder import FullCovarianceEncoder, MeanFieldEncoder
from .guides.flow import Flow
from .guides.nuts import NUTS
from .implicit import Implicit
from .latents import Latents, ModelLike, Site, Values
from .objective import Objective, Player
from .objectives.elbo import ELBO
from .objectives.forward_kl import ForwardKL
from .observation import Observation
from .packed import PackedGuide

__all__ = [
    "ELBO",
    "GUIDES",
    "NUTS",
    "OBJECTIVES",
    "AutoMultivariateNormal",
    "AutoNormal",
    "BadCheckpoint",
    "BadInput",
    "Diverged",
    "Draws",
    "Fit",
    "Flow",
    "ForwardKL",
    "FullCovarianceEncoder",
    "Guide",
    "HasDensity",
    "HasEvidence",
    "HasNoise",
    "HasRsample",
    "HasScore",
    "Implicit",
    "Incompatible",
    "Latents",
    "MeanFieldEncoder",
    "ModelLike",
    "NeuroguideError",
    "NoDensity",
    "NoExactPosterior",
    "Objective",
    "Observation",
    "OutputError",
    "PackedGuide",
    "Player",
    "Site",
    "Values",
    "exact",
    "fit",
    "lookup",
]


def exact(model: Any) -> Guide:
    """The model's exact posterior, which is a guide too."""
    guide: Guide = model.exact()
    return guide


GUIDES: Mapping[str, Callable[..., Guide]] = {
    "exact": exact,
    "mean_field_encoder": MeanFieldEncoder,
    "full_covariance_encoder": FullCovarianceEncoder,
    "flow": Flow,
    "auto_normal": AutoNormal,
    "auto_multivariate_normal": AutoMultivariateNormal,
    "nuts": NUTS,
}
OBJECTIVES: Mapping[str, type[Objective]] = {"elbo": ELBO, "forward_kl": ForwardKL}
