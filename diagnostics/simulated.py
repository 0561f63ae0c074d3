"""Problems from the joint and a guide's draws for each: what every check of calibration needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from inference import checkpoint as files
from inference.errors import BadCheckpoint, Incompatible
from inference.guide import Guide, check_counts
from inference.latents import ModelLike, Values
from inference.observation import Observation, fingerprint, parts, take
from inference.progress import bar
from inference.seeds import seeded, stream
from inference.show import title_of

from .draws import tree_of

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["Chunk", "Measure", "Simulations", "pit"]

Array = np.ndarray[Any, Any]
CHUNK = 50  # problems drawn for at once
CIRCUIT_THIN = 10  # kept: every tenth draw of a guide whose draws are correlated
PROBLEMS, DRAWS, TIES = 0, 1, 2  # streams of the seed; other modules take theirs from 3 on


@dataclass(frozen=True)
class Chunk:
    """B problems and what a guide draws for them.

    Attributes:
        x: observation of B problems.
        z: the latents that made x and, behind them, L draws: by site, each (1 + L, B, *shape).
        rng: for what is broken at random; depends on the seed and the chunk alone.
    """

    x: Observation
    z: Values
    rng: np.random.Generator


Measure = Callable[[Chunk], Mapping[str, Array]]  # numbers by quantity, each (B, ...)


def pit(values: Tensor, rng: np.random.Generator) -> Array:
    """(rank + u) / (L + 1), uniform where row 0 is exchangeable with the others.

    Args:
        values: (1 + L, B, ...), the truth and, behind it, L draws.
        rng: breaks ties, and draws u from Uniform(0, 1).

    Returns:
        Numbers in [0, 1], (B, ...): small where the truth lies below the draws.
    """
    found = values.cpu().numpy()
    truth, draws = found[0], found[1:]
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    rank = below + np.floor(rng.uniform(size=below.shape) * (ties + 1))
    result: Array = (rank + rng.uniform(size=rank.shape)) / (len(draws) + 1)
    return result


@dataclass(frozen=True)
class Simulations:
    """Problems from a model's joint, to be drawn for by an amortised guide, chunk by chunk.

    Args:
        model: the model; only those without factors can be simulated.
        guide: an amortised guide of it, the exact posterior included.
        problems: simulated observations.
        draws: L, kept for each of them.
        thin: keep every thin-th draw; by default 1, or 10 if the guide's draws are correlated.
        seed: everything depends on it alone.

    Raises:
        Incompatible: the guide has parameters for each problem.
        BadInput: a count is below 1.
    """

    model: ModelLike
    guide: Guide
    problems: int
    draws: int
    thin: int | None
    seed: int

    def __post_init__(self) -> None:
        check_counts(problems=self.problems, draws=self.draws, thin=self.step)
        if not self.guide.amortised:
            raise Incompatible(
                type(self.guide).__name__,
                expected="a guide that answers for any x",
                got="one with parameters for each problem",
                fix="Use an amortised guide, or compare it with the exact posterior.",
            )

    @property
    def step(self) -> int:
        """How many draws are made for each that is kept."""
        default = 1 if self.guide.independent else CIRCUIT_THIN
        return default if self.thin is None else self.thin

    @property
    def attrs(self) -> dict[str, Any]:
        """What was done, for the tree."""
        return {
            "model": title_of(self.model),
            "guide": type(self.guide).__name__,
            "seed": self.seed,
            "draws": self.draws,
            "thin": self.step,
        }

    def tree(
        self,
        kind: str,
        measure: Measure,
        *,
        progress: bool,
        checkpoint: str | Path | None,
        dims: Mapping[str, list[str]] | None = None,
    ) -> DataTree:
        """What `measure` finds, problem by problem, as the group `prior_sbc`.

        Args:
            kind: name of the check; part of the settings of a checkpoint.
            measure: from a chunk to numbers by quantity.
            progress: show a bar.
            checkpoint: a file that is written after each chunk. A later call with the same
                settings goes on from it, with the numbers of an unbroken run.
            dims: names of the axes of quantities other than the latents.

        Returns:
            By quantity, dims (chain, draw, ...): one chain with a draw for each problem.

        Raises:
            BadCheckpoint: the file is damaged or belongs to other settings.
            OutputError: the file cannot be written.
        """
        lat = self.guide.latents
        z, x = lat.joint(self.problems, seed=stream(self.seed, PROBLEMS))
        store = _Store(checkpoint, self._settings(kind, z, x) if checkpoint else {})
        chunks = list(self._pieces(z, x))
        with bar(kind, len(chunks), start=store.done, show=progress) as advance:
            for k in range(store.done, len(chunks)):
                with torch.no_grad(), seeded(self.seed, TIES, k):
                    store.add(measure(self._drawn(k, *chunks[k])))
                advance()
        arrays = {n: np.concatenate(v)[None] for n, v in store.found.items()}
        known = {**getattr(self.model, "dims", {}), **(dims or {})}
        names = {n: list(axes) for n, axes in known.items() if n in arrays}
        tree = tree_of({"prior_sbc": arrays}, lat, names)
        tree.attrs = self.attrs
        return tree

    def _pieces(self, z: Values, x: Observation) -> Iterator[tuple[Values, Observation]]:
        """Chunks of problems; one at a time where a data set is one problem."""
        plated = self.guide.latents.plated
        step = CHUNK if plated else 1
        for i in range(0, self.problems, step):
            piece = take(x, slice(i, i + step))
            if not plated:
                piece = tuple(t[0] for t in piece) if isinstance(piece, tuple) else piece[0]
            yield {name: v[i : i + step] for name, v in z.items()}, piece

    def _drawn(self, k: int, z: Values, x: Observation) -> Chunk:
        seed, step = stream(self.seed, DRAWS, k), self.step
        found = self.guide.draw(x, draws=self.draws * step, chains=1, seed=seed).values
        both = {n: torch.cat([v[None], found[n][0, step - 1 :: step]]) for n, v in z.items()}
        return Chunk(x, both, np.random.default_rng(stream(self.seed, TIES, k)))

    def _settings(self, kind: str, z: Values, x: Observation) -> dict[str, Any]:
        """All that decides the numbers; the simulated problems stand for the model's program."""
        return {
            "kind": kind,
            **self.attrs,
            "problems": self.problems,
            "knobs": self.guide.knobs,
            "model parameters": _state(self.model),
            "guide parameters": _state(self.guide),
            "simulated": fingerprint(*z.values(), *parts(x)),
        }


def _state(module: object) -> str:
    return fingerprint(*module.state_dict().values()) if isinstance(module, nn.Module) else ""


class _Store:
    """Results by chunk, on disk too if there is a path."""

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = Path(path) if path else None
        self.settings = files.plain(settings)
        self.found: dict[str, list[Array]] = {}
        self.done = 0
        if self.path and self.path.exists():
            self._resume(self.path)

    def add(self, results: Mapping[str, Array]) -> None:
        """Take one more chunk and write what there is so far."""
        for name, values in results.items():
            self.found.setdefault(name, []).append(values)
        self.done += 1
        if self.path:
            tensors = {n: torch.from_numpy(np.concatenate(v)) for n, v in self.found.items()}
            header = {"settings": self.settings, "done": self.done, "names": list(self.found)}
            files.write(self.path, tensors, header | {"versions": files.versions()})

    def _resume(self, path: Path) -> None:
        tensors, header = files.read(path)
        saved = header["settings"]
        if differ := [
            k for k in {**self.settings, **saved} if saved.get(k) != self.settings.get(k)
        ]:
            raise BadCheckpoint(
                str(path),
                expected=", ".join(f"{k}={self.settings.get(k)!r}" for k in differ),
                got=", ".join(f"{k}={saved.get(k)!r}" for k in differ),
                fix="Use the settings of the saved run, or another checkpoint path.",
            )
        self.found = {n: [tensors[n].numpy()] for n in header["names"]}
        self.done = header["done"]
