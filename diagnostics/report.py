"""A self-contained HTML page for a run."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.gauges import said

from . import (
    plot_calibration,
    plot_circuits,
    plot_recognition,
    plot_refinement,
    plot_reliability,
    plot_scores,
    plot_signatures,
    plots,
)
from .compare import EXACT, summary
from .draws import packed
from .film import GROUP, film
from .metrics import METRICS
from .page import number, write_page
from .reliability import variability_against_uncertainty
from .rundir import RunDirectory
from .signature_fits import MIN_COUNTS, MIN_POINTS
from .verdict import AT_FLOOR, labels, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import Dataset, DataTree

__all__ = ["report", "table", "telling", "trees_of"]


def telling(comparison: Dataset) -> Dataset:
    """Without the metrics that say nothing of any guide, such as those of discrete latents."""
    return comparison.sel(metric=comparison.value.notnull().any(["guide", "problem"]))


def table(comparison: Dataset) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Guides and cells of the metric table: text, standard error, state and reason.

    The state is "floor" for the exact posterior against itself, "at" or "above" the floor for
    guides, and "plain" where there is nothing to judge.
    """
    means = summary(comparison)
    guides = [str(g) for g in means.guide.values]
    rows = []
    for guide in guides:
        row = []
        for name in means.metric.values:
            cell = means.sel(guide=guide, metric=name)
            judged = guide != EXACT and not math.isnan(float(cell.excess_se))
            state = "floor" if guide == EXACT else "plain"
            state = ("at" if bool(cell.at_floor) else "above") if judged else state
            error = float(cell.se)
            row.append(
                {
                    "text": number(float(cell.value)),
                    "se": "" if math.isnan(error) else f"± {number(float(f'{error:.1g}'))}",
                    "state": state,
                    "reason": str(cell.reason.values),
                }
            )
        rows.append(row)
    return guides, rows


def report(path: str | Path) -> Path:
    """Write report.html into a run directory; nothing it shows needs a network.

    First a verdict on each guide in words and what fits warn of, then pictures, of videos a film
    among them, then every metric beside its floor.

    Args:
        path: a directory that `neuroguide compare` or `neuroguide fit` has written.

    Returns:
        The page's path.

    Raises:
        BadCheckpoint: not a run, or not a finished one.
        OutputError: the page cannot be written.
    """
    run = RunDirectory.open(path)
    losses, health = run.losses(), run.health()
    content = _compared(run) if run.path.joinpath("draws.nc").exists() else {}
    pictures = content.pop("pictures", {})
    if (ranks := run.calibration()) is not None:
        pictures["calibration"] = plot_calibration.ecdf(ranks)
    if losses:
        pictures["losses"] = plots.losses(losses)
    if games := {n: seen for n, seen in health.items() if plot_recognition.GAUGES & seen.keys()}:
        pictures["game"] = plot_recognition.game(games, inks={n: plots.colour(n) for n in games})
    content["warned"] = [(n, plots.colour(n), s) for n, seen in health.items() for s in said(seen)]
    shown = {name: _png(figure) for name, figure in pictures.items() if figure is not None}
    target = run.path / "report.html"
    write_page(target, "report.html.j2", run=run, pictures=shown, **content)
    return target


def trees_of(draws: DataTree) -> Mapping[str, DataTree]:
    """Draws by guide, the exact posterior first."""
    children = dict(draws.children)
    return {EXACT: children.pop(EXACT)} | children


def _compared(run: RunDirectory) -> dict[str, Any]:
    """What a run with draws has to show: verdicts, pictures and the metric table."""
    draws, whole = run.draws(), run.comparison()
    trees, comparison = trees_of(draws), telling(whole)
    guides, rows = table(comparison)
    colours = [plots.colour(g) for g in guides]
    judged = verdicts(trees, whole)
    return {
        "verdicts": [(g, plots.colour(g), v, v == AT_FLOOR) for g, v in judged.items()],
        "pictures": _pictures(trees, str(draws.attrs.get("image_shape", ""))),
        "film": _film(trees),
        "sizes": {**trees[EXACT]["posterior"].sizes},
        "guides": list(zip(guides, colours, strict=True)),
        "metrics": [
            (METRICS[str(m)], [row[k] for row in rows])
            for k, m in enumerate(comparison.metric.values)
        ],
        "reasons": sorted({c["reason"] for row in rows for c in row} - {""}),
    }


def _pictures(trees: Mapping[str, DataTree], image_shape: str) -> dict[str, Figure | None]:
    """Figures by name; of circuits what they do, of correlated draws their chains, too."""
    found: dict[str, Figure | None] = {
        "marginals": plots.marginals(trees),
        "forest": plots.forest(trees),
    }
    if len(labels(trees[EXACT])) > 1:
        found["correlations"] = plots.correlations(trees)
    if shape := tuple(int(n) for n in image_shape.split(",") if n):
        found["reconstructions"] = plots.reconstructions(trees, shape)
    if shape and "dreams" in trees[EXACT].children:
        observed = next(iter(trees[EXACT]["observed_data"].dataset.data_vars.values())).values
        dreams = trees[EXACT]["dreams"].dataset["mean"].values
        rows = {"observation": observed, "the model's own": dreams}
        found["samples"] = plot_recognition.samples(rows, shape)
    found |= _refined(trees)
    found |= _priced(trees)
    for name, tree in trees.items():
        found |= _circuit(name, tree)
        if not tree.attrs["independent_draws"] and tree["posterior"].sizes["chain"] > 1:
            found[f"ranks of {name}"] = plots.ranks(tree)
            found[f"traces of {name}"] = plots.traces(tree)
    return found


def _circuit(name: str, tree: DataTree) -> dict[str, Figure | None]:
    """What was seen of a circuit; nothing of other guides."""
    found: dict[str, Figure | None] = {}
    ink = plots.colour(name)
    if "oscillation" in tree.children:
        waves = tree["oscillation"].to_dataset()
        found[f"oscillations of {name}"] = plot_signatures.oscillation_against_surprise(waves)
    if "score_field" in tree.children:
        scores = tree["score_field"].to_dataset()
        kind = "scores" if scores.sizes["packed"] > 2 else "field"
        found[f"{kind} of {name}"] = plot_scores.score_field(scores, ink=ink)
    if "trajectory" in tree.children:
        paths = tree["trajectory"].to_dataset()
        found[f"paths of {name}"] = plot_circuits.trajectories(paths, ink=ink)
        found |= {f"rates of {name}": plots.rates(tree)} if "rates" in paths else {}
    return found


def _refined(trees: Mapping[str, DataTree]) -> dict[str, Figure | None]:
    """What was seen of circuits that iterate, beside one another; nothing of other guides."""
    seen = {n: t["refinement"].to_dataset() for n, t in trees.items() if "refinement" in t.children}
    if not seen:
        return {}
    inks = {name: plots.colour(name) for name in seen}
    found: dict[str, Figure | None] = {
        f"raster of {name}": plot_refinement.raster(one)
        for name, one in seen.items()
        if one.sizes["step"] > 1
    }
    found["free energy"] = plot_refinement.free_energy(seen, inks=inks)
    shown = {name: one for name, one in seen.items() if np.isfinite(one["r2"]).any()}
    if shown:  # an x of one pixel has no contrast
        found["rate distortion"] = plot_refinement.rate_distortion(shown, inks=inks)
    linear = [one for one in seen.values() if "dictionary" in one]
    if linear:  # all guides are of one model
        found["dictionary"] = plot_refinement.dictionary(linear[0])
    return found


def _priced(trees: Mapping[str, DataTree]) -> dict[str, Figure | None]:
    """Of circuits that pay for reliability their account, and where they vary."""
    seen = {n: t for n, t in trees.items() if "reliability" in t.children}
    if not seen:
        return {}
    inks = {name: plots.colour(name) for name in seen}
    accounts = {name: tree["reliability"].to_dataset() for name, tree in seen.items()}
    found: dict[str, Figure | None] = {"account": plot_reliability.account(accounts, inks=inks)}
    problems, draws, latents = packed(trees[EXACT]).shape
    if problems * latents < MIN_POINTS or draws < 2 * MIN_COUNTS:
        return found
    kinds = ["marginal"] + ["conditional"] * (1 < latents < draws / 10)
    for name, tree in seen.items():
        panels = {
            kind: variability_against_uncertainty(tree, trees[EXACT], kind=kind, seed=0)
            for kind in kinds
        }
        found[f"noise of {name}"] = plot_reliability.variability(panels, ink=inks[name])
    return found


def _film(trees: Mapping[str, DataTree]) -> str:
    """A film of the first problem of a model of videos; nothing of others."""
    if not all(GROUP in tree.children for tree in trees.values()):
        return ""
    return base64.b64encode(film(trees)).decode()


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
