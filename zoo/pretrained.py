"""Circuits that come trained: small checkpoints in the package, each with a card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from inference import checkpoint as files
from inference.errors import BadCheckpoint, BadInput, NeuroguideError
from inference.fit import Fit
from inference.guide import Guide
from inference.observation import take
from inference.show import card, columns
from inference.table import Table

if TYPE_CHECKING:
    from .model import Model

__all__ = [
    "FOLDER",
    "PRETRAINED",
    "Pretrained",
    "digest",
    "pretrained",
    "pretrained_on",
    "state_hash",
    "told",
]

FOLDER = Path(__file__).parent / "pretrained_files"
SHOWN = "title", "paper", "data", "objective", "steps", "seed", "command", "licence"
UNTAUGHT = "exact", "nuts", "ista", "sparse_laplace"  # guides in which there is nothing to learn


@dataclass(frozen=True, repr=False)
class Pretrained:
    """A trained guide on file: a checkpoint, and a card that says how it came about.

    Attributes:
        name: key in `PRETRAINED`.
        guide: key in `inference.GUIDES`.
        model: key in `zoo.MODELS`.
        data: what the model was learned from; None where it is the model as it comes.
        folder: where both files lie.
    """

    name: str
    guide: str
    model: str
    data: str | None = None
    folder: Path = FOLDER

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def about(self) -> str:
        """One line."""
        learned = f", learned from {self.data}" if self.data else ""
        return f"{self.guide} on {self.model}{learned}".replace("_", " ")

    @property
    def card(self) -> dict[str, Any]:
        """Title, paper, data, command, seed, settings, metrics, licence and versions.

        Raises:
            BadCheckpoint: the card is missing or unreadable.
        """
        try:
            found: dict[str, Any] = json.loads(self.path.with_suffix(".json").read_text())
        except (OSError, ValueError) as error:
            raise self._unfit("its card", f"{type(error).__name__}: {error}") from error
        return found

    def load(self, model: Model | None = None) -> Guide:
        """The trained guide, on its model.

        Args:
            model: the model to put it on, as it comes from the table; by default it is built. Where
                it was learned it gets the learned parameters.

        Raises:
            BadCheckpoint: the files are missing or damaged, or the present code does not fit them.
        """
        from inference import GUIDES

        from . import MODELS

        said = self.card
        if self.path.exists() and digest(self.path) != said.get("sha256"):
            raise self._unfit("the file that its card describes", "another check sum")
        try:
            tensors, _ = files.read(self.path)
            if model is None:
                model = MODELS[self.model](**_tuples(said["model_knobs"]))
                model.keep(take(model.observations(), slice(0, said["knows"])))
            if "observations" in tensors:
                model = model.belonging_to(tensors["observations"])
                model.image_shape = tuple(said["image_shape"])
            guide = GUIDES[self.guide](model, **_tuples(said["guide_knobs"]))
            Fit.load(self.path, guide)
        except (NeuroguideError, TypeError, KeyError) as error:
            raise self._unfit("a checkpoint of the present code", str(error)) from error
        if state_hash(model) != said["model_hash"]:
            raise self._unfit("the model that it was trained on", "one with other parameters")
        return guide

    def _unfit(self, expected: str, got: str) -> BadCheckpoint:
        fix = f"Make it again: neuroguide train-pretrained {self.name}"
        return BadCheckpoint(str(self.path), expected=expected, got=got, fix=fix)

    def _rows(self) -> list[tuple[str, str]]:
        try:
            said = self.card
        except BadCheckpoint as error:  # what shows an object must not fail
            return [("card", str(error))]
        rows = [(key, str(said[key])) for key in SHOWN]
        return [*rows, *((n["title"], told(n)) for n in said["metrics"].values())]

    def __repr__(self) -> str:
        return columns([("name", self.name), *self._rows()])

    def _repr_html_(self) -> str:
        return card(f"{self.name}: {self.about}", self._rows())


def told(number: Mapping[str, Any]) -> str:
    """A number of a card with its standard error and, where it has one, its floor."""
    floor = "" if number.get("floor") is None else f" (floor {number['floor']:.3g})"
    return f"{number['value']:.4g} ± {number['se']:.2g}{floor}"


def pretrained(name: str) -> Guide:
    """A trained circuit from the package, on its model, which is its attribute `model`.

    Args:
        name: key in `PRETRAINED`, which says what there is: the guide's name in `inference.GUIDES`,
            and NAME_on_MODEL where it comes on several models.

    Raises:
        BadInput: there is none of that name.
        BadCheckpoint: the files are damaged, or the present code does not fit them.

    Example:
        >>> guide = pretrained("poisson_encoder")
        >>> x = guide.model.observations()[:2]
        >>> guide.draw(x, draws=5, chains=1, seed=0).values["z"].shape
        torch.Size([1, 5, 2, 3])
    """
    return _entry(name).load()


def pretrained_on(guide: str, model: str) -> Pretrained:
    """The entry of a guide on a model, as it comes or learned.

    Raises:
        BadInput: there is none; the message lists those of the model.
    """
    for entry in PRETRAINED.values():
        if (entry.guide, entry.model) == (guide, model):
            return entry
    there = [e.guide for e in PRETRAINED.values() if e.model == model]
    raise BadInput(
        f"pretrained {guide!r}",
        expected=f"one of those on {model}: {', '.join(there) or 'none'}",
        got=f"{guide}, which has no checkpoint on it",
        fix=_remedy(guide, [e.model for e in PRETRAINED.values() if e.guide == guide]),
    )


def _entry(name: str) -> Pretrained:
    if name in UNTAUGHT:
        raise BadInput(
            "pretrained guide",
            expected=f"one of {', '.join(sorted(PRETRAINED))}",
            got=repr(name),
            fix=_remedy(name, []),
        )
    return PRETRAINED[name]


def _remedy(guide: str, models: list[str]) -> str:
    if guide in UNTAUGHT:
        return f"There is nothing to learn in {guide}: build it, and draw."
    if models:
        return f"It comes on {', '.join(models)}; or train it: leave --pretrained out."
    return "Train it: leave --pretrained out."


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_hash(model: nn.Module) -> str:
    """SHA-256 of parameters and buffers, which count to four decimals, as machines differ."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        rounded = value.detach().cpu().double().round(decimals=4) + 0.0  # no minus zero
        found.update(name.encode() + rounded.numpy().tobytes())
    return found.hexdigest()


def _tuples(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs as they were before JSON made lists of tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()}


def _entries() -> dict[str, Pretrained]:
    mixture, poisson, contrast = "gaussian_mixture_latents", "poisson_coding", "observed_contrast"
    plain = [
        ("reservoir_sampler", mixture), ("random_reservoir", mixture),
        ("energy_reservoir", mixture), ("sampler_only_rate", mixture),
        ("sampler_only_current", mixture), ("online_poisson", poisson),
        ("poisson_encoder", poisson), ("semi_amortised_poisson", poisson),
        ("single_layer_circuit", contrast), ("multi_layer_circuit", contrast),
        ("recurrent_circuit", contrast), ("stochastic_synapses", "bayesian_regression"),
        ("recurrent_recognition", "explaining_away"), ("noise_mlp", "explaining_away"),
        ("temporal_recognition", "state_space"),
    ]  # fmt: skip
    twice = [
        ("reservoir_sampler", "laplace_mixture"),
        ("recurrent_circuit", "factor_analysis"),
        ("stochastic_synapses", "bayesian_mlp"),
    ]
    learned = [
        ("iterative_poisson", poisson, "digits"),
        ("iterative_gaussian", "factor_analysis", "digits"),
        ("lca", "sparse_coding", "patches"),
    ]
    found = [Pretrained(g, g, m) for g, m in plain]
    found += [Pretrained(f"{g}_on_{m}", g, m) for g, m in twice]
    found += [Pretrained(g, g, m, data) for g, m, data in learned]
    return {e.name: e for e in found}


PRETRAINED: Table[Pretrained] = Table("pretrained guide", _entries(), say=lambda e: e.about)
