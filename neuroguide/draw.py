"""The command `draw`: draws of a guide that is trained already, by a run or in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import diagnostics
import inference
import zoo
from diagnostics.rundir import RunDirectory
from inference.errors import BadInput
from inference.files import write_netcdf
from inference.guide import Guide
from inference.observation import take
from zoo.pretrained import pretrained_on

from . import pipeline

__all__ = ["draw"]

out = Console()


def draw(
    model: Annotated[str, typer.Argument(help="A model of `neuroguide list`.")],
    guide: Annotated[str, typer.Argument(help="A guide of `neuroguide list`.")],
    run: Annotated[
        Path | None, typer.Option(help="Run directory of `fit` or `compare` that trained it.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Take the one that comes trained.")
    ] = False,
    problems: Annotated[int, typer.Option(help="Observations.")] = 10,
    draws: Annotated[int, typer.Option(help="Draws per chain.")] = 1000,
    chains: Annotated[int, typer.Option(help="Chains.")] = 4,
    seed: Annotated[int, typer.Option(help="Draws depend on it alone.")] = 0,
    out_path: Annotated[Path, typer.Option("--out", help="NetCDF file.")] = Path("draws.nc"),
) -> None:
    """Draw from a trained guide, and keep the draws as an ArviZ DataTree.

    Example: neuroguide draw gaussian_mixture_latents reservoir_sampler --pretrained --out draws.nc
    """
    zoo.MODELS[model]
    inference.GUIDES[guide]
    built, x = _trained(model, guide, run, problems, shipped=pretrained)
    tree = diagnostics.draw(built.model, built, x, draws=draws, chains=chains, seed=seed)
    write_netcdf(out_path, tree)
    out.print(f"draws      {out_path}")


def _trained(
    model: str, guide: str, run: Path | None, problems: int, *, shipped: bool
) -> tuple[Guide, Any]:
    """The guide and the observations: those of the run, or the model's first."""
    if run is not None and not shipped:
        found, x = pipeline.trained(RunDirectory.open(run), model, guide)
        return found, _few(found, x, problems)
    if shipped and run is None:
        built = pretrained_on(guide, model).load()
        return built, _few(built, built.model.observations(), problems)
    built = inference.GUIDES[guide](zoo.MODELS[model]())
    if run is None and pipeline.nothing_to_learn(built):
        return built, _few(built, built.model.observations(), problems)
    raise BadInput(
        f"guide {guide!r}",
        expected="one that is trained: either --pretrained or --run DIRECTORY",
        got="both" if run else "neither",
        fix=f"Train it: neuroguide fit {model} {guide} --out DIRECTORY; or see zoo.PRETRAINED.",
    )


def _few(guide: Guide, x: Any, problems: int) -> Any:
    """The first of the observations; all that it knows, of a guide that knows no others."""
    whole = not (guide.amortised and guide.latents.plated)
    return x if whole else take(x, slice(0, problems))
