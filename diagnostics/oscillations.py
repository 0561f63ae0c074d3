"""What an oscillating circuit does while evoked and dreamt states alternate."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from inference.codes import Codes
from inference.errors import BadInput, Incompatible
from inference.guide import Guide
from inference.latents import Latents
from inference.objectives.oscillating import Oscillating
from inference.observation import Observation, flatten
from inference.show import title_of

from .draws import array, beside
from .style import labels_of

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["ALTERNATION", "oscillations"]

ALTERNATION = (0.45, 0.5)  # cycles per step, the band of what alternates from step to step


def oscillations(
    game: Oscillating, guide: Guide, x: Observation, *, cycles: int = 32, trials: int = 8, seed: int
) -> DataTree:
    """Let a circuit alternate between what x evokes and what it dreams, and watch all its neurons.

    A cycle is two steps, the evoked state and the one that bounces back from it. What differs
    between them on average oscillates at half a cycle per step. So `ALTERNATION` is the band for
    `diagnostics.oscillation_amplitude` and `diagnostics.oscillation_against_surprise`, which take
    the tree as it is. Draws are random, which adds white noise to the circuit; more cycles make its
    share of the band no smaller, but better known.

    Args:
        game: the one that trained the guide.
        guide: with differentiable draws.
        x: observation of B problems.
        cycles: for each trial; ten at least, or the band is too narrow.
        trials: repetitions.
        seed: everything depends on it alone.

    Returns:
        The group `circuit`: `potentials` (chain, draw, problem, neuron), the layers from x up, in
        units of the joint, and `rates` (chain, draw, problem, critic), softplus(T). Chains are
        trials and draws are steps, with the coordinate `state`, evoked or dreamt. Neurons and
        critics have the names of the sites they belong to.

    Raises:
        BadInput: the game has not been played, or a count or x is not what it should be.
        Incompatible: the game was played with a guide of another model.

    References:
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2021), whose
        abstract predicts oscillations that grow with surprise https://arxiv.org/abs/2006.10811

    Differences:
        The papers' measure of amplitude was not available.

    Example:
        >>> import inference, zoo
        >>> from diagnostics.oscillations import oscillations
        >>> model = zoo.LayeredGaussian()
        >>> game, guide = inference.Oscillating(hidden=(8,)), model.exact()
        >>> critics = game.players(guide)["critic"]  # `inference.fit` does it, and trains them
        >>> tree = oscillations(game, guide, model.observations()[:3], trials=2, seed=0)
        >>> tree["circuit"]["critic"].values.tolist()
        ['x | z1', 'z1 | z2', 'z2']
    """
    import xarray

    lat = guide.latents
    layers = _layers(lat, x)
    _check(game, list(layers.values()))
    found = game.oscillate(guide, beside(guide, x), cycles=cycles, trials=trials, seed=seed).circuit
    axes = ("chain", "draw", "problem")
    seen = {
        "potentials": ((*axes, "neuron"), array(found["potentials"])),
        "rates": ((*axes, "critic"), array(found["rates"])),
    }
    pairs = [f"{low} | {high}" for low, high in pairwise(layers)]
    coords = {
        "neuron": labels_of(layers),
        "critic": [*pairs, list(layers)[-1]],
        "state": ("draw", ["evoked", "dreamt"] * cycles),
    }
    tree = xarray.DataTree.from_dict({"circuit": xarray.Dataset(seen, coords)})
    tree.attrs = {
        "model": title_of(guide.model),
        "guide": type(guide).__name__,
        "seed": seed,
    }
    return tree


def _layers(lat: Latents, x: Observation) -> dict[str, int]:
    """Neurons in each layer, from the observation up to the first site of the program."""
    lat.check(x)
    sizes = Codes(lat, "oscillations").sizes
    features = flatten(x, lat.problems(x)).shape[1]
    return {lat.observed: features} | {name: sizes[name] for name in reversed(lat.names)}


def _check(game: Oscillating, sizes: list[int]) -> None:
    """Refuse a game without critics, or with those of another model."""
    if not hasattr(game, "critic"):
        raise BadInput(
            "game", expected="a game that was played", got="one without critics",
            fix="inference.fit(model, guide, objective=game) trains them.",
        )  # fmt: skip
    known = [len(game.members[0].units.x_loc), *[len(c.units.u_loc) for c in game.members]]
    if known[:-1] != sizes:
        raise Incompatible(
            "game with guide", expected=f"layers of {known[:-1]} neurons, as it was played with",
            got=str(sizes), fix="Pass the guide that the game trained.",
        )  # fmt: skip
