"""What a fit does before its first step: devices, simulations, checks, players."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import BadInput, Incompatible
from .guide import Guide, check_counts
from .latents import Values
from .loop import Trainer
from .objective import Objective
from .observation import Observation, parts
from .seeds import seeded, stream

__all__ = ["check", "place", "simulations", "trainers"]


def place(device: str, modules: Sequence[object], x: Observation | None) -> Observation | None:
    """Everything on one device; returns x there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise BadInput(
            "device", expected="auto, cpu or cuda", got=repr(device), fix="device='auto'."
        ) from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput("device", expected="a GPU", got="none", fix="Use device='cpu' or 'auto'.")
    for module in modules:
        if isinstance(module, nn.Module):
            module.to(device)
    if not isinstance(x, Tensor | tuple) or not all(isinstance(t, Tensor) for t in parts(x)):
        return x
    return tuple(t.to(device) for t in x) if isinstance(x, tuple) else x.to(device)


def simulations(
    guide: Guide, x: Observation | None, n: int, seed: int
) -> tuple[Observation, Values]:
    """A fixed set of n draws from the joint."""
    check_counts(simulations=n)
    if x is not None or not guide.latents.plated:
        raise BadInput(
            "simulations",
            expected='x=None and a model whose latents are inside the plate "data"',
            got="observations" if x is not None else "a model whose data set is one problem",
            fix="Leave simulations out.",
        )
    z, made = guide.latents.joint(n, seed=stream(seed, 2))
    return made, z


def check(
    guide: Guide, objective: Objective | None, x: Observation | None, *, learn_model: bool
) -> None:
    """Refuse data, guides and objectives that do not fit together, and bind the guide to x."""
    if x is not None:
        guide.latents.check(x)
        guide.bind(x)
    elif not guide.amortised:
        raise BadInput(
            "x",
            expected=f"observations: {type(guide).__name__} has parameters for each problem",
            got="None (draws from the joint)",
            fix="Pass x, or use an amortised guide such as FullCovarianceEncoder.",
        )
    if objective is None and learn_model:
        raise Incompatible(
            f"{type(guide).__name__} with learn_model=True",
            expected="an objective",
            got="a guide without one",
            fix="Pass objective=ELBO() and a guide with a density.",
        )
    if objective is not None:
        objective.check(guide, joint=x is None, learn_model=learn_model)
        with torch.no_grad(), seeded(0):
            # the example is enough, and small; a guide that is not amortised knows only x
            guide.trace(guide.latents.like if x is None or guide.amortised else x)


def trainers(
    guide: Guide, objective: Objective | None, *, learn_model: bool, lr: float
) -> list[Trainer]:
    """One trainer per player with something to learn; the model joins the player "guide"."""
    found = []
    for name, player in (objective.players(guide) if objective else {}).items():
        modules = [player.module] + ([guide.model] if learn_model and name == "guide" else [])
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        if parameters:
            found.append(Trainer(name, parameters, player, lr))
    return found
