"""Reference draws on file, with where they came from and how good they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from inference.checkpoint import versions
from inference.errors import BadCheckpoint, BadInput
from inference.files import write_netcdf
from inference.guide import Draws, Guide, check_counts
from inference.implicit import Implicit
from inference.latents import Values
from inference.observation import Observation, flatten, parts
from inference.seeds import seeded

from .model import Model

__all__ = ["StoredDraws", "reference_path", "source_hash"]

MAX_RHAT = 1.01  # the standard of public reference posteriors


def reference_path(name: str) -> Path:
    """Where the draws of a model of the zoo lie: inside the package."""
    return Path(__file__).parent / "reference" / f"{name}.nc"


def source_hash(model: Model) -> str:
    """SHA-256 of the model's source and parameters: changes when the model does.

    Parameters count to four decimals, so that neither the dtype nor the last bit of another
    machine's arithmetic makes another model.
    """
    digest = hashlib.sha256(model.source().encode())
    for name, value in sorted(model.state_dict().items()):
        rounded = value.detach().cpu().double().round(decimals=4) + 0.0  # no minus zero
        digest.update(name.encode() + rounded.numpy().tobytes())
    return digest.hexdigest()


class StoredDraws(Guide):
    """Long-run draws for the observations they were made for, and for no others.

    Args:
        model: the model they are draws of.
        path: NetCDF file written by :meth:`write`.

    Raises:
        BadCheckpoint: no such file, not one of ours, or made by another version of the model.
    """

    kind: ClassVar[str] = "reference"

    def __init__(self, model: Model, path: str | Path) -> None:
        super().__init__(model, path=str(path))
        tree = _open(Path(path))
        self.attrs: dict[str, Any] = dict(tree.attrs)
        if self.attrs.get("source_hash") != source_hash(model):
            raise BadCheckpoint(
                str(path),
                expected="draws made by the present source of the model",
                got="another source hash",
                fix=f"Make them again: {self.attrs.get('command', 'StoredDraws.write(...)')}",
            )
        like = parts(self.latents.like)[0]
        data = tree["posterior"].dataset
        for s in self.latents.sites:
            pool = torch.as_tensor(data[s.name].values).to(like).flatten(0, 1)
            self.register_buffer(f"pool_{s.name}", pool, persistent=False)  # (S, B, *shape)
        known = torch.as_tensor(tree["observed_data"]["x"].values).to(like)
        self.register_buffer("known", known, persistent=False)

    def _pool(self, name: str) -> Tensor:
        pool: Tensor = getattr(self, f"pool_{name}")
        return pool

    def _rows(self, x: Observation) -> Tensor:
        """Which stored problem each problem of x is."""
        self.latents.check(x)
        asked = flatten(x, self.latents.problems(x))
        same = (asked[:, None] - self.known[None]).abs().amax(-1) == 0
        if not bool(same.any(1).all()):
            raise BadInput(
                "x",
                expected=f"some of the {len(self.known)} observations of {self.knobs['path']}",
                got=f"problem {int((~same.any(1)).nonzero()[0])}, which is not among them",
                fix="Use model.observations(), or make reference draws for this x.",
            )
        rows: Tensor = same.float().argmax(1)
        return rows

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Stored draws at random, none of them twice.

        Raises:
            BadInput: x was not stored, or more draws are asked for than there are.
        """
        check_counts(draws=draws, chains=chains)
        rows, have = self._rows(x), len(self._pool(self.latents.names[0]))
        if draws * chains > have:
            raise BadInput(
                "draws",
                expected=f"at most {have} in all, as many as are stored",
                got=f"{chains} chains of {draws}",
                fix="Ask for fewer, or store more.",
            )
        with seeded(seed):
            pick = torch.randperm(have)[: draws * chains]
        values = {n: self._pool(n)[pick][:, rows] for n in self.latents.names}
        return Draws({n: v.reshape(chains, draws, *v.shape[1:]) for n, v in values.items()})

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Standard error of a stored mean, in posterior sds, (B,)."""
        size = float(self.attrs["ess_min"]) ** -0.5
        return {"mean": torch.full((self.latents.problems(x),), size)}

    def forward(self, x: Observation) -> Values:
        """One stored draw per problem; there is no density."""
        rows, lat = self._rows(x), self.latents
        pick = torch.randint(len(self._pool(lat.names[0])), rows.shape)
        with lat.plate(x):
            drawn = {n: self._pool(n)[pick, rows] for n in lat.names}
            drawn = drawn if lat.plated else {n: v[0] for n, v in drawn.items()}
            return self.sample_sites(lambda s: Implicit(drawn[s.name], event_dim=s.event_dim))

    @staticmethod
    def write(
        path: str | Path,
        guide: Guide,
        x: Observation,
        *,
        draws: int,
        chains: int,
        seed: int,
        command: str,
        progress: bool = False,
    ) -> None:
        """Run a guide, such as NUTS, and keep its draws with their provenance.

        Args:
            path: file to write, atomically.
            guide: what makes the draws.
            x: observation of B problems.
            draws: draws per chain.
            chains: at least two, or R-hat means nothing.
            seed: of the draws.
            command: the command that makes this file again.
            progress: show a bar.

        Raises:
            BadInput: R-hat of some latent is 1.01 or more.
        """
        import arviz_stats
        from arviz_base import from_dict

        found = guide.draw(x, draws=draws, chains=chains, seed=seed, progress=progress)
        features = flatten(x, guide.latents.problems(x)).cpu().numpy()
        tree = from_dict(
            {
                "posterior": {n: v.cpu().numpy() for n, v in found.values.items()},
                "observed_data": {"x": features},
            },
            dims={n: ["problem"] for n in (*found.values, "x")},
        )
        data = tree["posterior"].dataset
        rhat = _extreme(arviz_stats.rhat(data), np.max)
        if not rhat < MAX_RHAT:
            raise BadInput(
                "draws",
                expected=f"R-hat below {MAX_RHAT} for every latent",
                got=f"{rhat:.3f}",
                fix="Run longer chains, or more warm-up.",
            )
        tree.attrs = {
            "method": type(guide).__name__,
            "knobs": str(guide.knobs),
            "command": command,
            "seed": seed,
            "rhat_max": rhat,
            "ess_min": _extreme(arviz_stats.ess(data), np.min),
            "source_hash": source_hash(guide.model),
            **{f"version_{name}": v for name, v in versions().items()},
        }
        write_netcdf(Path(path), tree, encoding=_small(tree))


def _small(tree: Any) -> dict[str, Any]:
    """Compression, and 16 bits for each draw where they resolve 1/500 of every posterior sd.

    Whole numbers, which counts are, come back as whole numbers.
    """
    found = {}
    for name, variable in tree["posterior"].dataset.data_vars.items():
        packing: dict[str, Any] = {"zlib": True, "shuffle": True, "complevel": 9}
        step = float(np.abs(variable.values).max()) / 32767
        whole = step <= 1 and bool((variable == variable.round()).all())
        fine = step < float(variable.std(("chain", "draw")).min()) / 500
        if variable.dtype.kind == "f" and (whole or fine):
            scale = 1.0 if whole else step
            packing |= {"dtype": "int16", "scale_factor": scale, "_FillValue": -32768}
        found[name] = packing
    return {"/posterior": found}


def _extreme(data: Any, pick: Any) -> float:
    return float(pick([pick(v.values) for v in data.data_vars.values()]))


def _open(path: Path) -> Any:
    import xarray

    try:
        return xarray.open_datatree(path, engine="h5netcdf").load()
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(
            str(path),
            expected="a NetCDF file written by StoredDraws.write",
            got=f"{type(error).__name__}: {error}",
            fix="Check the path, or write the file again.",
        ) from error
