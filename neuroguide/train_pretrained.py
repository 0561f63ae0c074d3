"""The command `train-pretrained`: makes the circuits that come trained, and their cards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import inference
import zoo
from inference import Fit, Guide
from inference import checkpoint as files
from inference.files import write_bytes
from inference.observation import parts, take
from inference.progress import bar
from zoo.pretrained import Pretrained, digest, state_hash

from .headlines import Numbers
from .recipes import RECIPES, Recipe

__all__ = ["command", "measure", "train_pretrained"]

SEED = 0  # of training; cards are measured with the next
JOINT, OWN = "draws from the model", "the model's own observations"
KEPT = 100  # observations that stay with a learned model


def measure(
    entry: Pretrained, guide: Guide, seed: int, names: Sequence[str] | None = None
) -> Numbers:
    """The headline numbers of a guide's card, or some of them, with another seed."""
    recipe = RECIPES[entry.name]
    return recipe.measure(guide, recipe, seed, names)


def command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of zoo.PRETRAINED.", show_default="all")
    ] = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Folder.", show_default="inside the package")
    ] = None,
) -> None:
    """Train and measure the circuits that come trained; what is done and fits the code stays.

    A stopped training goes on where it stopped. All take half an hour on a core.

    Example: neuroguide train-pretrained poisson_encoder --out runs/pretrained
    """
    for path in train_pretrained(names or [], out_path):
        Console().print(f"checkpoint {path}")


def train_pretrained(names: Sequence[str], folder: Path | None = None) -> list[Path]:
    """Train, measure and write checkpoints and cards; those that are as they should be stay.

    Args:
        names: keys of `zoo.PRETRAINED`; none for all of them.
        folder: where they go; by default into the package. A stopped training is kept there, and
            goes on.

    Returns:
        The checkpoints, in order.

    Raises:
        UnknownName: there is no recipe of that name.
        OutputError: they cannot be written.
    """
    entries = [zoo.PRETRAINED[n] for n in names or zoo.PRETRAINED]
    if folder is not None:
        entries = [replace(e, folder=folder) for e in entries]
    with bar("training", len(entries)) as advance:
        for entry in entries:
            if not _done(entry):
                _make(entry, RECIPES[entry.name])
            advance(entry.name)
    return [e.path for e in entries]


def _done(entry: Pretrained) -> bool:
    """Files of the present code and the present recipe."""
    try:
        entry.load()
    except inference.BadCheckpoint:
        return False
    same: bool = entry.card["settings"] == RECIPES[entry.name].settings
    return same


def _make(entry: Pretrained, recipe: Recipe) -> None:
    built, data = zoo.MODELS[entry.model], recipe.data() if recipe.data else None
    model = built(**recipe.model_knobs)
    if data is not None:
        model = built.for_data(data.train, **_open(recipe))
        model.keep(data.validation[:KEPT].clone())
        model.image_shape = data.image_shape
    guide = inference.GUIDES[entry.guide](model, **recipe.guide_knobs)
    if recipe.knows:
        model.keep(take(model.observations(), slice(0, recipe.knows)))
    x = data.train if data else model.observations() if recipe.knows else None
    unfinished = entry.folder / f".{entry.name}-{_short(recipe)}.unfinished"
    run = inference.fit(
        model, guide, x, objective=recipe.objective() if recipe.objective else None,
        steps=recipe.steps, lr=recipe.lr, batch_size=recipe.batch_size, seed=SEED, device="cpu",
        learn_model=data is not None, checkpoint=unfinished, title=entry.name.replace("_", " "),
    )  # fmt: skip
    run.save(entry.path)
    if data is not None:
        tensors, header = files.read(entry.path)
        kept = parts(model.observations())[0]
        files.write(entry.path, {**tensors, "observations": kept}, header)
    _write_card(entry, recipe, run)
    unfinished.unlink(missing_ok=True)


def _open(recipe: Recipe) -> dict[str, Any]:
    """Knobs of `for_data`, which takes the number of features from the data."""
    return {k: v for k, v in recipe.model_knobs.items() if k != "features"}


def _short(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe.settings).encode()).hexdigest()[:8]


def _write_card(entry: Pretrained, recipe: Recipe, run: Fit) -> None:
    model, settings = run.guide.model, recipe.settings
    assert isinstance(model, zoo.Model)
    said = {
        "title": entry.about,
        "paper": recipe.paper,
        "model": entry.model,
        "guide": entry.guide,
        "data": entry.data or (OWN if recipe.knows else JOINT),
        "objective": run.settings["objective"],
        "steps": recipe.steps,
        "seed": SEED,
        "command": f"neuroguide train-pretrained {entry.name}",
        "licence": recipe.licence,
        "versions": files.versions(),
        "train_seconds": round(run.seconds, 1),
        "settings": settings,
        "model_knobs": settings["model_knobs"],
        "guide_knobs": settings["guide_knobs"],
        "image_shape": list(model.image_shape or ()),
        "knows": recipe.knows,
        "model_hash": state_hash(model),
        "sha256": digest(entry.path),
        "measured": {"seed": SEED + 1, "problems": recipe.problems, "draws": recipe.draws},
        "metrics": measure(entry, run.guide, SEED + 1),
    }
    write_bytes(entry.path.with_suffix(".json"), (json.dumps(said, indent=1) + "\n").encode())
